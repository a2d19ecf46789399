"""Rounds of timed blocks: one session at a time, in shuffled order, until every ratio's interval is narrow.

A block creates a session, warms it up, times some runs and destroys it. A round is one block of each model. Rounds
disturbed by other processes are detected by `Watch` and excluded, if enough others remain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import InvalidInput
from surgery.latency.fill import Progress
from surgery.latency.machine import Watch
from surgery.latency.probe import BLOCK_MS, MIN_BLOCK_RUNS, block_ms
from surgery.latency.session import Settings, open_session, random_inputs, run_once
from surgery.latency.stats import UNITY, Interval, paired_ratio

AA_TOLERANCE = 0.02
MIN_ROUNDS = 12  # too few rounds for a bootstrap otherwise


@dataclass(frozen=True, slots=True)
class Limits:
    """Stopping rule of a measurement, and length of a block.

    Rounds end when every ratio's 95 % interval is narrower than `width` and the A/A ratio is within 1.00 ± 0.02, or at
    `max_runs` of any model, or after `max_seconds`. At least twelve rounds are run, even if they take up to four times
    as long, since fewer give no reliable interval.

    Attributes:
        min_runs: timed runs of every model before an early end; 1000 or more for a p99.
        max_runs: limit on timed runs per model.
        max_seconds: limit on the total time of rounds.
        block_ms: length of a block without warm-up, at least three runs.
        width: sufficient full width of the interval, relative to the ratio.

    Raises:
        InvalidInput: a value is out of range.
    """

    min_runs: int = 0
    max_runs: int = 2000
    max_seconds: float = 45.0
    block_ms: float = BLOCK_MS
    width: float = 0.03

    def __post_init__(self) -> None:
        if not isinstance(self.max_runs, int) or self.max_runs < MIN_BLOCK_RUNS:
            raise InvalidInput(f"max_runs={self.max_runs!r}: give a whole number of {MIN_BLOCK_RUNS} or more")
        if not isinstance(self.min_runs, int) or not 0 <= self.min_runs <= self.max_runs:
            raise InvalidInput(f"min_runs={self.min_runs!r}: give a whole number from 0 to max_runs={self.max_runs}")
        for name in ("max_seconds", "block_ms", "width"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name}={getattr(self, name)!r}: give a number above 0")

    def block_runs(self, run_ms: float) -> int:
        """Return the runs of one block: `block_ms` long, but allowing 100 blocks within `max_runs`."""
        most = max(MIN_BLOCK_RUNS, self.max_runs // 100)
        return min(most, max(MIN_BLOCK_RUNS, math.ceil(self.block_ms / run_ms)))


@dataclass(slots=True)
class TimedModel:
    """A file, its inputs, and its blocks of run times in milliseconds so far."""

    path: Path
    inputs: dict[str, NDArray[Any]]
    block_runs: int
    blocks: list[NDArray[np.float64]] = field(default_factory=list)

    def medians_ms(self, rounds: Sequence[int]) -> list[float]:
        """Return the median run time of each of these rounds' blocks."""
        return [float(np.median(self.blocks[i])) for i in rounds]

    @property
    def runs(self) -> int:
        """Timed runs so far."""
        return len(self.blocks) * self.block_runs


def block_order(models: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of the models for each round, indefinitely; determined by the seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield [int(i) for i in rng.permutation(models)]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Models that are timed against a baseline.

    Attributes:
        models: by name.
        base: the baseline of ratios.
        control: the baseline's file in its own sessions; None without an A/A test.
        settings: session settings.
        limits: limits on rounds.
        watch: detects disturbed rounds.
    """

    models: Mapping[str, TimedModel]
    base: TimedModel
    control: TimedModel | None
    settings: Settings
    limits: Limits
    watch: Watch = field(default_factory=Watch)

    @property
    def all(self) -> list[TimedModel]:
        """Every model, the control last."""
        return [*self.models.values(), *([self.control] if self.control else [])]

    @property
    def used(self) -> list[int]:
        """Rounds to use: the undisturbed ones, or all if those are too few."""
        undisturbed = self.watch.undisturbed
        return undisturbed if len(undisturbed) >= MIN_ROUNDS else list(range(len(self.base.blocks)))

    def ratio(self, model: TimedModel) -> Interval:
        """Return the model's latency relative to the baseline's."""
        if model is self.base:
            return UNITY
        used = self.used
        return paired_ratio(model.medians_ms(used), self.base.medians_ms(used), seed=self.settings.seed)

    def run(self, report: Progress) -> str:
        """Run rounds until a stopping rule applies; returns its description."""
        start = perf_counter()
        orders = block_order(len(self.all), self.settings.seed)
        for done in count(1):
            for position in next(orders):
                model = self.all[position]
                model.blocks.append(_block(model, self.settings))
            self.watch.round_done()
            elapsed_s = perf_counter() - start
            report("timing", _fraction(self, done, elapsed_s))
            stop = _stop(self, done, elapsed_s)
            if stop:
                break
        self.watch.judge()
        report("timing", 1.0)
        return stop


def _stop(m: Measurement, done: int, elapsed_s: float) -> str:
    limits = m.limits
    # The bootstrap becomes slower and its result more stable with more rounds, so check less and less often.
    due = done >= MIN_ROUNDS and done % (1 + done // 24) == 0
    if due and min(model.runs for model in m.all) >= limits.min_runs and _narrow(m):
        return f"every interval under {limits.width:.1%}"
    if any(model.runs + model.block_runs > limits.max_runs for model in m.all):
        return f"{limits.max_runs} runs of a model"
    late = elapsed_s > limits.max_seconds and done >= MIN_ROUNDS
    if late or (elapsed_s > 4 * limits.max_seconds and done >= 3):
        return f"{limits.max_seconds:g} s of measuring"
    return ""


def _narrow(m: Measurement) -> bool:
    ratios = [m.ratio(model) for model in m.all if model is not m.base]
    if m.control and abs(ratios[-1].value - 1.0) > AA_TOLERANCE:
        return False  # narrow but biased: more rounds may average a disturbance out
    return all(ratio.width <= m.limits.width for ratio in ratios)


def _fraction(m: Measurement, done: int, elapsed_s: float) -> float:
    runs = max(model.runs for model in m.all) / m.limits.max_runs
    clock = min(elapsed_s / m.limits.max_seconds, done / MIN_ROUNDS)
    return min(0.99, max(runs, clock))


def _block(model: TimedModel, settings: Settings) -> NDArray[np.float64]:
    """Return the run times of one block in milliseconds, (block_runs,), in a temporary session."""
    times: NDArray[np.float64] = block_ms(open_session(model.path, settings), model.inputs, model.block_runs)
    return times


def open_models(files: Mapping[str, Path], settings: Settings, limits: Limits) -> dict[str, TimedModel]:
    """Create inputs for each model and determine the runs per block, one session at a time."""
    models = {name: _pilot(path, settings, limits) for name, path in files.items()}
    known = {name for model in models.values() for name in model.inputs}
    unknown = sorted(settings.shapes.keys() - known)
    if unknown:
        raise InvalidInput(f"shapes name {', '.join(unknown)}, but the inputs are {', '.join(sorted(known))}")
    return models


def _pilot(path: Path, settings: Settings, limits: Limits) -> TimedModel:
    session = open_session(path, settings)
    inputs = random_inputs(session, path, settings)
    run_once(session, inputs, path)
    run_ms = float(np.median(block_ms(session, inputs, MIN_BLOCK_RUNS)))
    return TimedModel(path, inputs, limits.block_runs(run_ms))
