"""Searches over several compact models: the fastest one within a drop of accuracy, and iterative pruning in steps.

`decide` and `realise` are those of `planning` and `pipeline` where no search is asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporters.session import OnnxModel
from surgery import pipeline, planning
from surgery.config import DEPLOYED, MILDEST, Budget, Recipe
from surgery.core import Clock, Plan, Progress
from surgery.coupling import kept_costs, plan_from_dead
from surgery.cutting import tracer_of
from surgery.errors import BudgetUnreachable, InvalidInput, SurgeryError
from surgery.inputs import read_batches
from surgery.pipeline import Result, Share
from surgery.planning import Decision, LatencyBench
from surgery.recovery import Step, points_lost


def decide(
    model: torch.nn.Module,
    example_inputs: Any,
    recipe: Recipe,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Return what would be cut, decided at once or in several steps; arguments and errors are those of `shrink`."""
    if isinstance(recipe.data.val, Iterator):  # can be read once, and is needed for each model
        recipe = recipe.but(val=list(read_batches(recipe.data.val, recipe.selection.seed, "val")))
    at_once = recipe.selection.steps == 1
    chosen = planning.decide if at_once else _decide_in_steps
    return chosen(model, example_inputs, recipe, example_kwargs=example_kwargs, progress=progress)


def realise(decision: Decision, *, progress: Progress | None = None, share: Share | None = None) -> Result:
    """Return the verified and recovered compact model; arguments and errors are those of `pipeline.realise`."""
    if decision.recipe.selection.max_drop is not None:
        return fastest(decision, progress)
    return pipeline.realise(decision, progress=progress, share=share)


# The fastest model within a drop. ------------------------------------------------------------------------------------

FIRST = 0.5
NEAR = 0.04
"""The search ends when the interval is this narrow, as a fraction of the dense latency."""
MOST = 7
"""Maximum number of recovered models."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One model of the search.

    Attributes:
        aim: target of its plan, as a fraction of the dense latency by the table.
        lost: points lost.
        upper: upper bound of the points lost, of the 95 % interval if there is one.
        measured: its latency as a fraction of the dense one's; None if it lost too much to be timed.
    """

    aim: float
    lost: float
    upper: float
    measured: float | None = None


def lost_by(steps: tuple[Step, ...]) -> tuple[float, float, str]:
    """Return points lost from the dense model to the last step, their upper bound, and the metric."""
    first, last = steps[0], steps[-1]
    if last.agreement is not None and last.agreement.drop is not None:
        return last.agreement.drop[0], last.agreement.drop[2], "accuracy"
    if first.metrics and last.metrics:
        lost = points_lost(first.metrics, last.metrics)
        return lost, lost, f"'{next(iter(first.metrics))}' of --metric, without an interval"
    if last.agreement is not None and last.agreement.differs is not None:
        return last.agreement.differs[0], last.agreement.differs[2], "agreement with the dense model"
    raise InvalidInput(
        "--max-drop needs something to lose: give labelled images with --val, a measure with --metric, or a classifier "
        "and images with --data"
    )


