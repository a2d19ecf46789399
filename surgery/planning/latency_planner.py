"""Plans by the clock: a latency table and scores become a plan that meets a time, with the reason for every width."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from surgery.config import Budget
from surgery.core import Block, Coupling, InputSpec, Kernel, Plan, Scores, Widths
from surgery.coupling import plan_from_dead
from surgery.errors import BudgetUnreachable
from surgery.importance import Signal
from surgery.latency import LatencyTable
from surgery.planning.allocation import attempts
from surgery.planning.forecast import Forecast, group_steps, predicted_ms, widths_of
from surgery.planning.ladders import Ladder, ladders_of
from surgery.planning.latency_search import State, Worth, spend, worth_of
from surgery.planning.lowering import Lowered

FINEST = 32
"""Steps of a group where the device shows no stairs."""
REFINEMENTS = 4


class Source(Protocol):
    """Where a latency table comes from: measured here where it has gaps, or given."""

    live: bool

    @property
    def device(self) -> Mapping[str, Any]:
        """What the table was measured on."""

    def cover(self, placed: Sequence[tuple[Kernel, Widths]]) -> LatencyTable:
        """Return a table that holds all these kernels, up to these widths."""

    def refine(self, points: Iterable[tuple[Kernel, Widths]]) -> LatencyTable | None:
        """Return a table in which these points were measured themselves, or None where there is nothing to add."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A plan, and the milliseconds that the table tells for what it leaves.

    Attributes:
        plan: which units die.
        kept_ms: by the table.
        dropped: blocks that had best go as well; to be taken out of the program, and planned for again.
    """

    plan: Plan
    kept_ms: float
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What `spend` searches: steps of ladders and blocks, what they save and what is lost with them."""

    ladders: Sequence[Ladder]
    forecast: Forecast
    worth: Worth


