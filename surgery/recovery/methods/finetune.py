"""Fine-tuning with labels."""

from __future__ import annotations

from surgery.recovery.distillation import distilled
from surgery.recovery.steps import Outcome, Task, recovery_method


@recovery_method("finetune", needs=["images", "gradients", "labels"], after="reconstruct", undo_if_worse=False)
def finetune(task: Task) -> Outcome:
    """Train the compact model on the dense model's outputs and on labels."""
    return distilled(task, "finetune", labels=True)
