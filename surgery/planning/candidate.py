"""Candidates: the traced program without some of its blocks, coupled and scored for planning."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from surgery.config import Recipe
from surgery.core import Arrangement, Block, Clock, CostFn, Coupling, Program, Scores
from surgery.coupling import (
    dead_blocks,
    drop,
    find_blocks,
    kept_names,
    priced,
    reordered,
    reorderings,
)
from surgery.cutting import tracer_of
from surgery.importance import arrange, measures_losses, score
from surgery.inputs import Calibration


@dataclass(frozen=True, eq=False)
class Candidate:
    """A program without some of its blocks, with the data needed for planning.

    Attributes:
        program: the program without those blocks.
        coupling: its groups.
        orders: its head orders.
        costs: cost functions by kind.
    """

    program: Program
    coupling: Coupling
    orders: tuple[Arrangement, ...]
    costs: Mapping[str, CostFn]
    _recipe: Recipe
    _seen: Calibration | None
    _clock: Clock

    @cached_property
    def scores(self) -> Scores:
        """Importance per unit; computed on first use, since a transferred plan needs none."""
        recipe, seen, clock = self._recipe, self._seen, self._clock
        order = reorderings(self.coupling, self.orders)
        with clock("score"):
            found = score(
                self.program,
                self.coupling,
                recipe.criterion,
                seed=recipe.selection.seed,
                prepare=lambda weights: reordered(weights, order),
                images=seen.batches if seen is not None else None,
                macs=self.costs["macs"]({}),
                progress=lambda fraction: clock.progress("score", fraction),
            )
            if measures_losses(recipe.criterion) and recipe.goal.kind in self.costs:
                return priced(found, self.coupling, self.costs[recipe.goal.kind])
            return found


def candidate_of(program: Program, recipe: Recipe, seen: Calibration | None, clock: Clock) -> Candidate:
    """Return a program as a candidate, with coupling, cost functions and head orders."""
    tracer = tracer_of(recipe.selection.tracer)
    with clock("couple"):
        coupling = tracer.couple(program, keep=recipe.selection.keep)
    with clock("score"):
        orders = arrange(program, coupling, recipe.criterion, seed=recipe.selection.seed)
        costs = tracer.cost_functions(program, coupling)
    return Candidate(program, coupling, orders, costs, recipe, seen, clock)


@dataclass(frozen=True, slots=True, eq=False)
class DroppableBlocks:
    """The blocks of a program that may be dropped.

    Attributes:
        program: the program as traced.
        blocks: droppable blocks, which contain no tensor to be kept.
        dead: blocks that are always dropped because their branch is constant, with the constant of each channel.
        notes: notes on the dead blocks.
    """

    program: Program
    blocks: tuple[Block, ...] = ()
    dead: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def program_without(self, names: Collection[str]) -> Program:
        """Return the program without the blocks of these names."""
        constants = {b.name: self.dead.get(b.name, ()) for b in self.blocks if b.name in names}
        return drop(self.program, constants, self.blocks)


def droppable_blocks(program: Program, recipe: Recipe) -> DroppableBlocks:
    """Return the blocks that a recipe allows to drop; if all are dead, as before training, none is treated as dead."""
    if not recipe.selection.drop_layers or not program.has_graph:
        return DroppableBlocks(program)
    every = find_blocks(program)
    kept = kept_names(program, recipe.selection.keep).keys()
    blocks = tuple(block for block in every if kept.isdisjoint(block.tensors))
    dead = dead_blocks(program, blocks)
    if dead and len(dead) == sum(not block.is_layer for block in every):
        note = f"all {len(dead)} residual branches give a constant, as before training: they stay"
        return DroppableBlocks(program, blocks, notes=(note,))
    source = {block.name: block.source for block in blocks}
    left = {name: "a constant per channel, which stays" if dead[name] else "nothing" for name in dead}
    notes = tuple(f"dead: the branch of '{name}' ({source[name]}) gives {left[name]}" for name in dead)
    return DroppableBlocks(program, blocks, dead, notes)
