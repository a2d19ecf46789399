"""Plans for latency budgets, from a latency table and scores, with a reason for every width."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any

from surgery.config import Recipe
from surgery.core import Block, Coupling, Plan, Program, Scores, scratch_folder
from surgery.coupling import find_blocks, flush_mib, plan_from_dead, reordered, reorderings
from surgery.errors import BudgetUnreachable, InvalidInput
from surgery.importance import Signal, block_losses, measures_losses, settled, signal_of, weights_of
from surgery.latency import Conditions, LatencyTable, Source, table_source
from surgery.planning.allocation import Ladder, attempts, ladders_of, removed
from surgery.planning.choice import Candidate, Candidates, Choice, RefinementLog, with_dead
from surgery.planning.latency_search import (
    Forecast,
    ImportanceLoss,
    State,
    group_steps,
    ladder_losses,
    predicted_ms,
    search,
    staircases,
)
from surgery.planning.lowering import Lowered
from surgery.planning.refinement import HIGHEST_AIM, LatencyBench

SCHEMA = 1  # schema of acceptances
FINEST = 32  # number of steps of a group if the device has no stairs
REFINEMENTS = 4  # number of times that the points used by a plan are measured, and the plan is updated
_HINT = "`python PACK.zip accept compact.onnx` writes one on the device"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A compact model's latency measured on another device, which calibrates the next plan for that device.

    ``python PACK.zip accept compact.onnx`` writes one on the device.
    """

    origin: str  # name in messages
    ratio: float  # measured latency of the compact model relative to the dense one
    predicted: float  # by the latency table when the plan was made
    dense_ms: float
    device: Mapping[str, Any]
    fingerprint: str  # of the dense architecture
    batch: int

    @classmethod
    def load(cls, path: str | Path) -> Acceptance:
        """Read the output of a pack; raises InvalidInput if the file is missing or unsuitable for calibration."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise InvalidInput(
                    f"{path}: acceptance of schema {data['schema']}, this version reads {SCHEMA}; use a new pack"
                )
            if data["predicted_latency_ratio"] is None:
                raise InvalidInput(
                    f"{path}: its compact model does not say which latency was predicted for it; accept one that "
                    "`surgery shrink --latency` wrote"
                )
            figures = [float(data[key]) for key in ("ratio", "predicted_latency_ratio", "dense_ms")]
            if not all(0 < figure < inf for figure in figures):
                raise ValueError("latencies must be positive")
            (ratio, predicted, ms), fingerprint = figures, str(data["dense_fingerprint"])
            if type(batch := data["batch"]) is not int or batch < 1:
                raise ValueError("the batch must be a positive whole number")
            return cls(str(path), ratio, predicted, ms, dict(data["device"]), fingerprint, batch)
        except OSError as error:
            raise InvalidInput(f"cannot read acceptance {path}: {error}; {_HINT}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(f"{path}: not an acceptance ({error!s:.120}); {_HINT}") from error

    def aim(self, target: float) -> float:
        """Return the fraction to aim at by the table so that the device measures `target`."""
        return min(target * self.predicted / self.ratio, HIGHEST_AIM)

    def validate_device(self, device: Mapping[str, Any], fingerprint: str, batch: int) -> None:
        """Raise InvalidInput if the table is from another device, or the plan for another architecture or batch."""
        names = sorted(name for name in {*device, *self.device} if device.get(name) != self.device.get(name))
        if names:
            differing = ", ".join(names)
            wrong = f"was measured on another device than the latency table: {differing} differ; run the pack for both"
        elif batch != self.batch:
            wrong = f"was measured with a batch of {self.batch}, the plan is for --batch {batch}; give both the same"
        elif fingerprint != self.fingerprint:
            wrong = "is of another architecture than this model; accept a compact model of this"
        else:
            return
        raise InvalidInput(f"acceptance {self.origin} {wrong}")


def conditions_of(program: Program, recipe: Recipe) -> Conditions:
    """Return the conditions under which a recipe's kernels are timed."""
    return Conditions(recipe.target.threads, flush_mib(program, recipe.target.deploy), recipe.target.deploy)


