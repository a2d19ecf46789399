"""The measuring environment: runtime, processor, and load by other processes."""

from __future__ import annotations

import platform
from functools import cache
from time import perf_counter
from typing import Any

import cpuinfo
import onnxruntime
import psutil

from surgery.latency import probe
from surgery.latency.probe import PROVIDER, available_cores, session_options

# Instruction sets that select ONNX Runtime kernels, by their names in processors and operating systems.
_X86 = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
_MATRIX = ("amx_int8", "amx_bf16", "i8mm", "bf16", "sve", "sve2", "neon")
_ALIASES = {"avx512vnni": "avx512_vnni", "asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16", "fphp": "fp16"}
_INSTRUCTION_SETS = {**{name: name for name in (*_X86, *_MATRIX)}, **_ALIASES}


def describe(threads: int, provider: str = PROVIDER) -> dict[str, Any]:
    """Return runtime, provider, session options, CPU model, instruction sets and cores, as plain JSON values."""
    brand, flags = _processor()
    options = session_options(threads)
    return {
        "onnxruntime": onnxruntime.__version__,
        "provider": provider,
        "threads": threads,
        "session_options": {
            "intra_op_num_threads": options.intra_op_num_threads,
            "inter_op_num_threads": options.inter_op_num_threads,
            "execution_mode": options.execution_mode.name,
            "graph_optimization_level": options.graph_optimization_level.name,
        },
        "cpu": brand,
        "architecture": platform.machine(),
        "instruction_sets": list(dict.fromkeys(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags)),
        "cores": available_cores(),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": int(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


@cache
def _processor() -> tuple[str, frozenset[str]]:
    """Return the processor's name and instruction sets: from the system, else by py-cpuinfo, which takes a second.

    Linux on ARM reports instruction sets and no name.
    """
    brand, flags = probe.processor()
    if not flags or brand in ("unknown", platform.processor()):
        found = cpuinfo.get_cpu_info()
        brand, flags = found.get("brand_raw") or brand, found.get("flags") or flags
    return brand, frozenset(flags)


def clocks() -> tuple[float, float]:
    """Return wall time and the processor time used so far by all processes but this one, in seconds."""
    times, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    # `guest` time is already contained in `user`.
    busy = sum(times.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    return perf_counter(), busy - own.user - own.system


def share_of_others(before: tuple[float, float]) -> float:
    """Return the share of the machine that other processes have used since `clocks` returned `before`, from 0 to 1.

    The system counts in steps of 10 ms.
    """
    elapsed_s, used_s = (now - then for now, then in zip(clocks(), before, strict=True))
    return min(1.0, max(0.0, used_s / (max(elapsed_s, 1e-9) * (psutil.cpu_count() or 1))))
