"""Registries of criteria and recovery methods, built-in and user-defined, registered by the same decorators.

Names are read from the decorators in a package's files, so that a command line can offer them without loading torch; a
module is imported when one of its entries is first used.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Entry:
    """A criterion for scoring units, or a recovery method."""

    name: str
    function: Callable[..., Any]  # see `surgery.criterion` and `surgery.recovery_method`
    needs: frozenset[str] = frozenset()  # inputs besides the weights, or the two models
    head_members: Callable[..., Any] | None = None  # of a criterion: for the members of attention heads; without needs
    after: str = ""  # name of the method that runs before it; empty for none
    undo_if_worse: bool = True  # whether to undo a method if outputs get further from the dense model's


class Registry:
    """Entries by name, which the modules of a package register; `kind` is what messages call one."""

    def __init__(self, kind: str, package: str, needs: Collection[str]) -> None:
        self._kind, self._package, self._needs = kind, package, frozenset(needs)
        self._entries: dict[str, Entry] = {}

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Name of each built-in entry → its module, as in ``@criterion("name", ..)``."""
        found = {}
        folder = Path(importlib.import_module(self._package).__path__[0])
        for file in folder.glob("*.py"):
            for name in re.findall(r'^@\w+\(\s*"([\w-]+)"', file.read_text("utf-8"), re.MULTILINE):
                found[name] = f"{self._package}.{file.stem}"
        return found

    def names(self) -> list[str]:
        """Return all names, sorted; loads none of the modules."""
        return sorted(self._modules.keys() | self._entries.keys())

    def add(self, entry: Entry) -> None:
        """Register an entry; raises ValueError for a name that is taken or a need that is not known."""
        if unknown := entry.needs - self._needs:
            raise ValueError(f"{self._kind} {entry.name}: needs {min(unknown)!r}; known are {sorted(self._needs)}")
        built_in = self._modules.get(entry.name, entry.function.__module__)
        if entry.name in self._entries or entry.function.__module__ != built_in:
            raise ValueError(f"there is a {self._kind} '{entry.name}' already: choose another name")
        self._entries[entry.name] = entry

    def remove(self, name: str) -> None:
        """Remove an entry that a user registered; built-in entries stay, as their modules are loaded only once."""
        if self._entries[name].function.__module__.startswith(f"{self._package}."):
            raise ValueError(f"{self._kind} '{name}' is built in and cannot be removed")
        del self._entries[name]

    def has_need(self, name: object, need: str) -> bool:
        """Return whether the entry of this name, if there is one, needs something."""
        return isinstance(name, str) and need in self[name].needs

    def __getitem__(self, name: str) -> Entry:
        if name not in self.names():
            raise InvalidInput(f"no {self._kind} '{name}'; there are {', '.join(self.names())}")
        if name not in self._entries:
            importlib.import_module(self._modules[name])
        return self._entries[name]


CRITERIA = Registry(
    "criterion", "surgery.importance.criteria", ("images", "graph", "gradients", "consumers", "costs", "seed")
)
RECOVERY_METHODS = Registry(
    "recovery method", "surgery.recovery", ("images", "drawn-images", "graph", "gradients", "labels")
)
