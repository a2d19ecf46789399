"""The roof: the list of stages on one screen.

`decide` goes from a module to a plan and `realise` on to a checked compact module, timed and corrected on the way where
the budget is one of time; `shrink` is both, and `apply` brings a plan to another copy of the dense model. Each stage is
a function that can be called alone; nothing here knows how any of them works. What is done with a result, exporting,
timing and writing files, is in `deliver`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from surgery import gradual, within
from surgery.capture import Whole
from surgery.config import OPTIONS, Recipe, option_of, validate
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
)
from surgery.coupling import Cut, batch_size, drop
from surgery.cutting import check_whole, describe_whole, notes_on_whole, tracer_of
from surgery.errors import InvalidInput, UnsupportedModel
from surgery.inputs import read
from surgery.planning import Decision, decide, refined, traced
from surgery.recovery import (
    Recovery,
    Step,
    Training,
    checked,
    recovered,
    run as recovery,
    twin,
    with_recovery,
)
from surgery.report import as_json, describe, layer_shapes


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A checked compact model and everything that led to it.

    Attributes:
        model: the compact `nn.Module`: the dense model's call signature, trainable.
        kind: `module` for the user's own class, `graph` for the rewritten program.
        plan: which units died; `apply(plan, copy_of_the_dense_model)` does it again.
        check: what the oracle found.
        report: what report.json holds; without files and times, which `save` adds.
        program: the traced dense model.
        coupling: its groups.
        compact: the compact model, with the reason for its kind; where a part was shrunk, the part alone.
        whole: where a part was shrunk, the dense model that it belongs to; `model` is then the whole compact one.
        recipe: what was asked for.
        recovery: its steps, each with how the compact model did after it, and the images; None for none.
    """

    model: torch.nn.Module = field(repr=False)
    kind: str
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
    def cut(self) -> Cut:
        """The plan applied to the traced program."""
        return Cut(self.program, self.coupling, self.plan)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Of recovery: the dense model, the one as cut, and what was done."""
        return self.recovery.steps if self.recovery is not None else ()


Share = Callable[[Plan, torch.nn.Module], None]


def realise(decision: Decision, *, progress: Progress | None = None, share: Share | None = None) -> Result:
    """Cut what was decided and check it; raises CheckFailed where the compact model is not the masked dense one.

    `share` is given the plan and the compact model before that is trained, where other processes take part.
    """
    run = Clock(progress)
    if decision.recipe.selection.max_drop is not None:
        result: Result = within.fastest(decision, lambda chosen: realise(chosen, progress=progress), run)
        return result
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
    regained = recovered(
        cut,
        compact,
        model,
        whole,
        decision.recipe,
        run.progress,
        seen=decision.seen,
        between=decision.between,
        share=share,
    )
    data = describe(program, coupling, plan, compact=compact, verdict=verdict, costs=costs, loop=choice.refinement)
    if whole is not None:
        data["part"] = describe_whole(whole, model, verdict)
        notes = [*notes, *notes_on_whole(data["part"])]
    data = {
        **data,
        "layers": layer_shapes(program.dense.model, compact.module),
        "stairs": [as_json(stair) for stair in choice.stairs],
        "notes": [*data["notes"], *choice.warnings, *notes],
        "stages_s": {**decision.stages_s, **run.seconds},
    }
    data = with_recovery(data, regained)
    return Result(
        model=model,
        kind=compact.kind,
        plan=plan,
        check=verdict,
        report=data,
        program=program,
        coupling=coupling,
        compact=compact,
        whole=whole,
        recipe=decision.recipe,
        recovery=regained,
    )


def follow(decision: Decision, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take part, as one of several processes, in the training that the first one leads.

    Args:
        decision: the first one's plan on this process's copy of the model.
        tensors: of its compact model, by name.
    """
    choice, whole = decision.choice, decision.whole
    tracer = tracer_of(choice.program.tracer)
    compact = tracer.cut(choice.cut)
    compact.module.load_state_dict(tensors)
    model = whole.around(compact.module) if whole else compact.module
    recovery.follow(choice.cut, compact, model, whole, decision.recipe)


