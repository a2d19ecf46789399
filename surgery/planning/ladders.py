"""Steps and order in which groups may shrink. Does not import torch.

A *ladder* is the sequence of steps in which a group, or several that must have equal sizes, may shrink.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from surgery.core import Coupling, Group, Scores, Site

Unit = tuple[str, int]
"""A group's name, and a unit of it."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """The steps in which one group, or several together, may shrink.

    Attributes:
        groups: names of the groups.
        order: all their units, in removal order.
        ends: number of units removed after each step, increasing; every group keeps a unit.
        keys: importance of each step: mean score of its units, non-decreasing along the ladder.
    """

    groups: tuple[str, ...]
    order: tuple[Unit, ...]
    ends: tuple[int, ...]
    keys: tuple[float, ...]

    @property
    def fractions(self) -> tuple[float, ...]:
        """The remaining fraction of the units after each step."""
        size = len(self.order)
        return tuple((size - end) / size for end in self.ends)


def ladders_of(coupling: Coupling, scores: Scores, round_to: int | Mapping[str, int]) -> list[Ladder]:
    """Return the ladders of all groups, in order of the groups; groups that must have equal sizes share one.

    Args:
        coupling: the groups.
        scores: importance per unit.
        round_to: the remaining size of a pruned group is a multiple of this; one number, or one per group.
    """
    multiples = dict.fromkeys((g.name for g in coupling.groups), round_to) if isinstance(round_to, int) else round_to
    bundles = {piece[0][0]: pieces for pieces in coupling.equal_pieces if (piece := pieces[0])}
    together = {name for pieces in coupling.equal_pieces for piece in pieces for name, _ in piece}
    groups = {group.name: group for group in coupling.groups}
    out = []
    for name, group in groups.items():
        if name in bundles:
            out.append(_alike(bundles[name], groups, scores, multiples, coupling))
        elif name not in together:
            out.append(_single(group, scores[name], multiples[name], coupling.required_units.get(name, ())))
    return out


def _single(group: Group, scores: Sequence[float], round_to: int, floors: Sequence[Sequence[int]]) -> Ladder:
    """Remove units one by one, the least important first; the best of each required set remains."""
    ranked = sorted(range(group.size), key=lambda unit: scores[unit])
    staying = {max(units, key=lambda unit: (scores[unit], unit)) for units in floors} or {ranked[-1]}
    order = [u for u in ranked if u not in staying] + [u for u in ranked if u in staying]
    left = sum(widths := _widths(group))
    ends = []
    for removed, unit in enumerate(order[: -len(staying)], start=1):
        left -= widths[unit]
        if left > 0 and left % round_to == 0:
            ends.append(removed)
    return _ladder((group.name,), [(group.name, unit) for unit in order], ends, {group.name: tuple(scores)})


def _alike(
    pieces: Sequence[Sequence[Unit]],
    groups: Mapping[str, Group],
    scores: Scores,
    round_to: Mapping[str, int],
    coupling: Coupling,
) -> Ladder:
    """Remove the least important unit of each piece, then the next of each, and so on; the last round remains."""
    names = tuple(dict.fromkeys(name for piece in pieces for name, _ in piece))
    ranked = [sorted(piece, key=lambda u: scores[u[0]][u[1]]) for piece in pieces]
    order = [unit for turn in zip(*ranked, strict=True) for unit in turn]
    last = {piece[-1] for piece in ranked}
    floors = [{(name, unit) for unit in units} for name in names for units in coupling.required_units.get(name, ())]
    widths = {name: _widths(groups[name]) for name in names}
    left = {name: sum(width) for name, width in widths.items()}
    ends = []
    for removed, (name, unit) in enumerate(order[: -len(pieces)], start=1):
        left[name] -= widths[name][unit]
        whole = removed % len(pieces) == 0 and all(n > 0 and n % round_to[owner] == 0 for owner, n in left.items())
        if whole and all(floor & (last | set(order[removed:])) for floor in floors):
            ends.append(removed)
    return _ladder(names, order, ends, scores)


def _ladder(names: tuple[str, ...], order: Sequence[Unit], ends: Sequence[int], scores: Scores) -> Ladder:
    values = np.array([scores[name][unit] for name, unit in order], dtype=np.float64)
    means = [float(values[start:end].mean()) for start, end in pairwise([0, *ends])]
    keys = np.maximum.accumulate(means) if means else np.empty(0)  # already sorted, except for rounding and pieces
    return Ladder(names, tuple(order), tuple(ends), tuple(keys.tolist()))


def _widths(group: Group) -> list[int]:
    """Return positions per unit along the group's longest extent on a first axis, the channels seen by a runtime.

    Later axes may repeat a channel many times (a linear layer after flattening), which would hide its width.
    """

    def stretch(site: Site) -> int:
        return sum(len(owned) for owned in site.index)

    first = [site for site in group.sites if site.axis == 0]
    widest = max(first or group.sites, key=stretch, default=None)
    return [len(owned) for owned in widest.index] if widest else [1] * group.size
