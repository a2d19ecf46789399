"""Latency in ONNX Runtime, measured as in serving: warm, with one model at a time.

Models are timed in rounds of blocks, in shuffled order. Only one session exists at a time: it is created, warmed up,
timed and destroyed, so that no idle thread pool spins next to another model and no model runs on caches left by another
(strict A B A B alternation has both problems). Each round gives one ratio of block medians per model, and rounds
continue until every ratio's 95 % interval is narrow. The baseline's file is timed a second time as the A/A row; if its
ratio differs from 1, the figures are marked as unreliable. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import InvalidInput
from surgery.latency.blocks import AA_TOLERANCE, MIN_ROUNDS, Limits, Measurement, TimedModel, open_models
from surgery.latency.fill import Progress
from surgery.latency.machine import describe
from surgery.latency.session import Settings, file_bytes, model_file
from surgery.latency.stats import Interval
from surgery.latency.worker import FirstRuns, fresh_process

P99_RUNS = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One model's figures.

    Attributes:
        name: as given to `time`.
        p50_ms: median latency of one run, over all timed runs; `p90_ms` likewise.
        p99_ms: None under 1000 runs.
        quantiles_ms: of single runs, from the shortest to the longest in steps of five hundredths.
        throughput_per_s: batch items per second, from the mean latency.
        runs: timed runs, without warm-up.
        ratio: latency relative to the baseline's, below 1 is faster.
        speedup: 1 / ratio.
        load_ms: time to create the session in a fresh process; None if not requested.
        peak_memory_bytes: peak resident set of that process, including interpreter and runtime.
        floor_memory_bytes: resident set before the model was loaded.
        file_bytes: size on disk, including external weights.
    """

    name: str
    p50_ms: float
    p90_ms: float
    p99_ms: float | None
    quantiles_ms: tuple[float, ...]
    throughput_per_s: float
    runs: int
    ratio: Interval
    speedup: Interval
    load_ms: float | None
    peak_memory_bytes: int | None
    floor_memory_bytes: int | None
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Result of `time`.

    Attributes:
        rows: one per model, in the order given.
        baseline: name of the model the ratios refer to.
        aa: the baseline against its own copy in separate sessions; None if not requested.
        reliable: whether `aa` lies within 1.00 ± 0.02, on enough rounds.
        why: the reason for `reliable`, in words.
        rounds: number of rounds used, each with one block of every model. Rounds in which other processes used more
            than a tenth of the machine are excluded, if twelve others remain.
        stopped: the rule that ended the measurement.
        environment: runtime, processor, session options; `other_processes`, the share of the machine used by other
        processes in these rounds; `disturbed_rounds`, the number of disturbed rounds.
        settings: batch, seed and limits as given.
    """

    rows: tuple[Row, ...]
    baseline: str
    aa: Interval | None
    reliable: bool
    why: str
    rounds: int
    stopped: str
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]

    def row(self, name: str) -> Row:
        """Return the row called `name`; raises InvalidInput if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise InvalidInput(f"no model '{name}' was timed; there are {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def time(
    models: Mapping[str, str | Path],
    settings: Settings | None = None,
    limits: Limits | None = None,
    *,
    baseline: str | None = None,
    aa: bool = True,
    fresh: bool = True,
    progress: Progress | None = None,
) -> Timing:
    """Time ONNX models against each other.

    Args:
        models: name → ONNX file.
        settings: batch, threads, provider, seed and input shapes; by default batch 1 on one thread of the CPU.
        limits: limits on runs, seconds and interval widths.
        baseline: the model ratios refer to; the first by default.
        aa: also time a copy of the baseline, as a test of the timer.
        fresh: measure load time and peak memory, in one child process per model.
        progress: called with the current stage and the completed fraction (0 to 1). It must not leave work running in
            other threads, which would disturb the measurement.

    Raises:
        InvalidInput: a file cannot be read, loaded or run, or there is no such baseline.
        TimerFailed: a child process died.
    """
    settings, limits, report = settings or Settings(), limits or Limits(), progress or (lambda stage, fraction: None)
    files = {name: model_file(path) for name, path in models.items()}
    base = _baseline(files, baseline)
    timed = open_models(files, settings, limits)
    firsts = _fresh(files, settings, report) if fresh else {}
    control = TimedModel(files[base], timed[base].inputs, timed[base].block_runs) if aa else None
    environment = describe(settings.threads, settings.provider)
    measurement = Measurement(timed, timed[base], control, settings, limits)
    stopped = measurement.run(report)
    ratio = measurement.ratio(control) if control else None
    reliable, why = _verdict(ratio, measurement)
    return Timing(
        rows=tuple(_row(name, measurement, firsts.get(name)) for name in timed),
        baseline=base,
        aa=ratio,
        reliable=reliable,
        why=why,
        rounds=len(measurement.used),
        stopped=stopped,
        environment={**environment, **_other_processes(measurement)},
        settings={**asdict(settings), **asdict(limits)},
    )