def fastest(decision: Decision, progress: Progress | None) -> Result:
    """Return the result with the lowest measured latency among those that lose no more than `max_drop`.

    Args:
        decision: for a latency budget; its `planner` makes the plans. The interval of latencies is halved: both latency
            and accuracy fall as more is cut. Models that lose little enough are timed against the dense one.
        progress: called with each attempt.

    Raises:
        BudgetUnreachable: even the slowest model that was tried loses more.
    """
    recipe, choice, clock = decision.recipe, decision.choice, Clock(progress)
    limit = recipe.selection.max_drop
    assert limit is not None and choice.refinement is not None, "the caller makes sure"
    tried: list[Attempt] = []
    best: tuple[float, Result] | None = None
    low, high, aim = 0.0, 1.0, FIRST
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        dense, seen = choice.program.dense, decision.seen
        bench = LatencyBench(dense, Path(folder), recipe, seen, clock.progress, for_accuracy=True)
        while len(tried) < MOST and high - low > NEAR and aim <= MILDEST.amount:
            clock.progress(f"within {limit:g} points: {aim:.2f} of the latency", 0.0)
            found, measured = _at(decision, aim, progress), None
            if found is not None:
                file = bench.export(found.compact.module)
                lost, upper, _ = lost_by(_with_last(found, file, recipe))
                if upper <= limit:
                    measured = bench.ratio(file, processes=2).value
                tried.append(Attempt(round(aim, 4), round(lost, 3), round(upper, 3), measured))
            if found is not None and measured is not None and (best is None or measured < best[0]):
                best = measured, found
            low, high = (low, aim) if measured is not None else (aim, high)
            aim = (low + high) / 2
    if best is None:
        nearest = min(tried, key=lambda t: t.upper, default=None)
        told = f"; the nearest, at {nearest.aim:.2f} of the latency, loses up to {nearest.upper:.2f}" if nearest else ""
        raise BudgetUnreachable(
            f"no model within --max-drop {limit:g} was found in {len(tried)} tries{told}; allow more, recover more "
            "(--recover distill), or judge by more images: the bound is that of the 95 % interval"
        )
    result = best[1]
    within = {
        "max_drop": limit,
        "dense": choice.refinement.dense,
        "of": lost_by(result.steps)[2],
        "measured": best[0],
        "tried": [asdict(t) for t in tried],
    }
    verdict = f"measured {best[0]:.4f} of {choice.refinement.dense} latency, the lowest found within {limit:g} points"
    latency = {**result.report["latency"], "target": best[0], "verdict": verdict}
    return replace(result, report={**result.report, "within": within, "latency": latency})


def _with_last(found: Result, file: Path, recipe: Recipe) -> tuple[Step, ...]:
    """Return the result's steps; for low-precision deployment, the last one is evaluated on its file.

    The file of a part does not take the images that the whole model is judged by: of those the float model counts.
    """
    steps: tuple[Step, ...] = found.steps
    if recipe.target.deploy == DEPLOYED[0] or found.whole is not None:
        return steps
    model, reference = OnnxModel(file), found.recovery.reference if found.recovery is not None else None
    agreement = None if reference is None else reference.judge(lambda inputs: model(*inputs))
    metrics = None if recipe.data.metric is None else recipe.data.metric(model)
    return (*steps, replace(steps[-1], name=recipe.target.deploy, agreement=agreement, metrics=metrics))


def _at(decision: Decision, aim: float, progress: Progress | None) -> Result | None:
    """Return the result for one latency; None if it cannot be reached."""
    assert decision.planner is not None
    try:
        choice = decision.planner.plan(aim)
    except BudgetUnreachable:
        return None
    plan = replace(choice.plan, budget=Budget(latency=aim))
    refinement = replace(choice.refinement, target=aim) if choice.refinement is not None else None
    recipe = decision.recipe.but(budget=plan.budget, correct=False, max_drop=None)
    attempt = replace(decision, choice=replace(choice, plan=plan, refinement=refinement), recipe=recipe)
    return pipeline.realise(attempt, progress=progress)


# Iterative pruning. --------------------------------------------------------------------------------------------------


def _decide_in_steps(
    model: torch.nn.Module,
    example_inputs: Any,
    recipe: Recipe,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Iterative pruning: each step chooses units on the recovered model of the step before.

    The units removed by all steps make one plan for the dense model, which is cut, checked and recovered like any.
    """
    target = recipe.goal.amount
    first = _toward(recipe, 1 - (1 - target) / recipe.selection.steps)
    decision = planning.decide(model, example_inputs, first, example_kwargs=example_kwargs, progress=progress)
    quiet = decision.recipe.but(recover="reconstruct")
    if isinstance(recipe.data.data, Iterator):  # which is there once
        recipe = recipe.but(data=decision.seen)
    between = list[Step]()
    for step in range(2, recipe.selection.steps + 1):
        kept = _kept(decision)
        aim = 1 - (1 - target) * step / recipe.selection.steps
        if kept <= aim:
            continue
        so_far = pipeline.realise(replace(decision, recipe=quiet), progress=progress)
        between += [_named(done, f"{step - 1} of {recipe.selection.steps}") for done in so_far.steps[1:]]
        again = _toward(recipe, aim / kept).but(drop_layers=False)
        further = planning.decide(so_far.model, example_inputs, again, example_kwargs=example_kwargs, progress=progress)
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
