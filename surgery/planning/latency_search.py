"""Scores, a latency table and a budget make a plan: the most importance that fits into the time.

Time does not fall evenly with channels: a step of the device's stairs buys much, all widths between cost like the next
edge, and what a step buys hangs on the widths around it. So the search moves from edge to edge, takes each time what
gives most time for the importance that it costs, and works out all costs anew after each move; a last pass exchanges
steps as long as that keeps more. Blocks that may be dropped compete with channels in the same currency. They are large
pieces, which a greedy search misjudges one way or the other: it begins several times, with blocks priced lower and
higher than they are worth, and the best of its ends, at the true price, is taken.

Source: after Yang et al. 2018, NetAdapt (arXiv:1804.03230), and Shen et al. 2022, HALP (arXiv:2110.10811).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgery.importance import Reader, Signal, loss_of
from surgery.planning.forecast import Forecast
from surgery.planning.ladders import Ladder

LOOK_AHEAD = 4
"""How many steps of a ladder one move may take: single steps may buy nothing where several units share a stair."""
ROUNDS = 200
PRICES = (1.0, 0.7, 0.55, 1.5)
"""What blocks count in one search after the other, in their own worth."""


@dataclass(frozen=True, slots=True)
class State:
    """Steps taken on each ladder, and the blocks that are gone."""

    levels: tuple[int, ...]
    dropped: frozenset[int] = frozenset()

    def moved(self, ladder: int, to: int) -> State:
        """Return the state with one ladder at another level."""
        levels = list(self.levels)
        levels[ladder] = to
        return replace(self, levels=tuple(levels))


@dataclass(frozen=True, slots=True, eq=False)
class Worth:
    """Importance lost at each level of each ladder, and with each block.

    Attributes:
        ladders: for each ladder, importance lost at level 0, 1, ..: begins with 0 and never falls.
        blocks: importance lost with each block.
        inside: for each block, the ladders whose units go with it altogether.
        within: for each block, the blocks that are part of it.
    """

    ladders: tuple[tuple[float, ...], ...]
    blocks: tuple[float, ...] = ()
    inside: tuple[frozenset[int], ...] = ()
    within: tuple[frozenset[int], ...] = ()

    def without(self, state: State, block: int) -> State | None:
        """Return the state with one block more gone; None where it is gone, by itself or with another."""
        parts = self.within or (frozenset(),) * len(self.blocks)
        if block in state.dropped or any(block in parts[b] for b in state.dropped):
            return None
        return replace(state, dropped=(state.dropped - parts[block]) | {block})

    def lost(self, state: State) -> float:
        """Return the importance that a state has lost."""
        gone = frozenset().union(*(self.inside[b] for b in state.dropped)) if state.dropped else frozenset()
        widths = sum(
            lost[level] for k, (lost, level) in enumerate(zip(self.ladders, state.levels, strict=True)) if k not in gone
        )
        return widths + sum(self.blocks[b] for b in state.dropped)


def worth_of(ladders: Sequence[Ladder], signal: Signal) -> tuple[tuple[float, ...], ...]:
    """Return what is lost at each level of each ladder: how much of the signal its readers no longer get.

    Where images told what is lost with each unit, that is summed up.

    So narrowing one layer to nothing costs more than taking as many units from several, and a unit of a residual
    stream, which many layers read, costs more than one that a single layer reads.

    Args:
        ladders: by which groups shrink.
        signal: who reads the units, or what is lost with each.
    """
    if signal.losses is not None:
        return tuple(_summed(ladder, signal.losses) for ladder in ladders)
    return tuple(_lost_on(ladder, signal.readers) for ladder in ladders)


def _summed(ladder: Ladder, losses: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
    sums = np.concatenate([[0.0], np.cumsum([max(0.0, losses[name][unit]) for name, unit in ladder.order])])
    return tuple(float(sums[end]) for end in (0, *ladder.ends))


def _lost_on(ladder: Ladder, readers: Mapping[str, Sequence[Reader]]) -> tuple[float, ...]:
    """A layer that reads several of the ladder's groups loses what it reads of all of them."""
    heard = {reader.name: reader.heard for name in ladder.groups for reader in readers[name]}
    shares = {
        layer: {name: r.shares for name in ladder.groups for r in readers[name] if r.name == layer} for layer in heard
    }
    total = np.zeros(len(ladder.ends) + 1)
    for layer, loudness in heard.items():
        own = [shares[layer][name][unit] if name in shares[layer] else 0.0 for name, unit in ladder.order]
        sums = np.concatenate([[0.0], np.cumsum(own)])
        total += [loss_of(loudness, float(sums[end])) for end in (0, *ladder.ends)]
    return tuple(float(x) for x in np.maximum.accumulate(total))


