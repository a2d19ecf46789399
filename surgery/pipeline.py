"""From a model to a compact model: decide, cut, verify, refine by measurements, recover, and report.

Each stage is a function that can be called separately. Iterative pruning and the search for the fastest model within a
drop of accuracy go through them several times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from exporters.session import OnnxModel
from surgery import planning
from surgery.capture import Whole
from surgery.config import DEPLOYED, MILDEST, Budget, Recipe
from surgery.core import (
    CheckResult,
    Clock,
    CompactModel,
    Coupling,
    Plan,
    Program,
    Progress,
    buffers_kept,
    count_macs,
    count_params,
    scratch_folder,
)
from surgery.coupling import Cut, batch_size, drop
from surgery.cutting import check_whole, describe_whole, tracer_of
from surgery.errors import BudgetUnreachable, InvalidInput, SurgeryError, UnsupportedModel
from surgery.inputs import LoadedModel, read_batches
from surgery.planning import Decision, LatencyBench, refined, traced
from surgery.recovery import Recovery, Step, Subject, points_lost, recovered, run as recovery, with_recovery
from surgery.report import as_json, describe, layer_shapes


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A verified compact model, with its plan and report.

    Attributes:
        model: the compact `nn.Module`: the dense model's call signature, trainable.
        plan: the removed units; `apply(plan, copy_of_the_dense_model)` repeats it.
        check: result of the verification.
        report: contents of report.json, without files and times, which `save` adds.
        program: the traced dense model; `coupling` are its groups.
        compact: the compact model, or compact submodule, with the reason for its kind.
        whole: the dense model around a pruned submodule, if any; `model` is then the whole compact model.
        recovery: recovery steps with evaluations, and the images; None without recovery.
    """

    model: torch.nn.Module = field(repr=False)
    plan: Plan = field(repr=False)
    check: CheckResult
    report: Mapping[str, Any] = field(repr=False)
    program: Program = field(repr=False)
    coupling: Coupling = field(repr=False)
    compact: CompactModel = field(repr=False)
    whole: Whole | None = field(default=None, repr=False)
    recipe: Recipe = field(default_factory=Recipe, repr=False)
    recovery: Recovery | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """`module` for the user's own class, `graph` for the rewritten program."""
        return self.compact.kind

    @property
    def cut(self) -> Cut:
        """The plan applied to the traced program."""
        return Cut(self.program, self.coupling, self.plan)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Recovery steps: the dense model, the model as cut, and each method."""
        return self.recovery.steps if self.recovery is not None else ()


def realise(decision: Decision, *, progress: Progress | None = None) -> Result:
    """Return the verified and recovered compact model, with `max_drop` the fastest one within it.

    Raises:
        CheckFailed: the compact model differs from the masked dense one.
        BudgetUnreachable: no model is within `max_drop`.
    """
    if decision.recipe.selection.max_drop is not None:
        return fastest(decision, progress)
    run = Clock(progress)
    decision = refined(decision, run)
    choice = decision.choice
    cut, program, coupling, plan = choice.cut, choice.program, choice.coupling, choice.plan
    tracer, whole = tracer_of(program.tracer), decision.whole
    with run("cut"):
        compact = tracer.cut(cut)
        model = whole.around(compact.module) if whole else compact.module
    with run("check"):
        verdict = tracer.check(cut, compact, seed=decision.recipe.selection.seed)
        if whole is not None:
            verdict = check_whole(whole, tracer.reference(cut), model, verdict, program)
    with run("count"), buffers_kept(compact.module):
        costs, notes = _counted(decision, compact)
    subject = Subject.of(cut, compact, model, whole)
    seen, between, shared = decision.seen, decision.between, decision.shared
    regained = recovered(subject, decision.recipe, run, seen=seen, between=between, shared=shared)
    data = describe(cut, costs, choice.refinement, compact=compact, verdict=verdict)
    if whole is not None:
        data["part"], note = describe_whole(whole, model, verdict)
        notes = [*notes, note]
    data |= {
        "layers": layer_shapes(program.dense.model, compact.module),
        "stairs": [as_json(stair) for stair in choice.stairs],
        "notes": [*data["notes"], *choice.warnings, *notes],
        "stages_s": {**decision.stages_s, **run.seconds},
    }
    report, recipe = with_recovery(data, regained), decision.recipe
    return Result(model, plan, verdict, report, program, coupling, compact, whole, recipe, regained)


def follow(decision: Decision, tensors: Mapping[str, torch.Tensor]) -> None:
    """Participate in distributed training led by the first process, with its plan and its compact model's tensors."""
    choice, whole = decision.choice, decision.whole
    tracer = tracer_of(choice.program.tracer)
    compact = tracer.cut(choice.cut)
    compact.module.load_state_dict(tensors)
    model = whole.around(compact.module) if whole else compact.module
    recovery.follow(Subject.of(choice.cut, compact, model, whole), decision.recipe)


