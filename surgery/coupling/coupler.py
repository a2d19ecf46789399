"""Coupling: find which indices of which parameters must be removed together, as equivalence classes of labels.

Network inputs have no labels, and labels that reach an output are frozen. Locked labels replay a cut program.
Source: coupled groups after Fang et al. 2023 (arXiv:2301.12900); axes as conjunctions of factors after Shardy's
sharding rules; running movement operators on integer labels is original.
"""

from __future__ import annotations

import difflib
import fnmatch
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.capture import source_of
from surgery.core import (
    KEPT,
    Coupling,
    Frozen,
    Group,
    LabelledGraph,
    LabelSet,
    Layer,
    Mask,
    Program,
    Site,
    Value,
    all_tensors,
    arguments_of,
    attribute,
    interpret,
    shapes_of,
)
from surgery.coupling.masking import not_zeros, values_in
from surgery.errors import InvalidInput
from surgery.ops import Call, rules

aten = torch.ops.aten


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
    labels, kept, tensors = LabelSet(), kept_names(program, keep), all_tensors(program)
    params: dict[str, Value] = {}
    tied: dict[int, Value] = {}

    def labels_of(name: str, tensor: Tensor) -> Value:
        if name not in params:
            same = tied.get(id(tensors[name]))
            axes = same.axes if same else tuple((labels.fresh(size),) if size > 1 else () for size in tensor.shape)
            params[name] = tied[id(tensors[name])] = Value(tuple(tensor.shape), axes, index_table(tensor))
            if name in kept:
                for layers in axes:
                    labels.freeze(layers, f"{KEPT} {kept[name]}")
        return params[name]

    values, calls = propagate_labels(program.graph, labels_of, lambda node: shapes_of(node.meta.get("val")), labels)
    params |= {n: tied[id(t)] for n, t in tensors.items() if id(t) in tied and n not in params}
    labels.settle()
    groups = groups_of(labels, params)
    labels.freeze(tuple(np.array(g.units) for g in groups if g.size == 1), ALONE)
    groups = tuple(g for g in groups if g.size > 1)
    labelled = LabelledGraph(labels, values, calls, params, {group.name: group.units for group in groups})
    reasons = not_zeros(program, labelled)
    groups = tuple(replace(g, inexact=g.inexact or reasons.get(g.name)) for g in groups)
    shapes = {name: value.shape for name, value in params.items()}
    required, equal = _required_units(labelled), _equal_pieces(program.graph, labelled)
    return Coupling(groups, tuple(frozen_axes(labels, params, groups)), shapes, labelled, required, equal)


