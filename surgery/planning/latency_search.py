"""Search for latency budgets: minimise the importance lost within a time, as in docs/explanation/latency-budgets.md.

Widths move from edge to edge of the device's latency staircase, each time by the move with the best ratio of saved time
to lost importance; a final pass exchanges moves. Blocks compete by the same measure, at several prices, since greedy
search misjudges what is large. Does not import torch.

Source: after Yang et al. 2018, NetAdapt (arXiv:1804.03230), and Shen et al. 2022, HALP (arXiv:2110.10811).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from surgery.core import Coupling, Widths
from surgery.importance import Signal, loss_of
from surgery.latency import LatencyTable, Point, kind_of
from surgery.planning.allocation import Ladder
from surgery.planning.lowering import Lowered

LOOK_AHEAD = 4  # maximum steps of a ladder per move; single steps may save nothing if several units share a stair
EXCHANGES = 200
PRICES = (1.0, 0.7, 0.55, 1.5)  # factors for the loss of blocks in successive searches
SHOWN, _POINTS = 4, 96  # maximum number of staircases, and about how many widths each has


@dataclass(frozen=True, slots=True)
class State:
    """Steps taken on each ladder, and the blocks that are dropped."""

    levels: tuple[int, ...]
    dropped: frozenset[int] = frozenset()

    def moved(self, ladder: int, to: int) -> State:
        """Return the state with one ladder at another level."""
        return State((*self.levels[:ladder], to, *self.levels[ladder + 1 :]), self.dropped)


def predicted_ms(points: Iterable[Point], table: LatencyTable) -> float:
    """Return the sum of the kernels' milliseconds; kernels missing in the table count zero."""
    return sum((table.ms(kernel, widths) or 0.0) + table.overhead_ms for kernel, widths in points)


