"""The latency of one model relative to another's, measured in fresh processes.

Times depend on the memory layout of the process, so that they vary more between processes than between blocks of one. A
budget is therefore judged by the median over several processes. ``python -m surgery.latency.ratio REQUEST`` answers one
request with one line of JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from surgery.errors import InvalidInput
from surgery.latency import ort
from surgery.latency.blocks import Limits
from surgery.latency.child import ask
from surgery.latency.fill import Progress
from surgery.latency.session import Settings

PROCESSES = 3
SECONDS = 4.0
TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio measured in several processes.

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
        """Return the combined result; milliseconds are the mean of both."""
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
        # -P keeps the working folder off the child's path, since it may contain folders with our packages' names.
        arguments = ["-P", "-m", "surgery.latency.ratio", json.dumps(request)]
        answers.append(ask(arguments, f"latency of {compact}", timeout_s=TIMEOUT_S))
    keys = ("ratio", "dense_ms", "compact_ms")
    ratios, dense_ms, compact_ms = (tuple(float(answer[key]) for answer in answers) for key in keys)
    return Ratio(median(ratios), ratios, median(dense_ms), median(compact_ms))


def main(request: str) -> int:
    """Serve one request, as JSON on standard output; returns the exit code."""
    fields = json.loads(request)
    files = {name: fields.pop(name) for name in ("dense", "compact")}
    limits = Limits(max_seconds=fields.pop("max_seconds"), width=0.02)
    try:
        timing = ort.time(files, Settings.from_json(fields), limits, baseline="dense", aa=False, fresh=False)
    except InvalidInput as error:
        print(json.dumps({"error": str(error)}))
        return 2
    row = timing.row("compact")
    print(json.dumps({"ratio": row.ratio.value, "dense_ms": timing.row("dense").p50_ms, "compact_ms": row.p50_ms}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
