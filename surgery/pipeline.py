"""From a decision to a compact model: cut, verify, refine by measurements, recover, and report.

Each stage is a function that can be called separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.capture import Whole
from surgery.config import Recipe
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
from surgery.cutting import check_whole, describe_whole, tracer_of
from surgery.errors import UnsupportedModel
from surgery.planning import Decision, refined, traced
from surgery.recovery import Recovery, Step, Subject, recovered, run as recovery, with_recovery
from surgery.report import as_json, describe, layer_shapes


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A verified compact model, with its plan and report.

    Attributes:
        model: the compact `nn.Module`: the dense model's call signature, trainable.
        plan: the removed units; `apply(plan, copy_of_the_dense_model)` repeats it.
        check: result of the verification.
        report: contents of report.json, without files and times, which `save` adds.
        program: the traced dense model.
        coupling: its groups.
        compact: the compact model, or compact submodule, with the reason for its kind.
        whole: the dense model around a pruned submodule, if any; `model` is then the whole compact model.
        recipe: the recipe.
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
    """Cut and verify a decision; raises CheckFailed if the compact model differs from the masked dense one."""
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
    regained = recovered(subject, decision.recipe, run.progress, seen=seen, between=between, shared=shared)
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
