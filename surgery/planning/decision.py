"""From a module to a decision: trace, couple, score and plan, or repeat a plan on another copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from exporters.quantize import FEWEST, validate_kept
from surgery.capture import submodule as parts
from surgery.config import Budget, Recipe, validate
from surgery.core import Clock, Plan, Program, Progress, scratch_folder
from surgery.coupling import drop, require_own_cuts
from surgery.cutting import tracer_of
from surgery.errors import InvalidInput, PlanMismatch, UnsupportedModel
from surgery.importance import settled
from surgery.inputs import Calibration, LoadedModel, calibration_images
from surgery.planning.allocation import allocate
from surgery.planning.choice import Candidate, Candidates, Choice, traced_part
from surgery.planning.latency_planner import LatencyPlanner
from surgery.planning.refinement import LatencyBench, refine
from surgery.recovery import Step, validate_dense, validate_training
from surgery.report import describe


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What will be pruned, and why."""

    recipe: Recipe  # with opened data
    choice: Choice
    stages_s: Mapping[str, float]
    whole: parts.Whole | None = None  # the dense model around a submodule
    seen: Calibration | None = None  # the images read from `data`
    between: tuple[Step, ...] = ()  # recovery steps of intermediate models in iterative pruning
    planner: LatencyPlanner | None = None  # makes further plans for a latency budget
    shared: bool = False  # whether other processes wait to train along

    @property
    def report(self) -> dict[str, Any]:
        """The data of report.json before anything is cut."""
        data = describe(self.choice.cut, self.choice.costs, self.choice.refinement)
        return {**data, "notes": [*data["notes"], *self.choice.warnings], "stages_s": dict(self.stages_s)}


def decide(loaded: LoadedModel, recipe: Recipe, progress: Progress | None = None) -> Decision:
    """Return what would be pruned, without changing the model; arguments and errors are those of `shrink`."""
    validate(recipe)
    clock = Clock(progress)
    program, whole = traced_part(loaded, recipe, clock)
    seen = None
    if recipe.data.data is not None:
        with clock("read images"):
            seen = calibration_images(recipe.data.data, program, whole, recipe.data.max_images, recipe.selection.seed)
    validate_training(program, whole, recipe, seen)
    if "int8" in recipe.precisions and seen is not None:
        _validate_int8(program, whole, recipe, seen)
    if recipe.data.val is not None and not recipe.data.allow_chance:
        with clock("evaluate the dense model"):
            validate_dense(program, whole, recipe)
    choice, planner = _chosen(program, recipe, seen, clock)
    while recipe.selection.own_class and (module := _in_the_way(choice, recipe, clock)):
        recipe = recipe.but(keep=(*recipe.selection.keep, module))
        choice, planner = _chosen(program, recipe, seen, clock)
    return Decision(recipe, choice, clock.seconds, whole, seen, planner=planner)


def _validate_int8(program: Program, whole: parts.Whole | None, recipe: Recipe, seen: Calibration) -> None:
    """Raise InvalidInput early if there are too few images to calibrate on, or names to keep are of no layer."""
    if seen.count < FEWEST:
        raise InvalidInput(f"too few images to calibrate int8 files on ({seen.count}); give {FEWEST} or more")
    if whole is None and program.has_graph:
        layers = [name.removesuffix(".weight") for name, x in program.model.named_parameters() if x.dim() > 1]
        with scratch_folder() as folder:
            validate_kept(recipe.output.int8_keep, layers, lambda: LatencyBench(program, folder, recipe).dense)


def _chosen(
    program: Program, recipe: Recipe, seen: Calibration | None, clock: Clock
) -> tuple[Choice, LatencyPlanner | None]:
    candidates = Candidates(program, recipe, seen, clock)
    if recipe.goal.is_latency:
        planner = LatencyPlanner(candidates)
        return planner.first_plan(), planner
    goal, left, dense = recipe.goal, candidates.base, candidates.without(()).costs.get(recipe.goal.kind)
    scores, cost, selection = left.scores, left.costs.get(goal.kind), recipe.selection  # stages of their own
    units, settings = None if dense is None else dense({}), candidates.settings
    with clock("allocate"):
        plan = allocate(
            program, left.coupling, scores, goal, cost=cost, dense=units, selection=selection, settings=settings
        )
    plan = settled(plan, left.orders)
    plan = replace(plan, dropped=candidates.dead, notes=(*plan.notes, *candidates.notes))
    return candidates.chosen(left, plan), None


