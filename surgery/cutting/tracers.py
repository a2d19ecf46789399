"""The stages that depend on how a model was captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from surgery.capture import trace
from surgery.core import CheckResult, CompactModel, CostFn, Coupling, Program
from surgery.coupling import cost_functions, couple
from surgery.cutting import submodule as parts
from surgery.cutting.rewrite import cut
from surgery.cutting.verify import check
from surgery.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages that depend on how the model was captured."""

    trace: Callable[..., Program]
    couple: Callable[..., Coupling]
    cost_functions: Callable[..., Mapping[str, CostFn]]
    cut: Callable[..., CompactModel]
    check: Callable[..., CheckResult]
    reference: Callable[..., torch.nn.Module]


def stages_of(tracer: str) -> Stages:
    """Return what belongs to a tracer; raises InvalidInput where there is none of that name."""
    if tracer == "export":
        return Stages(trace, couple, cost_functions, cut, check, parts.reference_module)
    if tracer == "torch-pruning":
        from surgery.cutting import (
            eager,  # Here: importing torch-pruning takes seconds.
            torch_pruning,
        )

        return Stages(
            eager.trace, torch_pruning.couple, eager.cost_functions, eager.cut, eager.check, eager.reference_module
        )
    raise InvalidInput(f"no tracer '{tracer}'; there are export and torch-pruning")
