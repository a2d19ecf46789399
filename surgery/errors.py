"""Exceptions raised by the package, with the exit codes of the command line.

All derive from `SurgeryError`. A message says what failed, where (the user's ``file:line`` if known), why, and what to
do next. Imports neither torch nor other modules of the package.
"""

from __future__ import annotations

from math import isfinite
from typing import Mapping

OK = 0
INTERNAL = 1


class SurgeryError(Exception):
    """Base class of all exceptions of the package; `exit_code` is the exit code of the command line."""

    exit_code = INTERNAL
    figures: Mapping[str, float] = {}  # in the message, by name


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
    """The budget cannot be met; the message and `figures` say what was reachable."""

    exit_code = 5

    def __init__(self, message: str, figures: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.figures = {name: value for name, value in (figures or {}).items() if isfinite(value)}
