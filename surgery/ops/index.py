"""Lookups: embeddings and indexing with constant tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgery.core import Value, gather
from surgery.ops.examples import Built
from surgery.ops.registry import Call, Replacement, Rewrite, Rule, register


def _couple_embedding(call: Call) -> Value:
    """Weight (V, D), indices (..), output (.., D)."""
    weight, indices = call.value("weight"), call.value("indices")
    call.freeze(weight, 0, "looked up by index")
    kept = {a: call.passed(indices, a) for a in range(len(indices.shape))}
    return call.out({**kept, len(indices.shape): call.passed(weight, 1)})


def _couple_index_select(call: Call) -> Value:
    """A constant index maps units to positions; with any other index the axis is never cut."""
    x, index = call.value("self"), call.value("index")
    rank = len(x.shape)
    dim = call["dim"] % rank
    axes = {a: call.passed(x, a) for a in range(rank) if a != dim}
    call.freeze(index, 0, "an index")
    if index.table is None:
        call.freeze(x, dim, "looked up by index")
    else:
        axes[dim] = gather(call.labels.canon(call.passed(x, dim)), index.table)
    return call.out(axes)


def _couple_index(call: Call) -> Value:
    """`x[:, i, j]`: axes without an index pass; a single constant index is applied to the labels."""
    x = call.value("self")
    indices = [i for i in call["indices"] if isinstance(i, Value)]
    where = [a for a, i in enumerate(call["indices"]) if isinstance(i, Value)]
    for index in indices:
        for a in range(len(index.shape)):
            call.freeze(index, a, "an index")
    rank = max(len(i.shape) for i in indices)
    if len(call.outputs[0]) != len(x.shape) - len(where) + rank:  # a mask: known only at run time
        return call.out({})
    adjacent = where == list(range(where[0], where[-1] + 1))
    at = where[0] if adjacent else 0
    free = [a for a in range(len(x.shape)) if a not in where]
    axes = {k if k < at else k + rank: call.passed(x, a) for k, a in enumerate(free)}
    table = _constant_index(call.bound)
    for a in where:
        if table is None:
            call.freeze(x, a, "looked up by index")
        else:
            axes[a] = gather(call.labels.canon(call.passed(x, a)), table)
    return call.out(axes)


def _constant_index(bound: Mapping[str, Any]) -> NDArray[np.int64] | None:
    """Return the values of the index if it is the only one, constant and one-dimensional."""
    indices = [i for i in bound["indices"] if isinstance(i, Value)]
    return indices[0].table if len(indices) == 1 else None


def _rewrite_index(r: Rewrite) -> Mapping[str, Any] | Replacement:
    table = _constant_index(r.bound)
    dim = next(a for a, i in enumerate(r.bound["indices"]) if isinstance(i, Value))
    return {} if table is None or r.keep("self", dim).all() else picked(r, dim, table)


def picked(r: Rewrite, dim: int, source: NDArray[np.int64]) -> Replacement:
    """Select the compact output along `dim` from the compact input; `source` holds dense positions."""
    keep = r.keep("self", dim)
    position = np.cumsum(keep) - 1
    index = position[source[keep[source]]]
    return Replacement(torch.ops.aten.index_select.default, (r.raw["self"], dim, torch.from_numpy(index)))


def _rewrite_index_select(r: Rewrite) -> Mapping[str, Any] | Replacement:
    x, index, dim = r.bound["self"], r.bound["index"], r.bound["dim"]
    if index.table is None or r.keep("self", dim).all():
        return {}
    return picked(r, dim % len(x.shape), index.table)


class _Table(nn.Module):
    """A learned vector per token, selected by an index buffer, added to projected tokens."""

    def __init__(self, *, embedding: bool) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(7, 12), nn.Linear(12, 5)
        self.table = nn.Embedding(9, 12)
        self.embedding = embedding
        self.index: Tensor
        self.register_buffer("index", torch.tensor([0, 2, 4, 6, 8, 1]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6, 7) to (B, 6, 5)."""
        rows = self.table(self.index) if self.embedding else self.table.weight.index_select(0, self.index)
        y: Tensor = self.after(self.before(x) + rows)
        return y


class _Positions(nn.Module):
    """A bias per head and token pair, selected from a table by an index matrix, as in windowed attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.after = nn.Linear(7, 3 * 12), nn.Linear(12, 5)
        self.table = nn.Parameter(torch.randn(11, 3))
        self.index: Tensor
        self.register_buffer("index", torch.arange(6)[:, None] - torch.arange(6) + 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 6, 7) to (B, 6, 5)."""
        q, k, v = self.qkv(x).reshape(x.shape[0], 6, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(2, 3) + self.table[self.index].permute(2, 0, 1)).softmax(-1)
        y: Tensor = self.after((attention @ v).transpose(1, 2).reshape(x.shape[0], 6, 12))
        return y


def _example(*, embedding: bool) -> Built:
    return _Table(embedding=embedding), (torch.randn(2, 6, 7),)


register(
    Rule(
        op="aten.embedding.default",
        family="look-up",
        couple=_couple_embedding,
        example=lambda: _example(embedding=True),
        summary="rows are never cut, features pass",
    ),
    Rule(
        op="aten.index.Tensor",
        family="look-up",
        couple=_couple_index,
        rewrite=_rewrite_index,
        example=lambda: (_Positions(), (torch.randn(2, 6, 7),)),
        summary="other axes pass; one constant list of indices is run on labels, other indexed axes stay whole",
    ),
    Rule(
        op="aten.index_select.default",
        family="look-up",
        couple=_couple_index_select,
        rewrite=_rewrite_index_select,
        example=lambda: _example(embedding=False),
        summary="a constant index is run on labels; with any other the indexed axis is never cut",
    ),
)
