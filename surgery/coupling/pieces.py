"""Constraints on the choice of units: pieces that must not become empty, and pieces of equal size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from surgery.core import LabelSet, Value

aten = torch.ops.aten

_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)

Roots = Mapping[str, tuple[int, ...]]
"""Group name → root label of each unit."""
Sets = Mapping[str, tuple[tuple[int, ...], ...]]
"""Group name → sets of its units."""
Pieces = tuple[tuple[tuple[str, int], ...], ...]
"""For each piece, the group and unit of each index."""


def required_units(values: Mapping[str, Any], labels: LabelSet, roots: Roots) -> Sets:
    """Return sets of units that form the whole axis of a value without being all units of their group.

    One unit of each set must remain, or the axis would become empty.
    """
    unit_of = _unit_of(roots)
    seen: set[bytes] = set()
    found: dict[str, dict[tuple[int, ...], None]] = {}
    for layer in _layers(values, labels):
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


def equal_pieces(
    graph: torch.fx.GraphModule, values: Mapping[str, Any], labels: LabelSet, roots: Roots
) -> tuple[Pieces, ...]:
    """Return equal pieces into which a chunk or split divides groups; the user's code works while they stay equal.

    Omitted are pieces that contain part of a group only, and groups that are divided in two different ways.
    """
    unit_of = _unit_of(roots)
    found: dict[frozenset[str], Pieces | None] = {}
    for node in graph.graph.nodes:
        pieces = values.get(node.name)
        if node.target not in _SPLITS or not isinstance(pieces, tuple):
            continue
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        units = tuple(tuple(sorted(_units(piece, dim, labels, unit_of))) for piece in pieces)
        groups = frozenset(name for piece in units for name, _ in piece)
        held = [unit for piece in units for unit in piece]
        if not held or len(set(held)) != len(held) or len(held) != sum(len(roots[name]) for name in groups):
            continue
        if len({len(piece) for piece in units}) == 1:
            found[groups] = units if found.get(groups, units) == units else None
    shared = [names for names in found if any(names & other for other in found if other != names)]
    return tuple(units for names, units in found.items() if units is not None and names not in shared)


def _units(piece: Value, dim: int, labels: LabelSet, unit_of: Mapping[int, tuple[str, int]]) -> list[tuple[str, int]]:
    """Return group and unit of each index of a piece; empty if an index has none, or several."""
    layers = labels.canon(piece.axes[dim % len(piece.shape)])
    if len(layers) != 1 or not all(root in unit_of for root in layers[0].tolist()):
        return []
    return [unit_of[root] for root in layers[0].tolist()]


def _unit_of(roots: Roots) -> dict[int, tuple[str, int]]:
    return {root: (name, unit) for name, labels in roots.items() for unit, root in enumerate(labels)}


def _layers(values: Mapping[str, Any], labels: LabelSet) -> Iterator[Any]:
    for found in values.values():
        several: Sequence[Any] = found if isinstance(found, tuple) else (found,)
        for value in several:
            for layers in value.axes if isinstance(value, Value) else ():
                yield from labels.canon(layers)
