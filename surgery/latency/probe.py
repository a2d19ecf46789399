"""Times small ONNX models kernel by kernel. Goes to devices as it stands: Python 3.8, numpy and onnxruntime.

ONNX Runtime's profiler tells the time of each operator apart from all else. Between runs a buffer is written that is
as large as the network, so that weights come from where they come from there.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from typing import Any, List, Optional

import numpy as np
import onnxruntime

from surgery.latency.micro import CONTEXT, FP32, KERNEL

PROVIDER = "CPUExecutionProvider"
ENOUGH_MS = 12.0
WARM_RUNS, MIN_RUNS, MAX_RUNS = 1, 4, 20


@dataclass(frozen=True)
class Conditions:
    """What kernels are timed under, and latency tables hold for, on one device.

    Attributes:
        threads: of ONNX Runtime.
        flush_mib: how much of the caches the rest of the network takes between two runs of a kernel; 0 for a small one.
        precision: `fp32` or `int8`.
    """

    threads: int = 1
    flush_mib: int = 4
    precision: str = FP32


def options(threads: int, profile: str = "") -> Any:
    """Return the options of every session: sequential operators, all optimisations."""
    found = onnxruntime.SessionOptions()
    found.intra_op_num_threads = threads
    found.inter_op_num_threads = 1
    found.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    found.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    found.log_severity_level = 3
    if profile:
        found.enable_profiling = True
        found.profile_file_prefix = profile
    return found


class Timer:
    """Times models by their operators; profiles are written into `folder` and removed.

    Before each run as many MiB are written to as the conditions say: a large network pushes a kernel's weights out of
    the caches, a small one leaves them there.
    """

    def __init__(self, conditions: Conditions, folder: str) -> None:
        self._threads, self._profile = conditions.threads, os.path.join(folder, "profile")
        self._buffer = np.zeros(max(1, conditions.flush_mib << 18), np.float32)

    def kernel_ms(self, model: bytes) -> float:
        """Return the median milliseconds that the kernel in an ONNX model takes: its operators, not its context."""
        session = onnxruntime.InferenceSession(model, options(self._threads, self._profile), providers=[PROVIDER])
        inputs = _inputs(session)
        start = time.perf_counter()
        runs = 0
        while runs < WARM_RUNS + MIN_RUNS or (
            runs < WARM_RUNS + MAX_RUNS and (time.perf_counter() - start) * 1e3 < ENOUGH_MS
        ):
            self._buffer += 1.0
            session.run(None, inputs)
            runs += 1
        path = session.end_profiling()
        with open(path, encoding="utf-8") as stream:
            events = json.load(stream)
        os.remove(path)
        return float(np.median(runs_ms(events)[WARM_RUNS:]))

    def try_ms(self, model: bytes) -> Optional[float]:
        """Return the same, or None where ONNX Runtime cannot run the model."""
        try:
            return self.kernel_ms(model)
        except Exception:  # ONNX Runtime's exceptions have no base class of their own
            return None

    def wall_ms(self, model: bytes, runs: int = 400) -> float:
        """Return the median milliseconds of a whole run."""
        session = onnxruntime.InferenceSession(model, options(self._threads), providers=[PROVIDER])
        inputs = _inputs(session)
        times = np.empty(runs)
        for k in range(runs):
            start = time.perf_counter()
            session.run(None, inputs)
            times[k] = time.perf_counter() - start
        return float(np.median(times[runs // 4 :])) * 1e3


def _inputs(session: Any) -> dict[str, Any]:
    rng = np.random.RandomState(0)
    return {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in session.get_inputs()}


def runs_ms(events: list[Any]) -> list[float]:
    """Return for each run the milliseconds of the kernel's own operators."""
    totals: list[float] = []
    current: list[tuple[str, str, int]] = []
    for event in events:
        if event.get("cat") == "Session" and event.get("name") == "model_run":
            totals.append(_own(current) / 1e3)
            current = []
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            current.append((event["args"]["op_name"], event["name"], event["dur"]))
    return totals


_TO_BLOCKS, _FROM_BLOCKS = ("ReorderInput", "Transpose"), ("ReorderOutput", "Transpose")
"""Changes of layout that a runtime puts in: to blocks of channels in float, to channels last in int8."""


def _own(run: list[tuple[str, str, int]]) -> float:
    """Sum the microseconds of one run, without the context and the changes of layout at the model's ends."""
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
    """Return what a latency depends on, as JSON values: runtime, build, provider, options, processor, conditions."""
    brand, flags = processor()
    return {
        "onnxruntime": onnxruntime.__version__,
        "build": getattr(onnxruntime, "get_build_info", lambda: "")(),
        "provider": PROVIDER,
        "options": "sequential, all optimisations",
        "architecture": platform.machine(),
        "cpu": brand,
        "flags": flags,
        **asdict(conditions),
    }


def processor() -> tuple[str, list[str]]:
    """Return the processor's name and its instruction sets, as far as the system tells: Linux does."""
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
