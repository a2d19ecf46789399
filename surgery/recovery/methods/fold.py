"""Reconstruction without the user's images."""

from __future__ import annotations

from surgery.recovery.methods.reconstruct import reconstruct
from surgery.recovery.run import Outcome, Task, recovery_method


@recovery_method("fold", needs=["drawn-images", "graph"])
def fold(task: Task) -> Outcome:
    """Reconstruct on synthetic images."""
    return reconstruct(task)
