"""No recovery."""

from __future__ import annotations

from surgery.recovery.run import Outcome, Task, recovery_method


@recovery_method("none")
def none(task: Task) -> Outcome:
    """Leave the compact model unchanged."""
    return Outcome()
