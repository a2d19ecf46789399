"""The loop closed by measuring: a plan by the table is cut, exported, timed against the dense model, and corrected.

A table knows operators one by one. What a whole network makes of them (caches, the runtime's own fusions) is measured
on the files themselves, in fresh processes, and the plan's aim is moved until the measured ratio is the one asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import torch

from exporters import onnx
from exporters.quantize import FEWEST, Int8, to_int8
from exporters.session import feeds
from exporters.signature import bind
from surgery.config import Budget, Recipe
from surgery.core import Plan, Program
from surgery.coupling import flush_mib
from surgery.errors import BudgetUnreachable, InvalidInput
from surgery.inputs import Calibration
from surgery.latency import FP32, INT8, Conditions, Given, LatencyTable, Measured, ratio as timer
from surgery.planning.latency_planner import Source

ROUNDS = 4
LOWEST, HIGHEST = 0.92, 1.03
"""The measured ratio over the one asked for: between these a plan meets its budget."""
NEAR = 0.02
"""One process's ratio that is this near is worth asking others."""
CLOSE = 0.015
"""Corrections end once the measured ratio is this near, relative to the one asked for."""
HIGHEST_AIM = 0.999
"""Corrections that ask for more ask for this fraction of the dense time."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Round:
    """One plan: what it aimed at by the table, what the table told of it, and what was measured."""

    aim: float
    predicted: float
    measured: float
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Loop:
    """How a plan was found.

    Attributes:
        target: the fraction of the dense latency that was asked for.
        dense_ms: the dense model's measured latency; None where nothing was measured.
        rounds: in order; the plan that was taken is that of round `taken`.
        taken: index of that round; -1 where nothing was measured.
        verdict: whether the budget is met, or why not.
        device: what times were taken on, by the table, and in which precision.
    """

    target: float
    dense_ms: float | None
    predicted_dense_ms: float
    predicted_ms: float
    rounds: tuple[Round, ...] = ()
    taken: int = -1
    verdict: str = ""
    device: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **asdict(self),
            "rounds": [{**asdict(r), "ratios": list(r.ratios)} for r in self.rounds],
            "met": self.met,
        }

    @property
    def predicted(self) -> float:
        """The fraction of the dense latency that the table tells."""
        return self.predicted_ms / self.predicted_dense_ms

    @property
    def dense(self) -> str:
        """What the latency is relative to, for readers."""
        precision = self.device.get("precision", FP32)
        return "the dense" if precision == FP32 else f"the dense {precision}"

    @property
    def met(self) -> bool | None:
        """Whether the measured ratio is within bounds; None where nothing was measured."""
        if self.taken < 0:
            return None
        return LOWEST <= self.rounds[self.taken].measured / self.target <= HIGHEST


def int8_of(recipe: Recipe) -> Int8:
    """Return how files in int8 are made."""
    output = recipe.output
    return Int8(output.int8_method, output.int8_keep, output.int8_reduce_range)


def conditions_of(program: Program, recipe: Recipe) -> Conditions:
    """Return what a recipe's kernels are timed under."""
    return Conditions(recipe.target.threads, flush_mib(program, recipe.target.deploy), recipe.target.deploy)


def source_of(
    table: LatencyTable | str | Path | None,
    conditions: Conditions,
    *,
    seed: int,
    progress: Progress | None,
    warn: Callable[[str], None],
) -> Source:
    """Return where kernels' times come from: the table that is given, or this machine."""
    if table is None:
        return Measured(conditions, seed=seed, progress=progress, warn=warn)
    if not isinstance(table, (LatencyTable, str, Path)):
        raise InvalidInput(f"latency_table is of type {type(table).__name__}: give a path, or a LatencyTable")
    given, origin = (table, "table.json") if isinstance(table, LatencyTable) else (LatencyTable.load(table), str(table))
    threads, theirs = conditions.threads, given.device.get("threads", conditions.threads)
    if theirs != threads:
        warn(f"the plan is for --threads {theirs}, as latency table {origin} is; times here are of --threads {threads}")
    precision = given.device.get("precision", FP32)
    if precision != conditions.precision:
        raise InvalidInput(
            f"latency table {origin} is of {precision}, and the plan is for {conditions.precision}: give --deploy "
            f"{precision}, or a table that `surgery profile --deploy {conditions.precision}` wrote"
        )
    return Given(given, origin, warn=warn)


class Plotted(Protocol):
    """A plan with what is known of its time."""

    @property
    def plan(self) -> Plan:
        """Which units die."""

    @property
    def loop(self) -> Loop | None:
        """What the table tells."""


