"""Rounds of blocks: one session alive at a time, in shuffled order, until every ratio's interval is narrow.

A block creates a session, warms it up, times some runs and destroys it. A round is one block of each competitor. Rounds
that other processes disturbed are told by `Watch` and do not count, as long as enough others do.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.errors import InvalidInput
from surgery.latency.machine import Watch
from surgery.latency.session import Settings, open_session, random_inputs, run_once
from surgery.latency.stats import UNITY, Interval, paired_ratio

AA_TOLERANCE = 0.02
MIN_ROUNDS = 12  # fewer say too little about their own spread for a bootstrap
WARM_RUNS = 2
WARM_MS = 20.0
MIN_BLOCK_RUNS = 3

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop, and how long a block is; see `ort.time`. Raises InvalidInput for values out of range."""

    min_runs: int
    max_runs: int
    max_seconds: float
    block_ms: float
    width: float

    def __post_init__(self) -> None:
        if not isinstance(self.max_runs, int) or self.max_runs < MIN_BLOCK_RUNS:
            raise InvalidInput(f"max_runs={self.max_runs!r}: give a whole number of {MIN_BLOCK_RUNS} or more")
        if not isinstance(self.min_runs, int) or not 0 <= self.min_runs <= self.max_runs:
            raise InvalidInput(f"min_runs={self.min_runs!r}: give a whole number from 0 to max_runs={self.max_runs}")
        for name in ("max_seconds", "block_ms", "width"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name}={getattr(self, name)!r}: give a number above 0")

    def block_runs(self, run_ms: float) -> int:
        """Return the runs of one block: `block_ms` long, yet leaving room for 100 blocks under `max_runs`."""
        most = max(MIN_BLOCK_RUNS, self.max_runs // 100)
        return min(most, max(MIN_BLOCK_RUNS, math.ceil(self.block_ms / run_ms)))


@dataclass(slots=True)
class Entry:
    """One competitor: a file, its inputs, and its blocks of run times in milliseconds so far."""

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


def block_order(entries: int, seed: int) -> Iterator[list[int]]:
    """Yield the order in which the entries are timed, round after round without end: the same for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield [int(i) for i in rng.permutation(entries)]


@dataclass(frozen=True, slots=True)
class Race:
    """Everything the rounds need; `control` is the baseline's file under sessions of its own."""

    entries: Mapping[str, Entry]
    control: Entry | None
    base: Entry
    settings: Settings
    limits: Limits
    report: Progress
    watch: Watch

    @property
    def all(self) -> list[Entry]:
        """Every competitor, the control last."""
        return [*self.entries.values(), *([self.control] if self.control else [])]

    @property
    def used(self) -> list[int]:
        """Rounds that count: the undisturbed ones, or all where those are too few."""
        undisturbed = self.watch.undisturbed
        return undisturbed if len(undisturbed) >= MIN_ROUNDS else list(range(len(self.base.blocks)))

    def ratio(self, entry: Entry) -> Interval:
        """Return the entry's latency relative to the baseline's."""
        if entry is self.base:
            return UNITY
        used = self.used
        return paired_ratio(entry.medians_ms(used), self.base.medians_ms(used), seed=self.settings.seed)


def race_to_end(race: Race) -> str:
    """Make rounds until a rule says stop; returns the rule in words."""
    start = perf_counter()
    orders = block_order(len(race.all), race.settings.seed)
    for done in count(1):
        for position in next(orders):
            entry = race.all[position]
            entry.blocks.append(_block(entry, race.settings))
        race.watch.round_done()
        elapsed_s = perf_counter() - start
        race.report("timing", _fraction(race, done, elapsed_s))
        stop = _stop(race, done, elapsed_s)
        if stop:
            break
    race.watch.judge()
    race.report("timing", 1.0)
    return stop


def _stop(race: Race, done: int, elapsed_s: float) -> str:
    limits = race.limits
    # The bootstrap costs more as rounds add up, and the answer changes less: ask at growing distances.
    due = done >= MIN_ROUNDS and done % (1 + done // 24) == 0
    if due and min(entry.runs for entry in race.all) >= limits.min_runs and _narrow(race):
        return f"every interval under {limits.width:.1%}"
    if any(entry.runs + entry.block_runs > limits.max_runs for entry in race.all):
        return f"{limits.max_runs} runs of a model"
    late = elapsed_s > limits.max_seconds and done >= MIN_ROUNDS
    if late or (elapsed_s > 4 * limits.max_seconds and done >= 3):
        return f"{limits.max_seconds:g} s of measuring"
    return ""


def _narrow(race: Race) -> bool:
    ratios = [race.ratio(entry) for entry in race.all if entry is not race.base]
    if race.control and abs(ratios[-1].value - 1.0) > AA_TOLERANCE:
        return False  # narrow and wrong: more rounds may still average a disturbance out
    return all(ratio.width <= race.limits.width for ratio in ratios)


def _fraction(race: Race, done: int, elapsed_s: float) -> float:
    runs = max(entry.runs for entry in race.all) / race.limits.max_runs
    clock = min(elapsed_s / race.limits.max_seconds, done / MIN_ROUNDS)
    return min(0.99, max(runs, clock))


def _block(entry: Entry, settings: Settings) -> NDArray[np.float64]:
    """Return the run times of one block in milliseconds, (block_runs,), in a session that lives only here."""
    session = open_session(entry.path, settings)
    run, inputs = session.run, entry.inputs
    nanoseconds = np.empty(entry.block_runs)
    with _no_garbage_collection():
        _warm_up(lambda: run(None, inputs))
        for i in range(entry.block_runs):
            start = perf_counter_ns()
            run(None, inputs)
            nanoseconds[i] = perf_counter_ns() - start
    return nanoseconds / 1e6


def _warm_up(run: Callable[[], object]) -> None:
    """Run a few times, untimed: memory arena, weights and clock frequency settle."""
    start = perf_counter()
    for _ in range(WARM_RUNS):
        run()
    while (perf_counter() - start) * 1e3 < WARM_MS:
        run()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def enter(files: Mapping[str, Path], settings: Settings, limits: Limits) -> dict[str, Entry]:
    """Make inputs for each model and find how many of its runs fill a block, one session at a time."""
    entries = {name: _pilot(path, settings, limits) for name, path in files.items()}
    known = {name for entry in entries.values() for name in entry.inputs}
    unknown = sorted(settings.shapes.keys() - known)
    if unknown:
        raise InvalidInput(f"input_shapes names {', '.join(unknown)}, but the inputs are {', '.join(sorted(known))}")
    return entries


def _pilot(path: Path, settings: Settings, limits: Limits) -> Entry:
    session = open_session(path, settings)
    inputs = random_inputs(session, path, settings)
    run_once(session, inputs, path)
    trial = Entry(path, inputs, MIN_BLOCK_RUNS)
    del session
    trial.block_runs = limits.block_runs(float(np.median(_block(trial, settings))))
    return trial