def _baseline(files: Mapping[str, Path], baseline: str | None) -> str:
    if not files:
        raise InvalidInput("no models to time: give at least one name and ONNX file")
    if baseline is None:
        return next(iter(files))
    if baseline not in files:
        raise InvalidInput(f"baseline '{baseline}' is none of the models: {', '.join(files)}")
    return baseline


def _fresh(files: Mapping[str, Path], settings: Settings, report: Progress) -> dict[str, FirstRuns]:
    firsts: dict[str, FirstRuns] = {}
    for name, path in files.items():
        report(f"loading {name}", 0.0)
        firsts[name] = fresh_process(path, settings)
    return firsts


def _row(name: str, m: Measurement, first: FirstRuns | None) -> Row:
    model = m.models[name]
    runs_ms = np.concatenate([model.blocks[i] for i in m.used])
    ratio = m.ratio(model)
    p50, p90, p99 = (float(p) for p in np.percentile(runs_ms, [50, 90, 99]))
    return Row(
        name=name,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99 if runs_ms.size >= P99_RUNS else None,
        quantiles_ms=tuple(float(q) for q in np.percentile(runs_ms, np.arange(0, 101, 5))),
        throughput_per_s=m.settings.batch * 1e3 / float(runs_ms.mean()),
        runs=int(runs_ms.size),
        ratio=ratio,
        speedup=ratio.inverse(),
        load_ms=first.load_ms if first else None,
        peak_memory_bytes=first.peak_memory_bytes if first else None,
        floor_memory_bytes=first.floor_memory_bytes if first else None,
        file_bytes=file_bytes(model.path),
    )


def _other_processes(m: Measurement) -> dict[str, Any]:
    """Return the share of the machine used by other processes, and the number of disturbed rounds."""
    shares = [m.watch.shares[i] for i in m.used if i < len(m.watch.shares)]
    return {
        "other_processes": round(float(np.mean(shares)), 3) if shares else None,
        "disturbed_rounds": len(m.base.blocks) - len(m.watch.undisturbed),
    }


def _verdict(aa: Interval | None, m: Measurement) -> tuple[bool, str]:
    if aa is None:
        return False, "the timer was not tested against a copy of the baseline (aa=False)"
    found = f"the baseline against its own copy came out at {aa.value:.3f} [{aa.low:.3f}, {aa.high:.3f}]"
    share, rounds = _other_processes(m)["other_processes"] or 0.0, len(m.used)
    others = f"; other processes used {share:.0%} of the machine" if share > 0.02 else ""
    if rounds < MIN_ROUNDS:
        return False, f"only {rounds} rounds were made, {MIN_ROUNDS} are needed: allow more runs or more time{others}"
    if abs(aa.value - 1.0) > AA_TOLERANCE:
        return False, f"{found}, outside 1.00 ± {AA_TOLERANCE}{others}"
    if max(aa.high - 1.0, 1.0 - aa.low) > 2 * AA_TOLERANCE:
        return False, f"{found}, an interval too wide to judge by{others}: allow more runs or more time"
    return True, f"{found}{others}"