Chosen = TypeVar("Chosen", bound=Plotted)


class Track:
    """The dense model as an ONNX file, and compact ones to be timed against it."""

    def __init__(
        self,
        program: Program,
        folder: Path,
        recipe: Recipe,
        seen: Calibration | None,
        progress: Progress | None,
        *,
        to_judge: bool = False,
    ):
        self._program, self._folder, self._recipe, self._seen, self._to_judge = program, folder, recipe, seen, to_judge
        self._threads, self._seed, self._progress = recipe.target.threads, recipe.selection.seed, progress
        tensors = bind(program.model, program.example_args, program.example_kwargs).tensors
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._axes = {name: spec.dynamic for name, spec in zip(tensors, program.inputs, strict=True)}
        free = any(0 in axes for axes in self._axes.values())
        self._batch = recipe.target.batch if free else next(iter(self._shapes.values()))[0]
        self._dense = self._export(program.model, "dense")

    def _export(self, module: torch.nn.Module, name: str) -> Path:
        if self._progress is not None:
            self._progress(f"export {name} to time it", 0.0)
        program = self._program
        result = onnx.export(
            module,
            program.example_args,
            self._folder / f"{name}.onnx",
            example_kwargs=program.example_kwargs,
            dynamic_axes=self._axes,
            check=False,
        )
        if self._recipe.target.deploy == INT8:
            to_int8(result.path, result.path, self._calibration(result.path), int8_of(self._recipe), check=False)
        return result.path

    def _calibration(self, path: Path) -> list[dict[str, Any]]:
        """The images; some of them where files are only timed, or the example inputs where there are none.

        Ranges change what comes out of a file, and not how long it takes.
        """
        args = bind(self._program.model, self._program.example_args, self._program.example_kwargs).tensors.values()
        seen = self._seen
        batches = seen.batches if seen is not None else [tuple(args)] * FEWEST
        found, count = list[dict[str, Any]](), 0
        for feed in feeds(path, batches):
            if count >= FEWEST and not (self._to_judge and seen is not None):
                break
            found.append(feed)
            count += len(next(iter(feed.values())))
        return found

    @property
    def dense(self) -> Path:
        """The dense model's file."""
        return self._dense

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Input name → its shape in one timed run."""
        return {
            name: (self._batch, *shape[1:]) if 0 in self._axes[name] else shape for name, shape in self._shapes.items()
        }

    def entry(self, module: torch.nn.Module, name: str = "compact") -> Path:
        """Export a compact model, to be timed; it takes the place of one of the same name."""
        return self._export(module, name)

    def time(self, compact: Path, *, processes: int, after: timer.Ratio | None = None) -> timer.Ratio:
        """Return a file's latency relative to the dense model's, from so many processes, those before counted."""
        done = len(after.ratios) if after is not None else 0
        found = timer.measure(
            self._dense,
            compact,
            threads=self._threads,
            batch=self._batch,
            shapes=self._shapes,
            seed=self._seed + done,
            processes=processes - done,
            progress=self._progress,
        )
        return found if after is None else after + found

    def dense_ms(self) -> float:
        """Return the dense model's latency."""
        found = timer.measure(
            self._dense, self._dense, threads=self._threads, batch=self._batch, shapes=self._shapes, seed=self._seed
        )
        return found.dense_ms


def track_of(
    program: Program,
    folder: Path,
    recipe: Recipe,
    seen: Calibration | None,
    progress: Progress | None,
    *,
    to_judge: bool = False,
) -> Track:
    """Return the track for a recipe; files go into `folder`, and may be judged as well if that is said."""
    return Track(program, folder, recipe, seen, progress, to_judge=to_judge)


def open_loop(kept_ms: float, dense_ms: float, target: float, device: Mapping[str, Any]) -> Loop:
    """Return what is known of a plan that was not timed."""
    told = "not timed: the latencies are the table's"
    return Loop(target, None, dense_ms, kept_ms, verdict=told, device=device)


def target_of(budget: Budget, dense_ms: float) -> float:
    """Return the fraction of the dense latency that a budget asks for.

    Raises:
        InvalidInput: the milliseconds are no less than the dense model takes already.
    """
    if budget.latency is not None:
        return budget.latency
    fraction = budget.amount / dense_ms
    if fraction >= 1:
        raise InvalidInput(
            f"latency_ms={budget.amount:g}: the dense model takes {dense_ms:.4g} ms already; ask for fewer milliseconds"
        )
    return fraction


