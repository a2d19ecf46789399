"""The roof: the list of stages on one screen.

`decide` goes from a module to a plan and `realise` on to a checked compact module, timed and corrected on the way where
the budget is one of time; `shrink` is both, and `apply` brings a plan to another copy of the dense model. Each stage is
a function that can be called alone; nothing here knows how any of them works. What is done with a result, exporting,
timing and writing files, is in `deliver`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from exporters.quantize import Int8
from surgery import gradual, within
from surgery.core import (
    Budget,
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
from surgery.coupling import batch_size, drop
from surgery.cutting import check_dropped, stages_of, submodule as parts
from surgery.errors import InvalidInput, UnsupportedModel
from surgery.inputs import read
from surgery.planning import Decision, decide, refinement as race, traced
from surgery.recovery import (
    Recovery,
    Step,
    Training,
    checked,
    level_of,
    recovered,
    refuse_drop,
    run as recovery,
    twin,
    with_recovery,
)
from surgery.report import content as report
from surgery.request import Request


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
    whole: parts.Whole | None = field(default=None, repr=False)
    recovery: Recovery | None = field(default=None, repr=False)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Of recovery: the dense model, the one as cut, and what was done."""
        return self.recovery.steps if self.recovery is not None else ()


def realise(decision: Decision, *, progress: Progress | None = None) -> Result:
    """Cut what was decided and check it; raises CheckFailed where the compact model is not the masked dense one."""
    run = Clock(progress)
    if decision.request.max_drop is not None:
        result: Result = within.fastest(decision, lambda chosen: realise(chosen, progress=progress), run)
        return result
    decision = _corrected(decision, run)
    choice = decision.choice
    program, coupling, plan = choice.program, choice.coupling, choice.plan
    stages, whole = stages_of(program.tracer), decision.whole
    with run("cut"):
        compact = stages.cut(program, plan, coupling=coupling)
        model = whole.around(compact.module) if whole else compact.module
    with run("check"):
        verdict = stages.check(program, plan, compact, coupling=coupling, seed=decision.request.seed)
        if program.whole is not None:
            told = check_dropped(program, plan, seed=decision.request.seed)
            verdict = replace(verdict, notes=(*verdict.notes, *told))
        if whole is not None:
            verdict = parts.check(whole, stages.reference(program, plan, coupling), model, verdict, program)
    with run("count"), buffers_kept(compact.module):
        costs, notes = _counted(decision, compact)
    regained = recovered(program, plan, coupling, compact, model, whole, decision.request, run.progress)
    data = report.describe(program, coupling, plan, compact=compact, verdict=verdict, costs=costs, loop=choice.loop)
    if whole is not None:
        data["part"] = parts.describe(whole, model, verdict)
        notes = [*notes, *parts.notes(data["part"])]
    data = {
        **data,
        "layers": report.layers(program.dense.model, compact.module),
        "stairs": [report.plain(stair) for stair in choice.stairs],
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
        recovery=regained,
    )


def _corrected(decision: Decision, run: Clock) -> Decision:
    """Time the compact model against the dense one and correct the plan, where the budget is time on this machine."""
    choice, request = decision.choice, decision.request
    if choice.replan is None or choice.loop is None or not (request.correct and choice.live):
        return decision
    stages = stages_of(request.tracer)
    with run("close the loop"), tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        track = race.track_of(choice.program.dense, Path(folder), request, run.progress)
        plans, loop = race.close(
            choice,
            choice.replan,
            lambda c: stages.cut(c.program, c.plan, coupling=c.coupling).module,
            track,
        )
    return replace(decision, choice=replace(plans, loop=loop))


