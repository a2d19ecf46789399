"""The search: most importance within a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product

import pytest
from hypothesis import example, given, settings, strategies as st

from benchmarks.studies.allocation import Exact
from surgery.planning.latency_search import ImportanceLoss, State, search


@dataclass(frozen=True)
class Chain:
    """Layers between ladders: the time of each is the product of the widths on both sides. Block b is layer b."""

    widths: tuple[tuple[int, ...], ...]
    layers: tuple[tuple[int, int], ...]
    blocks: tuple[int, ...] = ()

    def _ms(self, layer: tuple[int, int], levels: Sequence[int]) -> float:
        a, b = layer
        return float(self.widths[a][levels[a]] * self.widths[b][levels[b]])

    def _there(self, dropped: Collection[int]) -> list[tuple[int, int]]:
        gone = {self.blocks[b] for b in dropped}
        return [layer for k, layer in enumerate(self.layers) if k not in gone]

    def total(self, state: State) -> float:
        return sum(self._ms(layer, state.levels) for layer in self._there(state.dropped))

    def saved(self, state: State, ladder: int, to: int) -> float:
        return self.total(state) - self.total(state.moved(ladder, to))

    @property
    def _depends(self) -> tuple[tuple[int, ...], ...]:
        return self.layers

    @property
    def _gone(self) -> list[set[int]]:
        return [{k} for k in self.blocks]

    def kernel(self, k: int, state: State) -> float:
        return self._ms(self.layers[k], state.levels)

    def block(self, state: State, block: int) -> float:
        return self.total(state) - self.total(replace(state, dropped=state.dropped | {block}))


def chain(importance: Sequence[Sequence[float]], *, blocks: Sequence[float] = ()) -> tuple[Chain, ImportanceLoss]:
    """Ladders of these steps' importance, each next to the one after it; the first layers are blocks of this loss."""
    widths = tuple(tuple(range(len(steps) + 1, 0, -1)) for steps in importance)
    lost = tuple(tuple(sum(steps[:k]) for k in range(len(steps) + 1)) for steps in importance)
    layers = tuple((k, k + 1) for k in range(len(importance) - 1))
    inside = tuple(frozenset[int]() for _ in blocks)
    return Chain(widths, layers, tuple(range(len(blocks)))), ImportanceLoss(lost, tuple(blocks), inside)


def best_by_trying_all(time: Chain, loss: ImportanceLoss, target: float) -> float | None:
    sets = [frozenset(b for b, out in enumerate(bits) if out) for bits in product((0, 1), repeat=len(loss.blocks))]
    states = [State(levels, s) for levels in product(*(range(len(x)) for x in loss.ladders)) for s in sets]
    within = [loss.of(s) for s in states if time.total(s) <= target]
    return min(within, default=None)


steps = st.lists(st.floats(0.1, 5.0), min_size=1, max_size=3).map(sorted)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, min_size=2, max_size=4), st.lists(st.floats(0.1, 9.0), max_size=1), st.floats(0.05, 0.99))
def test_the_time_is_kept_and_nearly_the_most_importance(
    importance: list[list[float]], blocks: list[float], share: float
) -> None:
    time, loss = chain(importance, blocks=blocks)
    dense = State((0,) * len(importance))
    target = share * time.total(dense)
    best = best_by_trying_all(time, loss, target)
    found = search(time, loss, target)  # type: ignore[arg-type]
    if best is None:
        assert found is None
        return
    assert found is not None
    assert time.total(found) <= target + 1e-9
    everything = sum(x[-1] for x in loss.ladders) + sum(loss.blocks)
    assert loss.of(found) <= best + 0.25 * everything


def test_nothing_goes_where_there_is_time() -> None:
    time, loss = chain([[1.0], [1.0]])
    assert search(time, loss, time.total(State((0, 0)))) == State((0, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("worth_of_block", [0.01, 100.0])
def test_a_block_goes_where_it_buys_time_cheaply(worth_of_block: float) -> None:
    time, loss = chain([[1.0, 1.0, 1.0]] * 3, blocks=[worth_of_block])
    found = search(time, loss, 0.6 * time.total(State((0, 0, 0))))  # type: ignore[arg-type]
    assert found is not None
    assert (found.dropped == {0}) == (worth_of_block < 1)


def test_units_inside_a_block_are_not_paid_twice() -> None:
    loss = ImportanceLoss(((0.0, 5.0),), (3.0,), (frozenset({0}),))
    assert loss.of(State((1,), frozenset())) == 5.0
    assert loss.of(State((1,), frozenset({0}))) == 3.0


@settings(max_examples=25, deadline=None)
@example([[1.5, 2.0], [1.0], [2.0], [1.0]], 0.8125, 2.0)
@given(st.lists(steps, min_size=2, max_size=4), st.floats(0.3, 0.9), st.floats(0.1, 5.0))
def test_the_studys_exact_solver_finds_what_trying_all_finds(
    importance: list[list[float]], share: float, worth_of_block: float
) -> None:
    time, loss = chain(importance, blocks=[worth_of_block])
    dense = time.total(State((0,) * len(loss.ladders)))
    wanted = best_by_trying_all(time, loss, share * dense)
    state, _ = Exact(time, loss, share * dense).solve(20.0)  # type: ignore[arg-type]
    if wanted is None:
        assert state is None
    else:
        assert state is not None and time.total(state) <= share * dense * (1 + 1e-6)
        assert loss.of(state) == pytest.approx(wanted, rel=2e-3, abs=1e-6)
