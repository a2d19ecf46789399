"""Results of planning, and what plans are made from: programs without some of their blocks, coupled and scored."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
    kept_costs,
    kept_names,
    plan_from_dead,
    priced,
    reordered,
    reorderings,
)
from surgery.cutting import tracer_of
from surgery.importance import arrange, measures_losses, score
from surgery.inputs import Calibration, LoadedModel
from surgery.latency import FP32, INT8
from surgery.planning.latency_search import Staircase
from surgery.planning.lowering import Lowered, lower

LOWEST, HIGHEST = 0.92, 1.03  # a plan meets its budget if the measured ratio over the target is between these


@dataclass(frozen=True, slots=True)
class Iteration:
    """One plan of a refinement: fractions of the dense latency. `measured` is the median of one ratio per process."""

    aim: float
    predicted: float
    measured: float
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RefinementLog:
    """The predicted and measured latency of a plan, and the plans tried before it."""

    target: float  # the requested fraction of the dense latency
    dense_ms: float | None  # measured; None if nothing was measured
    predicted_dense_ms: float  # by the table
    predicted_ms: float
    iterations: tuple[Iteration, ...] = ()
    taken: int = -1  # index of the iteration with the final plan; -1 if nothing was measured
    verdict: str = ""  # whether the budget is met, or why not
    device: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {**asdict(self), "met": self.met}
        rounds = [{**i, "ratios": list(i["ratios"])} for i in values.pop("iterations")]
        return {**values, "rounds": rounds}

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
    """A plan and its program, without the dropped blocks."""

    program: Program
    coupling: Coupling
    plan: Plan
    costs: Mapping[str, tuple[int, int]]  # ``params``, ``macs``, ``channels`` → (dense, kept)
    refinement: RefinementLog | None = None  # the plan's latency; None for other budgets
    warnings: tuple[str, ...] = ()  # about the latency table
    stairs: tuple[Staircase, ...] = ()  # times of the costliest kernels by width

    @property
    def cut(self) -> Cut:
        """The plan applied to its program."""
        return Cut(self.program, self.coupling, self.plan)


def traced_part(loaded: LoadedModel, recipe: Recipe, clock: Clock) -> tuple[Program, submodule.Whole | None]:
    """Trace the model, or the recipe's submodule, which comes with the whole model."""
    with clock("trace"):
        chosen, (model, *call) = recipe.selection, loaded.call
        part = chosen.submodule
        whole = submodule.reach(model, part, *call) if part is not None else None
        traced = tracer_of(chosen.tracer).trace(*(whole.call if whole else loaded.call), fixed_size=chosen.fixed_size)
        return traced, whole


def with_dead(plan: Plan, coupling: Coupling, dead: Mapping[str, Sequence[int]]) -> Plan:
    """Return the plan with other removed units."""
    made = plan_from_dead(plan, coupling, dead)
    return replace(plan, dead=made.dead, sizes=made.sizes, cuts=made.cuts)


# Candidates. ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Candidate:
    """A program without some of its blocks, with the data needed for planning, computed on first use."""

    program: Program
    _all: Candidates

    @cached_property
    def coupling(self) -> Coupling:
        """Its groups."""
        with self._all.clock("couple"):
            return tracer_of(self.program.tracer).couple(self.program, keep=self._all.recipe.selection.keep)

    @cached_property
    def orders(self) -> tuple[Arrangement, ...]:
        """Its head orders."""
        with self._all.clock("score"):
            recipe = self._all.recipe
            return arrange(self.program, self.coupling, recipe.criterion, seed=recipe.selection.seed)

    @cached_property
    def costs(self) -> Mapping[str, CostFn]:
        """Cost functions by kind."""
        return tracer_of(self.program.tracer).cost_functions(self.program, self.coupling)

    @cached_property
    def lowered(self) -> Lowered:
        """Its kernels."""
        return lower(self.program, self.coupling, batch=self._all.recipe.target.batch)

    @cached_property
    def scores(self) -> Scores:
        """Importance per unit."""
        recipe, seen, clock = self._all.recipe, self._all.seen, self._all.clock
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


class Candidates:
    """A traced program, with and without blocks that may be dropped.

    Attributes:
        blocks: the blocks that the recipe allows to drop, which contain no tensor to be kept.
        dead: blocks that are always dropped because their branch is constant, with the constant of each channel; none
            if all are constant, as before training. `notes` are on these.
    """

    def __init__(self, program: Program, recipe: Recipe, seen: Calibration | None, clock: Clock) -> None:
        self.program, self.recipe, self.seen, self.clock = program, recipe, seen, clock
        self.blocks: tuple[Block, ...] = ()
        self.dead: Mapping[str, tuple[float, ...]] = {}
        self.notes: list[str] = []
        self._known: dict[frozenset[str], Candidate] = {}
        if not recipe.selection.drop_layers or not program.has_graph:
            return
        every, kept = find_blocks(program), kept_names(program, recipe.selection.keep).keys()
        self.blocks = tuple(block for block in every if kept.isdisjoint(block.tensors))
        dead, source = dead_blocks(program, self.blocks), {block.name: block.source for block in self.blocks}
        if dead and len(dead) == sum(not block.is_layer for block in every):
            self.notes.append(f"all {len(dead)} residual branches give a constant, as before training: they stay")
            return
        self.dead = dead
        for name, constant in dead.items():
            left = "a constant per channel, which stays" if constant else "nothing"
            self.notes.append(f"dead: the branch of '{name}' ({source[name]}) gives {left}")

    def without(self, names: Collection[str]) -> Candidate:
        """Return the program without the blocks of these names."""
        key = frozenset(names)
        if key not in self._known:
            constants = {b.name: self.dead.get(b.name, ()) for b in self.blocks if b.name in key}
            self._known[key] = Candidate(drop(self.program, constants, self.blocks), self)
        return self._known[key]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings recorded in a plan, so that it can be applied again: JSON values, without the budget."""
        recipe, selection, target, output = self.recipe, self.recipe.selection, self.recipe.target, self.recipe.output
        names = ("scope", "round_to", "inexact", "own_class", "tracer", "seed", "drop_layers", "steps")
        found: dict[str, Any] = {
            "criterion": by if isinstance(by := recipe.criterion, str) else getattr(by, "__name__", "custom"),
            "keep": list(selection.keep),
            "part": selection.submodule,
            **{name: getattr(selection, name) for name in names},
        }
        if recipe.goal.is_latency:
            found |= {"threads": target.threads, "batch": target.batch, "deploy": target.deploy}
            if target.deploy == INT8:
                int8 = {"method": output.int8_method, "keep": list(output.int8_keep)}
                found["int8"] = {**int8, "reduce_range": output.int8_reduce_range}
        if self.seen is not None:
            found["data"] = self.seen.described()
        return {**found, **submodule.plain_arguments(self.program)}

    @property
    def base(self) -> Candidate:
        """The program without its dead blocks."""
        return self.without(self.dead)

    def chosen(self, left: Candidate, plan: Plan, **latency: Any) -> Choice:
        """Return a plan for one of the candidates, with its costs relative to the whole program."""
        whole = self.without(())
        costs = kept_costs(whole.coupling, whole.costs, left.coupling, left.costs, plan)
        return Choice(left.program, left.coupling, plan, costs, **latency)
