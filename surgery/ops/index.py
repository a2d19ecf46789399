"""Reads and writes by index: embeddings, constant tables, slices, and functional writes to a part of a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgery.core import Value, gather
from surgery.ops.examples import WithParameters, between_linears, fork_convs
from surgery.ops.registry import Call, Replacement, Rewrite, Rule, register

aten = torch.ops.aten
Changes = Mapping[str, Any] | Replacement


def _couple_embedding(call: Call) -> Value:
    """Weight (V, D), indices (..), output (.., D)."""
    weight, indices = call.value("weight"), call.value("indices")
    return call.out({**call.axes(indices), len(indices.shape): call.axes(weight, (0,), "looked up by index")[1]})


def _indexed(bound: Mapping[str, Any]) -> dict[int, Value]:
    """Return axis → its index."""
    if "index" in bound:
        return {bound["dim"] % len(bound["self"].shape): bound["index"]}
    return {a: index for a, index in enumerate(bound["indices"]) if isinstance(index, Value)}


def _constant(indices: Mapping[int, Value]) -> NDArray[np.int64] | None:
    """Return the values of the index if it is the only one, constant and one-dimensional."""
    return next(iter(indices.values())).table if len(indices) == 1 else None


def _couple_index(call: Call) -> Value:
    """`x[:, i, j]`: axes without an index pass; a single constant index is applied to the labels."""
    x, indices = call.value("self"), _indexed(call.bound)
    for index in indices.values():
        call.axes(index, range(len(index.shape)), "an index")
    rank, where = max(len(i.shape) for i in indices.values()), list(indices)
    if len(call.outputs[0]) != len(x.shape) - len(where) + rank:  # a mask: known only at run time
        return call.out({})
    table = _constant(indices)
    found = call.axes(x, where if table is None else (), "looked up by index")
    at = where[0] if where == list(range(where[0], where[-1] + 1)) else 0
    free = [a for a in range(len(x.shape)) if a not in where]
    axes = {k if k < at else k + rank: found[a] for k, a in enumerate(free)}
    if table is not None:
        axes[where[0]] = gather(call.labels.canon(found[where[0]]), table)
    return call.out(axes)


def _rewrite_index(r: Rewrite) -> Changes:
    indices = _indexed(r.bound)
    table = _constant(indices)
    return {} if table is None else picked(r, next(iter(indices)), table)


def picked(r: Rewrite, dim: int, source: NDArray[np.int64]) -> Changes:
    """Select the compact output along `dim` from the compact input, if cut; `source` holds dense positions."""
    keep = r.keep("self", dim)
    if keep.all():
        return {}
    index = (np.cumsum(keep) - 1)[source[keep[source]]]
    return Replacement(aten.index_select.default, (r.raw["self"], dim, torch.from_numpy(index)))


_OPEN = 2**63 - 1  # the end of a slice without an explicit end


def slice_bounds(r: Rewrite) -> Changes:
    """Slice: start and end count survivors; with a step, the survivors are picked by a constant index."""
    dim = r.bound["dim"] % len(r.bound["self"].shape)
    keep = r.keep("self", dim)
    if keep.all():
        return {}
    size = len(keep)
    start, stop, step = _range(r.bound, size)
    if step != 1:
        return picked(r, dim, np.arange(start, stop, step))
    # Keep bounds relative to the end: the axis may be longer in another call.
    first, last = r.bound["start"] or 0, r.bound["end"]
    begin = -int(keep[start:].sum()) if first < 0 else int(keep[:start].sum())
    if last is None or last > size or (last == size and not isinstance(r.raw["end"], int)):
        return {"start": begin, "end": _OPEN}
    return {"start": begin, "end": (-int(keep[stop:].sum()) or _OPEN) if last < 0 else int(keep[:stop].sum())}


def _range(bound: Mapping[str, Any], size: int) -> tuple[int, int, int]:
    return slice(bound.get("start"), bound.get("end"), bound.get("step", 1)).indices(size)


def _couple_slice_scatter(call: Call) -> Value:
    """`x[.., start:end, ..] = src`: the range of the axis is tied to src's, like all other axes."""
    x, src = call.value("self"), call.value("src")
    dim = call["dim"] % len(x.shape)
    axes = {a: call.tie(x, a, src, a) for a in range(len(x.shape)) if a != dim and x.shape[a] > 1}
    start, stop, step = _range(call.bound, x.shape[dim])
    if step != 1:
        call.freeze(x, dim, "written at every few indices")
        call.freeze(src, dim, "written at every few indices")
        return call.out(axes)
    inside = tuple(layer[start:stop] for layer in call.labels.canon(call.passed(x, dim)))
    call.tie_layers(inside, call.passed(src, dim), stop - start)
    return call.out({**axes, dim: call.passed(x, dim)})


def _rewrite_slice_scatter(r: Rewrite) -> Changes:
    keep = r.keep("self", r.bound["dim"])
    if keep.all():
        return {}
    start, stop, _ = _range(r.bound, len(keep))
    first = int(keep[:start].sum())
    return {"start": first, "end": first + int(keep[start:stop].sum())}


