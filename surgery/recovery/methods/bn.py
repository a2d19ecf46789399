"""Batch-norm re-estimation."""

from __future__ import annotations

from surgery.recovery.batch_norm import estimate_norms
from surgery.recovery.steps import Outcome, Task, recovery_method


@recovery_method("bn", needs=["images"])
def bn(task: Task) -> Outcome:
    """Re-estimate the running statistics of all batch norms on images."""
    subject = task.subject
    count = estimate_norms(
        subject.compact, task.images, call=lambda batch: subject.part(*batch), progress=task.progress
    )
    return Outcome(() if count else ("the model has no batch norms with running statistics",))
