"""Plans for latency budgets, from a latency table and scores, with a reason for every width."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from surgery.capture import submodule as parts
from surgery.config import Budget, Recipe
from surgery.core import Block, Clock, Coupling, Kernel, Plan, Program, Scores, Widths
from surgery.coupling import find_blocks, flush_mib, kept_costs, plan_from_dead, reordered, reorderings
from surgery.errors import BudgetUnreachable, InvalidInput
from surgery.importance import Signal, block_losses, measures_losses, settled, signal_of, weights_of
from surgery.inputs import Calibration
from surgery.latency import Conditions, LatencyTable, Source, Stairs, table_source
from surgery.planning.acceptance import Acceptance, acceptance_of
from surgery.planning.allocation import attempts
from surgery.planning.candidate import Candidate, DroppableBlocks, candidate_of
from surgery.planning.choice import Choice, RefinementLog, plan_settings
from surgery.planning.forecast import Forecast, State, group_steps, predicted_ms, staircases, widths_of
from surgery.planning.ladders import Ladder, ladders_of
from surgery.planning.latency_bench import LatencyBench
from surgery.planning.latency_search import ImportanceLoss, ladder_losses, search
from surgery.planning.lowering import Lowered, lower

FINEST = 32
"""Number of steps of a group if the device has no stairs."""
REFINEMENTS = 4
"""Number of times that the points used by a plan are measured, and the plan is updated."""


def conditions_of(program: Program, recipe: Recipe) -> Conditions:
    """Return the conditions under which a recipe's kernels are timed."""
    return Conditions(recipe.target.threads, flush_mib(program, recipe.target.deploy), recipe.target.deploy)


