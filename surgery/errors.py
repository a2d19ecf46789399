"""Every error the package raises on purpose, and the exit code the command line gives it.

One small hierarchy under `SurgeryError`: catch that, and nothing that was foreseen escapes. A message says what, where
(the user's own ``file:line`` where there is one), why, and the next step. Imports neither torch nor anything of ours.
"""

from __future__ import annotations

OK = 0
INTERNAL = 1


class SurgeryError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = INTERNAL


class InvalidInput(SurgeryError):
    """Arguments, files, shapes or weights that cannot be used as given."""

    exit_code = 2


class PlanMismatch(InvalidInput):
    """The plan was made for another architecture, or its file is not a plan."""


class UnsupportedModel(SurgeryError):
    """The model cannot be traced, cut or exported; the message names the user's source line."""

    exit_code = 3


class IllegalCut(UnsupportedModel):
    """A cut would leave survivors that do not form whole slabs, or an empty axis."""


class CheckFailed(SurgeryError):
    """The compact model does not compute what the masked dense model computes, or the check cannot tell."""

    exit_code = 4


class BudgetUnreachable(SurgeryError):
    """The budget cannot be met; the message says what was reachable and what is frozen."""

    exit_code = 5