def apply(
    plan: Plan,
    dense_model: torch.nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Return the compact model of another copy of the dense model.

    Args:
        plan: plan of `shrink` or `Plan.load`.
        dense_model: model of the plan's dense architecture, with any weights; unchanged.
        example_inputs: as for `shrink`; None: made from the plan's input signature.
        example_kwargs: as for `shrink`; numbers, strings and flags are in the plan.

    Raises:
        PlanMismatch: the plan was made for another architecture.
        InvalidInput: the plan's inputs cannot be rebuilt; pass `example_inputs`.
    """
    program, whole = traced(plan, dense_model, example_inputs, example_kwargs)
    program, tracer = drop(program, plan.dropped), tracer_of(program.tracer)
    module: torch.nn.Module = tracer.cut(tracer.cut_of(program, plan)).module
    return whole.around(module) if whole else module


def _counted(decision: Decision, compact: CompactModel) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Return the costs as fvcore counts them on the two modules, and a note where it cannot."""
    program = decision.choice.program
    args, kwargs, batch = program.example_args, program.example_kwargs, batch_size(program)
    modules = (program.dense.model, compact.module)
    try:
        dense, kept = (count_macs(module, args, kwargs, batch=batch) for module in modules)
    except UnsupportedModel as error:
        return dict(decision.choice.costs), [f"MACs are the plan's own count, fvcore has none: {error}"]
    params = count_params(modules[0]), count_params(modules[1])
    return {**decision.choice.costs, "macs": (dense, kept), "params": params}, []


# Iterative pruning. --------------------------------------------------------------------------------------------------


def decide(loaded: LoadedModel, recipe: Recipe, progress: Progress | None = None) -> Decision:
    """Return what would be cut; errors are those of `shrink`.

    In iterative pruning, each step chooses units on the recovered model of the step before; all make one plan.
    """
    steps, seed = recipe.selection.steps, recipe.selection.seed
    if isinstance(recipe.data.val, Iterator):  # can be read once, and is needed for each model
        recipe = recipe.but(val=list(read_batches(recipe.data.val, seed, "val")))
    if steps == 1:
        return planning.decide(loaded, recipe, progress)
    goal, between = recipe.goal, list[Step]()
    targets = [1 - (1 - goal.amount) * step / steps for step in range(1, steps + 1)]
    decision = planning.decide(loaded, _toward(recipe, targets[0]), progress)
    quiet = decision.recipe.but(recover="reconstruct")
    if isinstance(recipe.data.data, Iterator):  # can be read once
        recipe = recipe.but(data=decision.seen)
    for step, target in enumerate(targets[1:], 1):
        dense, left = decision.choice.costs[goal.kind]
        kept = left / dense
        if kept <= target:
            continue
        so_far, which = realise(replace(decision, recipe=quiet), progress=progress), f"{step} of {steps}"
        for done in so_far.steps[1:]:
            notes = tuple(f"step {which}: {note}" for note in done.notes)
            between.append(replace(done, name=f"{done.name} {which}", notes=notes))
        again = _toward(recipe, target / kept).but(drop_layers=False, allow_chance=True)
        decision = _joined(decision, planning.decide(replace(loaded, module=so_far.model), again, progress))
    plan = replace(decision.choice.plan, budget=goal)
    return replace(decision, choice=replace(decision.choice, plan=plan), recipe=recipe, between=tuple(between))


def _toward(recipe: Recipe, fraction: float) -> Recipe:
    return recipe.but(steps=1, budget=Budget(**{recipe.goal.kind: min(fraction, 0.999)}))


def _joined(decision: Decision, further: Decision) -> Decision:
    """Return the decision with the units removed further from its model, where indices are those of the units left."""
    choice, plan, more = decision.choice, decision.choice.plan, further.choice.plan
    sizes = {group.name: group.size for group in choice.coupling.groups}
    dead = dict(plan.dead)
    for name, units in more.dead.items():
        removed = dead.get(name, ())
        left = [unit for unit in range(sizes.get(name, 0)) if unit not in removed]
        if len(left) != more.sizes[name]:
            raise SurgeryError(
                f"--steps: group '{name}' of the smaller model has {more.sizes[name]} units where {len(left)} were "
                "left; please report it, and do without --steps"
            )
        dead[name] = tuple(sorted([*removed, *(left[unit] for unit in units)]))
    plan = replace(planning.with_dead(plan, choice.coupling, dead), notes=(*plan.notes, *more.notes))
    joined = planning.choice_of(plan, choice.program.dense, decision.recipe, Clock(None))
    return replace(decision, choice=joined)


# The fastest model within a drop. ------------------------------------------------------------------------------------

FIRST = 0.5
NEAR = 0.04  # the search ends when the interval is this narrow, as a fraction of the dense latency
MOST = 7  # maximum number of recovered models


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

    The interval of latencies is halved: both latency and accuracy fall as more is cut. Models that lose little enough
    are timed against the dense one.
    """
    recipe, choice, clock = decision.recipe, decision.choice, Clock(progress)
    limit = recipe.selection.max_drop
    assert limit is not None and choice.refinement is not None, "the caller makes sure"
    tried = list[dict[str, Any]]()
    best: tuple[float, Result] | None = None
    low, high, target = 0.0, 1.0, FIRST
    with scratch_folder() as folder:
        dense, seen = choice.program.dense, decision.seen
        bench = LatencyBench(dense, folder, recipe, seen, clock.progress, for_accuracy=True)
        while len(tried) < MOST and high - low > NEAR and target <= MILDEST.amount:
            clock.progress(f"within {limit:g} points: {target:.2f} of the latency", 0.0)
            found, measured = _at(decision, target, progress), None
            if found is not None:
                file = bench.export(found.compact.module)
                lost, upper, _ = lost_by(_with_last(found, file, recipe))
                measured = bench.ratio(file, processes=2).value if upper <= limit else None
                figures = {"aim": round(target, 4), "lost": round(lost, 3), "upper": round(upper, 3)}
                tried.append({**figures, "measured": measured})  # None if it lost too much to be timed
                if measured is not None and (best is None or measured < best[0]):
                    best = measured, found
            low, high = (low, target) if measured is not None else (target, high)
            target = (low + high) / 2
    if best is None:
        nearest = min(tried, key=lambda t: float(t["upper"]), default=None)
        hint = "; the nearest, {aim:.2f} of the latency, loses up to {upper:.2f}".format(**nearest) if nearest else ""
        raise BudgetUnreachable(
            f"no model within --max-drop {limit:g} was found in {len(tried)} tries{hint}; allow more, recover more "
            "(--recover distill), or evaluate on more images: the bound is that of the 95 % interval",
            {name: value for name, value in (nearest or {}).items() if value is not None},
        )
    (ratio, result), of = best, choice.refinement.dense
    within = {"max_drop": limit, "dense": of, "of": lost_by(result.steps)[2], "measured": ratio, "tried": tried}
    verdict = f"measured {ratio:.4f} of {of} latency, the lowest found within {limit:g} points"
    latency = {**result.report["latency"], "target": ratio, "verdict": verdict}
    return replace(result, report={**result.report, "within": within, "latency": latency})


def _with_last(found: Result, file: Path, recipe: Recipe) -> tuple[Step, ...]:
    """Return the result's steps; for low-precision deployment, the last one is evaluated on its file.

    A submodule's file does not take the whole model's images: the float model is evaluated on those.
    """
    if recipe.target.deploy == DEPLOYED[0] or found.whole is not None:
        return found.steps
    model, reference = OnnxModel(file), found.recovery.reference if found.recovery is not None else None
    agreement = None if reference is None else reference.judge(lambda inputs: model(*inputs))
    metrics = None if recipe.data.metric is None else recipe.data.metric(model)
    return (*found.steps, replace(found.steps[-1], name=recipe.target.deploy, agreement=agreement, metrics=metrics))


def _at(decision: Decision, target: float, progress: Progress | None) -> Result | None:
    """Return the result for one latency; None if it cannot be reached."""
    assert decision.planner is not None
    try:
        choice = decision.planner.plan(target)
    except BudgetUnreachable:
        return None
    plan = replace(choice.plan, budget=Budget(latency=target))
    refinement = replace(choice.refinement, target=target) if choice.refinement is not None else None
    recipe = decision.recipe.but(budget=plan.budget, correct=False, max_drop=None)
    attempt = replace(decision, choice=replace(choice, plan=plan, refinement=refinement), recipe=recipe)
    return realise(attempt, progress=progress)
