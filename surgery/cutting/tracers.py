"""The two ways to capture a model, each with the stages that depend on it.

`export` captures a graph of operators. `torch-pruning` follows autograd along the example's path, for models that
`torch.export` cannot capture: nothing is known of their operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from surgery.capture import trace
from surgery.core import CheckResult, CompactModel, CostFn, Coupling, Plan, Program
from surgery.coupling import Cut, cost_functions, couple
from surgery.cutting.rewrite import rewrite_program
from surgery.cutting.verify import check_cut
from surgery.cutting.verify_dropped import check_dropped
from surgery.cutting.verify_whole import masked_part
from surgery.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Tracer:
    """The stages that depend on how a model was captured; what that permits says `Program.has_graph`.

    Attributes:
        name: as in `--tracer`.
        trace: arguments and errors are those of `surgery.trace`.
        couple: those of `surgery.couple`.
        cost_functions: what a plan leaves, by the name of a budget.
        cut: the compact model.
        check: what the oracle found; raises CheckFailed. Takes a cut, its compact model and a `seed`.
        reference: a module that computes what the dense one computes when removed units count as removed.
    """

    name: str
    trace: Callable[..., Program]
    couple: Callable[..., Coupling]
    cost_functions: Callable[[Program, Coupling], Mapping[str, CostFn]]
    cut: Callable[[Cut], CompactModel]
    check: Callable[..., CheckResult]
    reference: Callable[[Cut], torch.nn.Module]

    def cut_of(self, program: Program, plan: Plan, coupling: Coupling | None = None) -> Cut:
        """Return a plan applied to its program; the coupling is worked out where it is not given."""
        return Cut(program, coupling or self.couple(program, keep=tuple(plan.settings.get("keep", ()))), plan)


def tracer_of(name: str) -> Tracer:
    """Return the tracer of a name; raises InvalidInput where there is none."""
    if name == "export":
        return Tracer("export", trace, couple, cost_functions, rewrite_program, _check_graph, masked_part)
    if name == "torch-pruning":
        from surgery.cutting import eager, torch_pruning  # here: importing torch-pruning takes seconds

        stages = eager.trace, torch_pruning.couple, eager.cost_functions, eager.slice_module, eager.check_module
        return Tracer("torch-pruning", *stages, eager.masked_copy)
    raise InvalidInput(f"no tracer '{name}'; there are export and torch-pruning")


def _check_graph(cut: Cut, compact: CompactModel, *, seed: int = 0) -> CheckResult:
    verdict = check_cut(cut, compact, seed=seed)
    if cut.program.whole is None:
        return verdict
    return replace(verdict, notes=(*verdict.notes, *check_dropped(cut.program, cut.plan, seed=seed)))


def cut(program: Program, plan: Plan, *, coupling: Coupling | None = None) -> CompactModel:
    """Return a smaller copy of the traced model without the plan's dead units.

    Args:
        program: what `trace` returned; left unchanged.
        plan: for each `AxisCut(tensor, axis, dead)` a tensor of shape (.., C, ..) becomes (.., C - len(dead), ..).
        coupling: what `couple` returned for this program, where it is at hand.

    Returns:
        Module with the dense model's signature, output shapes and parameter names; trainable.

    Raises:
        PlanMismatch: the plan was made for another architecture, or contradicts itself.
        IllegalCut: an axis would be left empty.

    Source: coupled groups after Fang et al. 2023 (arXiv:2301.12900); label propagation is derived in `couple.py`.
    """
    tracer = tracer_of(program.tracer)
    return tracer.cut(tracer.cut_of(program, plan, coupling))


def check(
    program: Program, plan: Plan, compact: CompactModel, *, coupling: Coupling | None = None, seed: int = 0
) -> CheckResult:
    """Verify a compact model against the dense program.

    Args:
        program: the dense model, traced.
        plan: what was removed.
        compact: what `cut` returned; its weights must still be slices of the dense ones.
        coupling: what `couple` returned, where it is at hand.
        seed: of the values and inputs.

    Returns:
        Errors relative to the part of the output that varies with the input.

    Raises:
        CheckFailed: labels do not match, numbers differ by more than 1e-10 in float64 or 1e-4 in float32 (on the real
            weights: and by more than rounding explains), or the output varies too little with the input to tell.
    """
    tracer = tracer_of(program.tracer)
    return tracer.check(tracer.cut_of(program, plan, coupling), compact, seed=seed)