def close(
    first: Chosen,
    replan: Callable[[float], Chosen],
    cut: Callable[[Chosen], torch.nn.Module],
    track: Track,
) -> tuple[Chosen, Loop]:
    """Correct a plan until its measured ratio is the one asked for, in at most `ROUNDS` rounds.

    A round that one process finds near is judged by `ratio.PROCESSES` fresh ones.

    Args:
        first: the plan that aims at the target, by the table.
        replan: fraction of the dense time by the table → another plan.
        cut: plan → compact module.
        track: where modules are timed.

    Returns:
        The plan whose measured ratio is nearest to the target, one within bounds before any other; and the rounds.
    """
    target = _loop(first).target
    plans, files, dense = [first], list[Path](), list[float]()
    rounds: list[Round] = []
    aim, why = target, ""
    while True:
        files.append(track.entry(cut(plans[-1]), f"compact {len(files) + 1}"))
        found = track.time(files[-1], processes=1)
        last = len(rounds) + 1 == ROUNDS
        if last or abs(found.value / target - 1) <= NEAR:
            found = track.time(files[-1], processes=timer.PROCESSES, after=found)
        dense.append(found.dense_ms)
        rounds.append(Round(aim, _loop(plans[-1]).predicted, found.value, found.ratios))
        if last or abs(found.value / target - 1) <= CLOSE:
            why = "the corrections ran out"
            break
        corrected, why = _another(rounds, target, plans, replan)
        if corrected is None:
            break
        aim, plan = corrected
        plans.append(plan)
    best = min(range(len(rounds)), key=lambda k: _distance(rounds[k].measured / target))
    if len(rounds[best].ratios) < timer.PROCESSES:
        found = track.time(files[best], processes=timer.PROCESSES)
        rounds[best] = replace(rounds[best], measured=found.value, ratios=found.ratios)
    loop = replace(_loop(plans[best]), dense_ms=median(dense), rounds=tuple(rounds), taken=best)
    return plans[best], _judged(loop, why)


def _another(
    rounds: Sequence[Round], target: float, plans: Sequence[Chosen], replan: Callable[[float], Chosen]
) -> tuple[tuple[float, Chosen] | None, str]:
    """Return the next aim and its plan, one that was not timed yet; where no such plan is found, None and why."""
    for aim in dict.fromkeys(_aims(rounds, target)):
        try:
            found = replan(aim)
        except BudgetUnreachable:  # and so are those that follow, which ask for less
            return None, "every group is at its smallest"
        if not any(_same(found.plan, plan.plan) for plan in plans):
            return (aim, found), ""
    if all(r.measured < target for r in rounds):
        return None, "no other widths were found that take as much"
    return None, "no other widths were found between those that were timed"


def _aims(rounds: Sequence[Round], target: float) -> Iterator[float]:
    """Corrections of the last aim, the best first.

    In proportion; but between two aims, one of which took too long and one less than asked for, where there are such.
    """
    last = rounds[-1]
    factor = target / last.measured
    across = [r.aim for r in rounds if (r.measured < target) != (last.measured < target)]
    if not across:
        yield from (min(last.aim * factor**power, HIGHEST_AIM) for power in (1, 2, 4))
        return
    other = min(across, key=lambda aim: abs(aim - last.aim))
    if min(last.aim, other) < last.aim * factor < max(last.aim, other):
        yield last.aim * factor
    yield from (last.aim + share * (other - last.aim) for share in (0.5, 0.25, 0.75))


def _loop(plotted: Plotted) -> Loop:
    assert plotted.loop is not None, "only plans for a time are timed"
    return plotted.loop


def _same(a: Plan, b: Plan) -> bool:
    return a.dead == b.dead and a.dropped == b.dropped


def _distance(relative: float) -> tuple[bool, float]:
    return not LOWEST <= relative <= HIGHEST, abs(relative - 1)


def _judged(loop: Loop, why: str) -> Loop:
    measured = loop.rounds[loop.taken].measured
    rounds = "1 round" if len(loop.rounds) == 1 else f"{len(loop.rounds)} rounds"
    told = f"measured {measured:.4f} of {loop.dense} latency, asked for {loop.target:.4f}, in {rounds}"
    if loop.met:
        return replace(loop, verdict=f"met: {told}")
    more = ", faster than asked for since more was cut than had to be" if measured < loop.target else ""
    return replace(loop, verdict=f"NOT met: {told}{more}: {why}")
