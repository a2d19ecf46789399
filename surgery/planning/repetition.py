"""A plan brought to another copy of its model: traced again, and decided without scores or a budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.config import Budget, Recipe
from surgery.core import Clock, Plan, Program, Progress
from surgery.coupling import drop, kept_costs, require_own_cuts
from surgery.cutting import submodule as parts, tracer_of
from surgery.errors import InvalidInput, PlanMismatch
from surgery.planning.decision import Choice, Decision


def traced(
    plan: Plan, dense_model: torch.nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[Program, parts.Whole | None]:
    """Return the program that a plan was made for, as it was traced, and the whole model where that is a part.

    Arguments and errors are those of `surgery.apply`.
    """
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
    program = tracer_of(plan.settings.get("tracer", "export")).trace(*call)
    if program.fingerprint != plan.fingerprint:
        raise PlanMismatch(
            f"the plan was made for another architecture than this {type(dense_model).__name__} "
            f"(fingerprint {plan.fingerprint[:12]}, here {program.fingerprint[:12]}); make a new plan"
        )
    return program, whole


def as_planned(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe with what the plan was made by."""
    names = ("keep", "tracer", "seed", "deploy")
    settings = {name: plan.settings[name] for name in names if name in plan.settings}
    return recipe.but(budget=plan.budget or Budget(), submodule=plan.settings.get("part"), **settings)


def repeat(
    plan: Plan,
    dense_model: torch.nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Return a plan as a decision on this model, to be realised; arguments and errors are those of `surgery.apply`."""
    run = Clock(progress)
    recipe = as_planned(Recipe(), plan)
    tracer = tracer_of(recipe.selection.tracer)
    with run("trace"):
        dense, whole = traced(plan, dense_model, example_inputs, example_kwargs)
    with run("couple"):
        program = drop(dense, plan.dropped)
        coupling = tracer.couple(program, keep=recipe.selection.keep)
        require_own_cuts(plan, coupling)
        dense_coupling = tracer.couple(dense, keep=recipe.selection.keep) if plan.dropped else coupling
    before, after = tracer.cost_functions(dense, dense_coupling), tracer.cost_functions(program, coupling)
    costs = kept_costs(dense_coupling, before, coupling, after, plan)
    return Decision(recipe, Choice(program, coupling, plan, costs), run.seconds, whole)
