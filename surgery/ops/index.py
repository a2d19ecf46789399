"""Look-ups: embeddings and indexing with constant tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgery.labels import Value, gather
from surgery.ops.examples import Built
from surgery.ops.registry import Call, Replacement, Rewrite, Rule, register


def _couple_embedding(call: Call) -> Value:
    """Weight (V, D), indices (..), output (.., D)."""
    weight, indices = call.value("weight"), call.value("indices")
    call.freeze(weight, 0, "looked up by index")
    kept = {a: call.passed(indices, a) for a in range(len(indices.shape))}
    return call.out({**kept, len(indices.shape): call.passed(weight, 1)})


def _couple_index_select(call: Call) -> Value:
    """An index that is a buffer's says which unit goes where; any other one needs its axis whole."""
    x, index = call.value("self"), call.value("index")
    rank = len(x.shape)
    dim = call["dim"] % rank
    axes = {a: call.passed(x, a) for a in range(rank) if a != dim}
    call.freeze(index, 0, "an index")
    if index.table is None:
        call.freeze(x, dim, "looked up by index")
    else:
        axes[dim] = gather(call.atoms.canon(call.passed(x, dim)), index.table)
    return call.out(axes)


def picked(r: Rewrite, dim: int, source: NDArray[np.int64]) -> Replacement:
    """The compact output along `dim` as a constant selection of the compact input; `source` are dense positions."""
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
    """A learned vector per token, found through an index buffer, added to projected tokens."""

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


def _example(*, embedding: bool) -> Built:
    return _Table(embedding=embedding), (torch.randn(2, 6, 7),)


register(
    Rule(
        op="aten.embedding.default",
        family="look-up",
        couple=_couple_embedding,
        example=lambda: _example(embedding=True),
        says="rows are never cut, features pass",
    ),
    Rule(
        op="aten.index_select.default",
        family="look-up",
        couple=_couple_index_select,
        rewrite=_rewrite_index_select,
        example=lambda: _example(embedding=False),
        says="a constant index is run on labels; with any other the indexed axis is never cut",
    ),
)