def spend(forecast: Forecast, worth: Worth, target_ms: float, *, start: State | None = None) -> State | None:
    """Return a state that takes at most `target_ms` and loses little importance; None where none is fast enough."""
    begin = start or State((0,) * len(worth.ladders))
    ends = []
    for price in PRICES if worth.blocks else PRICES[:1]:
        priced = replace(worth, blocks=tuple(price * lost for lost in worth.blocks))
        end = _descended(forecast, priced, begin, target_ms)
        if end is not None:
            ends.append(_polished(forecast, worth, end, target_ms))
    return min(ends, key=worth.lost, default=None)


def _descended(forecast: Forecast, worth: Worth, state: State, target_ms: float) -> State | None:
    left = forecast.total(state.levels, state.dropped)
    while left > target_ms:
        steps = [(step, saved) for step in _steps(worth, state) if (saved := step.saved(forecast, state)) > 0]
        if not steps:
            return None
        wanted = left - target_ms
        step, saved = max(steps, key=lambda found: (_rate(found[0], found[1], wanted), -found[0].lost))
        state, left = step.after(worth, state), left - saved
    return state


@dataclass(frozen=True, slots=True)
class _Step:
    """Something more that may go: a ladder down to a level, or a block."""

    lost: float
    ladder: int = -1
    to: int = 0
    block: int = -1

    def saved(self, forecast: Forecast, state: State) -> float:
        if self.block >= 0:
            return forecast.block(state.levels, self.block, state.dropped)
        return -forecast.change(state.levels, self.ladder, self.to, state.dropped)

    def after(self, worth: Worth, state: State) -> State:
        after = worth.without(state, self.block) if self.block >= 0 else state.moved(self.ladder, self.to)
        assert after is not None, "steps begin where they can be taken"
        return after


def _rate(step: _Step, saved: float, wanted: float) -> float:
    """Time won for importance lost; what is won beyond what is wanted does not count."""
    return min(saved, wanted) / max(step.lost, 1e-12)


def _steps(worth: Worth, state: State) -> Iterator[_Step]:
    """All steps that a state leaves."""
    gone = frozenset().union(*(worth.inside[b] for b in state.dropped)) if state.dropped else frozenset()
    for k, lost in enumerate(worth.ladders):
        at = state.levels[k]
        for to in range(at + 1, min(at + 1 + LOOK_AHEAD, len(lost))) if k not in gone else ():
            yield _Step(lost[to] - lost[at], k, to)
    for b in range(len(worth.blocks)):
        if (after := worth.without(state, b)) is not None:
            yield _Step(worth.lost(after) - worth.lost(state), block=b)


def _polished(forecast: Forecast, worth: Worth, state: State, target_ms: float) -> State:
    """Put steps back, and exchange one for another, as long as that keeps more importance within the time."""
    for _ in range(ROUNDS):
        total = forecast.total(state.levels, state.dropped)
        better = _best_exchange(forecast, worth, state, target_ms - total)
        if better is None:
            return state
        state = better
    return state


def _best_exchange(forecast: Forecast, worth: Worth, state: State, slack: float) -> State | None:
    """The exchange that keeps most; those that cannot keep more than the best so far are not looked at."""
    lost = worth.lost(state)
    most, best = 1e-9 * max(1.0, lost), None
    upward = [(lost - worth.lost(before), before, saved) for before, saved in _upward(forecast, worth, state)]
    for won, before, saved in sorted(upward, key=lambda found: -found[0]):
        if won <= most:
            break
        if saved + slack >= 0:
            most, best = won, before
            continue
        for step in sorted(_steps(worth, before), key=lambda step: step.lost):
            if won - step.lost <= most:
                break
            if saved + step.saved(forecast, before) + slack >= 0:
                most, best = won - step.lost, step.after(worth, before)
                break
    return best


def _upward(forecast: Forecast, worth: Worth, state: State) -> Iterator[tuple[State, float]]:
    """States in which something is back, and the time that it saves: below zero."""
    for k in range(len(worth.ladders)):
        at = state.levels[k]
        for to in range(max(0, at - LOOK_AHEAD), at):
            yield state.moved(k, to), -forecast.change(state.levels, k, to, state.dropped)
    for b in state.dropped:
        after = replace(state, dropped=state.dropped - {b})
        yield after, -forecast.block(state.levels, b, after.dropped)
