"""Make a plan from scores, costs and a budget. Does not import torch.

Cost decreases along a schedule of steps, so the first state that meets the budget is found by bisection, in about a
dozen calls of the cost function; undoing its last step would exceed the budget. Only `plan_from_dead` converts units to
positions of tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.config import Budget, Selection
from surgery.core import KEPT, CostFn, Coupling, Plan, Program, Scores
from surgery.coupling import NO_SETTINGS, plan_from_dead
from surgery.errors import BudgetUnreachable, InvalidInput
from surgery.planning.ladders import Ladder, ladders_of


def allocate(
    program: Program,
    coupling: Coupling,
    scores: Scores,
    budget: Budget,
    *,
    cost: CostFn | None,
    dense: int | None = None,
    selection: Selection | None = None,
    settings: Mapping[str, Any] = NO_SETTINGS,
) -> Plan:
    """Return the plan that meets the budget with the fewest removals, in order of score.

    Args:
        program: the program, as traced.
        coupling: its groups.
        scores: importance per unit; within a group the lowest is removed first, ties in order of the units.
        budget: fraction of the dense model to keep.
        cost: removed units per group name → remaining MACs or parameters, according to the budget; None for `channels`,
        which is the fraction of the units of all groups.
        dense: cost of the dense model, if `cost` is for a model without some of its blocks.
        selection: selection of units, with these options. `scope`: `global` ranks the steps of all groups by their
            units' mean score; `uniform` keeps one fraction of every group, rounded up to a permitted size. `round_to`:
            the remaining size of a pruned group is a multiple of this, counted in positions along the group's longest
            extent on a first axis (the output channels of its widest producer). `inexact`: `never` leaves inexact
            groups untouched, `if-needed` prunes them, ranked with the others, only if the budget cannot be met
            otherwise, `always` ranks them with the others.
        settings: criterion, seed and so on, stored in the plan unchanged.

    Returns:
        A plan whose remaining cost is at most the budget's fraction of the dense cost, but exceeds it if the last step
        is undone. A step is one unit (a multiple for `round_to`, one of each piece if pieces must stay equal), or one
        width level with `uniform`. Every group keeps at least one unit, or one multiple of `round_to`.

    Raises:
        BudgetUnreachable: not even the smallest model meets the budget.
        InvalidInput: scores do not fit the groups, or there is no cost function.
        IllegalCut: an axis would become empty.
    """
    selection = selection or Selection()
    _validate_scores(coupling, scores)
    meter = _Meter.of(coupling, budget, cost, dense)
    ladders = ladders_of(coupling, scores, selection.round_to)
    dead, notes = _least(coupling, ladders, meter, selection)
    return plan_from_dead(
        coupling,
        dead,
        fingerprint=program.fingerprint,
        inputs=program.inputs,
        budget=budget,
        settings=settings,
        notes=notes,
    )


def _least(
    coupling: Coupling, ladders: Sequence[Ladder], meter: _Meter, selection: Selection
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the fewest removed units that meet the budget, and notes for the plan."""
    round_to, inexact = selection.round_to, selection.inexact
    make_schedule = global_schedule if selection.scope == "global" else uniform_schedule
    notes: list[str] = []
    for chosen in attempts(coupling, inexact):
        schedule = make_schedule([ladder for ladder in ladders if chosen.issuperset(ladder.groups)])
        dead = _first_within(schedule, meter)
        if dead is not None:
            left_whole = _left_whole(coupling, chosen, ladders, inexact=inexact, round_to=round_to)
            return dead, [*notes, f"kept {meter.kept(dead)}", *left_whole]
        smallest = schedule.dead(schedule.length)
        notes.append(
            f"with {len(chosen)} of {len(coupling.groups)} groups at their smallest, {meter.kept(smallest)} remain"
        )
    reached = notes[-1] if ladders else "no unit of it can be removed"
    hints = _hints(coupling, shrinks=meter.share(smallest) < 1, inexact=inexact, round_to=round_to)
    raise BudgetUnreachable(_unreachable(meter, reached, coupling, hints))


@dataclass(frozen=True, slots=True)
class Schedule:
    """States 0 (dense) to `length`; `taken(state)` is the number of steps taken on each ladder."""

    ladders: Sequence[Ladder]
    length: int
    taken: Callable[[int], Sequence[int]]

    def dead(self, state: int) -> dict[str, tuple[int, ...]]:
        """Return group name → removed units, for pruned groups."""
        dead: dict[str, list[int]] = {}
        for ladder, steps in zip(self.ladders, self.taken(state), strict=True):
            for name, unit in ladder.order[: ladder.ends[steps - 1]] if steps else ():
                dead.setdefault(name, []).append(unit)
        return {name: tuple(sorted(units)) for name, units in dead.items()}


def global_schedule(ladders: Sequence[Ladder]) -> Schedule:
    """Take steps one at a time, least important first; ties in the order of groups, then of steps."""
    owners = np.array([k for k, ladder in enumerate(ladders) for _ in ladder.ends], dtype=np.int64)
    keys = np.array([key for ladder in ladders for key in ladder.keys], dtype=np.float64)
    ranked = owners[np.argsort(keys, kind="stable")]

    def taken(state: int) -> list[int]:
        return [int(steps) for steps in np.bincount(ranked[:state], minlength=len(ladders))]

    return Schedule(ladders, len(ranked), taken)


