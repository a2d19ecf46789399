"""Make a plan from scores, costs and a budget. Does not import torch.

Cost decreases along a schedule of steps, so the first state that meets the budget is found by bisection. A *ladder* is
the sequence of steps in which a group, or several that must have equal sizes, may shrink.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from surgery.config import Budget, Selection
from surgery.core import KEPT, CostFn, Coupling, Group, Plan, Program, Scores
from surgery.coupling import NO_SETTINGS, plan_from_dead
from surgery.errors import BudgetUnreachable, InvalidInput

Unit = tuple[str, int]  # a group's name, and a unit of it
_Dead = dict[str, tuple[int, ...]]


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
        selection: `scope`: `global` ranks the steps of all groups by their units' mean score; `uniform` keeps one
            fraction of every group, rounded up to a permitted size. `round_to`: the remaining size of a pruned group is
            a multiple of this, counted in output channels of its widest producer. `inexact`: `never` leaves inexact
            groups untouched, `if-needed` prunes them only if the budget cannot be met otherwise, `always` ranks them
            with the others.
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
    if budget.kind == "channels":
        dense = total = sum(group.size for group in coupling.groups)
        cost = lambda dead: total - sum(map(len, dead.values()))  # noqa: E731
    if cost is None:
        raise InvalidInput(f"a budget on {budget.kind} needs a cost function: pass `cost`, or give budget channels")
    meter = _Meter(budget.kind, budget.amount, cost({}) if dense is None else dense, cost)
    ladders = ladders_of(coupling, scores, selection.round_to)
    dead, notes = _least(coupling, ladders, meter, selection)
    return plan_from_dead(program, coupling, dead, budget=budget, settings=settings, notes=notes)


def _least(
    coupling: Coupling, ladders: Sequence[Ladder], meter: _Meter, selection: Selection
) -> tuple[_Dead, list[str]]:
    """Return the fewest removed units that meet the budget, and notes for the plan."""
    notes: list[str] = []
    for chosen in attempts(coupling, selection.inexact):
        allowed = [ladder for ladder in ladders if chosen.issuperset(ladder.groups)]
        last, state = _global_schedule(allowed) if selection.scope == "global" else _uniform_schedule(allowed)
        dead = _first_within(last, state, meter)
        if dead is not None:
            left_whole = _left_whole(coupling, chosen, ladders, selection)
            return dead, [*notes, f"kept {meter.kept(dead)}", *left_whole]
        smallest = state(last)
        notes.append(
            f"with {len(chosen)} of {len(coupling.groups)} groups at their smallest, {meter.kept(smallest)} remain"
        )
    wish = f"cannot get down to {_percent(meter.fraction)} of the {meter.kind}"
    reached = notes[-1] if ladders else "no unit of it can be removed"
    frozen = "; ".join(_frozen_reasons(coupling)) or "nothing"
    hints = _hints(coupling, selection, shrinks=meter.share(smallest) < 1)
    figures = {"target": meter.fraction, "least": meter.share(smallest)}
    raise BudgetUnreachable(f"{wish}: {reached}; frozen: {frozen}; {' or '.join(hints)}", figures)


def _first_within(last: int, state: Callable[[int], _Dead], meter: _Meter) -> _Dead | None:
    """Return the removed units of the first state within the budget, or None; 0 if dropping blocks was sufficient."""
    if meter.share(state(last)) > meter.fraction:
        return None
    return state(bisect_left(range(last), True, key=lambda k: meter.share(state(k)) <= meter.fraction))


def _global_schedule(ladders: Sequence[Ladder]) -> tuple[int, Callable[[int], _Dead]]:
    """Take steps one at a time, least important first; ties in the order of groups, then of steps."""
    owners = np.array([k for k, ladder in enumerate(ladders) for _ in ladder.ends], dtype=np.int64)
    keys = np.array([key for ladder in ladders for key in ladder.keys], dtype=np.float64)
    ranked = owners[np.argsort(keys, kind="stable")]
    return len(ranked), lambda state: removed(ladders, np.bincount(ranked[:state], minlength=len(ladders)).tolist())


def _uniform_schedule(ladders: Sequence[Ladder]) -> tuple[int, Callable[[int], _Dead]]:
    """Shrink all groups together: at level f each keeps the smallest permitted size of at least fraction f."""
    fractions = [np.array([(len(x.order) - end) / len(x.order) for end in x.ends]) for x in ladders]
    levels = [np.inf, *sorted({fraction for kept in fractions for fraction in kept.tolist()}, reverse=True)]
    return len(levels) - 1, lambda state: removed(ladders, [int((x >= levels[state]).sum()) for x in fractions])


@dataclass(frozen=True, slots=True)
class _Meter:
    """The remaining cost, in the budget's unit."""

    kind: str
    fraction: float
    dense: int
    cost: CostFn

    def share(self, dead: Mapping[str, Sequence[int]]) -> float:
        """Remaining fraction of the dense cost (as a quotient, since 0.29 * 100 is not 29)."""
        return self.cost(dead) / self.dense if self.dense else 1.0

    def kept(self, dead: Mapping[str, Sequence[int]]) -> str:
        """Return a description of the remaining cost."""
        return f"{self.cost(dead):,} of {self.dense:,} {self.kind} ({_percent(self.share(dead))})"


def attempts(coupling: Coupling, inexact: str) -> list[frozenset[str]]:
    """Return sets of names of groups that may be pruned, to be tried in turn."""
    every = frozenset(group.name for group in coupling.groups)
    exact = frozenset(group.name for group in coupling.groups if group.inexact is None)
    attempts = {"never": [exact], "always": [every], "if-needed": [exact, every]}[inexact]
    return attempts[:1] if exact == every else attempts