@dataclass(frozen=True, eq=False)
class Planner:
    """Makes plans for one network and one device; the table grows as plans ask for points.

    Attributes:
        coupling: the groups.
        scores: importance per unit.
        lowered: the network's kernels.
        source: of the table.
        inexact: as for `allocate`.
        fingerprint: of the program, for plans.
        inputs: of the program, for plans.
        settings: kept in plans as given.
        budget: what was asked for, kept in plans.
        signal: who reads the units, and what is lost with them and with blocks.
        blocks: those that may be dropped.
    """

    coupling: Coupling
    scores: Scores
    lowered: Lowered
    source: Source
    inexact: str
    fingerprint: str
    inputs: tuple[InputSpec, ...]
    settings: Mapping[str, Any]
    budget: Budget
    signal: Signal
    blocks: tuple[Block, ...] = ()

    def dense_ms(self) -> float:
        """Return the dense model's milliseconds by the table, which is filled where it has gaps."""
        dense = widths_of(self.lowered, self.coupling.labelled, {})
        table = self.source.cover(dense)
        return predicted_ms(dense, self.source.refine(dense) or table)

    def plan(self, target_ms: float) -> Timed:
        """Return a plan that is predicted to take at most so many milliseconds.

        Raises:
            BudgetUnreachable: the smallest model is predicted to take longer.
        """
        dense = widths_of(self.lowered, self.coupling.labelled, {})
        table = self.source.cover(dense)
        table = self.source.refine(dense) or table
        timed, points = self._once(table, target_ms)
        for _ in range(REFINEMENTS):
            finer = self.source.refine(points)
            if finer is None:
                break
            table = finer
            timed, points = self._once(table, target_ms)
        return timed

    def _once(self, table: LatencyTable, target_ms: float) -> tuple[Timed, list[tuple[Kernel, Widths]]]:
        least = float("inf")
        for problem in self.problems(table):
            forecast = problem.forecast
            state = spend(forecast, problem.worth, target_ms)
            if state is not None:
                timed = self._timed(forecast, problem.worth, problem.ladders, state, table, target_ms)
                return timed, forecast.points(state.levels, state.dropped)
            everything = range(len(self.blocks))
            least = min(least, forecast.total([len(ladder.ends) for ladder in problem.ladders], everything))
        steps = group_steps(self.lowered, self.coupling, table, most=FINEST)
        raise BudgetUnreachable(self._unreachable(target_ms, least, steps))

    def problems(self, table: LatencyTable) -> Iterator[Problem]:
        """Yield what is to be searched by a table; first without groups whose removal is inexact, where that is so."""
        steps = group_steps(self.lowered, self.coupling, table, most=FINEST)
        ladders = ladders_of(self.coupling, self.scores, steps)
        taken = [{*block.nodes, block.sum} for block in self.blocks]
        for chosen in attempts(self.coupling, self.inexact):
            allowed = [ladder for ladder in ladders if chosen.issuperset(ladder.groups)]
            forecast = Forecast(self.lowered, table, self.coupling, allowed, taken)
            yield Problem(allowed, forecast, self._worth(allowed))

    def _worth(self, ladders: Sequence[Ladder]) -> Worth:
        sites = {group.name: {site.tensor for site in group.sites} for group in self.coupling.groups}
        held = [set(block.tensors) for block in self.blocks]
        inside = tuple(
            frozenset(k for k, ladder in enumerate(ladders) if all(sites[name] <= own for name in ladder.groups))
            for own in held
        )
        within = tuple(
            frozenset(k for k, part in enumerate(self.blocks) if part.sum in block.nodes) for block in self.blocks
        )
        return Worth(
            worth_of(ladders, self.signal),
            tuple(self.signal.blocks[block.name] for block in self.blocks),
            inside,
            within,
        )

    def _unreachable(self, target_ms: float, least: float, steps: Mapping[str, int]) -> str:
        if not steps and not self.blocks:
            return (
                f"cannot get down to {target_ms:.4g} ms: nothing of the model may be cut, all of it is frozen or kept"
            )
        step = max(steps.values(), default=1)
        why = f" (widths go in steps of {step} on this device)" if step > 1 else ""
        return (
            f"cannot get down to {target_ms:.4g} ms: with every group at its smallest{why}, {least:.4g} ms are "
            "predicted; raise the budget, or set it in --macs, which takes any width"
        )

    def _timed(
        self,
        forecast: Forecast,
        worth: Worth,
        ladders: Sequence[Ladder],
        state: State,
        table: LatencyTable,
        target_ms: float,
    ) -> Timed:
        kept_ms = forecast.total(state.levels, state.dropped)
        dead: dict[str, list[int]] = {}
        for ladder, level in zip(ladders, state.levels, strict=True):
            for name, unit in ladder.order[: ladder.ends[level - 1]] if level else ():
                dead.setdefault(name, []).append(unit)
        reasons = {
            name: reason
            for k, ladder in enumerate(ladders)
            for name, reason in _reasons(k, ladder, forecast, worth, state, table)
        }
        for gone in state.dropped:
            names = [name for k in worth.inside[gone] for name in ladders[k].groups]
            reasons.update(dict.fromkeys(names, f"goes with '{self.blocks[gone].name}', which is dropped"))
        for b, block in enumerate(self.blocks):
            reasons[block.name] = self._why_block(b, forecast, worth, state)
        plan = plan_from_dead(
            self.coupling,
            dead,
            fingerprint=self.fingerprint,
            inputs=self.inputs,
            budget=self.budget,
            settings=self.settings,
            notes=[
                f"predicted by the latency table: {kept_ms:.4g} ms, aimed at {target_ms:.4g}",
                *_untimed(self.lowered, table),
            ],
            reasons=reasons,
        )
        return Timed(plan, kept_ms, tuple(self.blocks[b].name for b in sorted(state.dropped)))

    def _why_block(self, b: int, forecast: Forecast, worth: Worth, state: State) -> str:
        others = replace(state, dropped=state.dropped - {b})
        without = worth.without(others, b)
        if without is None:
            return "goes with the block that it is in"
        ms = forecast.block(state.levels, b, others.dropped)
        lost = worth.lost(without) - worth.lost(others)
        rate = f"{1e3 * ms / lost:.3g} us for each unit of importance" if lost > 0 else "at no importance"
        return f"{'dropped' if b in state.dropped else 'stays'}: without it {ms:.3g} ms less, {rate}"


