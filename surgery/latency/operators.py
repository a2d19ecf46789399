"""Where a model's time goes: milliseconds by operator, from ONNX Runtime's own profiler.

The profiler costs time itself, so that these figures tell shares, and the timer's tell times.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from surgery.errors import InvalidInput
from surgery.latency.session import RUNTIME_ERRORS, Settings, model_file, random_inputs, run_once, session_options

WARM_RUNS, RUNS = 3, 20


def by_operator(path: str | Path, settings: Settings, *, runs: int = RUNS) -> Mapping[str, float]:
    """Return operator type → median milliseconds of a run, the costliest first.

    Operators are those that are run: after ONNX Runtime has fused and rearranged what it can.

    Args:
        path: ONNX file.
        settings: how it is run.
        runs: that are profiled.

    Raises:
        InvalidInput: the file cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        options = session_options(settings.threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = onnxruntime.InferenceSession(str(model_file(path)), options, providers=[settings.provider])
        except RUNTIME_ERRORS as error:
            raise InvalidInput(f"ONNX Runtime cannot load {path}: {error}") from error
        inputs = random_inputs(session, Path(path), settings)
        for _ in range(WARM_RUNS + runs):
            run_once(session, inputs, Path(path))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    each: list[dict[str, float]] = []
    current: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["args"]["op_name"]
            current[name] = current.get(name, 0.0) + event["dur"] / 1e3
        elif event.get("cat") == "Session" and event.get("name") == "model_run":
            each.append(current)
            current = {}
    counted = each[WARM_RUNS:]
    names = {name for run in counted for name in run}
    found = {name: float(np.median([run.get(name, 0.0) for run in counted])) for name in names}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
