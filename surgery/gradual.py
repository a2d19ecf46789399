"""Cut a little, recover, look again, cut more: what is missed of what is left shows only once the rest is gone.

Each step chooses on the recovered model of the step before, whose groups are those of the dense one with fewer units.
What has gone by then makes one plan for the dense model, so that the result is cut, checked and recovered like any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from surgery.config import Budget, Recipe
from surgery.core import Plan, Progress
from surgery.coupling import kept_costs, plan_from_dead
from surgery.cutting import tracer_of
from surgery.errors import SurgeryError
from surgery.planning import Decision, decide
from surgery.recovery import Step

Realise = Callable[[Decision], Any]


def decide_in_steps(
    model: torch.nn.Module,
    example_inputs: Any,
    recipe: Recipe,
    realise: Realise,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Return the decision that several steps come to; other arguments and errors are those of `decide`.

    Args:
        model: the dense model.
        example_inputs: of it.
        recipe: for how many steps, and to which budget.
        realise: decision → recovered result, with its `model` and the `steps` of its recovery.
        example_kwargs: of the model.
        progress: told each step.
    """
    target = recipe.goal.amount
    first = _toward(recipe, 1 - (1 - target) / recipe.selection.steps)
    decision = decide(model, example_inputs, first, example_kwargs=example_kwargs, progress=progress)
    quiet = decision.recipe.but(recover="reconstruct")
    if isinstance(recipe.data.data, Iterator):  # which is there once
        recipe = recipe.but(data=decision.seen)
    between = list[Step]()
    for step in range(2, recipe.selection.steps + 1):
        kept = _kept(decision)
        aim = 1 - (1 - target) * step / recipe.selection.steps
        if kept <= aim:
            continue
        so_far = realise(replace(decision, recipe=quiet))
        between += [_named(done, f"{step - 1} of {recipe.selection.steps}") for done in so_far.steps[1:]]
        again = _toward(recipe, aim / kept).but(drop_layers=False)
        further = decide(so_far.model, example_inputs, again, example_kwargs=example_kwargs, progress=progress)
        decision = _joined(decision, further)
    plan = replace(decision.choice.plan, budget=recipe.goal)
    return replace(
        decision,
        choice=replace(decision.choice, plan=plan),
        recipe=recipe,
        between=tuple(between),
    )


def _named(step: Step, which: str) -> Step:
    return replace(step, name=f"{step.name} {which}", notes=tuple(f"step {which}: {note}" for note in step.notes))


def _toward(recipe: Recipe, fraction: float) -> Recipe:
    return recipe.but(steps=1, budget=Budget(**{recipe.goal.kind: min(fraction, 0.999)}))


def _kept(decision: Decision) -> float:
    dense, kept = decision.choice.costs[decision.recipe.goal.kind]
    return kept / dense


def _joined(decision: Decision, further: Decision) -> Decision:
    """The decision with what went further of its model: units there are those that were left here."""
    choice, more = decision.choice, further.choice.plan
    dead = {name: list(units) for name, units in choice.plan.dead.items()}
    sizes = {group.name: group.size for group in choice.coupling.groups}
    for name, units in more.dead.items():
        left = _left(sizes, dead, name, more.sizes[name])
        dead[name] = sorted([*dead.get(name, ()), *(left[unit] for unit in units)])
    plan: Plan = plan_from_dead(
        choice.coupling,
        dead,
        fingerprint=choice.plan.fingerprint,
        inputs=choice.plan.inputs,
        settings=choice.plan.settings,
        notes=[*choice.plan.notes, *more.notes],
    )
    plan = replace(plan, dropped=choice.plan.dropped, arranged=choice.plan.arranged)
    tracer, program = tracer_of(decision.recipe.selection.tracer), choice.program
    dense = tracer.couple(program.dense, keep=decision.recipe.selection.keep) if plan.dropped else choice.coupling
    before = tracer.cost_functions(program.dense, dense)
    after = tracer.cost_functions(program, choice.coupling)
    costs = kept_costs(dense, before, choice.coupling, after, plan)
    return replace(decision, choice=replace(choice, plan=plan, costs=costs))


def _left(sizes: Mapping[str, int], dead: Mapping[str, Sequence[int]], name: str, expected: int) -> list[int]:
    gone = set(dead.get(name, ()))
    left = [unit for unit in range(sizes.get(name, 0)) if unit not in gone]
    if len(left) != expected:
        raise SurgeryError(
            f"--steps: group '{name}' of the model in between has {expected} units where {len(left)} were left; "
            "please report it, and do without --steps"
        )
    return left
