"""Results of planning, and what plans are made from: programs without some of their blocks, coupled and scored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from surgery.capture import submodule
from surgery.config import Recipe
from surgery.core import Arrangement, Block, Clock, CostFn, Coupling, Plan, Program, Scores
from surgery.coupling import (
    Cut,
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
from surgery.latency import FP32, INT8
from surgery.planning.latency_search import Staircase
from surgery.planning.lowering import Lowered, lower

LOWEST, HIGHEST = 0.92, 1.03
"""A plan meets its budget if the measured ratio over the target is between these."""


@dataclass(frozen=True, slots=True)
class Iteration:
    """One plan of a refinement.

    Attributes:
        aim: the fraction of the dense latency that it was made for.
        predicted: the fraction predicted by the table.
        measured: the measured fraction, the median of `ratios`.
        ratios: one per process.
    """

    aim: float
    predicted: float
    measured: float
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RefinementLog:
    """The predicted and measured latency of a plan, and the plans tried before it.

    Attributes:
        target: the requested fraction of the dense latency.
        dense_ms: the dense model's measured latency; None if nothing was measured.
        predicted_dense_ms: the dense model's latency by the table.
        predicted_ms: the plan's latency by the table.
        iterations: iterations in order.
        taken: index of the iteration with the final plan; -1 if nothing was measured.
        verdict: whether the budget is met, or why not.
        device: the device and precision of the measurements.
    """

    target: float
    dense_ms: float | None
    predicted_dense_ms: float
    predicted_ms: float
    iterations: tuple[Iteration, ...] = ()
    taken: int = -1
    verdict: str = ""
    device: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        del values["iterations"]
        rounds = [{**asdict(i), "ratios": list(i.ratios)} for i in self.iterations]
        return {**values, "rounds": rounds, "met": self.met}

    @property
    def predicted(self) -> float:
        """The fraction of the dense latency that the table predicts."""
        return self.predicted_ms / self.predicted_dense_ms

    @property
    def dense(self) -> str:
        """Description of what the latency is relative to."""
        precision = self.device.get("precision", FP32)
        return "the dense" if precision == FP32 else f"the dense {precision}"

    @property
    def met(self) -> bool | None:
        """Whether the measured ratio is within bounds; None if nothing was measured."""
        if self.taken < 0:
            return None
        return LOWEST <= self.iterations[self.taken].measured / self.target <= HIGHEST


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A plan and its program.

    Attributes:
        program: the traced program without the dropped blocks.
        coupling: its groups.
        plan: the plan.
        costs: ``params``, ``macs``, ``channels`` → (dense, kept).
        refinement: the plan's latency; None for other budgets.
        warnings: warnings about the latency table.
        stairs: times of the costliest kernels by width; empty for other budgets.
    """

    program: Program
    coupling: Coupling
    plan: Plan
    costs: Mapping[str, tuple[int, int]]
    refinement: RefinementLog | None = None
    warnings: tuple[str, ...] = ()
    stairs: tuple[Staircase, ...] = ()

    @property
    def cut(self) -> Cut:
        """The plan applied to its program."""
        return Cut(self.program, self.coupling, self.plan)


def plan_settings(program: Program, recipe: Recipe, seen: Calibration | None) -> dict[str, Any]:
    """Return the settings recorded in a plan, so that it can be applied again: JSON values, without the budget."""
    selection, target, output, criterion = recipe.selection, recipe.target, recipe.output, recipe.criterion
    names = ("scope", "round_to", "inexact", "own_class", "tracer", "seed", "drop_layers", "steps")
    found: dict[str, Any] = {
        "criterion": criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom"),
        "keep": list(selection.keep),
        "part": selection.submodule,
        **{name: getattr(selection, name) for name in names},
    }
    if recipe.goal.is_latency:
        found |= {"threads": target.threads, "batch": target.batch, "deploy": target.deploy}
        if target.deploy == INT8:
            int8 = {"method": output.int8_method, "keep": list(output.int8_keep)}
            found["int8"] = {**int8, "reduce_range": output.int8_reduce_range}
    if seen is not None:
        found["data"] = seen.described()
    return {**found, **submodule.plain_arguments(program)}


# Candidates. ----------------------------------------------------------------------------------------------------------


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

    @classmethod
    def of(cls, program: Program, recipe: Recipe, seen: Calibration | None, clock: Clock) -> Candidate:
        """Return a program with its coupling, cost functions and head orders."""
        tracer = tracer_of(recipe.selection.tracer)
        with clock("couple"):
            coupling = tracer.couple(program, keep=recipe.selection.keep)
        with clock("score"):
            orders = arrange(program, coupling, recipe.criterion, seed=recipe.selection.seed)
            costs = tracer.cost_functions(program, coupling)
        return cls(program, coupling, orders, costs, recipe, seen, clock)

    @cached_property
    def lowered(self) -> Lowered:
        """Its kernels."""
        return lower(self.program, self.coupling, batch=self._recipe.target.batch)

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
