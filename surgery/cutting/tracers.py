"""The two ways to capture a model, each with the stages that depend on it.

`export` captures a graph of operators. `torch-pruning` follows autograd along the example's path, without a graph of
operators, for models that `torch.export` cannot capture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from surgery.capture import trace
from surgery.core import CheckResult, CompactModel, CostFn, Coupling, Plan, Program
from surgery.coupling import Cut, cost_functions, couple
from surgery.cutting.rewrite import rewrite_program
from surgery.cutting.verify import MaskedPart, check_cut
from surgery.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Tracer:
    """The stages that depend on how a model was captured; arguments and errors are those of `surgery.trace` etc."""

    trace: Callable[..., Program]
    couple: Callable[..., Coupling]
    cost_functions: Callable[[Program, Coupling], Mapping[str, CostFn]]
    cut: Callable[[Cut], CompactModel]
    check: Callable[..., CheckResult]
    reference: Callable[[Cut], torch.nn.Module]  # the masked dense model

    def cut_of(self, program: Program, plan: Plan, coupling: Coupling | None = None) -> Cut:
        """Return the cut of a plan and its program; the coupling is computed if not given."""
        return Cut(program, coupling or self.couple(program, keep=tuple(plan.settings.get("keep", ()))), plan)


def tracer_of(name: str) -> Tracer:
    """Return the tracer called `name`; raises InvalidInput if there is none."""
    if name == "export":
        return Tracer(trace, couple, cost_functions, rewrite_program, check_cut, MaskedPart)
    if name == "torch-pruning":
        from surgery.cutting import eager  # imported here because importing torch-pruning takes seconds

        stages = eager.trace, eager.couple, eager.cost_functions, eager.slice_module, eager.check_module
        return Tracer(*stages, eager.masked_copy)
    raise InvalidInput(f"no tracer '{name}'; there are export and torch-pruning")


def cut(program: Program, plan: Plan, *, coupling: Coupling | None = None) -> CompactModel:
    """Return a smaller copy of the traced model without the plan's dead units.

    Args:
        program: result of `trace`; unchanged.
        plan: for each `AxisCut(tensor, axis, dead)` a tensor of shape (.., C, ..) becomes (.., C - len(dead), ..).
        coupling: result of `couple` for this program, if available.

    Returns:
        Module with the dense model's signature, output shapes and parameter names; trainable.

    Raises:
        PlanMismatch: the plan was made for another architecture, or contradicts itself.
        IllegalCut: an axis would become empty.

    Source: coupled groups after Fang et al. 2023 (arXiv:2301.12900); label propagation is derived in `coupler.py`.
    """
    tracer = tracer_of(program.tracer)
    return tracer.cut(tracer.cut_of(program, plan, coupling))


def check(
    program: Program, plan: Plan, compact: CompactModel, *, coupling: Coupling | None = None, seed: int = 0
) -> CheckResult:
    """Verify a compact model against the dense program.

    Args:
        program: the dense model, traced.
        plan: the plan of the cut.
        compact: result of `cut`; its weights must still be slices of the dense ones.
        coupling: result of `couple`, if available.
        seed: seed of the values and inputs.

    Returns:
        Errors relative to the part of the output that varies with the input.

    Raises:
        CheckFailed: labels do not match, outputs differ by more than 1e-10 in float64 or 1e-4 in float32 (on the real
        weights, also by more than rounding explains), or the output varies too little with the input.
    """
    tracer = tracer_of(program.tracer)
    return tracer.check(tracer.cut_of(program, plan, coupling), compact, seed=seed)
