"""What a state of the search takes by a latency table: kernels at the widths that the surviving units make.

A state says how many steps each ladder has taken, and which blocks are gone. Only what a move touches is worked out
again, so that a search may look at thousands of moves a second.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.core import Coupling, Kernel, LabelledGraph, Layers, Placed, Widths
from surgery.latency import LatencyTable, kind_of
from surgery.planning.ladders import Ladder
from surgery.planning.lowering import Lowered

Levels = Sequence[int]
"""Steps taken on each ladder."""
_REMEMBERED = 200_000
"""Changes of a forecast that are kept at most: some hundred bytes each."""


def widths_of(
    lowered: Lowered, labelled: LabelledGraph, dead: Mapping[str, Sequence[int]]
) -> list[tuple[Kernel, Widths]]:
    """Return each kernel of a program with the widths that a plan's dead units leave."""
    lengths = lowered.sizes.lengths(labelled.dead_roots(dead))
    return [(p.kernel, tuple(lengths[s] for s in p.slots)) for p in lowered.placed]


def predicted_ms(points: Sequence[tuple[Kernel, Widths]], table: LatencyTable) -> float:
    """Return the milliseconds that kernels take one after the other; those that the table lacks count as nothing."""
    return sum((table.ms(kernel, widths) or 0.0) + table.overhead_ms for kernel, widths in points)


def group_steps(lowered: Lowered, coupling: Coupling, table: LatencyTable, *, most: int) -> dict[str, int]:
    """Return for each group the step that its widths had best be multiples of.

    It is the largest step of the kernels that the group's units reach; where the device shows no stairs, one that gives
    `most` steps, since a finer search gains nothing.
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
    """One slot: for each layer of its labels, which ladder takes each index away, and when."""

    ladders: tuple[int, ...]
    layers: tuple[tuple[Any, Any], ...]


class Forecast:
    """Predicts the latency of states.

    Args:
        lowered: the kernels.
        table: holds all of them; those it lacks count as nothing.
        coupling: of the same program.
        ladders: by which groups shrink.
        blocks: for each block that may go, the names of the operations that go with it.
    """

    def __init__(
        self,
        lowered: Lowered,
        table: LatencyTable,
        coupling: Coupling,
        ladders: Sequence[Ladder],
        blocks: Sequence[Collection[str]] = (),
    ) -> None:
        self._table, self._ladders = table, ladders
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

    def total(self, levels: Levels, dropped: Collection[int] = ()) -> float:
        """Return the predicted milliseconds of a state."""
        gone = self._missing(dropped)
        return sum(self._ms(k, levels) for k in range(len(self._placed)) if k not in gone)

    def change(self, levels: Levels, ladder: int, to: int, dropped: Collection[int] = ()) -> float:
        """Return by how many milliseconds a state changes when one ladder goes to another level."""
        ladders, blocks = self._near[ladder]
        key = (ladder, to, tuple(levels[k] for k in ladders), tuple(b for b in blocks if b in dropped))
        if key not in self._changes:
            if len(self._changes) > _REMEMBERED:
                self._changes.clear()
            moved = list(levels)
            moved[ladder] = to
            gone = self._missing(dropped)
            touched = [k for k in self._touched[ladder] if k not in gone]
            self._changes[key] = sum(self._ms(k, moved) - self._ms(k, levels) for k in touched)
        return self._changes[key]

    def cost(self, levels: Levels, ladder: int, dropped: Collection[int] = ()) -> float:
        """Return the milliseconds of all kernels that one ladder's units reach."""
        gone = self._missing(dropped)
        return sum(self._ms(k, levels) for k in self._touched[ladder] if k not in gone)

    def block(self, levels: Levels, block: int, dropped: Collection[int] = ()) -> float:
        """Return the milliseconds that a block takes in a state in which it is still there."""
        gone = self._missing(dropped)
        return sum(self._ms(k, levels) for k in self._gone[block] if k not in gone)

    @property
    def hangs_on(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each kernel the ladders that its widths hang on, and the blocks that it goes with."""
        return [
            (
                tuple(ladder for ladder, touched in enumerate(self._touched) if k in touched),
                tuple(block for block, gone in enumerate(self._gone) if k in gone),
            )
            for k in range(len(self._placed))
        ]

    def kernel(self, k: int, levels: Levels) -> float:
        """Return the milliseconds of one kernel in a state in which it is still there."""
        return self._ms(k, levels)

    def kinds(self, ladder: int) -> list[str]:
        """Return the kinds of kernels that one ladder's units reach."""
        return sorted({kind_of(self._placed[k].kernel) for k in self._touched[ladder]})

    def points(self, levels: Levels, dropped: Collection[int] = ()) -> list[tuple[Kernel, Widths]]:
        """Return the kernels of a state with their widths."""
        gone = self._missing(dropped)
        return [(p.kernel, self._widths(p, levels)) for k, p in enumerate(self._placed) if k not in gone]

    def _around(self, kernels: Collection[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ladders that widths of these kernels hang on, and the blocks that some of them go with."""
        ladders = {ladder for k in kernels for slot in self._placed[k].slots for ladder in self._axes[slot].ladders}
        return tuple(sorted(ladders)), tuple(b for b, gone in enumerate(self._gone) if not gone.isdisjoint(kernels))

    def _missing(self, dropped: Collection[int]) -> Collection[int]:
        return frozenset().union(*(self._gone[b] for b in dropped)) if dropped else frozenset()

    def _ms(self, k: int, levels: Levels) -> float:
        placed = self._placed[k]
        widths = self._widths(placed, levels)
        if (k, widths) not in self._times:
            ms = self._table.ms(placed.kernel, widths)
            self._times[k, widths] = (ms or 0.0) + self._table.overhead_ms
        return self._times[k, widths]

    def _widths(self, placed: Placed, levels: Levels) -> Widths:
        return tuple(self._length(slot, levels) for slot in placed.slots)

    def _length(self, slot: int, levels: Levels) -> int:
        axis = self._axes[slot]
        key = (slot, *(levels[ladder] for ladder in axis.ladders))
        if key not in self._lengths:
            alive: Any = True
            for owner, rank in axis.layers:
                removed = np.array([self._removed(k, levels) for k in range(len(self._ladders))] + [0])
                alive = alive & (rank >= removed[owner])
            self._lengths[key] = int(np.sum(alive))
        return self._lengths[key]

    def _removed(self, ladder: int, levels: Levels) -> int:
        return self._ladders[ladder].ends[levels[ladder] - 1] if levels[ladder] else 0


def _axis(layers: Layers, ladders: Sequence[Ladder], labelled: LabelledGraph) -> _Axis:
    """Where each index of an axis stands in the order of removal; owner -1, the last of all, never goes."""
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