def refined(decision: Decision, clock: Clock) -> Decision:
    """Time the compact model against the dense one and correct the plan, if the budget is latency on this machine."""
    planner, choice, recipe = decision.planner, decision.choice, decision.recipe
    if planner is None or not (recipe.target.correct and planner.source.live):
        return decision
    tracer = tracer_of(recipe.selection.tracer)
    with clock("correct the plan"), scratch_folder() as folder:
        bench = LatencyBench(choice.program.dense, folder, recipe, decision.seen, clock.progress)
        found = refine(choice, planner.plan, lambda choice: tracer.cut(choice.cut).module, bench)
    return replace(decision, choice=found)


def _in_the_way(choice: Choice, recipe: Recipe, clock: Clock) -> str:
    """Return the submodule that must not be pruned for the model's own class to work, or "" if it works."""
    program = choice.program
    with clock("fit"):
        compact = tracer_of(recipe.selection.tracer).cut(choice.cut)
    if compact.kind == "module":
        return ""
    module = compact.stuck
    while module and module in recipe.selection.keep:
        module = module.rpartition(".")[0]
    if not module:
        raise UnsupportedModel(
            f"{type(program.model).__name__} cannot hold a cut model: {compact.why}; "
            "do without --own-class, and the rewritten program comes back in its place"
        )
    return module


# A plan repeated. --------------------------------------------------------------------------------------------------


def traced(
    plan: Plan, dense_model: torch.nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[Program, parts.Whole | None]:
    """Return the program of a plan, and the whole model around a submodule; errors are those of `surgery.apply`."""
    if not isinstance(plan, Plan):
        raise InvalidInput(f"the plan is of type {type(plan).__name__}; read one with surgery.Plan.load(path)")
    if not isinstance(dense_model, torch.nn.Module):
        raise InvalidInput(f"the dense model is of type {type(dense_model).__name__}, not a torch.nn.Module")
    whole = parts.of_plan(plan, dense_model, example_inputs, example_kwargs)
    if whole is not None:
        call = whole.call
    elif example_inputs is not None:
        call = dense_model, example_inputs, {**plan.settings.get("arguments", {}), **(example_kwargs or {})}
    else:
        call = dense_model, *parts.inputs_of(plan, dense_model)
    fixed_size = not any(axis for spec in plan.inputs for axis in spec.dynamic)
    program = tracer_of(plan.settings.get("tracer", "export")).trace(*call, fixed_size=fixed_size)
    if program.fingerprint != plan.fingerprint:
        raise PlanMismatch(
            f"the plan was made for another architecture than this {type(dense_model).__name__} "
            f"(fingerprint {plan.fingerprint[:12]}, here {program.fingerprint[:12]}); make a new plan"
        )
    return program, whole


def as_planned(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe with the plan's settings."""
    names = ("keep", "tracer", "seed", "deploy")
    settings = {name: plan.settings[name] for name in names if name in plan.settings}
    return recipe.but(budget=plan.budget or Budget(), submodule=plan.settings.get("part"), **settings)


def repeat(plan: Plan, loaded: LoadedModel, progress: Progress | None = None) -> Decision:
    """Return a plan as a decision for this model; errors are those of `surgery.apply`."""
    clock = Clock(progress)
    recipe = as_planned(Recipe(), plan)
    with clock("trace"):
        dense, whole = traced(plan, *loaded.call)
    choice = choice_of(plan, dense, recipe, clock)
    require_own_cuts(plan, choice.coupling)
    return Decision(recipe, choice, clock.seconds, whole)


def choice_of(plan: Plan, dense: Program, recipe: Recipe, clock: Clock) -> Choice:
    """Return a plan with its program and costs."""
    candidates = Candidates(dense, recipe.but(drop_layers=False), None, clock)
    left = Candidate(drop(dense, plan.dropped), candidates) if plan.dropped else candidates.base
    return candidates.chosen(left, plan)
