"""Coupling: find which indices of which parameters must be removed together.

Every axis of every parameter and buffer starts with fresh labels; network inputs have none, and labels that reach a
network output are frozen. Operator rules tie labels. The remaining equivalence classes are the units; units that occur
on the same axes in the same way form a group.

Source: coupled groups after Fang et al. 2023 (arXiv:2301.12900); axes as conjunctions of factors after Shardy's
sharding rules; running movement operators on integer labels is original.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from surgery.core import KEPT, Coupling, Frozen, Group, LabelledGraph, LabelSet, Mask, Program, Site, Value, all_tensors
from surgery.coupling.labelled_graph import dense_shapes, index_table, propagate_labels
from surgery.coupling.pieces import equal_pieces, required_units
from surgery.coupling.zeros import not_zeros
from surgery.errors import InvalidInput


def couple(program: Program, *, keep: Sequence[str] = ()) -> Coupling:
    """Find the groups of units that may be removed.

    Args:
        program: result of `trace`.
        keep: shell patterns of parameter and module names; no axis of a match is cut.

    Returns:
        Groups, frozen axes with reasons, and labels for later stages.

    Raises:
        InvalidInput: a pattern matches nothing; the message lists similar names.
    """
    labels = LabelSet()
    params: dict[str, Value] = {}
    kept = kept_names(program, keep)

    tensors = all_tensors(program)
    tied: dict[int, Value] = {}

    def labels_of(name: str, tensor: Tensor) -> Value:
        if name not in params:
            same = tied.get(id(tensors[name]))
            axes = same.axes if same else tuple((labels.fresh(size),) if size > 1 else () for size in tensor.shape)
            params[name] = Value(tuple(tensor.shape), axes, name, index_table(tensor))
            tied[id(tensors[name])] = params[name]
            if name in kept:
                for layers in axes:
                    labels.freeze(layers, f"{KEPT} {kept[name]}")
        return params[name]

    values, calls = propagate_labels(program.graph, labels_of, dense_shapes, labels)
    params |= {n: replace(tied[id(t)], param=n) for n, t in tensors.items() if id(t) in tied and n not in params}
    labels.settle()
    groups = groups_of(labels, params)
    labels.freeze(tuple(np.array(g.units) for g in groups if g.size == 1), _ALONE)
    groups = tuple(g for g in groups if g.size > 1)
    roots = {group.name: group.units for group in groups}
    labelled = LabelledGraph(labels, values, calls, params, roots)
    shapes = {name: value.shape for name, value in params.items()}
    reasons = not_zeros(program, labelled)
    groups = tuple(replace(g, inexact=g.inexact or reasons.get(g.name)) for g in groups)
    required, equal = required_units(values, labels, roots), equal_pieces(program.graph, values, labels, roots)
    return Coupling(groups, tuple(frozen_axes(labels, params, groups)), shapes, labelled, required, equal)


def kept_names(program: Program, patterns: Sequence[str]) -> dict[str, str]:
    """Return parameter or buffer name → the pattern that keeps it."""
    if program.has_graph:
        names = [str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"]
    else:
        names = list(all_tensors(program))
    modules = [name for name, _ in program.model.named_modules() if name]
    kept: dict[str, str] = {}
    for pattern in patterns:
        matched = set(fnmatch.filter(names, pattern))
        for module in fnmatch.filter(modules, pattern):
            matched.update(n for n in names if n.startswith(module + "."))
        if not matched:
            near = difflib.get_close_matches(pattern, [*modules, *names], n=3, cutoff=0.3)
            raise InvalidInput(
                f"--keep {pattern!r} matches no module or parameter; near names: {', '.join(near) or 'none'}"
            )
        kept.update(dict.fromkeys(matched, pattern))
    return kept


def groups_of(labels: LabelSet, params: Mapping[str, Value]) -> tuple[Group, ...]:
    """Sort the units into groups with unique names."""
    return tuple(_numbered(_groups(labels, params)))


def _groups(labels: LabelSet, params: Mapping[str, Value]) -> Iterator[Group]:
    """Group units that occur on the same axes in the same way, in order of first appearance."""
    places: list[tuple[str, int]] = []  # one entry per layer of a parameter axis
    columns: list[Mask] = []
    for name, value in params.items():
        for axis, layers in enumerate(value.axes):
            for layer in labels.canon(layers):
                columns.append(np.stack((layer, np.full(len(layer), len(places)), np.arange(len(layer)))))
                places.append((name, axis))
    if not places:
        return
    root, place, position = np.concatenate(columns, axis=1)
    order = np.lexsort((position, place, root))
    root, place, position = root[order], place[order], position[order]
    members: dict[tuple[bytes, str | None], list[tuple[int, int, int]]] = {}
    starts = np.flatnonzero(np.diff(root, prepend=-1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(root)], strict=True):
        label = int(root[start])
        if label:
            key = (place[start:stop].tobytes(), labels.state.inexact.get(label))
            members.setdefault(key, []).append((start, stop, label))
    for (_, inexact), units in sorted(members.items(), key=lambda kv: (place[kv[1][0][0]], position[kv[1][0][0]])):
        units.sort(key=lambda u: int(position[u[0]]))
        sites = tuple(_sites(units, places, place, position))
        yield Group(_name(sites[0]), tuple(label for _, _, label in units), sites, inexact)


def _numbered(groups: Iterator[Group]) -> Iterator[Group]:
    """Number groups whose first units have the same name."""
    seen: Counter[str] = Counter()
    for group in groups:
        seen[group.name] += 1
        number = seen[group.name]
        yield replace(group, name=f"{group.name}#{number}") if number > 1 else group


def _name(site: Site) -> str:
    """Name a group by its first occurrence: ``tensor:axis``, then start, width and stride of its first unit."""
    first = site.index[0]
    name = f"{site.tensor}:{site.axis}" + (f"@{first[0]}" if first[0] else "")
    if len(first) > 1:
        name += f"x{len(first)}" + (f"/{first[1] - first[0]}" if first[1] - first[0] > 1 else "")
    return name


def _sites(
    units: Sequence[tuple[int, int, int]], places: Sequence[tuple[str, int]], place: Any, position: Any
) -> Iterator[Site]:
    """Return the parameter axes of a group's units, merging layers of the same axis."""
    start, stop, _ = units[0]
    block = place[start:stop]
    rows = np.stack([position[a:b] for a, b, _ in units])
    by_axis: dict[tuple[str, int], list[Any]] = {}
    for k in dict.fromkeys(block.tolist()):
        by_axis.setdefault(places[k], []).append(rows[:, block == k])
    for (tensor, axis), parts in by_axis.items():
        index = np.sort(np.concatenate(parts, axis=1), axis=1)
        yield Site(tensor, axis, tuple(tuple(row) for row in index.tolist()))


def frozen_axes(labels: LabelSet, params: Mapping[str, Value], groups: Sequence[Group]) -> Iterator[Frozen]:
    """Return axes with indices that are never cut, except kernel axes."""
    cuttable = np.zeros(labels.count, dtype=np.bool_)
    for group in groups:
        cuttable[list(group.units)] = True
    for name, value in params.items():
        for axis, layers in enumerate(value.axes):
            free = np.zeros(value.shape[axis], dtype=np.bool_)
            for layer in labels.canon(layers):
                free |= cuttable[layer]
            whole: list[int] = layers[0][~free].tolist() if layers else []
            reasons = dict.fromkeys(labels.reason(label) or _ALONE for label in whole)
            for reason in reasons:
                if axis < 2 or "needs this axis whole" not in reason:
                    yield Frozen(name, axis, reason)


_ALONE = "a single unit, which the axis cannot do without"