class LatencyPlanner:
    """Makes plans for a latency budget, by a given or measured latency table.

    Blocks and widths are searched jointly, on the program without its dead blocks; the plan is then transferred to the
    program without the dropped blocks.

    Args:
        recipe: the recipe.
        seen: images to measure importance on, if any.
        droppable: droppable blocks of the traced program.
        clock: reports progress.

    Attributes:
        source: source of the latency table.
        warnings: warnings about the table, extended while it is read.
    """

    def __init__(self, recipe: Recipe, seen: Calibration | None, droppable: DroppableBlocks, clock: Clock) -> None:
        self._recipe, self._seen, self._clock = recipe, seen, clock
        self._droppable, self._program = droppable, droppable.program
        self._candidates: dict[frozenset[str], Candidate] = {}
        self.warnings: list[str] = []
        self.source: Source = table_source(
            recipe.target.latency_table,
            conditions_of(self._program, recipe),
            seed=recipe.selection.seed,
            progress=clock.progress,
            warn=self.warnings.append,
        )

    @cached_property
    def dense_ms(self) -> float:
        """The dense model's latency by the table; raises InvalidInput if the table has none."""
        dense = self._candidate(frozenset())
        points = widths_of(self._lowered(dense), dense.coupling.labelled, {})
        with self._clock("measure kernels"):
            found = predicted_ms(points, covered(self.source, points))
        if found <= 0:
            raise InvalidInput("the latency table has no time for this model; make it again with surgery profile")
        return found

    @cached_property
    def calibration(self) -> Acceptance | None:
        """A measurement of an earlier plan from the table's device; raises InvalidInput if from another device."""
        found = acceptance_of(self._recipe)
        if found is not None:
            found.validate_device(self.source.device, self._program.fingerprint, self._recipe.target.batch)
        return found

    @cached_property
    def target(self) -> float:
        """The requested fraction of the dense latency.

        Milliseconds refer to the dense model's measured latency, or to the table's if it is not measured.
        """
        recipe, dense_ms = self._recipe, self.dense_ms
        if self.calibration is not None:
            dense_ms = self.calibration.dense_ms
        elif recipe.goal.latency_ms is not None and recipe.target.correct and self.source.live:
            with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
                bench = LatencyBench(self._program, Path(folder), recipe, self._seen, self._clock.progress)
                dense_ms = bench.dense_ms()
        return fraction_of(recipe.goal, dense_ms)

    def first_plan(self) -> Choice:
        """Return the plan for the target, calibrated by a measurement from the device if available."""
        if self.calibration is not None:
            return self.plan(self.calibration.aim(self.target))
        try:
            return self.plan(self.target)
        except BudgetUnreachable as error:
            if self._recipe.selection.max_drop is None:
                raise
            raise BudgetUnreachable(f"--max-drop: nothing can be cut that takes time ({error})") from error

    def plan(self, fraction: float) -> Choice:
        """Return a plan with a predicted latency of at most this fraction of the dense model's.

        Raises:
            BudgetUnreachable: the smallest model is predicted to take longer.
        """
        with self._clock("allocate"):
            found = self._search.solve(fraction * self.dense_ms)
            candidate, plan = self._carried(found)
        predicted = found.ms / self.dense_ms
        notes = [*plan.notes, *self._droppable.notes]
        if self.calibration is not None:
            notes.append(self.calibration.note(self.calibration.aim(self.target)))
        settings = {**plan.settings, "predicted_latency_ratio": round(predicted, 6)}
        plan = replace(plan, notes=tuple(notes), settings=settings)
        lowered, labelled = self._lowered(candidate), candidate.coupling.labelled
        table = self.source.cover(widths_of(lowered, labelled, {}))
        dense = self._candidate(frozenset())
        return Choice(
            candidate.program,
            candidate.coupling,
            plan,
            kept_costs(dense.coupling, dense.costs, candidate.coupling, candidate.costs, plan),
            RefinementLog(
                self.target,
                dense_ms=None,
                predicted_dense_ms=self.dense_ms,
                predicted_ms=found.ms,
                verdict="not timed: the latencies are the table's",
                device=self.source.device,
            ),
            tuple(self.warnings),
            staircases(lowered, labelled, table, plan.dead),
        )

    def _carried(self, found: Solution) -> tuple[Candidate, Plan]:
        """Return the solution as a plan, with the program without the dropped blocks."""
        base = self._base
        plan = plan_from_dead(
            base.coupling,
            found.dead,
            fingerprint=self._program.fingerprint,
            inputs=self._program.inputs,
            budget=self._recipe.goal,
            settings={**plan_settings(self._recipe, self._seen), **parts.plain_arguments(self._program)},
            notes=found.notes,
            reasons=found.reasons,
        )
        constants = {**self._droppable.dead, **dict.fromkeys(found.dropped, ())}
        if found.dropped:
            base = self._candidate(frozenset(constants))
            plan = carried_over(plan, base.coupling)
        return base, replace(settled(plan, base.orders), dropped=constants)

    def _candidate(self, dropped: frozenset[str]) -> Candidate:
        if dropped not in self._candidates:
            program = self._droppable.program_without(dropped)
            self._candidates[dropped] = candidate_of(program, self._recipe, self._seen, self._clock)
        return self._candidates[dropped]

    def _lowered(self, candidate: Candidate) -> Lowered:
        return lower(candidate.program, candidate.coupling, batch=self._recipe.target.batch)

    @property
    def _base(self) -> Candidate:
        """The program without its dead blocks, on which plans are searched."""
        return self._candidate(frozenset(self._droppable.dead))

    @cached_property
    def _search(self) -> WidthSearch:
        base = self._base
        blocks = self._blocks_left(base.program)
        return WidthSearch(
            base.coupling,
            base.scores,
            self._lowered(base),
            self.source,
            signal=self._signal(base, blocks),
            inexact=self._recipe.selection.inexact,
            blocks=blocks,
        )

    def _blocks_left(self, program: Program) -> tuple[Block, ...]:
        """Return the remaining droppable blocks under their original names, which dropping others may have changed."""
        droppable = self._droppable
        left = {block.sum: block for block in (find_blocks(program) if droppable.blocks else ())}
        alive = (block for block in droppable.blocks if block.name not in droppable.dead and block.sum in left)
        return tuple(replace(left[block.sum], name=block.name) for block in alive)

    def _signal(self, base: Candidate, blocks: tuple[Block, ...]) -> Signal:
        """Return consumers and importance losses of units and blocks, by the requested criterion."""
        recipe, seen = self._recipe, self._seen
        order = reorderings(base.coupling, base.orders)
        parameters = reordered(weights_of(base.program, base.coupling), order)
        signal = signal_of(base.program, base.coupling, parameters, blocks)
        if seen is not None and blocks:
            macs, compensated = base.costs["macs"]({}), measures_losses(recipe.criterion)
            with self._clock("calibrate"):
                lost = block_losses(base.program, blocks, seen.batches, macs=macs, compensated=compensated)
            signal = replace(signal, blocks=lost)
        if measures_losses(recipe.criterion):
            return replace(signal, losses=base.scores)
        return signal if recipe.criterion == "signal" else signal.ranked(base.scores)