class LatencyPlanner:
    """Makes plans for a latency budget, by a given or measured latency table.

    Blocks and widths are searched jointly, on the program without its dead blocks; the plan is then transferred to the
    program without the dropped blocks. `warnings` about the table are extended while it is read.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates, self._clock = candidates, candidates.clock
        self._recipe: Recipe = candidates.recipe
        self._program: Program = candidates.program
        recipe, program = self._recipe, self._program
        self.warnings: list[str] = []
        given = recipe.target.acceptance
        self.calibration = None if given is None else Acceptance.load(given)
        self.source: Source = table_source(
            recipe.target.latency_table,
            conditions_of(program, recipe),
            seed=recipe.selection.seed,
            progress=candidates.clock.progress,
            warn=self.warnings.append,
        )
        if self.calibration is not None:
            self.calibration.validate_device(self.source.device, program.fingerprint, recipe.target.batch)

    @cached_property
    def dense_ms(self) -> float:
        """The dense model's latency by the table; raises InvalidInput if the table has none."""
        points = self._candidates.without(()).lowered.points()
        with self._clock("measure kernels"):
            table = self.source.cover(points)
            found = predicted_ms(points, self.source.refine(points) or table)
        if found <= 0:
            raise InvalidInput("the latency table has no time for this model; make it again with surgery profile")
        return found

    @cached_property
    def target(self) -> float:
        """The requested fraction of the dense latency; raises InvalidInput if it is 1 or more.

        Milliseconds refer to the dense model's measured latency, or to the table's if it is not measured.
        """
        recipe, dense_ms = self._recipe, self.dense_ms
        if recipe.goal.latency is not None:
            return recipe.goal.latency
        if self.calibration is not None:
            dense_ms = self.calibration.dense_ms
        elif recipe.target.correct and self.source.live:
            with scratch_folder() as folder:
                bench = LatencyBench(self._program, folder, recipe, self._candidates.seen, self._clock.progress)
                dense_ms = bench.ratio(bench.dense).dense_ms
        if recipe.goal.amount >= dense_ms:
            raise InvalidInput(
                f"latency_ms={recipe.goal.amount:g}: the dense model takes {dense_ms:.4g} ms already; ask for fewer "
                "milliseconds"
            )
        return recipe.goal.amount / dense_ms

    def first_plan(self) -> Choice:
        """Return the plan for the target, calibrated by a measurement from the device if available."""
        try:
            return self.plan(self.target if self.calibration is None else self.calibration.aim(self.target))
        except BudgetUnreachable as error:
            if self._recipe.selection.max_drop is None:
                raise
            raise BudgetUnreachable(
                f"--max-drop: nothing can be cut that takes time ({error})", error.figures
            ) from error

    def plan(self, fraction: float) -> Choice:
        """Return a plan with a predicted latency of at most this fraction of the dense model's.

        Raises:
            BudgetUnreachable: the smallest model is predicted to take longer.
        """
        with self._clock("allocate"):
            problem, state = self._search.solve(fraction * self.dense_ms)
            candidate, plan = self._carried(problem, state)
        ms = problem.forecast.total(state)
        notes = [f"predicted by the latency table: {ms:.4g} ms, aimed at {fraction * self.dense_ms:.4g}"]
        notes += [*_untimed(self._candidates.base.lowered, problem), *plan.notes, *self._candidates.notes]
        if self.calibration is not None:
            notes.append(
                f"aimed at {self.calibration.aim(self.target):.4f} of the dense latency by the table, calibrated with "
                f"a measurement from the device: {self.calibration.ratio:.4f} where the table predicted "
                f"{self.calibration.predicted:.4f}"
            )
        settings = {**plan.settings, "predicted_latency_ratio": round(ms / self.dense_ms, 6)}
        plan = replace(plan, notes=tuple(notes), settings=settings)
        verdict = "not timed: the latencies are the table's"
        log = RefinementLog(self.target, None, self.dense_ms, ms, verdict=verdict, device=self.source.device)
        stairs = staircases(candidate.lowered, self.source.cover(candidate.lowered.points()), plan.dead)
        return self._candidates.chosen(candidate, plan, refinement=log, warnings=tuple(self.warnings), stairs=stairs)

    def _carried(self, problem: Problem, state: State) -> tuple[Candidate, Plan]:
        """Return a solution as a plan, with the program without the dropped blocks."""
        base = self._candidates.base
        dead, settings = removed(problem.ladders, state.levels), self._candidates.settings
        plan = plan_from_dead(self._program, base.coupling, dead, budget=self._recipe.goal, settings=settings)
        plan = replace(plan, reasons=_reasons(problem, state))
        dropped = {**self._candidates.dead, **{problem.blocks[b].name: () for b in sorted(state.dropped)}}
        if state.dropped:
            base = self._candidates.without(dropped)
            plan = carried_over(plan, base.coupling)
        return base, replace(settled(plan, base.orders), dropped=dropped)

    @cached_property
    def _search(self) -> WidthSearch:
        base, droppable = self._candidates.base, self._candidates
        left = {block.sum: block for block in (find_blocks(base.program) if droppable.blocks else ())}
        alive = (block for block in droppable.blocks if block.name not in droppable.dead and block.sum in left)
        blocks = tuple(replace(left[block.sum], name=block.name) for block in alive)  # under their original names
        signal, inexact = self._signal(base, blocks), self._recipe.selection.inexact
        return WidthSearch(base.coupling, base.scores, base.lowered, self.source, signal, inexact, blocks)

    def _signal(self, base: Candidate, blocks: tuple[Block, ...]) -> Signal:
        """Return consumers and importance losses of units and blocks, by the requested criterion."""
        recipe, seen = self._recipe, self._candidates.seen
        order = reorderings(base.coupling, base.orders)
        parameters = reordered(weights_of(base.program, base.coupling), order)
        signal = signal_of(base.program, base.coupling, parameters, blocks)
        if seen is not None and blocks:
            with self._clock("score blocks"):
                report = partial(self._clock.progress, "score blocks")
                lost = block_losses(base.program, blocks, seen.batches, macs=base.costs["macs"]({}), progress=report)
            signal = replace(signal, blocks=lost)
        if measures_losses(recipe.criterion):
            return replace(signal, losses=base.scores)
        return signal if recipe.criterion == "signal" else signal.ranked(base.scores)


