"""Fine-tuning with labels."""

from __future__ import annotations

from surgery.recovery.methods.distill import trained
from surgery.recovery.run import Outcome, Task, recovery_method


@recovery_method("finetune", needs=["images", "gradients", "labels"], after="reconstruct", undo_if_worse=False)
def finetune(task: Task) -> Outcome:
    """Train the compact model on the dense model's outputs and on labels."""
    return trained(task, "finetune", labels=True)
