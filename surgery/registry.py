"""Registries of criteria and recovery methods, built-in and user-defined.

A registry belongs to a package of which each module registers one entry under the module's own name (``bn_gamma.py``:
`bn-gamma`). Names are listed from the files, so that a command line can offer them without loading torch; a module is
loaded when its entry is first asked for. Users register entries of their own by the same decorators.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from surgery.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Criterion:
    """A criterion for scoring units.

    Attributes:
        name: by which it is chosen.
        function: see `surgery.criterion`.
        needs: inputs besides the weights.
        head_members: criterion of the same kind as one without needs, for the members of each attention head.
    """

    name: str
    function: Callable[..., Any]
    needs: frozenset[str] = frozenset()
    head_members: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class RecoveryMethod:
    """A recovery method.

    Attributes:
        name: by which it is chosen.
        function: see `surgery.recovery_method`.
        needs: inputs besides the two models.
        after: name of the method that runs before it; empty for none.
        undo_if_worse: whether its changes are undone where they leave the outputs further from the dense model's.
    """

    name: str
    function: Callable[..., Any]
    needs: frozenset[str] = frozenset()
    after: str = ""
    undo_if_worse: bool = True


Entry = TypeVar("Entry", Criterion, RecoveryMethod)


class Registry(Generic[Entry]):
    """Entries by name.

    Args:
        kind: name of an entry in messages.
        package: package whose modules register entries under their own names.
        needs: allowed needs of an entry.
    """

    def __init__(self, kind: str, package: str, needs: Collection[str]) -> None:
        self._kind, self._package, self._needs = kind, package, frozenset(needs)
        self._entries: dict[str, Entry] = {}

    def names(self) -> list[str]:
        """Return all names, sorted; loads none of the modules."""
        places = list(importlib.import_module(self._package).__path__)
        own = {module.name.replace("_", "-") for module in pkgutil.iter_modules(places)}
        return sorted(own | self._entries.keys())

    def add(self, entry: Entry) -> None:
        """Register an entry; raises ValueError for a name that is taken or a need that is not known."""
        if unknown := entry.needs - self._needs:
            raise ValueError(f"{self._kind} {entry.name}: needs {min(unknown)!r}; known are {sorted(self._needs)}")
        module = importlib.util.find_spec(f"{self._package}.{entry.name.replace('-', '_')}")
        if entry.name in self._entries or (module is not None and entry.function.__module__ != module.name):
            raise ValueError(f"there is a {self._kind} '{entry.name}' already: choose another name")
        self._entries[entry.name] = entry

    def remove(self, name: str) -> None:
        """Remove an entry that a user registered; built-in entries stay, as their modules are loaded only once."""
        if self._entries[name].function.__module__.startswith(f"{self._package}."):
            raise ValueError(f"{self._kind} '{name}' is built in and cannot be removed")
        del self._entries[name]

    def has_need(self, name: str | None, need: str) -> bool:
        """Return whether the entry of this name, if there is one, needs something."""
        return name is not None and need in self[name].needs

    def __getitem__(self, name: str) -> Entry:
        if name not in self.names():
            raise InvalidInput(f"no {self._kind} '{name}'; there are {', '.join(self.names())}")
        if name not in self._entries:
            importlib.import_module(f"{self._package}.{name.replace('-', '_')}")
        return self._entries[name]


CRITERIA: Registry[Criterion] = Registry(
    "criterion", "surgery.importance.criteria", ("images", "graph", "gradients", "consumers", "costs", "seed")
)
RECOVERY_METHODS: Registry[RecoveryMethod] = Registry(
    "recovery method", "surgery.recovery.methods", ("images", "drawn-images", "graph", "gradients", "labels")
)