def fraction_of(budget: Budget, dense_ms: float) -> float:
    """Return the fraction of the dense latency that a budget requests.

    Raises:
        InvalidInput: the milliseconds are not below the dense model's latency.
    """
    if budget.latency is not None:
        return budget.latency
    fraction = budget.amount / dense_ms
    if fraction >= 1:
        raise InvalidInput(
            f"latency_ms={budget.amount:g}: the dense model takes {dense_ms:.4g} ms already; ask for fewer milliseconds"
        )
    return fraction


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
    made = plan_from_dead(coupling, dead, fingerprint=plan.fingerprint, inputs=plan.inputs)
    return replace(plan, dead=made.dead, sizes=made.sizes, cuts=made.cuts)


# The search on one program. ------------------------------------------------------------------------------------------


def covered(source: Source, points: Sequence[tuple[Kernel, Widths]]) -> LatencyTable:
    """Return a table with a dense program's kernels, measured at these widths."""
    table = source.cover(points)
    return source.refine(points) or table


@dataclass(frozen=True, slots=True)
class Solution:
    """Result of `WidthSearch`.

    Attributes:
        dead: group name → removed units.
        dropped: names of the dropped blocks, whose units are not necessarily in `dead`.
        ms: latency predicted by the table.
        notes: notes for the plan.
        reasons: group or block name → reason for its size.
    """

    dead: Mapping[str, Sequence[int]]
    dropped: tuple[str, ...]
    ms: float
    notes: tuple[str, ...]
    reasons: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Input of `search`: ladders and blocks with time savings and importance losses."""

    ladders: Sequence[Ladder]
    forecast: Forecast
    loss: ImportanceLoss


@dataclass(frozen=True, slots=True, eq=False)
class WidthSearch:
    """Chooses group widths and blocks to drop, for one program and one device.

    Attributes:
        coupling: the groups.
        scores: importance per unit.
        lowered: the program's kernels.
        source: source of the latency table, which is extended as needed.
        signal: consumers and importance losses of units and blocks.
        inexact: as in `allocate`.
        blocks: droppable blocks.
    """

    coupling: Coupling
    scores: Scores
    lowered: Lowered
    source: Source
    signal: Signal
    inexact: str = "if-needed"
    blocks: tuple[Block, ...] = ()

    def table(self) -> LatencyTable:
        """Return the table with all kernels of the program."""
        return covered(self.source, widths_of(self.lowered, self.coupling.labelled, {}))

    def solve(self, target_ms: float) -> Solution:
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
        return self._solution(problem, state, target_ms)

    def problems(self, table: LatencyTable) -> Iterator[Problem]:
        """Yield search problems; for `if-needed`, first without inexact groups."""
        steps = group_steps(self.lowered, self.coupling, table, most=FINEST)
        ladders = ladders_of(self.coupling, self.scores, steps)
        taken = [{*block.nodes, block.sum} for block in self.blocks]
        for chosen in attempts(self.coupling, self.inexact):
            allowed = [ladder for ladder in ladders if chosen.issuperset(ladder.groups)]
            yield Problem(allowed, Forecast(self.lowered, table, self.coupling, allowed, taken), self._loss(allowed))

    def _loss(self, ladders: Sequence[Ladder]) -> ImportanceLoss:
        tensors = {group.name: {site.tensor for site in group.sites} for group in self.coupling.groups}

        def inside(block: Block) -> frozenset[int]:
            own = set(block.tensors)
            return frozenset(k for k, x in enumerate(ladders) if all(tensors[name] <= own for name in x.groups))

        return ImportanceLoss(
            ladder_losses(ladders, self.signal),
            tuple(self.signal.blocks[block.name] for block in self.blocks),
            tuple(inside(block) for block in self.blocks),
            tuple(frozenset(k for k, b in enumerate(self.blocks) if b.sum in block.nodes) for block in self.blocks),
        )

    def _searched(self, table: LatencyTable, target_ms: float) -> tuple[Problem, State]:
        least = float("inf")
        for problem in self.problems(table):
            state = search(problem.forecast, problem.loss, target_ms)
            if state is not None:
                return problem, state
            smallest = State(tuple(len(x.ends) for x in problem.ladders), frozenset(range(len(self.blocks))))
            least = min(least, problem.forecast.total(smallest))
        steps = group_steps(self.lowered, self.coupling, table, most=FINEST)
        raise BudgetUnreachable(f"cannot get down to {target_ms:.4g} ms: {self._obstacle(least, steps)}")

    def _obstacle(self, least: float, steps: Mapping[str, int]) -> str:
        if not steps and not self.blocks:
            return "nothing of the model may be cut, all of it is frozen or kept"
        step = max(steps.values(), default=1)
        why = f" (widths go in steps of {step} on this device)" if step > 1 else ""
        return (
            f"with every group at its smallest{why}, {least:.4g} ms are predicted; raise the budget, or set it in "
            "--macs, which takes any width"
        )

    def _solution(self, problem: Problem, state: State, target_ms: float) -> Solution:
        ms = problem.forecast.total(state)
        dead: dict[str, list[int]] = {}
        for ladder, level in zip(problem.ladders, state.levels, strict=True):
            for name, unit in ladder.order[: ladder.ends[level - 1]] if level else ():
                dead.setdefault(name, []).append(unit)
        return Solution(
            dead,
            tuple(self.blocks[b].name for b in sorted(state.dropped)),
            ms,
            (
                f"predicted by the latency table: {ms:.4g} ms, aimed at {target_ms:.4g}",
                *_untimed(self.lowered, problem.forecast.table),
            ),
            self._reasons(problem, state),
        )

    def _reasons(self, problem: Problem, state: State) -> dict[str, str]:
        reasons: dict[str, str] = {}
        for k, ladder in enumerate(problem.ladders):
            reasons.update(dict.fromkeys(ladder.groups, _why_width(problem, state, k)))
        for gone in state.dropped:
            names = [name for k in problem.loss.inside[gone] for name in problem.ladders[k].groups]
            reasons.update(dict.fromkeys(names, f"goes with '{self.blocks[gone].name}', which is dropped"))
        for b, block in enumerate(self.blocks):
            reasons[block.name] = _why_block(problem, state, b)
        return reasons


# Reasons. ------------------------------------------------------------------------------------------------------------


def _untimed(lowered: Lowered, table: LatencyTable) -> list[str]:
    """Return a note on operations that count zero: not timed, or kernels that do not run alone."""
    idle = [p for p in lowered.placed if (entry := table.entries.get(p.kernel.key)) and not any(entry.grid)]
    names = [*lowered.untimed, *(name for placed in idle for name in placed.nodes[:1])]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"the latency table does not time {len(names)} operations: {', '.join(names[:3])}{more}"]


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
    words = [cost + (f", with all of them {here + forecast.change(state, k, 0):.3g}" if level else "")]
    if level:
        words.append(f"{sizes[level - 1]} would add {forecast.change(state, k, level - 1):.3g} ms")
    if level < len(ladder.ends):
        saves = -forecast.change(state, k, level + 1)
        lost = problem.loss.ladders[k][level + 1] - problem.loss.ladders[k][level]
        gain = f"{saves:.3g} ms, {_rate(saves, lost)}" if saves > 0 else "nothing"
        words.append(f"{sizes[level + 1]} would save {gain}")
    else:
        words.append("no smaller width is on a stair edge" if ladder.ends else "no width below is on a stair edge")
    return "; ".join([*words, *_why_stair(size, forecast.kinds(k), forecast.table)])


def _why_stair(size: int, kinds: Sequence[str], table: LatencyTable) -> list[str]:
    """Return the effect of one unit less, by the staircase with the largest step."""
    found = [table.stairs[kind] for kind in kinds if kind in table.stairs]
    stairs: Stairs | None = max(found, key=lambda s: s.step, default=None)
    if stairs is None or stairs.step == 1 or size % stairs.step:
        return []
    edges = [w for w in stairs.curve if w % stairs.step == 0 and w - 1 in stairs.curve]
    edge = min(edges, key=lambda w: abs(w - size), default=None)
    if edge is None:
        return []
    ratio = stairs.curve[edge - 1] / stairs.curve[edge]
    if ratio > 1.03:
        return [f"{size} → {size - 1} would be slower ({ratio:.2f}x at {edge} → {edge - 1} on this device)"]
    return [f"{size} → {size - 1} would save nothing (the device pays in steps of {stairs.step})"]