def follow(decision: Decision, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take part, as one of several processes, in the training that the first one leads.

    Args:
        decision: the first one's plan on this process's copy of the model.
        tensors: of its compact model, by name.
    """
    choice, whole = decision.choice, decision.whole
    stages = stages_of(choice.program.tracer)
    compact = stages.cut(choice.program, choice.plan, coupling=choice.coupling)
    compact.module.load_state_dict(tensors)
    model = whole.around(compact.module) if whole else compact.module
    recovery.follow(choice.program, choice.plan, choice.coupling, compact, model, whole, decision.request)


def shrink(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    budget: Budget | None = None,
    criterion: str | Callable[..., Any] | None = None,
    scope: str = "global",
    round_to: int = 1,
    inexact: str = "if-needed",
    keep: Sequence[str] = (),
    own_class: bool = False,
    part: str | None = None,
    tracer: str = "export",
    seed: int = 0,
    threads: int = 1,
    batch: int = 1,
    deploy: str = "fp32",
    int8: Int8 | None = None,
    latency_table: Any = None,
    correct: bool = True,
    drop_layers: bool = True,
    acceptance: str | Path | None = None,
    data: Any = None,
    images: int = 512,
    recover: str | None = None,
    val: Any = None,
    training: Training | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    max_drop: float | None = None,
    steps: int = 1,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Return a physically smaller, checked copy of the model.

    Args:
        model: the dense model; bit-identical afterwards.
        example_inputs: a tensor, or a tuple of forward's positional arguments; (N, C, H, W) for most vision models.
        budget: what to keep; half of the dense model's latency in ONNX Runtime by default.
        criterion: name of a criterion of `surgery.score`, or a callable ``(group, parameters) -> score per unit``;
            None: `signal` for a budget of time, else `l1`.
        scope: `global` ranks all units together, `uniform` keeps the same share of every group.
        round_to: kept units per group are multiples of this.
        inexact: `never`, `if-needed` or `always` cut units whose removal is not the same as zeros (`Group.inexact`).
        keep: patterns (``*``, ``?``) of module or parameter names that stay whole.
        own_class: keep submodules whole whose own code does not run at other sizes, so that the model's class fits;
            the plan's settings then list them under `keep`.
        part: dotted name of the submodule to shrink, or None for the whole model.
        tracer: `export`, or `torch-pruning` for models that `torch.export` cannot capture.
        seed: of everything drawn at random; same model, seed and arguments give the same plan.
        threads: of ONNX Runtime, for budgets of time.
        batch: items per run, for budgets of time.
        deploy: `fp32` or `int8`: the precision in which the model will run, and that a budget of time is of: the int8
            file's latency against the dense model's in int8.
        int8: how files in int8 are made; None: as `exporters.quantize.Int8()`.
        latency_table: path of a table that `surgery profile` wrote, or a `LatencyTable`; None: this machine's, which is
            measured where it has gaps and kept on disk. With a table that is given nothing is timed.
        correct: time the compact model against the dense one, and correct the plan until the budget of time is met.
        drop_layers: let residual blocks and depthwise layers go: those that are dead already, and for budgets of time
            those that buy it most cheaply.
        acceptance: path of what a pack measured of an earlier plan on the table's device; the new plan aims by it.
        data: images to choose by and to recover with, no labels needed: a tensor (N, C, H, W), normalised as the model
            expects, a Dataset, or a sequence or DataLoader of batches, each forward's input or a tuple of its inputs
            and what follows them (classes, for `finetune`). The plan's settings record their number and digest.
        images: at most so many of them are looked at.
        recover: `none`, `fold` (without images), `bn`, `reconstruct`, `distill` or `finetune`; None: `reconstruct`
            where there are data, else `none`.
        val: images to judge by, with classes or without, as `data`, or a pair of tensors (N, C, H, W) and (N,).
        training: a `surgery.Training`, for `distill` and `finetune`.
        evaluate: a function of a model that returns figures by name; the first is to be kept high.
        max_drop: in the place of a budget, points that may be lost: of accuracy on labelled `val` by the upper end of
            its 95 % interval, else of the first figure of `evaluate`, else of agreement with the dense model.
        steps: cut so many times, each time a part of the way, with a reconstruction in between; not for latencies.
        example_kwargs: forward's keyword arguments.
        progress: called with a stage's name and 0.0 as it begins, 1.0 when it is done.

    Returns:
        The compact model, its plan, and the report on both.

    Raises:
        InvalidInput: arguments, shapes or weights that cannot be used.
        UnsupportedModel: the model cannot be traced or cut; the message names the source line. Or, with `own_class`,
            the class cannot hold any cut model.
        BudgetUnreachable: the message says what was reachable, and what is frozen.
        CheckFailed: the compact model does not compute what the masked dense model computes.
    """
    _require_types(keep=keep, part=part, seed=seed, example_kwargs=example_kwargs)
    request = Request(
        budget=budget,
        criterion=criterion,
        scope=scope,
        round_to=round_to,
        inexact=inexact,
        keep=(keep,) if isinstance(keep, str) else tuple(keep),
        own_class=own_class,
        part=part,
        tracer=tracer,
        seed=seed,
        threads=threads,
        batch=batch,
        deploy=deploy,
        int8=int8,
        latency_table=latency_table,
        correct=correct,
        drop_layers=drop_layers,
        acceptance=acceptance,
        data=data,
        images=images,
        recover=recover,
        val=val,
        training=training,
        evaluate=None if evaluate is None else checked(evaluate, "evaluate"),
        max_drop=max_drop,
        steps=steps,
    )
    level_of(request)
    refuse_drop(request)
    gradual.refuse_steps(request)
    if not isinstance(request.goal, Budget):
        raise InvalidInput(f"budget is {budget!r}; pass for example surgery.Budget(latency=0.5)")
    with torch.random.fork_rng(devices=()), buffers_kept(model):
        decision = decided(model, example_inputs, request, example_kwargs=example_kwargs, progress=progress)
        return realise(decision, progress=progress)


def decided(
    model: torch.nn.Module,
    example_inputs: Any,
    request: Request,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Return what would be cut, decided at once or in `request.steps`; arguments and errors are those of `shrink`."""
    gradual.refuse_steps(request)
    if isinstance(request.val, Iterator):  # which is there once, and is looked at again for each model
        request = replace(request, val=list(read(request.val, request.seed, "val")))
    if request.steps == 1:
        return decide(model, example_inputs, request, example_kwargs=example_kwargs, progress=progress)
    done: Callable[[Decision], Result] = lambda decision: realise(decision, progress=progress)  # noqa: E731
    return gradual.decide_in_steps(
        model, example_inputs, request, done, example_kwargs=example_kwargs, progress=progress
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
    request = Request(recover=level, data=data, val=val, images=images, training=training, seed=seed)
    level_of(request)
    with torch.random.fork_rng(devices=()), buffers_kept(result.model):
        compact = twin(result.compact)
        model = result.whole.around(compact.module) if result.whole else compact.module
        found = recovered(
            result.program,
            result.plan,
            result.coupling,
            compact,
            model,
            result.whole,
            request,
            Clock(progress).progress,
        )
    report_data = with_recovery(result.report, found)
    return replace(result, model=model, compact=compact, report=report_data, recovery=found or result.recovery)


def _require_types(*, keep: Any, part: Any, seed: Any, example_kwargs: Any) -> None:
    patterns = (keep,) if isinstance(keep, str) else keep
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidInput(f"keep={keep!r}: give patterns of names, such as keep=('fc', 'layer4.*')")
    if part is not None and not isinstance(part, str):
        raise InvalidInput(f"part={part!r:.60}: give the submodule's dotted name, such as 'backbone'")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidInput(f"seed={seed!r}: give a whole number of at least 0")
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise InvalidInput(f"example_kwargs is of type {type(example_kwargs).__name__}: give a dictionary of inputs")


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
    program, stages = drop(program, plan.dropped), stages_of(program.tracer)
    coupling = stages.couple(program, keep=tuple(plan.settings.get("keep", ())))
    module: torch.nn.Module = stages.cut(program, plan, coupling=coupling).module
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