def _couple_select_scatter(call: Call) -> Value:
    """`x[.., index, ..] = src`: the axis is never cut, the others are tied."""
    x, src = call.value("self"), call.value("src")
    others = call.axes(x, (call["dim"],), "a single index of this axis is written")
    return call.out({a: call.tie(x, a, src, k) for k, a in enumerate(others) if x.shape[a] > 1})


def _couple_along(call: Call) -> Value:
    """`x.gather(dim, index)`, `x.scatter(dim, index, src)`, ..: all tensors are tied along the other axes."""
    rank = len(call.outputs[0])
    dim = call["dim"] % max(rank, 1)
    first, *others = (x for x in call.tensors() if len(x.shape) == rank)
    axes = {}
    for a in range(rank):
        if a != dim and all(x.shape[a] == first.shape[a] for x in others):
            axes[a] = call.passed(first, a)
            for x in others:
                axes[a] = call.tie(first, a, x, a)
    return call.out(axes)


def _couple_index_put(call: Call) -> Value:
    """`x[:, i] = values` with one list of indices: the other axes are tied to those of the values."""
    x, values, indexed = call.value("self"), call.value("values"), _indexed(call.bound)
    if [len(i.shape) for i in indexed.values()] != [1]:
        return call.out({})
    rank = len(x.shape)
    axes = {a: call.passed(x, a) for a in range(rank) if a not in indexed}
    for a in axes.keys() & range(rank - len(values.shape), rank):
        if values.shape[a - rank] > 1:
            axes[a] = call.tie(x, a, values, a - rank)
    return call.out(axes)


def _along(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    summary = "the axis that it indexes is never cut, the others are tied"
    return Rule(f"aten.{name}", "look-up", _couple_along, fork_convs(function), summary=summary)


_ROWS = torch.tensor([0, 2, 4, 6, 8, 1])


def _biased(x: Tensor, table: Tensor) -> Tensor:
    """Attention with a bias per head and token pair, selected from a table by an index matrix, as in windows."""
    heads = x.reshape(-1, 6, 3, 4).transpose(1, 2)
    index = torch.arange(6)[:, None] - torch.arange(6) + 5
    attention = (heads @ heads.transpose(2, 3) + table[index].permute(2, 0, 1)).softmax(-1)
    return (attention @ heads).transpose(1, 2).flatten(2)


register(
    Rule(
        "aten.index_put.default",
        "look-up",
        _couple_index_put,
        fork_convs(lambda a, b: aten.index_put(b, [None, None, _ROWS], a[:, :, :6])),
        summary="the axis of one list of indices is never cut, the others are tied; several keep all axes whole",
    ),
    _along("gather.default", lambda a, b: b.gather(2, a.argsort(2))),
    _along("scatter.src", lambda a, b: b.scatter(2, a.argsort(2), a)),
    _along("scatter.value", lambda a, b: b.scatter(2, a.argsort(2)[:, :, :3], 0.5)),
    _along("scatter_add.default", lambda a, b: b.scatter_add(2, a.argsort(2), a)),
    _along("scatter_reduce.two", lambda a, b: b.scatter_reduce(2, a.argsort(2), a, "amax")),
    _along("index_add.default", lambda a, b: b.index_add(2, _ROWS, a[:, :, :6])),
    _along("index_copy.default", lambda a, b: b.index_copy(2, _ROWS, a[:, :, :6])),
    _along("index_fill.int_Scalar", lambda a, b: a + b.index_fill(2, _ROWS, 0.5)),
    Rule(
        "aten.embedding.default",
        "look-up",
        _couple_embedding,
        between_linears(WithParameters(lambda x, table: x + nn.functional.embedding(_ROWS, table), (9, 12))),
        summary="rows are never cut, features pass",
    ),
    Rule(
        "aten.index.Tensor",
        "look-up",
        _couple_index,
        between_linears(WithParameters(_biased, (11, 3))),
        _rewrite_index,
        summary="other axes pass; one constant list of indices is run on labels, other indexed axes stay whole",
    ),
    Rule(
        "aten.index_select.default",
        "look-up",
        _couple_index,
        between_linears(WithParameters(lambda x, table: x + table.index_select(0, _ROWS), (9, 12))),
        _rewrite_index,
        summary="a constant index is run on labels; with any other the indexed axis is never cut",
    ),
    Rule(
        "aten.slice_scatter.default",
        "movement",
        _couple_slice_scatter,
        fork_convs(lambda a, b: aten.slice_scatter.default(a, b[:, 2:5], 1, 2, 5)),
        _rewrite_slice_scatter,
        summary="ties what is written with the range it is written to",
    ),
    Rule(
        "aten.select_scatter.default",
        "movement",
        _couple_select_scatter,
        fork_convs(lambda a, b: aten.select_scatter.default(a, b[:, :, 0], 2, 3)),
        summary="the axis whose index is written is never cut, the others are tied",
    ),
)
