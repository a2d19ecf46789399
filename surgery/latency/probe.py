"""ONNX Runtime sessions and their timing, here and on devices: Python 3.8, numpy and onnxruntime.

Whole models are timed by wall time, in blocks of runs. Models of one kernel are timed by ONNX Runtime's profiler, which
reports the time of each operator. Between runs of a kernel, a buffer as large as the network is written, so that
weights are read from the same level of the memory hierarchy as in the network.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import time
import zlib
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import onnxruntime

from surgery.latency.micro import CONTEXT, FP32, KERNEL

PROVIDER = "CPUExecutionProvider"
OPTIMISATIONS = "sequential, all optimisations"
BLOCK_MS, MIN_BLOCK_RUNS = 100.0, 3
WARM_MS, WARM_RUNS = 20.0, 2
KERNEL_MS, MIN_KERNEL_RUNS, MAX_KERNEL_RUNS = 12.0, 4, 20

_DTYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bool": "bool",
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}


@dataclass(frozen=True)
class Conditions:
    """Conditions of kernel measurements, for which a latency table is valid.

    Attributes:
        threads: threads of ONNX Runtime.
        flush_mib: cache overwritten by the rest of the network between two runs of a kernel; 0 for a small network.
        precision: `fp32` or `int8`.
    """

    threads: int = 1
    flush_mib: int = 4
    precision: str = FP32


# Sessions. -----------------------------------------------------------------------------------------------------------


def session_options(threads: int, profile: str = "") -> Any:
    """Return session options; `profile` is the path prefix of an operator profile, if any."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return options


def available_cores() -> int:
    """Return the number of logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def random_values(name: str, kind: str, shape: Sequence[int], seed: int = 0) -> Any:
    """Return random values of an input: floats normal, integers 0 or 1, which are always valid as an index.

    Args:
        name: name of the input; equal names get equal values, in any model.
        kind: ONNX Runtime's type, for example ``tensor(float)``.
        shape: shape of the values.
        seed: random seed.

    Raises:
        TypeError: the input is not a numeric tensor.
    """
    dtype = _DTYPES.get(kind[len("tensor(") : -1])
    if dtype is None:
        raise TypeError(f"input '{name}' is a {kind}, and random values can be made for numeric tensors only")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return (rng.standard_normal(shape) if dtype.startswith("float") else rng.integers(0, 2, shape)).astype(dtype)


def block_ms(session: Any, inputs: Mapping[str, Any], runs: int) -> Any:
    """Return the milliseconds of timed runs of a session, (runs,), after warm-up.

    Warm-up lets the memory arena, weights and clock frequency settle. Garbage collection is disabled meanwhile.
    """
    times = np.empty(runs)
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin, warm = time.perf_counter(), 0
        while warm < WARM_RUNS or (time.perf_counter() - begin) * 1e3 < WARM_MS:
            session.run(None, inputs)
            warm += 1
        for k in range(runs):
            start = time.perf_counter_ns()
            session.run(None, inputs)
            times[k] = time.perf_counter_ns() - start
    finally:
        if collecting:
            gc.enable()
    return times / 1e6


def first_line(error: Exception) -> str:
    """Return the first line of ONNX Runtime's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;")


# Kernels. ------------------------------------------------------------------------------------------------------------


