"""The measuring environment: runtime, processor, and load by other processes."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from functools import cache
from time import perf_counter
from typing import Any

import cpuinfo
import onnxruntime
import psutil

from surgery.latency import probe
from surgery.latency.probe import PROVIDER, available_cores, session_options

WINDOW_S = 0.5
TOLERATED_SHARE = 0.1

# Reported name → names used by processors and operating systems; only those that select ONNX Runtime kernels.
_INSTRUCTION_SETS = {
    "avx2": {"avx2"},
    "fma": {"fma"},
    "f16c": {"f16c"},
    "avx_vnni": {"avx_vnni"},
    "avx512f": {"avx512f"},
    "avx512_vnni": {"avx512_vnni", "avx512vnni"},
    "avx512_bf16": {"avx512_bf16"},
    "avx512_fp16": {"avx512_fp16"},
    "amx_int8": {"amx_int8"},
    "amx_bf16": {"amx_bf16"},
    "neon": {"neon", "asimd"},
    "dotprod": {"asimddp"},
    "fp16": {"asimdhp", "fphp"},
    "i8mm": {"i8mm"},
    "bf16": {"bf16"},
    "sve": {"sve"},
    "sve2": {"sve2"},
}


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
        "instruction_sets": [name for name, aliases in _INSTRUCTION_SETS.items() if aliases & flags],
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


@dataclass(slots=True)
class Watch:
    """Detects rounds disturbed by other processes, by their processor time.

    A round is disturbed if they used more than a tenth of the machine. This matters even with idle cores, since cores
    share caches, memory and clock frequency, and on virtual machines often a physical core. The system counts in steps
    of 10 ms, so rounds are evaluated in groups of half a second or more.

    Attributes:
        shares: for each judged round, the share of the machine's capacity that others used, from 0 to 1.
    """

    shares: list[float] = field(default_factory=list)
    _pending: int = 0
    _start: tuple[float, float] = field(default_factory=lambda: _clocks())

    def round_done(self) -> None:
        """Note the end of a round."""
        self._pending += 1
        if perf_counter() - self._start[0] >= WINDOW_S:
            self.judge()

    def judge(self) -> None:
        """Evaluate the pending rounds, however short."""
        now = _clocks()
        capacity_s = max(now[0] - self._start[0], 1e-9) * (psutil.cpu_count() or 1)
        share = min(1.0, max(0.0, (now[1] - self._start[1]) / capacity_s))
        self.shares += [share] * self._pending
        self._pending, self._start = 0, now

    @property
    def undisturbed(self) -> list[int]:
        """Indices of the undisturbed rounds."""
        return [i for i, share in enumerate(self.shares) if share <= TOLERATED_SHARE]


def _clocks() -> tuple[float, float]:
    """Return wall time and the processor time used so far by all processes but this one, in seconds."""
    times, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    # `guest` time is already contained in `user`.
    busy = sum(times.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    return perf_counter(), busy - own.user - own.system
