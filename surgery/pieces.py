"""What limits the choice of units beyond their groups: pieces that must not vanish, and pieces that stay alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from surgery.labels import Atoms, Value

Roots = Mapping[str, tuple[int, ...]]
"""Group name → root label of each unit."""
Sets = Mapping[str, tuple[tuple[int, ...], ...]]
"""Group name → sets of its units."""


def floors(values: Mapping[str, Any], atoms: Atoms, roots: Roots) -> Sets:
    """Sets of units that make up the whole axis of some value without being all units of their group.

    One unit of each has to stay, or the value would lose all of the axis.
    """
    unit_of = _unit_of(roots)
    seen: set[bytes] = set()
    found: dict[str, dict[tuple[int, ...], None]] = {}
    for layer in _layers(values, atoms):
        key = layer.tobytes()
        if key in seen or not layer.all():
            continue
        seen.add(key)
        owned: dict[str, list[int]] = {}
        for root in np.unique(layer).tolist():
            if root in unit_of:
                owned.setdefault(unit_of[root][0], []).append(unit_of[root][1])
        if owned and all(len(units) < len(roots[name]) for name, units in owned.items()):
            name = max(owned, key=lambda n: len(owned[n]))
            found.setdefault(name, {})[tuple(owned[name])] = None
    return {name: tuple(sets) for name, sets in found.items()}


def alike(graph: torch.fx.GraphModule, values: Mapping[str, Any], atoms: Atoms, roots: Roots) -> Sets:
    """Equal pieces that a `chunk` cuts a group into: with as many units in each, the user's `chunk` goes on fitting.

    Groups that two chunks cut up differently are left out, and those of which a piece holds other units too.
    """
    unit_of = _unit_of(roots)
    found: dict[str, tuple[tuple[int, ...], ...] | None] = {}
    for node in graph.graph.nodes:
        pieces = values.get(node.name)
        if node.target is not torch.ops.aten.chunk.default or not isinstance(pieces, tuple):
            continue
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        units = [_units(piece, dim, atoms, unit_of) for piece in pieces]
        owners = {name for piece in units for name, _ in piece}
        sets = tuple(tuple(sorted(unit for _, unit in piece)) for piece in units)
        whole = len({u for s in sets for u in s}) == sum(map(len, sets)) == len(roots.get(next(iter(owners), ""), ()))
        if len(owners) == 1 and whole and len({len(s) for s in sets}) == 1:
            (name,) = owners
            found[name] = sets if found.get(name, sets) == sets else None
    return {name: sets for name, sets in found.items() if sets is not None}


def _units(piece: Value, dim: int, atoms: Atoms, unit_of: Mapping[int, tuple[str, int]]) -> list[tuple[str, int]]:
    """Group and unit of each index of a piece; nothing where an index has none, or several."""
    layers = atoms.canon(piece.axes[dim % len(piece.shape)])
    if len(layers) != 1 or not all(root in unit_of for root in layers[0].tolist()):
        return []
    return [unit_of[root] for root in layers[0].tolist()]


def _unit_of(roots: Roots) -> dict[int, tuple[str, int]]:
    return {root: (name, unit) for name, labels in roots.items() for unit, root in enumerate(labels)}


def _layers(values: Mapping[str, Any], atoms: Atoms) -> Iterator[Any]:
    for found in values.values():
        several: Sequence[Any] = found if isinstance(found, tuple) else (found,)
        for value in several:
            for layers in value.axes if isinstance(value, Value) else ():
                yield from atoms.canon(layers)