class KernelTimer:
    """Times kernels by operator profiles, which are written to `folder` and removed.

    Before each run `flush_mib` are overwritten, since a large network evicts a kernel's weights from the caches.
    """

    def __init__(self, conditions: Conditions, folder: str) -> None:
        self._threads, self._profile = conditions.threads, os.path.join(folder, "profile")
        self._buffer = np.zeros(max(1, conditions.flush_mib << 18), np.float32)

    def kernel_ms(self, model: bytes) -> float:
        """Return the median milliseconds of the kernel in an ONNX model, without its context."""
        options = session_options(self._threads, self._profile)
        session = onnxruntime.InferenceSession(model, options, providers=[PROVIDER])
        inputs = _inputs(session)
        start = time.perf_counter()
        runs = 0
        while runs < 1 + MIN_KERNEL_RUNS or (
            runs < 1 + MAX_KERNEL_RUNS and (time.perf_counter() - start) * 1e3 < KERNEL_MS
        ):
            self._buffer += 1.0
            session.run(None, inputs)
            runs += 1
        return float(np.median(kernel_runs_ms(profiled(session))[1:]))  # the first run warms up

    def try_ms(self, model: bytes) -> Optional[float]:
        """Like `kernel_ms`, but return None if ONNX Runtime cannot run the model."""
        try:
            return self.kernel_ms(model)
        except Exception:  # ONNX Runtime's exceptions have no common base class
            return None

    def wall_ms(self, model: bytes, runs: int = 300) -> float:
        """Return the median milliseconds of a whole run."""
        session = onnxruntime.InferenceSession(model, session_options(self._threads), providers=[PROVIDER])
        return float(np.median(block_ms(session, _inputs(session), runs)))


def _inputs(session: Any) -> Dict[str, Any]:
    return {item.name: random_values(item.name, item.type, item.shape) for item in session.get_inputs()}


Operators = List[Tuple[str, str, int]]
"""Type, event's name and microseconds of each operator of a run, in order."""


def profiled(session: Any) -> List[Operators]:
    """Return the executed operators for each run of a profiled session, and remove the profile."""
    path = session.end_profiling()
    with open(path, encoding="utf-8") as stream:
        events = json.load(stream)
    os.remove(path)
    return operators_by_run(events)


def operators_by_run(events: Sequence[Mapping[str, Any]]) -> List[Operators]:
    """Return the operators of each run in a profile's events."""
    runs: List[Operators] = []
    current: Operators = []
    for event in events:
        if event.get("cat") == "Session" and event.get("name") == "model_run":
            runs.append(current)
            current = []
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            current.append((event["args"]["op_name"], event["name"], event["dur"]))
    return runs


def kernel_runs_ms(runs: Sequence[Operators]) -> List[float]:
    """Return the milliseconds of the kernel's own operators for each run."""
    return [_own(run) / 1e3 for run in runs]


_TO_BLOCKS, _FROM_BLOCKS = ("ReorderInput", "Transpose"), ("ReorderOutput", "Transpose")
"""Layout changes inserted by the runtime: to blocks of channels in float, to channels-last in int8."""


def _own(run: Operators) -> float:
    """Sum the microseconds of one run, without the context and the layout changes at the model's ends."""
    total = 0.0
    for k, (op, name, duration) in enumerate(run):
        after = run[k + 1][1] if k + 1 < len(run) else ""
        before = run[k - 1][1] if k else ""
        put_in = not name.startswith(KERNEL)
        at_start = op in _TO_BLOCKS and after.startswith(CONTEXT) and not after.startswith(CONTEXT + "out")
        at_end = op in _FROM_BLOCKS and before.startswith(CONTEXT + "out")
        if not (name.startswith(CONTEXT) or (put_in and (at_start or at_end))):
            total += duration
    return total


def describe(conditions: Conditions) -> dict[str, Any]:
    """Return what latencies depend on, as JSON values: runtime, build, provider, options, processor, conditions."""
    brand, flags = processor()
    return {
        "onnxruntime": onnxruntime.__version__,
        "build": getattr(onnxruntime, "get_build_info", lambda: "")(),
        "provider": PROVIDER,
        "options": OPTIMISATIONS,
        "architecture": platform.machine(),
        "cpu": brand,
        "flags": flags,
        **asdict(conditions),
    }


def processor() -> tuple[str, list[str]]:
    """Return the processor's name and instruction sets, if the system reports them (Linux)."""
    brand = platform.processor() or "unknown"
    flags: List[str] = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                name, _, value = (part.strip() for part in line.partition(":"))
                if name in ("model name", "Model") and value:
                    brand = value
                if name in ("flags", "Features") and not flags:
                    flags = sorted(value.split())
    except OSError:
        pass
    return brand, flags