def carried_over(plan: Plan, coupling: Coupling) -> Plan:
    """Transfer a plan to its program without some blocks: remove units whose positions are all removed in the plan.

    Without a block, fewer axes are tied to each other, so units of the plan can still be removed together.
    """
    going = {(cut.tensor, cut.axis): frozenset(cut.dead) for cut in plan.cuts}
    dead: dict[str, list[int]] = {}
    for group in coupling.groups:
        site = group.sites[0]
        gone = going.get((site.tensor, site.axis), frozenset())
        dead[group.name] = [unit for unit, owned in enumerate(site.index) if gone.issuperset(owned)]
    return with_dead(plan, coupling, dead)


# The search on one program. ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Input of `search`: ladders and blocks with time savings and importance losses."""

    ladders: Sequence[Ladder]
    blocks: Sequence[Block]
    forecast: Forecast
    loss: ImportanceLoss


@dataclass(frozen=True, slots=True, eq=False)
class WidthSearch:
    """Chooses group widths and blocks to drop, for one program and one device, whose table is extended as needed."""

    coupling: Coupling
    scores: Scores
    lowered: Lowered
    source: Source
    signal: Signal
    inexact: str = "if-needed"
    blocks: tuple[Block, ...] = ()

    def table(self) -> LatencyTable:
        """Return the table with all kernels of the program, measured at its widths."""
        points = self.lowered.points()
        table = self.source.cover(points)
        return self.source.refine(points) or table

    def solve(self, target_ms: float) -> tuple[Problem, State]:
        """Return widths and dropped blocks with a predicted latency of at most `target_ms`.

        Raises:
            BudgetUnreachable: the smallest model is predicted to take longer.
        """
        problem, state = self._searched(self.table(), target_ms)
        for _ in range(REFINEMENTS):
            table = self.source.refine(problem.forecast.points(state))
            if table is None:
                break
            problem, state = self._searched(table, target_ms)
        return problem, state

    def problems(self, table: LatencyTable) -> Iterator[Problem]:
        """Yield search problems; for `if-needed`, first without inexact groups."""
        steps = group_steps(self.lowered, self.coupling, table, most=FINEST)
        ladders = ladders_of(self.coupling, self.scores, steps)
        taken = [{*block.nodes, block.sum} for block in self.blocks]
        for chosen in attempts(self.coupling, self.inexact):
            allowed = [ladder for ladder in ladders if chosen.issuperset(ladder.groups)]
            forecast = Forecast(self.lowered, table, self.coupling, allowed, taken)
            yield Problem(allowed, self.blocks, forecast, self._loss(allowed))

    def _loss(self, ladders: Sequence[Ladder]) -> ImportanceLoss:
        sites = {group.name: {site.tensor for site in group.sites} for group in self.coupling.groups}
        tensors = [set[str]().union(*(sites[name] for name in ladder.groups)) for ladder in ladders]
        blocks = self.blocks
        return ImportanceLoss(
            ladder_losses(ladders, self.signal),
            tuple(self.signal.blocks[block.name] for block in blocks),
            tuple(frozenset(k for k, own in enumerate(tensors) if own <= {*block.tensors}) for block in blocks),
            tuple(frozenset(k for k, b in enumerate(blocks) if b.sum in block.nodes) for block in blocks),
        )

    def _searched(self, table: LatencyTable, target_ms: float) -> tuple[Problem, State]:
        least = float("inf")
        for problem in self.problems(table):
            state = search(problem.forecast, problem.loss, target_ms)
            if state is not None:
                return problem, state
            smallest = State(tuple(len(x.ends) for x in problem.ladders), frozenset(range(len(self.blocks))))
            least = min(least, problem.forecast.total(smallest))
        step = max(group_steps(self.lowered, self.coupling, table, most=FINEST).values(), default=0)
        why = f" (widths go in steps of {step} on this device)" if step > 1 else ""
        obstacle = (
            f"with every group at its smallest{why}, {least:.4g} ms are predicted; raise the budget, or set it in "
            "--macs, which takes any width"
        )
        if not step and not self.blocks:
            obstacle = "nothing of the model may be cut, all of it is frozen or kept"
        figures = {"target_ms": target_ms, "least_ms": least}
        raise BudgetUnreachable(f"cannot get down to {target_ms:.4g} ms: {obstacle}", figures)