def group_steps(lowered: Lowered, coupling: Coupling, table: LatencyTable, *, most: int) -> dict[str, int]:
    """Return, for each group, the step of which its widths should be multiples.

    It is the largest step of the kernels affected by the group's units; if the device has no stairs, one that gives
    `most` steps, since a finer search brings no benefit.
    """
    owners = {label: name for name, labels in coupling.labelled.roots.items() for label in labels}
    steps: dict[str, int] = {}
    for placed in lowered.placed:
        step = table.step(placed.kernel)
        for layer in (layer for slot in placed.slots for layer in lowered.sizes.axes[slot]):
            for name in {owners[label] for label in np.unique(layer).tolist() if label in owners}:
                steps[name] = max(steps.get(name, 1), step)
    return {g.name: step if (step := steps.get(g.name, 1)) > 1 else max(1, g.size // most) for g in coupling.groups}


class Forecast:
    """Predicts the latency of states; `blocks` are the names of the operations removed with each droppable block."""

    def __init__(
        self,
        lowered: Lowered,
        table: LatencyTable,
        coupling: Coupling,
        ladders: Sequence[Ladder],
        blocks: Sequence[Collection[str]] = (),
    ) -> None:
        self.table, self._ladders, self._placed = table, ladders, lowered.placed
        places = {
            coupling.labelled.roots[name][unit]: (k, rank)
            for k, ladder in enumerate(ladders)
            for rank, (name, unit) in enumerate(ladder.order)
        }
        # For each slot's layers, the ladder (-1 for none) and step that removes each index.
        self._axes: list[list[Any]] = [
            [np.array([places.get(x, (-1, 0)) for x in layer.tolist()]).reshape(-1, 2).T for layer in axis]
            for axis in lowered.sizes.axes
        ]
        self._owners = [sorted({int(k) for owner, _ in axis for k in np.unique(owner)} - {-1}) for axis in self._axes]
        self._depends = [sorted({k for slot in p.slots for k in self._owners[slot]}) for p in self._placed]
        self._touched = [[k for k, on in enumerate(self._depends) if ladder in on] for ladder in range(len(ladders))]
        self._gone = [
            frozenset(k for k, p in enumerate(self._placed) if not frozenset(nodes).isdisjoint(p.nodes))
            for nodes in blocks
        ]
        self._lengths: dict[tuple[int, ...], int] = {}
        self._times: dict[tuple[int, ...], float] = {}

    def total(self, state: State) -> float:
        """Return the predicted milliseconds of a state."""
        return sum(self.kernel(k, state) for k in self._there(range(len(self._placed)), state))

    def saved(self, state: State, ladder: int, to: int) -> float:
        """Return the milliseconds saved if one ladder moves to another level."""
        moved, there = state.moved(ladder, to), self._there(self._touched[ladder], state)
        return sum(self.kernel(k, state) - self.kernel(k, moved) for k in there)

    def cost(self, state: State, ladder: int) -> float:
        """Return the milliseconds of all kernels affected by one ladder."""
        return sum(self.kernel(k, state) for k in self._there(self._touched[ladder], state))

    def block(self, state: State, block: int) -> float:
        """Return the milliseconds of a block in a state that contains it."""
        return sum(self.kernel(k, state) for k in self._there(self._gone[block], state))

    def kernel(self, k: int, state: State) -> float:
        """Return the milliseconds of one kernel in a state that contains it."""
        key = (k, *(state.levels[ladder] for ladder in self._depends[k]))
        if key not in self._times:
            self._times[key] = predicted_ms([(self._placed[k].kernel, self._widths(k, state))], self.table)
        return self._times[key]

    def points(self, state: State) -> list[Point]:
        """Return the kernels of a state with their widths."""
        there = self._there(range(len(self._placed)), state)
        return [(self._placed[k].kernel, self._widths(k, state)) for k in there]

    def kinds(self, ladder: int) -> list[str]:
        """Return the kinds of kernels affected by one ladder."""
        return sorted({kind_of(self._placed[k].kernel) for k in self._touched[ladder]})

    def _there(self, kernels: Iterable[int], state: State) -> list[int]:
        """Return the kernels that do not belong to a dropped block."""
        gone = frozenset[int]().union(*(self._gone[b] for b in state.dropped))
        return [k for k in kernels if k not in gone]

    def _widths(self, k: int, state: State) -> Widths:
        return tuple(self._length(slot, state) for slot in self._placed[k].slots)

    def _length(self, slot: int, state: State) -> int:
        key = (slot, *(state.levels[ladder] for ladder in self._owners[slot]))
        if key not in self._lengths:
            steps = zip(self._ladders, state.levels, strict=True)
            removed = np.array([*(ladder.ends[level - 1] if level else 0 for ladder, level in steps), 0])
            alive = [rank >= removed[owner] for owner, rank in self._axes[slot]]
            self._lengths[key] = int(np.sum(np.logical_and.reduce(alive)))
        return self._lengths[key]


@dataclass(frozen=True, slots=True, eq=False)
class ImportanceLoss:
    """Importance lost at each level of each ladder (from 0, non-decreasing), and by each block."""

    ladders: tuple[tuple[float, ...], ...]
    blocks: tuple[float, ...] = ()
    inside: tuple[frozenset[int], ...] = ()  # for each block, the ladders whose units all belong to it
    within: tuple[frozenset[int], ...] = ()  # for each block, the blocks that are part of it

    def of(self, state: State) -> float:
        """Return the importance lost in a state."""
        gone = self.gone_with_blocks(state)
        levels = zip(self.ladders, state.levels, strict=True)
        widths = sum(lost[level] for k, (lost, level) in enumerate(levels) if k not in gone)
        return widths + sum(self.blocks[b] for b in state.dropped)

    def gone_with_blocks(self, state: State) -> frozenset[int]:
        """Return the ladders whose units all belong to dropped blocks."""
        return frozenset[int]().union(*(self.inside[b] for b in state.dropped))

    def without(self, state: State, block: int) -> State | None:
        """Return the state with one more dropped block; None if it is already gone, possibly with another."""
        parts = self.within or (frozenset(),) * len(self.blocks)
        if block in state.dropped or any(block in parts[b] for b in state.dropped):
            return None
        return replace(state, dropped=(state.dropped - parts[block]) | {block})


def ladder_losses(ladders: Sequence[Ladder], signal: Signal) -> tuple[tuple[float, ...], ...]:
    """Return the importance lost at each level of each ladder: measured on images, or signal lost by consumers."""
    return tuple(tuple(_lost(ladder, signal).tolist()) for ladder in ladders)


def _lost(ladder: Ladder, signal: Signal) -> Any:
    """Return the importance lost at each level: a layer loses its shares of all groups of the ladder that it reads."""
    ends = [0, *ladder.ends]
    if signal.losses is not None:
        return _sums([max(0.0, signal.losses[name][unit]) for name, unit in ladder.order])[ends]
    total = np.zeros(len(ends))
    consumers = [(name, consumer) for name in ladder.groups for consumer in signal.consumers[name]]
    for layer, relevance in {consumer.name: consumer.relevance for _, consumer in consumers}.items():
        shares = {name: consumer.shares for name, consumer in consumers if consumer.name == layer}
        own = _sums([shares[name][unit] if name in shares else 0.0 for name, unit in ladder.order])
        total += [loss_of(relevance, float(lost)) for lost in own[ends]]
    return np.maximum.accumulate(total)


def _sums(values: Sequence[float]) -> Any:
    return np.concatenate([[0.0], np.cumsum(values)])


def search(forecast: Forecast, loss: ImportanceLoss, target_ms: float) -> State | None:
    """Return a state within `target_ms` that loses little importance; None if none is fast enough."""
    dense = State((0,) * len(loss.ladders))
    found = []
    for price in PRICES if loss.blocks else PRICES[:1]:
        priced = replace(loss, blocks=tuple(price * lost for lost in loss.blocks))
        state = _descend(forecast, priced, dense, target_ms)
        if state is not None:
            found.append(_exchange(forecast, loss, state, target_ms))
    return min(found, key=loss.of, default=None)


def _descend(forecast: Forecast, loss: ImportanceLoss, state: State, target_ms: float) -> State | None:
    """Take the best move until the target is met."""
    left = forecast.total(state)
    while left > target_ms:
        excess = left - target_ms
        moves = [(lost, after, ms) for lost, after, saved in _moves(forecast, loss, state) if (ms := saved()) > 0]
        if not moves:
            return None
        # Time saved per importance lost; savings beyond the target do not count.
        _, state, ms = max(moves, key=lambda m: (min(m[2], excess) / max(m[0], 1e-12), -m[0]))
        left -= ms
    return state


def _moves(
    forecast: Forecast, loss: ImportanceLoss, state: State
) -> Iterator[tuple[float, State, Callable[[], float]]]:
    """Yield further removals: importance lost, the state after it, and a function that returns the time saved."""
    gone = loss.gone_with_blocks(state)
    for k, lost in enumerate(loss.ladders):
        level = state.levels[k]
        for to in range(level + 1, min(level + 1 + LOOK_AHEAD, len(lost))) if k not in gone else ():
            yield lost[to] - lost[level], state.moved(k, to), partial(forecast.saved, state, k, to)
    for b in range(len(loss.blocks)):
        if (after := loss.without(state, b)) is not None:
            yield loss.of(after) - loss.of(state), after, partial(forecast.block, state, b)


def _exchange(forecast: Forecast, loss: ImportanceLoss, state: State, target_ms: float) -> State:
    """Undo moves, or exchange one for another, as long as this increases the importance kept within the time."""
    for _ in range(EXCHANGES):
        better = _best_exchange(forecast, loss, state, target_ms - forecast.total(state))
        if better is None:
            return state
        state = better
    return state


def _best_exchange(forecast: Forecast, loss: ImportanceLoss, state: State, slack: float) -> State | None:
    """Return the exchange that keeps most importance, skipping those that cannot beat the best so far."""
    lost = loss.of(state)
    most, best = 1e-9 * max(1.0, lost), None
    undone = [(lost - loss.of(before), before, ms) for before, ms in _undone(forecast, loss, state)]
    for won, before, ms in sorted(undone, key=lambda found: -found[0]):
        if won <= most:
            break
        if ms + slack >= 0:
            most, best = won, before
            continue
        for lost_again, after, saved in sorted(_moves(forecast, loss, before), key=lambda move: move[0]):
            if won - lost_again <= most:
                break
            if ms + saved() + slack >= 0:
                most, best = won - lost_again, after
                break
    return best


def _undone(forecast: Forecast, loss: ImportanceLoss, state: State) -> Iterator[tuple[State, float]]:
    """Yield states with a removal undone, and the (negative) time saved."""
    for k in range(len(loss.ladders)):
        level = state.levels[k]
        for to in range(max(0, level - LOOK_AHEAD), level):
            yield state.moved(k, to), forecast.saved(state, k, to)
    for b in state.dropped:
        before = replace(state, dropped=state.dropped - {b})
        yield before, -forecast.block(before, b)


# Staircases. ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Staircase:
    """A kernel's time over its last width, usually that of its result, which goes from `dense` to `kept`."""

    title: str
    nodes: tuple[str, ...]
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    dense: int
    kept: int


def staircases(lowered: Lowered, table: LatencyTable, dead: Mapping[str, Sequence[int]]) -> tuple[Staircase, ...]:
    """Return the curves of the dense network's costliest kernels, one of each kind, pruned ones first."""
    widths = [(before, after) for (_, before), (_, after) in zip(lowered.points(), lowered.points(dead), strict=True)]
    rows = [(placed, *pair) for placed, pair in zip(lowered.placed, widths, strict=True) if placed.slots]
    rows.sort(key=lambda row: (row[1][-1] == row[2][-1], -(table.ms(row[0].kernel, row[1]) or 0.0)))
    found: dict[str, Staircase] = {}
    for placed, before, after in rows:
        kernel, dense, kept = placed.kernel, before[-1], after[-1]
        if kernel.title in found or len(found) == SHOWN:
            continue
        step = max(1, dense // _POINTS)
        steps = sorted({*range(step, dense + 1, step), dense, max(1, kept)})
        times = [table.ms(kernel, (*after[:-1], width)) for width in steps]
        if any(times) and None not in times:
            ms = tuple(round(t or 0.0, 6) for t in times)
            found[kernel.title] = Staircase(kernel.title, tuple(placed.nodes), tuple(steps), ms, dense, kept)
    return tuple(found.values())
