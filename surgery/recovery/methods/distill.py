"""Distillation from the dense model."""

from __future__ import annotations

from surgery.recovery.distillation import distilled
from surgery.recovery.steps import Outcome, Task, recovery_method


@recovery_method("distill", needs=["images", "gradients"], after="reconstruct")
def distill(task: Task) -> Outcome:
    """Train the compact model on the dense model's outputs; no labels are needed."""
    return distilled(task, "distill", labels=False)
