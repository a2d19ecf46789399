"""ONNX Runtime sessions and their timing, here and on devices: Python 3.8, numpy and onnxruntime.

Whole models are timed by wall time, in blocks of runs; models of one kernel by ONNX Runtime's profiler.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import onnxruntime

from surgery.core import explained
from surgery.errors import InvalidInput
from surgery.latency.micro import CONTEXT, FP32, KERNEL

PROVIDER = "CPUExecutionProvider"
OPTIMISATIONS = "sequential, all optimisations"
BLOCK_MS, MIN_BLOCK_RUNS = 100.0, 3
WARM_MS, WARM_RUNS = 20.0, 2
KERNEL_MS, MIN_KERNEL_RUNS, MAX_KERNEL_RUNS = 12.0, 4, 20


@dataclass(frozen=True)
class Conditions:
    """Conditions of kernel measurements, for which a latency table is valid."""

    threads: int = 1
    flush_mib: int = 4  # overwritten by the rest of the network between two runs of a kernel; 0 for a small network
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


def require_cores(threads: int, option: str) -> None:
    """Raise InvalidInput for more threads than this process has cores."""
    if threads > available_cores():
        raise InvalidInput(
            f"{option}: this process may use {available_cores()} cores; times of more threads would include waiting "
            "for a core, so ask for fewer"
        )


def open_session(path: str, threads: int, *, provider: str = PROVIDER, profile: str = "") -> Any:
    """Return a session on an ONNX file; `profile` is the path prefix of an operator profile, if any.

    Raises:
        InvalidInput: ONNX Runtime cannot load the file, or the provider cannot start.
    """
    with explained(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}"):
        session = onnxruntime.InferenceSession(str(path), session_options(threads, profile), providers=[provider])
    started = session.get_providers()[0]
    if started != provider:  # ONNX Runtime falls back without an exception
        raise InvalidInput(f"provider '{provider}' did not start: {path} would run by {started} instead")
    return session


def random_inputs(session: Any, path: str, shapes: Mapping[str, Sequence[int]], seed: int = 0) -> Dict[str, Any]:
    """Return random inputs: floats normal, integers 0 or 1, which are always valid as an index.

    Equal names get equal values, in any model. `path` is for messages. Raises InvalidInput if an input has no shape, or
    is not a numeric tensor.
    """
    inputs = {}
    for item in session.get_inputs():
        if item.name not in shapes:
            raise InvalidInput(f"{path}: input '{item.name}' is none of the other model's ({', '.join(shapes)})")
        kind = item.type[len("tensor(") : -1]
        try:
            dtype = np.dtype("float32" if kind == "float" else kind)
        except TypeError as error:
            raise InvalidInput(
                f"{path}: input '{item.name}' is a {item.type}, and random values can be made for numeric tensors only"
            ) from error
        rng, shape = np.random.default_rng([seed, zlib.crc32(item.name.encode())]), tuple(shapes[item.name])
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        inputs[item.name] = values.astype(dtype)
    return inputs


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


# Kernels. ------------------------------------------------------------------------------------------------------------


def kernel_ms(model: bytes, threads: int, flushed: Any) -> float:
    """Return the median milliseconds of the kernel in an ONNX model, without its context, by operator profiles.

    The array `flushed` is overwritten before each run, as a network evicts a kernel's weights from the caches.
    """
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        options = session_options(threads, os.path.join(folder, "profile"))
        session = onnxruntime.InferenceSession(model, options, providers=[PROVIDER])
        inputs = _own_inputs(session)
        end = time.perf_counter() + KERNEL_MS / 1e3
        for run in range(1 + MAX_KERNEL_RUNS):  # the first one warms up
            if run > MIN_KERNEL_RUNS and time.perf_counter() > end:
                break
            flushed += 1.0
            session.run(None, inputs)
        return float(np.median([own_ms(run) for run in profiled(session)[1:]]))


def wall_ms(model: bytes, threads: int, runs: int = 300) -> float:
    """Return the median milliseconds of a whole run of an ONNX model."""
    session = onnxruntime.InferenceSession(model, session_options(threads), providers=[PROVIDER])
    return float(np.median(block_ms(session, _own_inputs(session), runs)))


def _own_inputs(session: Any) -> Dict[str, Any]:
    return random_inputs(session, "", {item.name: item.shape for item in session.get_inputs()})


Operators = List[Tuple[str, str, int]]
"""Type, event's name and microseconds of each operator of a run, in order."""


def profiled(session: Any) -> List[Operators]:
    """Return the executed operators for each run of a profiled session."""
    with open(session.end_profiling(), encoding="utf-8") as stream:
        return operators_by_run(json.load(stream))


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


_TO_BLOCKS, _FROM_BLOCKS = ("ReorderInput", "Transpose"), ("ReorderOutput", "Transpose")
"""Layout changes inserted by the runtime: to blocks of channels in float, to channels-last in int8."""


def own_ms(run: Operators) -> float:
    """Sum one run's milliseconds, without the context and the layout changes at the model's ends."""
    total = 0.0
    for k, (op, name, duration) in enumerate(run):
        after = run[k + 1][1] if k + 1 < len(run) else ""
        before = run[k - 1][1] if k else ""
        put_in = not name.startswith(KERNEL)
        at_start = op in _TO_BLOCKS and after.startswith(CONTEXT) and not after.startswith(CONTEXT + "out")
        at_end = op in _FROM_BLOCKS and before.startswith(CONTEXT + "out")
        if not (name.startswith(CONTEXT) or (put_in and (at_start or at_end))):
            total += duration / 1e3
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