def shrink(
    model: torch.nn.Module,
    example_inputs: Any,
    recipe: Recipe | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Return a physically smaller, checked copy of the model.

    Args:
        model: the dense model; bit-identical afterwards.
        example_inputs: a tensor, or a tuple of forward's positional arguments; (N, C, H, W) for most vision models.
        recipe: what is asked for, from `surgery.recipe`; half of the dense model's latency by default.
        example_kwargs: forward's keyword arguments.
        progress: called with a stage's name and 0.0 as it begins, 1.0 when it is done.
        options: those of earlier versions.

    Returns:
        The compact model, its plan, and the report on both.

    Raises:
        InvalidInput: arguments, shapes or weights that cannot be used.
        UnsupportedModel: the model cannot be traced or cut; the message names the source line. Or, with `own_class`,
            the class cannot hold any cut model.
        BudgetUnreachable: the message says what was reachable, and what is frozen.
        CheckFailed: the compact model does not compute what the masked dense model computes.
    """
    asked = (recipe or Recipe()).but(**renamed(options))
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise InvalidInput(f"example_kwargs is of type {type(example_kwargs).__name__}: give a dictionary of inputs")
    if asked.data.metric is not None:
        asked = asked.but(metric=checked(asked.data.metric, "metric"))
    validate(asked)
    with torch.random.fork_rng(devices=()), buffers_kept(model):
        decision = decided(model, example_inputs, asked, example_kwargs=example_kwargs, progress=progress)
        return realise(decision, progress=progress)


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of earlier versions as options of a recipe."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name == "training" and value is not None:
            if not isinstance(value, Training):
                raise InvalidInput(f"training={value!r:.60}: give a surgery.Training, such as Training(epochs=5)")
            told = {"batch": "train_batch", "every": "checkpoint_steps"}
            found |= {told.get(f.name, f.name): getattr(value, f.name) for f in fields(value) if f.name != "seed"}
        elif name == "int8" and value is not None:
            found |= {"int8_method": value.method, "int8_keep": value.keep, "int8_reduce_range": value.reduce_range}
        elif value is not None or name not in ("training", "int8", "budget"):
            found[next((new for new, old in OPTIONS.items() if name in option_of(old[1]).was), name)] = value
    return found


def decided(
    model: torch.nn.Module,
    example_inputs: Any,
    recipe: Recipe,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Return what would be cut, decided at once or in several steps; arguments and errors are those of `shrink`."""
    if isinstance(recipe.data.val, Iterator):  # which is there once, and is looked at again for each model
        recipe = recipe.but(val=list(read(recipe.data.val, recipe.selection.seed, "val")))
    if recipe.selection.steps == 1:
        return decide(model, example_inputs, recipe, example_kwargs=example_kwargs, progress=progress)
    done: Callable[[Decision], Result] = lambda decision: realise(decision, progress=progress)  # noqa: E731
    return gradual.decide_in_steps(
        model, example_inputs, recipe, done, example_kwargs=example_kwargs, progress=progress
    )


def recover(
    result: Result,
    data: Any = None,
    *,
    level: str | None = None,
    val: Any = None,
    images: int = 512,
    training: Training | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Return a result whose compact model is nearer to the dense one; the given result stays as it is.

    Args:
        result: what `shrink`, or an earlier `recover`, returned.
        data: images to learn from, as for `shrink`; not needed for `fold`.
        level: `fold`, `bn`, `reconstruct`, `distill` or `finetune`; None: `reconstruct` with data, else `fold`.
        val: images to judge by, as for `shrink`; None: `data`.
        images: at most so many images are looked at, where nothing is trained.
        training: how to train, for `distill` and `finetune`.
        seed: of all that is drawn.
        progress: called with a step's name and the fraction of it that is done.

    Raises:
        InvalidInput: data, level or settings that cannot be used.
    """
    if not isinstance(result, Result):
        raise InvalidInput(f"recover takes what surgery.shrink returned, not an object of type {type(result).__name__}")
    level = level or ("reconstruct" if data is not None else "fold")
    options = {"recover": level, "data": data, "val": val, "images": images, "training": training, "seed": seed}
    recipe = Recipe().but(**renamed(options))
    with torch.random.fork_rng(devices=()), buffers_kept(result.model):
        compact = twin(result.compact)
        model = result.whole.around(compact.module) if result.whole else compact.module
        found = recovered(
            result.cut,
            compact,
            model,
            result.whole,
            recipe,
            Clock(progress).progress,
        )
    report_data = with_recovery(result.report, found)
    return replace(result, model=model, compact=compact, report=report_data, recovery=found or result.recovery)


def apply(
    plan: Plan,
    dense_model: torch.nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Return the compact model of another copy of the dense model.

    Args:
        plan: what `shrink` decided, or `Plan.load` read.
        dense_model: same architecture as the plan was made for, any weights; left unchanged.
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
    """Return the costs as counted on the two modules themselves, by fvcore, and a note where the plan's differ."""
    program = decision.choice.program
    args, kwargs, batch = program.example_args, program.example_kwargs, batch_size(program)
    modules = (program.dense.model, compact.module)
    try:
        dense, kept = (count_macs(module, args, kwargs, batch=batch) for module in modules)
    except UnsupportedModel as error:
        return dict(decision.choice.costs), [f"MACs are the plan's own count, fvcore has none: {error}"]
    macs, params = (dense, kept), (count_params(modules[0]), count_params(modules[1]))
    planned = decision.choice.costs["macs"]
    notes = [f"the plan was made with {planned[0]:,} → {planned[1]:,} MACs"] if macs != planned else []
    return {**decision.choice.costs, "macs": macs, "params": params}, notes