def uniform_schedule(ladders: Sequence[Ladder]) -> Schedule:
    """Shrink all groups together: at level f each keeps the smallest permitted size of at least fraction f."""
    fractions = [np.array(ladder.fractions) for ladder in ladders]
    levels = sorted({fraction for ladder in ladders for fraction in ladder.fractions}, reverse=True)

    def taken(state: int) -> list[int]:
        return [int((kept >= levels[state - 1]).sum()) if state else 0 for kept in fractions]

    return Schedule(ladders, len(levels), taken)


@dataclass(frozen=True, slots=True)
class _Meter:
    """The remaining cost, in the budget's unit."""

    kind: str
    fraction: float
    dense: int
    cost: CostFn

    @classmethod
    def of(cls, coupling: Coupling, budget: Budget, cost: CostFn | None, dense: int | None) -> _Meter:
        if budget.kind == "channels":
            total = sum(group.size for group in coupling.groups)
            return cls("channels", budget.amount, total, lambda dead: total - sum(map(len, dead.values())))
        if cost is None:
            raise InvalidInput(f"a budget on {budget.kind} needs a cost function: pass `cost`, or give budget channels")
        return cls(budget.kind, budget.amount, cost({}) if dense is None else dense, cost)

    def share(self, dead: Mapping[str, Sequence[int]]) -> float:
        """Remaining fraction of the dense cost (as a quotient, since 0.29 * 100 is not 29)."""
        return self.cost(dead) / self.dense if self.dense else 1.0

    def kept(self, dead: Mapping[str, Sequence[int]]) -> str:
        """Return a description of the remaining cost."""
        return f"{self.cost(dead):,} of {self.dense:,} {self.kind} ({_percent(self.share(dead))})"


def _first_within(schedule: Schedule, meter: _Meter) -> dict[str, tuple[int, ...]] | None:
    """Return the removed units of the first state within the budget, or None."""
    if meter.share({}) <= meter.fraction:
        return {}  # dropping blocks was sufficient
    over, within = 0, schedule.length
    if meter.share(schedule.dead(within)) > meter.fraction:
        return None
    while within - over > 1:
        middle = (over + within) // 2
        if meter.share(schedule.dead(middle)) > meter.fraction:
            over = middle
        else:
            within = middle
    return schedule.dead(within)


def attempts(coupling: Coupling, inexact: str) -> list[frozenset[str]]:
    """Return sets of names of groups that may be pruned, to be tried in turn."""
    every = frozenset(group.name for group in coupling.groups)
    exact = frozenset(group.name for group in coupling.groups if group.inexact is None)
    attempts = {"never": [exact], "always": [every], "if-needed": [exact, every]}[inexact]
    return attempts[:1] if exact == every else attempts


# Messages.
# --------------------------------------------------------------------------------------------------------------


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"


def _left_whole(
    coupling: Coupling, chosen: frozenset[str], ladders: Sequence[Ladder], *, inexact: str, round_to: int
) -> list[str]:
    """Return notes on groups that were not considered."""
    notes = []
    spared = Counter(group.inexact for group in coupling.groups if group.name not in chosen)
    why = "inexact cuts were ruled out" if inexact == "never" else "exact groups sufficed"
    notes += [f"{count} inexact groups left whole, as {why}: {reason}" for reason, count in spared.items()]
    narrow = [
        name
        for ladder in ladders
        for name in ladder.groups
        if name in chosen and not ladder.ends and len(ladder.order) > len(ladder.groups)
    ]
    if narrow:
        notes.append(f"left whole for want of a smaller multiple of {round_to}: {', '.join(narrow)}")
    return notes


def _unreachable(meter: _Meter, reached: str, coupling: Coupling, hints: Sequence[str]) -> str:
    """Return an error that says what was reachable, what is frozen, and what to change."""
    wish = f"cannot get down to {_percent(meter.fraction)} of the {meter.kind}: {reached}"
    return f"{wish}; frozen: {'; '.join(_frozen_reasons(coupling)) or 'nothing'}; {' or '.join(hints)}"


def _hints(coupling: Coupling, *, shrinks: bool, inexact: str, round_to: int) -> list[str]:
    hints = ["raise the budget"] if shrinks else []
    if any(frozen.reason.startswith(KEPT) for frozen in coupling.frozen):
        hints.append("narrow the --keep patterns")
    if inexact == "never" and any(group.inexact for group in coupling.groups):
        hints.append("allow inexact groups to be cut")
    if round_to > 1:
        hints.append(f"round to less than {round_to}")
    return hints or ["this model has nothing that could be removed"]


def _frozen_reasons(coupling: Coupling, most: int = 3) -> list[str]:
    """Return the reasons affecting most parameters; a tensor counts once per reason."""
    tensors: dict[str, set[str]] = {}
    for frozen in coupling.frozen:
        tensors.setdefault(frozen.reason, set()).add(frozen.tensor)
    sizes = {reason: sum(math.prod(coupling.shapes[name]) for name in names) for reason, names in tensors.items()}
    ranked = sorted(sizes, key=lambda reason: -sizes[reason])[:most]
    return [f"{reason} ({sizes[reason]:,} parameters: {', '.join(sorted(tensors[reason])[:2])})" for reason in ranked]


def _validate_scores(coupling: Coupling, scores: Scores) -> None:
    for group in coupling.groups:
        values = scores.get(group.name, ())
        if len(values) != group.size:
            raise InvalidInput(f"group '{group.name}' has {group.size} units and {len(values)} scores: score it again")
        if not all(map(math.isfinite, values)):
            raise InvalidInput(f"group '{group.name}' has scores that are not finite numbers")
