"""Predict the latency of a search state by a latency table, from kernels at the remaining widths.

A state consists of the steps taken on each ladder, and the dropped blocks. A move changes few kernels, and only those
are recomputed, so that a search can evaluate thousands of moves per second.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surgery.core import Coupling, Kernel, LabelledGraph, Layers, Placed, Widths
from surgery.latency import LatencyTable, kind_of
from surgery.planning.ladders import Ladder
from surgery.planning.lowering import Lowered

_REMEMBERED = 200_000
"""Maximum number of cached changes of a forecast, of a few hundred bytes each."""
SHOWN = 4
"""Staircases at most."""
_POINTS = 96


@dataclass(frozen=True, slots=True)
class State:
    """Steps taken on each ladder, and the blocks that are dropped."""

    levels: tuple[int, ...]
    dropped: frozenset[int] = frozenset()

    def moved(self, ladder: int, to: int) -> State:
        """Return the state with one ladder at another level."""
        levels = list(self.levels)
        levels[ladder] = to
        return replace(self, levels=tuple(levels))


def widths_of(
    lowered: Lowered, labelled: LabelledGraph, dead: Mapping[str, Sequence[int]]
) -> list[tuple[Kernel, Widths]]:
    """Return each kernel of a program with its widths after pruning."""
    lengths = lowered.sizes.lengths(labelled.dead_roots(dead))
    return [(p.kernel, tuple(lengths[s] for s in p.slots)) for p in lowered.placed]


def predicted_ms(points: Sequence[tuple[Kernel, Widths]], table: LatencyTable) -> float:
    """Return the sum of the kernels' milliseconds; kernels missing in the table count zero."""
    return sum((table.ms(kernel, widths) or 0.0) + table.overhead_ms for kernel, widths in points)