# Ladders. -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ladder:
    """The steps in which one group, or several together, may shrink."""

    groups: tuple[str, ...]
    order: tuple[Unit, ...]  # all their units, in removal order
    ends: tuple[int, ...]  # number of units removed after each step, increasing; every group keeps a unit
    keys: tuple[float, ...]  # importance of each step: mean score of its units, non-decreasing along the ladder


def ladders_of(coupling: Coupling, scores: Scores, round_to: int | Mapping[str, int]) -> list[Ladder]:
    """Return the ladders of all groups, in order of the groups; groups that must have equal sizes share one.

    The remaining size of a pruned group is a multiple of `round_to`, one number or one per group.
    """
    multiples = dict.fromkeys((g.name for g in coupling.groups), round_to) if isinstance(round_to, int) else round_to
    bundles = {pieces[0][0][0]: pieces for pieces in coupling.equal_pieces if pieces[0]}
    together = {name for pieces in coupling.equal_pieces for piece in pieces for name, _ in piece}
    groups = {group.name: group for group in coupling.groups}
    alone = {g.name: [[(g.name, unit) for unit in range(g.size)]] for g in coupling.groups if g.name not in together}
    pieces = {**alone, **bundles}
    return [_ladder(pieces[name], groups, scores, multiples, coupling) for name in groups if name in pieces]


def _ladder(
    pieces: Sequence[Sequence[Unit]],
    groups: Mapping[str, Group],
    scores: Scores,
    round_to: Mapping[str, int],
    coupling: Coupling,
) -> Ladder:
    """Remove the least important unit of each piece, then the next of each, and so on.

    Of a single piece the best unit of each required set remains; of several, the last of each.
    """

    def score(unit: Unit) -> float:
        return scores[unit[0]][unit[1]]

    names = tuple(dict.fromkeys(name for piece in pieces for name, _ in piece))
    required = [{(name, unit) for unit in units} for name in names for units in coupling.required_units.get(name, ())]
    ranked = [sorted(piece, key=score) for piece in pieces]
    order, left = [unit for turn in zip(*ranked, strict=True) for unit in turn], len(pieces)
    if len(pieces) == 1 and required:
        staying = {max(units, key=lambda unit: (score(unit), unit[1])) for units in required}
        order, left = sorted(order, key=staying.__contains__), len(staying)
    widths = {name: _widths(groups[name]) for name in names}
    sizes = {name: sum(width) for name, width in widths.items()}
    ends = []
    for count, (name, unit) in enumerate(order[:-left], start=1):
        sizes[name] -= widths[name][unit]
        whole = count % len(pieces) == 0 and all(n > 0 and n % round_to[owner] == 0 for owner, n in sizes.items())
        if whole and (len(pieces) == 1 or all(units.intersection(order[count:]) for units in required)):
            ends.append(count)
    values = np.array([score(unit) for unit in order], dtype=np.float64)
    means = [float(values[start:end].mean()) for start, end in pairwise([0, *ends])]
    keys = np.maximum.accumulate(means) if means else np.empty(0)  # already sorted, except for rounding and pieces
    return Ladder(names, tuple(order), tuple(ends), tuple(keys.tolist()))


def removed(ladders: Sequence[Ladder], levels: Sequence[int]) -> _Dead:
    """Return group name → removed units, for pruned groups, after these numbers of steps."""
    dead: dict[str, list[int]] = {}
    for ladder, level in zip(ladders, levels, strict=True):
        for name, unit in ladder.order[: ladder.ends[level - 1]] if level else ():
            dead.setdefault(name, []).append(unit)
    return {name: tuple(sorted(units)) for name, units in dead.items()}


def _widths(group: Group) -> list[int]:
    """Return positions per unit along the group's longest extent on a first axis: later axes may repeat channels."""
    first = [site for site in group.sites if site.axis == 0]
    widest = max(first or group.sites, key=lambda site: sum(map(len, site.index)), default=None)
    return [len(owned) for owned in widest.index] if widest else [1] * group.size


# Messages. ------------------------------------------------------------------------------------------------------------


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"


def _left_whole(
    coupling: Coupling, chosen: frozenset[str], ladders: Sequence[Ladder], selection: Selection
) -> list[str]:
    """Return notes on groups that were not considered."""
    spared = Counter(group.inexact for group in coupling.groups if group.name not in chosen)
    why = "inexact cuts were ruled out" if selection.inexact == "never" else "exact groups sufficed"
    notes = [f"{count} inexact groups left whole, as {why}: {reason}" for reason, count in spared.items()]
    stuck = [ladder for ladder in ladders if not ladder.ends and len(ladder.order) > len(ladder.groups)]
    narrow = [name for ladder in stuck for name in ladder.groups if name in chosen]
    if narrow:
        notes.append(f"left uncut, since there is no smaller multiple of {selection.round_to}: {', '.join(narrow)}")
    return notes


def _hints(coupling: Coupling, selection: Selection, *, shrinks: bool) -> list[str]:
    hints = ["raise the budget"] if shrinks else []
    if any(frozen.reason.startswith(KEPT) for frozen in coupling.frozen):
        hints.append("keep fewer layers with --keep")
    if selection.inexact == "never" and any(group.inexact for group in coupling.groups):
        hints.append("allow inexact groups to be cut")
    if selection.round_to > 1:
        hints.append(f"round to less than {selection.round_to}")
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
