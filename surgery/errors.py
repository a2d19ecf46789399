"""Exceptions raised by the package, with the exit codes of the command line.

All derive from `SurgeryError`. A message says what failed, where (the user's ``file:line`` if known), why, and what to
do next. Imports neither torch nor other modules of the package.
"""

from __future__ import annotations

OK = 0
INTERNAL = 1


class SurgeryError(Exception):
    """Base class of all exceptions of the package; `exit_code` is the exit code of the command line."""

    exit_code = INTERNAL


class InvalidInput(SurgeryError):
    """Invalid arguments, files, shapes or weights."""

    exit_code = 2


class PlanMismatch(InvalidInput):
    """The plan was made for another architecture, or its file is not a plan."""


class UnsupportedModel(SurgeryError):
    """The model cannot be traced, cut or exported; the message names the user's source line."""

    exit_code = 3


class IllegalCut(UnsupportedModel):
    """A cut would leave an empty axis, or survivors that do not form a rectangle."""


class CheckFailed(SurgeryError):
    """The compact model differs from the masked dense model, or the verification is inconclusive."""

    exit_code = 4


class BudgetUnreachable(SurgeryError):
    """The budget cannot be met; the message says what was reachable and what is frozen."""

    exit_code = 5
