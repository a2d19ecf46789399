"""Result of planning: a plan with its program, and for latency budgets the refinement log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from surgery.config import Recipe
from surgery.core import Coupling, Plan, Program
from surgery.coupling import Cut
from surgery.inputs import Calibration
from surgery.latency import FP32
from surgery.planning.forecast import Staircase

LOWEST, HIGHEST = 0.92, 1.03
"""A plan meets its budget if the measured ratio over the target is between these."""


@dataclass(frozen=True, slots=True)
class Iteration:
    """One plan of a refinement.

    Attributes:
        aim: the fraction of the dense latency that it was made for.
        predicted: the fraction predicted by the table.
        measured: the measured fraction, the median of `ratios`.
        ratios: one per process.
    """

    aim: float
    predicted: float
    measured: float
    ratios: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RefinementLog:
    """The predicted and measured latency of a plan, and the plans tried before it.

    Attributes:
        target: the requested fraction of the dense latency.
        dense_ms: the dense model's measured latency; None if nothing was measured.
        predicted_dense_ms: the dense model's latency by the table.
        predicted_ms: the plan's latency by the table.
        iterations: iterations in order.
        taken: index of the iteration with the final plan; -1 if nothing was measured.
        verdict: whether the budget is met, or why not.
        device: the device and precision of the measurements.
    """

    target: float
    dense_ms: float | None
    predicted_dense_ms: float
    predicted_ms: float
    iterations: tuple[Iteration, ...] = ()
    taken: int = -1
    verdict: str = ""
    device: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        del values["iterations"]
        rounds = [{**asdict(i), "ratios": list(i.ratios)} for i in self.iterations]
        return {**values, "rounds": rounds, "met": self.met}

    @property
    def predicted(self) -> float:
        """The fraction of the dense latency that the table predicts."""
        return self.predicted_ms / self.predicted_dense_ms

    @property
    def dense(self) -> str:
        """Description of what the latency is relative to."""
        precision = self.device.get("precision", FP32)
        return "the dense" if precision == FP32 else f"the dense {precision}"

    @property
    def met(self) -> bool | None:
        """Whether the measured ratio is within bounds; None if nothing was measured."""
        if self.taken < 0:
            return None
        return LOWEST <= self.iterations[self.taken].measured / self.target <= HIGHEST


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A plan and its program.

    Attributes:
        program: the traced program without the dropped blocks.
        coupling: its groups.
        plan: the plan.
        costs: ``params``, ``macs``, ``channels`` → (dense, kept).
        refinement: the plan's latency; None for other budgets.
        warnings: warnings about the latency table.
        stairs: times of the costliest kernels by width; empty for other budgets.
    """

    program: Program
    coupling: Coupling
    plan: Plan
    costs: Mapping[str, tuple[int, int]]
    refinement: RefinementLog | None = None
    warnings: tuple[str, ...] = ()
    stairs: tuple[Staircase, ...] = ()

    @property
    def cut(self) -> Cut:
        """The plan applied to its program."""
        return Cut(self.program, self.coupling, self.plan)


def plan_settings(recipe: Recipe, seen: Calibration | None) -> dict[str, Any]:
    """Return the settings recorded in a plan, so that it can be applied again: JSON values, without the budget."""
    selection, target, criterion = recipe.selection, recipe.target, recipe.criterion
    found: dict[str, Any] = {
        "criterion": criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom"),
        "keep": list(selection.keep),
        "part": selection.submodule,
    }
    for name in ("scope", "round_to", "inexact", "own_class", "tracer", "seed", "drop_layers", "steps"):
        found[name] = getattr(selection, name)
    if recipe.goal.is_latency:
        found |= {"threads": target.threads, "batch": target.batch, "deploy": target.deploy}
        if target.deploy == "int8":
            output = recipe.output
            found["int8"] = {
                "method": output.int8_method,
                "keep": list(output.int8_keep),
                "reduce_range": output.int8_reduce_range,
            }
    if seen is not None:
        found["data"] = seen.described()
    return found
