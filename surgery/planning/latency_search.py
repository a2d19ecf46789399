"""Search for latency budgets: minimise the importance lost within a time. Does not import torch.

Latency is not linear in channels: all widths between two edges of the device's staircase cost like the upper edge, and
the saving of a step depends on neighbouring widths. The search therefore moves from edge to edge, each time by the move
with the best ratio of saved time to lost importance, and recomputes all costs after each move; a final pass exchanges
moves as long as this increases the importance kept. Droppable blocks compete with channels by the same measure. Since
blocks are large, greedy search misjudges them: it is run several times, with the loss of blocks scaled down and up, and
the best result by true loss is used.

Source: after Yang et al. 2018, NetAdapt (arXiv:1804.03230), and Shen et al. 2022, HALP (arXiv:2110.10811).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgery.importance import Consumer, Signal, loss_of
from surgery.planning.forecast import Forecast, State
from surgery.planning.ladders import Ladder

LOOK_AHEAD = 4
"""Maximum steps of a ladder per move; single steps may save nothing if several units share a stair."""
EXCHANGES = 200
PRICES = (1.0, 0.7, 0.55, 1.5)
"""Factors for the loss of blocks in successive searches."""


@dataclass(frozen=True, slots=True, eq=False)
class ImportanceLoss:
    """Importance lost at each level of each ladder, and by each block.

    Attributes:
        ladders: for each ladder, importance lost at level 0, 1, ..: starts at 0 and is non-decreasing.
        blocks: importance lost by dropping each block.
        inside: for each block, the ladders whose units all belong to it.
        within: for each block, the blocks that are part of it.
    """

    ladders: tuple[tuple[float, ...], ...]
    blocks: tuple[float, ...] = ()
    inside: tuple[frozenset[int], ...] = ()
    within: tuple[frozenset[int], ...] = ()

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
    """Return the importance lost at each level of each ladder: the signal lost by the consumers.

    Losses measured on images are summed. Otherwise, narrowing one layer to nothing costs more than removing as many
    units from several layers, and a unit of a residual stream, with many consumers, costs more than one with a single
    consumer.

    Args:
        ladders: ladders of the groups.
        signal: consumers of the units, or measured losses of units.
    """
    if signal.losses is not None:
        return tuple(_summed(ladder, signal.losses) for ladder in ladders)
    return tuple(_lost_to_consumers(ladder, signal.consumers) for ladder in ladders)


def _summed(ladder: Ladder, losses: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
    sums = np.concatenate([[0.0], np.cumsum([max(0.0, losses[name][unit]) for name, unit in ladder.order])])
    return tuple(float(sums[end]) for end in (0, *ladder.ends))


def _lost_to_consumers(ladder: Ladder, consumers: Mapping[str, Sequence[Consumer]]) -> tuple[float, ...]:
    """A layer that consumes several of the ladder's groups loses its shares of all of them."""
    relevance = {consumer.name: consumer.relevance for name in ladder.groups for consumer in consumers[name]}
    shares = {
        layer: {name: c.shares for name in ladder.groups for c in consumers[name] if c.name == layer}
        for layer in relevance
    }
    total = np.zeros(len(ladder.ends) + 1)
    for layer in relevance:
        own = [shares[layer][name][unit] if name in shares[layer] else 0.0 for name, unit in ladder.order]
        sums = np.concatenate([[0.0], np.cumsum(own)])
        total += [loss_of(relevance[layer], float(sums[end])) for end in (0, *ladder.ends)]
    return tuple(float(x) for x in np.maximum.accumulate(total))


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
        moves = [(move, saved) for move in _moves(loss, state) if (saved := move.saved(forecast, state)) > 0]
        if not moves:
            return None
        excess = left - target_ms
        # Time saved per importance lost; savings beyond the target do not count.
        move, saved = max(moves, key=lambda m: (min(m[1], excess) / max(m[0].lost, 1e-12), -m[0].lost))
        state, left = move.after(loss, state), left - saved
    return state


@dataclass(frozen=True, slots=True)
class _Move:
    """A further removal: a ladder down to a level, or a block."""

    lost: float
    ladder: int = -1
    to: int = 0
    block: int = -1

    def saved(self, forecast: Forecast, state: State) -> float:
        if self.block >= 0:
            return forecast.block(state, self.block)
        return -forecast.change(state, self.ladder, self.to)

    def after(self, loss: ImportanceLoss, state: State) -> State:
        after = loss.without(state, self.block) if self.block >= 0 else state.moved(self.ladder, self.to)
        assert after is not None, "moves begin where they can be made"
        return after


def _moves(loss: ImportanceLoss, state: State) -> Iterator[_Move]:
    gone = loss.gone_with_blocks(state)
    for k, lost in enumerate(loss.ladders):
        level = state.levels[k]
        for to in range(level + 1, min(level + 1 + LOOK_AHEAD, len(lost))) if k not in gone else ():
            yield _Move(lost[to] - lost[level], k, to)
    for b in range(len(loss.blocks)):
        if (after := loss.without(state, b)) is not None:
            yield _Move(loss.of(after) - loss.of(state), block=b)


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
    undone = [(lost - loss.of(before), before, saved) for before, saved in _undone(forecast, loss, state)]
    for won, before, saved in sorted(undone, key=lambda found: -found[0]):
        if won <= most:
            break
        if saved + slack >= 0:
            most, best = won, before
            continue
        for move in sorted(_moves(loss, before), key=lambda move: move.lost):
            if won - move.lost <= most:
                break
            if saved + move.saved(forecast, before) + slack >= 0:
                most, best = won - move.lost, move.after(loss, before)
                break
    return best


def _undone(forecast: Forecast, loss: ImportanceLoss, state: State) -> Iterator[tuple[State, float]]:
    """Yield states with a removal undone, and the (negative) time saved."""
    for k in range(len(loss.ladders)):
        level = state.levels[k]
        for to in range(max(0, level - LOOK_AHEAD), level):
            yield state.moved(k, to), -forecast.change(state, k, to)
    for b in state.dropped:
        before = replace(state, dropped=state.dropped - {b})
        yield before, -forecast.block(before, b)