# Reasons. ------------------------------------------------------------------------------------------------------------


def _reasons(problem: Problem, state: State) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for k, ladder in enumerate(problem.ladders):
        reasons.update(dict.fromkeys(ladder.groups, _why_width(problem, state, k)))
    for gone in state.dropped:
        names = [name for k in problem.loss.inside[gone] for name in problem.ladders[k].groups]
        reasons.update(dict.fromkeys(names, f"goes with '{problem.blocks[gone].name}', which is dropped"))
    return reasons | {block.name: _why_block(problem, state, b) for b, block in enumerate(problem.blocks)}


def _untimed(lowered: Lowered, problem: Problem) -> list[str]:
    """Return a note on operations that count zero: not timed, or kernels that do not run alone."""
    entries = problem.forecast.table.entries
    idle = [p for p in lowered.placed if (entry := entries.get(p.kernel.key)) and not any(entry.grid)]
    names = [*lowered.untimed, *(name for placed in idle for name in placed.nodes[:1])]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"the latency table does not time {len(names)} operations: {', '.join(names[:3])}{more}"] if names else []


def _rate(ms: float, lost: float) -> str:
    return f"{1e3 * ms / lost:.3g} us for each unit of importance" if lost > 0 else "at no importance"


def _why_block(problem: Problem, state: State, b: int) -> str:
    others = replace(state, dropped=state.dropped - {b})
    without = problem.loss.without(others, b)
    if without is None:
        return "goes with the block that it is in"
    ms = problem.forecast.block(others, b)
    lost = problem.loss.of(without) - problem.loss.of(others)
    return f"{'dropped' if b in state.dropped else 'stays'}: without it {ms:.3g} ms less, {_rate(ms, lost)}"


def _why_width(problem: Problem, state: State, k: int) -> str:
    """Return the cost of a ladder's groups, the savings of smaller widths, and the reason for the width."""
    ladder, forecast, level = problem.ladders[k], problem.forecast, state.levels[k]
    sizes = [len(ladder.order), *(len(ladder.order) - end for end in ladder.ends)]
    here, size = forecast.cost(state, k), sizes[level]
    cost = f"{size} of {sizes[0]}: its kernels take {here:.3g} ms"
    words = [cost + (f", with all of them {here - forecast.saved(state, k, 0):.3g}" if level else "")]
    if level:
        words.append(f"{sizes[level - 1]} would add {-forecast.saved(state, k, level - 1):.3g} ms")
    if level < len(ladder.ends):
        saves = forecast.saved(state, k, level + 1)
        lost = problem.loss.ladders[k][level + 1] - problem.loss.ladders[k][level]
        gain = f"{saves:.3g} ms, {_rate(saves, lost)}" if saves > 0 else "nothing"
        words.append(f"{sizes[level + 1]} would save {gain}")
    else:
        words.append("no smaller width is on a stair edge" if ladder.ends else "no width below is on a stair edge")
    return "; ".join([*words, *_why_stair(size, forecast.kinds(k), forecast.table)])


def _why_stair(size: int, kinds: Sequence[str], table: LatencyTable) -> list[str]:
    """Return the effect of one unit less, by the staircase with the largest step."""
    found = [table.stairs[kind] for kind in kinds if kind in table.stairs]
    stairs = max(found, key=lambda s: s.step, default=None)
    if stairs is None or stairs.step == 1 or size % stairs.step:
        return []
    edges = [w for w in stairs.curve if w % stairs.step == 0 and w - 1 in stairs.curve]
    if not edges:
        return []
    edge = min(edges, key=lambda w: abs(w - size))
    ratio = stairs.curve[edge - 1] / stairs.curve[edge]
    if ratio > 1.03:
        return [f"{size} → {size - 1} would be slower ({ratio:.2f}x at {edge} → {edge - 1} on this device)"]
    return [f"{size} → {size - 1} would save nothing (the device pays in steps of {stairs.step})"]