def kept_names(program: Program, patterns: Sequence[str]) -> dict[str, str]:
    """Return parameter or buffer name → the pattern that keeps it."""
    names = list(all_tensors(program))
    if program.has_graph:
        names = [str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"]
    modules = [name for name, _ in program.model.named_modules() if name]
    kept: dict[str, str] = {}
    for pattern in patterns:
        matched = set(fnmatch.filter(names, pattern))
        for module in fnmatch.filter(modules, pattern):
            matched.update(n for n in names if n.startswith(module + "."))
        if not matched:
            near = difflib.get_close_matches(pattern, [*modules, *names], n=3, cutoff=0.3)
            similar = f"; similar names: {', '.join(near)}" if near else ""
            raise InvalidInput(f"--keep {pattern!r} matches no module or parameter{similar}")
        kept.update(dict.fromkeys(matched, pattern))
    return kept


# Running a program on labels. ----------------------------------------------------------------------------------------


def propagate_labels(
    graph: torch.fx.GraphModule,
    params: Callable[[str, Tensor], Value],
    shapes: Callable[[torch.fx.Node], Any],
    labels: LabelSet,
    settled: Callable[[str, Any], Any] = lambda name, value: value,
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Run a graph on labels, which are open to couple and locked to verify; return all values and call arguments.

    `params` returns the labels of a parameter or buffer; `shapes` a node's output shape, a list of them, or a number
    for a symbolic size. `settled` is given each computed value and its node's name; its result is used instead.
    """
    table = rules()
    calls: dict[str, Mapping[str, Any]] = {}

    def placeholder(node: torch.fx.Node) -> Any:
        value = _plain(shapes(node))
        if labels.is_locked or not isinstance(value, Value):
            return value
        axes = tuple((labels.fresh(size),) if size > 1 and a > 0 else () for a, size in enumerate(value.shape))
        for layers in axes:
            labels.freeze(layers, "network input")  # so that labels tied to them report this as the reason
        return Value(value.shape, axes)

    def computed(node: torch.fx.Node, raw: Mapping[str, Any]) -> Any:
        shape = shapes(node)
        if not isinstance(shape, (tuple, list)):  # a symbolic size: its concrete value is the example's
            return shape
        where = source_of(node)
        labels.where = f"{node.target}" + (f" at {where}" if where else "")
        many = isinstance(shape, list)
        outputs = [s for s in shape if isinstance(s, tuple)] if isinstance(shape, list) else [shape]
        call = Call(node.name, calls[node.name], outputs, labels, many=many, raw=raw)
        rule = table.get(str(node.target))
        if rule is None:
            call.freeze_the_rest("no rule for this operator; to cut through it, add one in surgery/ops/")
            return _plain(shape)
        result = rule.couple(call)
        call.freeze_the_rest("the operator needs this axis whole")
        return result

    def run(node: torch.fx.Node, values: Mapping[str, Any]) -> Any:
        raw = arguments_of(node)
        bound = calls[node.name] = torch.fx.map_arg(raw, lambda n: values[n.name])
        picked = node.target is operator.getitem
        return settled(node.name, bound["0"][bound["1"]] if picked else computed(node, raw))

    values = interpret(
        graph.graph, placeholder=placeholder, parameter=lambda name: params(name, attribute(graph, name)), call=run
    )
    labels.where = "network output"
    for source in next(n for n in graph.graph.nodes if n.op == "output").all_input_nodes:
        for value in values_in(values[source.name]):
            for layers in value.axes:
                labels.freeze(layers, "network output")
    return values, calls


def _plain(shape: Any) -> Any:
    if isinstance(shape, tuple):
        return Value.plain(shape)
    return [_plain(s) for s in shape] if isinstance(shape, list) else shape


def index_table(tensor: Tensor) -> Layer | None:
    """Return the values of a one-dimensional integer tensor, such as an index buffer; None for any other tensor."""
    whole = tensor.dim() == 1 and tensor.dtype in (torch.int64, torch.int32)
    return tensor.detach().cpu().numpy().astype(np.int64) if whole else None


def groups_of(labels: LabelSet, params: Mapping[str, Value]) -> tuple[Group, ...]:
    """Group the units that occur on the same axes in the same way, in order of first appearance, with unique names."""
    places: list[tuple[str, int]] = []  # one entry per layer of a parameter axis
    columns: list[Mask] = []
    for name, value in params.items():
        for axis, layers in enumerate(value.axes):
            for layer in labels.canon(layers):
                columns.append(np.stack((layer, np.full(len(layer), len(places)), np.arange(len(layer)))))
                places.append((name, axis))
    if not places:
        return ()
    root, place, position = np.concatenate(columns, axis=1)
    order = np.lexsort((position, place, root))
    root, place, position = root[order], place[order], position[order]
    members: dict[tuple[bytes, str | None], list[tuple[int, int, int]]] = {}
    starts = np.flatnonzero(np.diff(root, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(root)], strict=True):
        if label := int(root[start]):
            key = (place[start:stop].tobytes(), labels.inexact.get(label))
            members.setdefault(key, []).append((start, stop, label))
    groups, seen = [], Counter[str]()
    for (_, inexact), units in sorted(members.items(), key=lambda kv: (place[kv[1][0][0]], position[kv[1][0][0]])):
        units.sort(key=lambda u: int(position[u[0]]))
        axes = [places[k] for k in place[units[0][0] : units[0][1]].tolist()]
        rows = np.stack([position[a:b] for a, b, _ in units])
        sites = []
        for tensor, axis in dict.fromkeys(axes):  # layers of the same axis are merged
            index = np.sort(rows[:, [k for k, own in enumerate(axes) if own == (tensor, axis)]], axis=1)
            sites.append(Site(tensor, axis, tuple(map(tuple, index.tolist()))))
        name, own = f"{sites[0].tensor}:{sites[0].axis}", sites[0].index[0]
        name += f"@{own[0]}" if own[0] else ""  # then start, width and stride of its first unit
        if len(own) > 1:
            name += f"x{len(own)}" + (f"/{own[1] - own[0]}" if own[1] - own[0] > 1 else "")
        seen[name] += 1
        name += f"#{seen[name]}" if seen[name] > 1 else ""
        groups.append(Group(name, tuple(label for _, _, label in units), tuple(sites), inexact))
    return tuple(groups)


def frozen_axes(labels: LabelSet, params: Mapping[str, Value], groups: Sequence[Group]) -> Iterator[Frozen]:
    """Return axes with indices that are never cut, except kernel axes."""
    cuttable = np.zeros(labels.count, dtype=np.bool_)
    cuttable[[unit for group in groups for unit in group.units]] = True
    for name, value in params.items():
        for axis, layers in enumerate(value.axes):
            free = np.zeros(value.shape[axis], dtype=np.bool_)
            for layer in labels.canon(layers):
                free |= cuttable[layer]
            whole: list[int] = layers[0][~free].tolist() if layers else []
            for reason in dict.fromkeys(labels.reason(label) or ALONE for label in whole):
                if axis < 2 or "needs this axis whole" not in reason:
                    yield Frozen(name, axis, reason)


ALONE = "a single unit, which the axis cannot do without"


# Constraints on the choice of units. ---------------------------------------------------------------------------------


def _unit_of(labelled: LabelledGraph) -> dict[int, tuple[str, int]]:
    return {root: (name, unit) for name, roots in labelled.roots.items() for unit, root in enumerate(roots)}


def _required_units(labelled: LabelledGraph) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return, by group, sets of units that form the whole axis of a value without being all units of their group."""
    unit_of, seen = _unit_of(labelled), set[bytes]()
    found: dict[str, dict[tuple[int, ...], None]] = {}
    axes = (axis for value in labelled.values.values() for v in values_in(value) for axis in v.axes)
    for layer in (layer for axis in axes for layer in labelled.labels.canon(axis)):
        key = layer.tobytes()
        if key in seen or not layer.all():
            continue
        seen.add(key)
        owned: dict[str, list[int]] = {}
        for root in np.unique(layer).tolist():
            if root in unit_of:
                owned.setdefault(unit_of[root][0], []).append(unit_of[root][1])
        if owned and all(len(units) < len(labelled.roots[name]) for name, units in owned.items()):
            name = max(owned, key=lambda n: len(owned[n]))
            found.setdefault(name, {})[tuple(owned[name])] = None
    return {name: tuple(sets) for name, sets in found.items()}


_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
Pieces = tuple[tuple[tuple[str, int], ...], ...]
"""For each piece, the group and unit of each index."""


def _equal_pieces(graph: torch.fx.GraphModule, labelled: LabelledGraph) -> tuple[Pieces, ...]:
    """Return equal pieces into which a split divides groups, unless they hold parts of groups or are divided twice."""
    unit_of = _unit_of(labelled)
    found: dict[frozenset[str], Pieces | None] = {}

    def units_of(piece: Value, dim: int) -> tuple[tuple[str, int], ...]:
        """Return group and unit of each index; empty if an index has none, or several."""
        layers = labelled.labels.canon(piece.axes[dim % len(piece.shape)])
        if len(layers) != 1 or not all(root in unit_of for root in layers[0].tolist()):
            return ()
        return tuple(sorted(unit_of[root] for root in layers[0].tolist()))

    for node in graph.graph.nodes:
        pieces = labelled.values.get(node.name)
        if node.target not in _SPLITS or not isinstance(pieces, tuple):
            continue
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        units = tuple(units_of(piece, dim) for piece in pieces)
        held = [unit for piece in units for unit in piece]
        groups = frozenset(name for name, _ in held)
        if not held or len(set(held)) != len(held) or len(held) != sum(len(labelled.roots[name]) for name in groups):
            continue
        if len({len(piece) for piece in units}) == 1:
            found[groups] = units if found.get(groups, units) == units else None
    shared = [names for names in found if any(names & other for other in found if other != names)]
    return tuple(units for names, units in found.items() if units is not None and names not in shared)
