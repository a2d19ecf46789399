"""Milliseconds by operator, from ONNX Runtime's profiler.

Profiling adds overhead, so these figures are suitable for shares only; latencies are measured by the timer.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from surgery.latency.probe import profiled
from surgery.latency.session import Settings, model_file, open_session, random_inputs, run_once

WARM_RUNS, RUNS = 3, 20


def by_operator(path: str | Path, settings: Settings, *, runs: int = RUNS) -> Mapping[str, float]:
    """Return operator type → median milliseconds per run, in descending order.

    Operators are those executed, after ONNX Runtime's fusions and other optimisations.

    Args:
        path: ONNX file.
        settings: session settings.
        runs: number of profiled runs.

    Raises:
        InvalidInput: the file cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        session = open_session(model_file(path), settings, profile=str(Path(folder) / "profile"))
        inputs = random_inputs(session, Path(path), settings)
        for _ in range(WARM_RUNS + runs):
            run_once(session, inputs, Path(path))
        each = []
        for run in profiled(session)[WARM_RUNS:]:
            each.append(Counter[str]())
            for operator, _, microseconds in run:
                each[-1][operator] += microseconds
    names = {name for run in each for name in run}
    found = {name: float(np.median([run[name] / 1e3 for run in each])) for name in names}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