def carried(plan: Plan, coupling: Coupling) -> Plan:
    """Return the plan for what is left of its program without some blocks: units go whose positions all go in it.

    Without a block fewer axes are tied to each other, never more; so what lived and died together still can.
    """
    going = {(cut.tensor, cut.axis): frozenset(cut.dead) for cut in plan.cuts}
    dead: dict[str, list[int]] = {}
    for group in coupling.groups:
        site = group.sites[0]
        gone = going.get((site.tensor, site.axis), frozenset())
        dead[group.name] = [unit for unit, owned in enumerate(site.index) if gone.issuperset(owned)]
    made = plan_from_dead(coupling, dead, fingerprint=plan.fingerprint, inputs=plan.inputs)
    return replace(plan, dead=made.dead, sizes=made.sizes, cuts=made.cuts)


def _untimed(lowered: Lowered, table: LatencyTable) -> list[str]:
    """What counts as nothing: operators without a timed form, and kernels that do not run by themselves."""
    idle = [p for p in lowered.placed if (entry := table.entries.get(p.kernel.key)) and not any(entry.grid)]
    names = [*lowered.untimed, *(name for placed in idle for name in placed.nodes[:1])]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"the latency table does not time {len(names)} operations: {', '.join(names[:3])}{more}"]


def _reasons(
    k: int, ladder: Ladder, forecast: Forecast, worth: Worth, state: State, table: LatencyTable
) -> list[tuple[str, str]]:
    """For each group of a ladder: what it costs, what it saves, and why it stands where it stands."""
    level, sizes = state.levels[k], [len(ladder.order), *(len(ladder.order) - end for end in ladder.ends)]
    here, size = forecast.cost(state.levels, k, state.dropped), sizes[level]
    dense = here + forecast.change(state.levels, k, 0, state.dropped)
    words = [
        f"{size} of {sizes[0]}: its kernels take {here:.3g} ms" + (f", with all of them {dense:.3g}" if level else "")
    ]
    if level:
        back = forecast.change(state.levels, k, level - 1, state.dropped)
        words.append(f"{sizes[level - 1]} would add {back:.3g} ms")
    if level < len(ladder.ends):
        saves = -forecast.change(state.levels, k, level + 1, state.dropped)
        lost = worth.ladders[k][level + 1] - worth.ladders[k][level]
        rate = f"{1e3 * saves / lost:.3g} us for each unit of importance" if lost > 0 else "at no importance"
        words.append(
            f"{sizes[level + 1]} would save {saves:.3g} ms, {rate}"
            if saves > 0
            else f"{sizes[level + 1]} would save nothing"
        )
    else:
        words.append("no smaller width is on a stair edge" if ladder.ends else "no width below is on a stair edge")
    if told := _stair(size, forecast.kinds(k), table):
        words.append(told)
    return [(name, "; ".join(words)) for name in ladder.groups]


def _stair(size: int, kinds: Sequence[str], table: LatencyTable) -> str:
    """What one unit less would cost, by the curve of the kind of kernel that pays in the widest steps."""
    stairs = max((table.stairs[kind] for kind in kinds if kind in table.stairs), key=lambda s: s.step, default=None)
    if stairs is None or stairs.step == 1 or size % stairs.step:
        return ""
    edges = [w for w in stairs.curve if w % stairs.step == 0 and w - 1 in stairs.curve]
    edge = min(edges, key=lambda w: abs(w - size), default=None)
    if edge is None:
        return ""
    ratio = stairs.curve[edge - 1] / stairs.curve[edge]
    if ratio > 1.03:
        return f"{size} → {size - 1} would be slower ({ratio:.2f}x at {edge} → {edge - 1} on this device)"
    return f"{size} → {size - 1} would save nothing (the device pays in steps of {stairs.step})"