def group_steps(lowered: Lowered, coupling: Coupling, table: LatencyTable, *, most: int) -> dict[str, int]:
    """Return, for each group, the step of which its widths should be multiples.

    It is the largest step of the kernels affected by the group's units; if the device has no stairs, one that gives
    `most` steps, since a finer search brings no benefit.
    """
    labelled = coupling.labelled
    owners = _owners(labelled)
    steps: dict[str, int] = {}
    for placed in lowered.placed:
        step = table.step(placed.kernel)
        for slot in placed.slots:
            for layer in lowered.sizes.axes[slot]:
                for name in {owners[label] for label in np.unique(layer).tolist() if label in owners}:
                    steps[name] = max(steps.get(name, 1), step)
    return {g.name: step if (step := steps.get(g.name, 1)) > 1 else max(1, g.size // most) for g in coupling.groups}


def _owners(labelled: LabelledGraph) -> dict[int, str]:
    return {label: name for name, labels in labelled.roots.items() for label in labels}


@dataclass(frozen=True, slots=True)
class _Axis:
    """One slot: for each layer of its labels, the ladder and step that removes each index."""

    ladders: tuple[int, ...]
    layers: tuple[tuple[Any, Any], ...]


class Forecast:
    """Predicts the latency of states.

    Args:
        lowered: the kernels.
        table: latency table; missing kernels count zero.
        coupling: coupling of the same program.
        ladders: ladders of the groups.
        blocks: for each droppable block, the names of the operations removed with it.
    """

    def __init__(
        self,
        lowered: Lowered,
        table: LatencyTable,
        coupling: Coupling,
        ladders: Sequence[Ladder],
        blocks: Sequence[Collection[str]] = (),
    ) -> None:
        self.table, self._ladders = table, ladders
        self._placed = list(lowered.placed)
        self._axes = [_axis(layers, ladders, coupling.labelled) for layers in lowered.sizes.axes]
        self._blocks = [frozenset(nodes) for nodes in blocks]
        self._lengths: dict[tuple[int, ...], int] = {}
        self._times: dict[tuple[int, Widths], float] = {}
        touched: list[set[int]] = [set() for _ in ladders]
        for k, placed in enumerate(self._placed):
            for slot in placed.slots:
                for ladder in self._axes[slot].ladders:
                    touched[ladder].add(k)
        self._touched = [sorted(kernels) for kernels in touched]
        self._gone = [
            frozenset(k for k, p in enumerate(self._placed) if nodes & set(p.nodes)) for nodes in self._blocks
        ]
        self._near = [self._around(kernels) for kernels in self._touched]
        self._changes: dict[tuple[Any, ...], float] = {}

    def total(self, state: State) -> float:
        """Return the predicted milliseconds of a state."""
        return sum(self._ms(k, state) for k in self._there(range(len(self._placed)), state))

    def change(self, state: State, ladder: int, to: int) -> float:
        """Return the change in milliseconds if one ladder moves to another level."""
        ladders, blocks = self._near[ladder]
        key = (ladder, to, tuple(state.levels[k] for k in ladders), tuple(b for b in blocks if b in state.dropped))
        if key not in self._changes:
            if len(self._changes) > _REMEMBERED:
                self._changes.clear()
            moved = state.moved(ladder, to)
            touched = self._there(self._touched[ladder], state)
            self._changes[key] = sum(self._ms(k, moved) - self._ms(k, state) for k in touched)
        return self._changes[key]

    def cost(self, state: State, ladder: int) -> float:
        """Return the milliseconds of all kernels affected by one ladder."""
        return sum(self._ms(k, state) for k in self._there(self._touched[ladder], state))

    def block(self, state: State, block: int) -> float:
        """Return the milliseconds of a block in a state that contains it."""
        return sum(self._ms(k, state) for k in self._there(self._gone[block], state))

    def kernel(self, k: int, state: State) -> float:
        """Return the milliseconds of one kernel in a state that contains it."""
        return self._ms(k, state)

    def points(self, state: State) -> list[tuple[Kernel, Widths]]:
        """Return the kernels of a state with their widths."""
        there = self._there(range(len(self._placed)), state)
        return [(self._placed[k].kernel, self._widths(self._placed[k], state)) for k in there]

    def kinds(self, ladder: int) -> list[str]:
        """Return the kinds of kernels affected by one ladder."""
        return sorted({kind_of(self._placed[k].kernel) for k in self._touched[ladder]})

    @property
    def dependencies(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each kernel, the ladders that determine its widths, and the blocks it belongs to."""
        return [
            (
                tuple(ladder for ladder, touched in enumerate(self._touched) if k in touched),
                tuple(block for block, gone in enumerate(self._gone) if k in gone),
            )
            for k in range(len(self._placed))
        ]

    def _around(self, kernels: Collection[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ladders that determine the widths of these kernels, and the blocks they belong to."""
        ladders = {ladder for k in kernels for slot in self._placed[k].slots for ladder in self._axes[slot].ladders}
        return tuple(sorted(ladders)), tuple(b for b, gone in enumerate(self._gone) if not gone.isdisjoint(kernels))

    def _there(self, kernels: Iterable[int], state: State) -> list[int]:
        """Return the kernels that do not belong to a dropped block."""
        gone = frozenset[int]().union(*(self._gone[b] for b in state.dropped))
        return [k for k in kernels if k not in gone]

    def _ms(self, k: int, state: State) -> float:
        placed = self._placed[k]
        widths = self._widths(placed, state)
        if (k, widths) not in self._times:
            self._times[k, widths] = predicted_ms([(placed.kernel, widths)], self.table)
        return self._times[k, widths]

    def _widths(self, placed: Placed, state: State) -> Widths:
        return tuple(self._length(slot, state) for slot in placed.slots)

    def _length(self, slot: int, state: State) -> int:
        axis = self._axes[slot]
        key = (slot, *(state.levels[ladder] for ladder in axis.ladders))
        if key not in self._lengths:
            removed = np.array([self._removed(k, state) for k in range(len(self._ladders))] + [0])
            alive: Any = True
            for owner, rank in axis.layers:
                alive = alive & (rank >= removed[owner])
            self._lengths[key] = int(np.sum(alive))
        return self._lengths[key]

    def _removed(self, ladder: int, state: State) -> int:
        level = state.levels[ladder]
        return self._ladders[ladder].ends[level - 1] if level else 0


def _axis(layers: Layers, ladders: Sequence[Ladder], labelled: LabelledGraph) -> _Axis:
    """Return the position of each index of an axis in the removal order; owner -1 is never removed."""
    places: Mapping[int, tuple[int, int]] = _places(ladders, labelled)
    made = []
    for layer in layers:
        found = [places.get(label, (-1, 0)) for label in layer.tolist()]
        owner, rank = np.array(found, dtype=np.int64).reshape(-1, 2).T
        made.append((owner, rank))
    owners = sorted({int(k) for owner, _ in made for k in np.unique(owner) if k >= 0})
    return _Axis(tuple(owners), tuple(made))


def _places(ladders: Sequence[Ladder], labelled: LabelledGraph) -> dict[int, tuple[int, int]]:
    return {
        labelled.roots[name][unit]: (k, rank)
        for k, ladder in enumerate(ladders)
        for rank, (name, unit) in enumerate(ladder.order)
    }


@dataclass(frozen=True, slots=True)
class Staircase:
    """A kernel's time over its last width, usually that of its result; other widths are as planned.

    Attributes:
        title: description of the kernel.
        nodes: the operations it covers.
        widths: widths at which the table was evaluated.
        ms: milliseconds at these widths.
        dense: the width before.
        kept: the width after.
    """

    title: str
    nodes: tuple[str, ...]
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    dense: int
    kept: int


def staircases(
    lowered: Lowered, labelled: LabelledGraph, table: LatencyTable, dead: Mapping[str, Sequence[int]]
) -> tuple[Staircase, ...]:
    """Return the curves of the dense network's costliest kernels, one of each kind, pruned ones first.

    Args:
        lowered: the network's kernels, without dropped blocks.
        labelled: labels of the same program.
        table: latency table of the device.
        dead: removed units of the plan.
    """
    dense, kept = (widths_of(lowered, labelled, gone) for gone in ({}, dead))
    rows = list(zip(lowered.placed, dense, kept, strict=True))
    rows = [row for row in rows if row[1][0].letters]
    rows.sort(key=lambda row: (row[1][1][-1] == row[2][1][-1], -(table.ms(*row[1]) or 0.0)))
    found: dict[str, Staircase] = {}
    for placed, (kernel, before), (_, after) in rows:
        if len(found) == SHOWN:
            break
        if kernel.title not in found and (curve := _curve(kernel, table, before, after, placed.nodes)) is not None:
            found[kernel.title] = curve
    return tuple(found.values())


def _curve(
    kernel: Kernel, table: LatencyTable, before: Widths, after: Widths, nodes: Sequence[str]
) -> Staircase | None:
    """Return the curve over the last width; None if the kernel is not in the table."""
    dense = before[-1]
    step = max(1, dense // _POINTS)
    widths = sorted({*range(step, dense + 1, step), dense, max(1, after[-1])})
    times = [table.ms(kernel, (*after[:-1], width)) for width in widths]
    if any(t is None for t in times) or not any(times):
        return None
    ms = tuple(round(t or 0.0, 6) for t in times)
    return Staircase(kernel.title, tuple(nodes), tuple(widths), ms, dense, after[-1])
