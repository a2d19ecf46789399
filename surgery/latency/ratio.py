"""The latency of one model relative to another's, each time from a fresh process.

A process has its own memory layout and its own luck with it, so that two processes agree less well than two blocks of
one: the median over several processes is what a budget is judged by. ``python -m surgery.latency.ratio REQUEST``
answers one request with one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from surgery.errors import InvalidInput
from surgery.latency import ort
from surgery.latency.blocks import Progress
from surgery.latency.session import Settings
from surgery.latency.worker import TimerFailed, answer_of, environment

PROCESSES = 3
SECONDS = 4.0
TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Ratio:
    """What several processes found.

    Attributes:
        value: median of the ratios.
        ratios: one per process.
        dense_ms: median of the baseline's median latencies.
        compact_ms: median of the model's.
    """

    value: float
    ratios: tuple[float, ...]
    dense_ms: float
    compact_ms: float

    def __add__(self, other: Ratio) -> Ratio:
        """Return what both found together; milliseconds are the mean of both."""
        ratios = (*self.ratios, *other.ratios)
        own, all_ = len(self.ratios), len(ratios)

        def mean(a: float, b: float) -> float:
            return (a * own + b * (all_ - own)) / all_

        return Ratio(
            median(ratios), ratios, mean(self.dense_ms, other.dense_ms), mean(self.compact_ms, other.compact_ms)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "ratios": list(self.ratios)}


def measure(
    dense: Path,
    compact: Path,
    settings: Settings,
    *,
    processes: int = PROCESSES,
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> Ratio:
    """Return the latency of `compact` relative to `dense`, the median over fresh processes.

    Raises:
        InvalidInput: a model cannot be loaded or run.
        TimerFailed: a process died.
    """
    answers = []
    for k in range(processes):
        if progress is not None:
            progress("time compact against dense", k / processes)
        request = {
            **{"dense": str(dense.resolve()), "compact": str(compact.resolve())},
            **{"max_seconds": seconds, **asdict(settings), "seed": settings.seed + k},
        }
        answers.append(_ask(request))
    keys = ("ratio", "dense_ms", "compact_ms")
    ratios, dense_ms, compact_ms = (tuple(float(answer[key]) for answer in answers) for key in keys)
    return Ratio(median(ratios), ratios, median(dense_ms), median(compact_ms))


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    # -P keeps the working folder off the child's path: users have `benchmarks` folders of their own.
    command = [sys.executable, "-P", "-m", "surgery.latency.ratio", json.dumps(request)]
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimerFailed(f"the process timing {request['compact']} gave no answer in {TIMEOUT_S:.0f} s") from error
    answer = answer_of(done.stdout)
    if "error" in answer:
        raise InvalidInput(str(answer["error"]))
    if done.returncode != 0 or "ratio" not in answer:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise TimerFailed(f"the process timing {request['compact']} ended with code {done.returncode} ({last})")
    return answer


def main(request: str) -> int:
    """Serve one request, as JSON on standard output; returns the exit code."""
    fields = json.loads(request)
    files = {name: Path(fields.pop(name)) for name in ("dense", "compact")}
    shapes = {name: tuple(shape) for name, shape in fields.pop("shapes").items()}
    try:
        timing = ort.time(files, baseline="dense", input_shapes=shapes, aa=False, fresh=False, width=0.02, **fields)
    except InvalidInput as error:
        print(json.dumps({"error": str(error)}))
        return 2
    row = timing.row("compact")
    print(json.dumps({"ratio": row.ratio.value, "dense_ms": timing.row("dense").p50_ms, "compact_ms": row.p50_ms}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
