"""Unit labels: which indices of which axes must be removed together, as a union-find over integers.

An index is alive if the labels of all *layers* of its axis are; label 0 always is. Labels are tied (`tie`), kept
(`freeze`), or replaced by a conjunction (`factor`): in 12 heads of 64, channel ``64 h + d`` is alive exactly if head h
and head dimension d are. Equations are only added that are *sufficient* for a sound cut. A label that is neither frozen
nor a conjunction is a *root*: a unit, the smallest thing that can be removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

Layer = NDArray[np.int64]
Layers = tuple[Layer, ...]
Mask = NDArray[np.bool_]


class LabelMismatch(Exception):
    """A new equation on locked labels: the structure of the cut program differs from the dense one."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor during coupling: its shape and, for each axis, the layers of labels (none: never cut).

    `table` holds the values of an integer buffer (a possible index).
    """

    shape: tuple[int, ...]
    axes: tuple[Layers, ...]
    table: Layer | None = None

    @classmethod
    def plain(cls, shape: Sequence[int]) -> Value:
        """Return a value none of whose axes can be cut."""
        return cls(tuple(shape), ((),) * len(shape))


def is_constant(layer: Layer) -> bool:
    """Return whether one label covers the whole axis; such a layer carries no structure."""
    return bool(len(layer) == 0 or (layer == layer[0]).all())


def same_partition(a: Layer, b: Layer) -> bool:
    """Return whether two layers partition the indices of an axis in the same way."""
    pairs = np.unique(np.stack((a, b)), axis=1).shape[1]
    return bool(pairs == len(np.unique(a)) == len(np.unique(b)))


@dataclass(eq=False)
class LabelSet:
    """The union-find; `where` names the current operator, for reasons and messages.

    `locked(dead)` returns a view that raises LabelMismatch for every equation that does not already hold, so that the
    same operator rules verify a cut program instead of coupling a dense one.
    """

    parent: list[int] = field(default_factory=lambda: [0])
    frozen: dict[int, str] = field(default_factory=lambda: {0: ""})
    parts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    claimed: set[int] = field(default_factory=set)
    inexact: dict[int, str] = field(default_factory=dict)
    axis_size: dict[int, int] = field(default_factory=dict)
    remembered: dict[str, Layer] = field(default_factory=dict)
    dead: Mask | None = None
    where: str = ""
    _known: dict[bytes, list[Layer]] = field(default_factory=dict)

    def locked(self, dead: Mask) -> LabelSet:
        """Return a read-only view in which the roots marked in `dead` (length `count`) have been removed."""
        return replace(self, dead=dead)

    @property
    def is_locked(self) -> bool:
        """Whether equations are verified instead of added."""
        return self.dead is not None

    @property
    def count(self) -> int:
        """The largest label plus one."""
        return len(self.parent)

    def fresh(self, count: int) -> Layer:
        """Return `count` new labels."""
        self._must_be_open("new labels")
        start = self.count
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count, dtype=np.int64)

    def created(self, key: str, count: int) -> Layer:
        """Return labels for an axis that operator `key` creates; if locked, the survivors of those created before."""
        if self.dead is None:
            self.remembered[key] = self.fresh(count)
            return self.remembered[key]
        layer = self.remembered.get(key)
        if layer is None:
            raise LabelMismatch(f"{self.where}: creates an axis the dense program does not have")
        kept = layer[self.keep((layer,), len(layer), self.dead)]
        if len(kept) != count:
            raise LabelMismatch(f"{self.where}: creates {count} indices where {len(kept)} survive")
        return kept

    def tie(self, a: Layers, b: Layers, length: int) -> None:
        """Tie index i of one axis to index i of another, for all i < length."""
        left, right = self.canon(a), self.canon(b)
        if self.is_locked:
            self._verify_equal(left, right, length)
            return
        if not left or not right:  # one side is never cut, so neither is the other
            why = next((r for layer in (*a, *b) for x in layer[:1].tolist() if (r := self.reason(x))), "")
            self.freeze(left + right, why or f"{self.where}: meets an axis that is not cut")
            return
        left, right = _without_shared(left, right)
        for x in left:  # layers that partition the axis in the same way are matched
            match = next((y for y in right if len(left) > 1 and len(right) > 1 and same_partition(x, y)), None)
            if match is not None:
                right = tuple(y for y in right if y is not match)
                left = tuple(y for y in left if y is not x)
                self._tie_indices((x,), (match,), length)
        self._tie_indices(left, right, length)

    def _tie_indices(self, left: Layers, right: Layers, length: int) -> None:
        if len(left) == len(right) == 1:
            different = left[0] != right[0]
            frozen, parts = self.frozen, self.parts
            for x, y in zip(left[0][different].tolist(), right[0][different].tolist(), strict=True):
                a, b = self.find(x), self.find(y)
                if a in frozen or b in frozen or a in parts or b in parts:
                    self._equate([a], [b])
                else:
                    self._union_roots(a, b)
        elif left or right:
            for i in range(length):
                self._equate([int(x[i]) for x in left], [int(y[i]) for y in right])

    def _verify_equal(self, left: Layers, right: Layers, length: int) -> None:
        left = tuple(x for x in left if not is_constant(x))
        right = tuple(x for x in right if not is_constant(x))
        left, right = _without_shared(left, right)
        for i in range(length):
            a, b = {int(x[i]) for x in left} - {0}, {int(x[i]) for x in right} - {0}
            if a != b:
                raise LabelMismatch(f"{self.where}: index {i} joins unit {sorted(a)} with unit {sorted(b)}")

    def _equate(self, a: Sequence[int], b: Sequence[int]) -> None:
        """Make two conjunctions equal, by the weakest sufficient equations found."""
        left = list(dict.fromkeys(root for x in a for root in self.expand(x)))
        right = list(dict.fromkeys(root for x in b for root in self.expand(x)))
        common = set(left) & set(right)
        left, right = [x for x in left if x not in common], [x for x in right if x not in common]
        if not left or not right:
            reasons = (self.frozen.get(self.find(x), "") for x in (*a, *b))
            why = next(filter(None, reasons), f"{self.where}: meets an axis that is not cut")
            for root in left + right:
                self._freeze_root(root, why)
        elif len(left) == len(right) == 1:
            self._union_roots(left[0], right[0])
        elif len(left) == 1 or len(right) == 1:
            single, parts = (left[0], right) if len(left) == 1 else (right[0], left)
            self._must_be_open(f"unit {single} to be split")
            for part in parts if single in self.inexact else ():
                self.inexact.setdefault(part, self.inexact[single])
            self._known.clear()
            self.parts[single] = tuple(parts)
        else:
            for root in (left + right)[1:]:
                self._union_roots(left[0], root)

    def _union_roots(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        self._must_be_open(f"units {a} and {b} to be one")
        low, high = min(a, b), max(a, b)
        self._known.clear()
        self.parent[high] = low
        if high in self.inexact:
            self.inexact.setdefault(low, self.inexact[high])
        if high in self.axis_size:
            self.axis_size[low] = max(self.axis_size[high], self.axis_size.get(low, 0))

    def _freeze_root(self, root: int, reason: str) -> None:
        self._must_be_open(f"unit {root} to be kept")
        self._known.clear()
        self.frozen[root] = reason

    def _must_be_open(self, what: str) -> None:
        if self.is_locked:
            raise LabelMismatch(f"{self.where}: the cut program needs {what}, the dense one does not")

    def freeze(self, layers: Layers, reason: str) -> None:
        """Keep all indices of this axis permanently. No-op if locked, since survivors are alive."""
        if self.is_locked:
            return
        for label in {int(x) for layer in layers for x in np.unique(layer)}:
            for root in self.expand(label):
                self._freeze_root(root, reason)

    def factor(self, labels: NDArray[np.int64]) -> tuple[Layers, ...]:
        """Distribute one layer, given per element of an array, over the array's axes: zero or one layer for each.

        If labels vary along several axes, the survivors must form a rectangle: each label becomes the conjunction of
        one new label per axis.
        """
        core = _reduced(labels)
        axes = [a for a in range(labels.ndim) if core.shape[a] > 1]
        out: list[Layers] = [()] * labels.ndim
        if not axes:
            self.freeze((core.reshape(-1),), f"{self.where}: removing it would leave nothing of the axis")
            return tuple(out)
        core = np.ascontiguousarray(core.reshape([core.shape[a] for a in axes]))
        if len(axes) == 1:
            out[axes[0]] = (core,)
            return tuple(out)
        self._must_be_open("an axis to be split that is whole in the dense one")
        layers = [self.fresh(size) for size in core.shape]
        for layer in layers:
            self.axis_size.update(dict.fromkeys(layer.tolist(), len(layer)))
        for index, label in np.ndenumerate(core):
            self._equate([int(label)], [int(layer[i]) for layer, i in zip(layers, index, strict=True)])
        for a, layer in zip(axes, layers, strict=True):
            out[a] = (layer,)
        return tuple(out)

    def claim(self, layers: Layers) -> None:
        """Declare that an operator computes along this axis separately (attention heads, convolution groups)."""
        if not self.is_locked:
            self.claimed.update(int(x) for layer in self.canon(layers) for x in np.unique(layer))

    def mark_inexact(self, layers: Layers, reason: str) -> None:
        """Mark these labels as inexact: removing them changes what a norm or a mean averages over."""
        if not self.is_locked:
            for layer in self.canon(layers):
                for root in np.unique(layer):
                    self.inexact.setdefault(int(root), reason)

    def find(self, label: int) -> int:
        """Return the representative of `label`."""
        parent = self.parent
        root = label
        while parent[root] != root:
            root = parent[root]
        while parent[label] != root:
            parent[label], label = root, parent[label]
        return root

    def expand(self, label: int) -> list[int]:
        """Return the roots whose conjunction `label` is; empty if it is always alive."""
        root = self.find(label)
        if root in self.frozen:
            return []
        if root not in self.parts:
            return [root]
        return list(dict.fromkeys(x for part in self.parts[root] for x in self.expand(part)))

    def canon(self, layers: Layers) -> Layers:
        """Rewrite layers in terms of roots, omitting layers that are always alive and merging equal ones."""
        out: list[Layer] = []
        for layer in layers:
            for column in self._columns(layer):
                if column.any() and not any(np.array_equal(column, other) for other in out):
                    out.append(column)
        return tuple(out)

    def _columns(self, layer: Layer) -> list[Layer]:
        """Roots per index, in as many layers as necessary; cached until the next equation."""
        key = layer.tobytes()
        if key in self._known:
            return self._known[key]
        unique, inverse = np.unique(layer, return_inverse=True)
        roots = [self.find(x) for x in unique.tolist()]
        columns: list[Any] = [roots]
        if not (self.frozen.keys().isdisjoint(roots) and self.parts.keys().isdisjoint(roots)):
            columns = list(zip_longest(*_aligned([self.expand(x) for x in roots]), fillvalue=0))
        found = self._known[key] = [np.array(column, dtype=np.int64)[inverse] for column in columns]
        for column in found:
            column.flags.writeable = False
        return found

    def keep(self, layers: Layers, length: int, dead: Mask) -> Mask:
        """Return a mask (length,) of the indices that survive if the roots marked in `dead` are removed."""
        mask = np.ones(length, dtype=np.bool_)
        for layer in self.canon(layers):
            mask &= ~dead[layer]
        return mask

    def reason(self, label: int) -> str | None:
        """Return why `label` is never cut, or None if it can be cut."""
        root = self.find(label)
        if root in self.frozen:
            return self.frozen[root]
        if root not in self.parts:
            return None
        reasons = [self.reason(part) for part in self.parts[root]]
        return None if None in reasons else reasons[0]

    def settle(self) -> None:
        """Freeze the parts of conjunctions that no operator claims (channel shuffles), but on the longest axis."""
        claimed = {root for label in self.claimed for root in self.expand(label)}
        unwanted: set[int] = set()
        wanted: set[int] = set()
        for label in list(self.parts):
            parts = self.expand(label)
            own = [p for p in parts if p in claimed]
            chosen = own or [max(parts, key=lambda p: self.axis_size.get(p, 0))] if parts else []
            wanted.update(chosen)
            unwanted.update(p for p in parts if p not in chosen and p in self.axis_size)
        for root in sorted(unwanted - wanted):
            self._freeze_root(root, "part of a reshaped axis that no operator computes on by itself")


def _reduced(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Keep one index of every axis along which nothing changes."""
    for axis in range(labels.ndim):
        first = labels[(slice(None),) * axis + (slice(0, 1),)]
        if labels.shape[axis] > 1 and (labels.strides[axis] == 0 or bool((labels == first).all())):
            labels = first
    return labels


def _aligned(conjunctions: Sequence[Sequence[int]]) -> list[list[int]]:
    """Arrange conjunctions in columns so that each label stays in one column as far as possible."""
    column: dict[int, int] = {}
    rows: list[list[int]] = [[] for _ in conjunctions]
    for k in sorted(range(len(rows)), key=lambda k: -len(conjunctions[k])):
        row = rows[k]
        for atom in conjunctions[k]:
            wanted = column.get(atom, 0)
            while wanted < len(row) and row[wanted]:
                wanted += 1
            row.extend([0] * (wanted + 1 - len(row)))
            row[wanted] = atom
            column.setdefault(atom, wanted)
    return [row or [0] for row in rows]


def _without_shared(left: Layers, right: Layers) -> tuple[Layers, Layers]:
    """Drop the layers that both sides have."""

    def rest(layers: Layers, others: Layers) -> Layers:
        return tuple(x for x in layers if not any(np.array_equal(x, y) for y in others))

    return rest(left, right), rest(right, left)


def gather(layers: Iterable[Layer], index: NDArray[np.int64]) -> Layers:
    """Pick the indices `index` out of every layer."""
    return tuple(layer[index] for layer in layers)


@dataclass(frozen=True, slots=True, eq=False)
class LabelledGraph:
    """Labels of all values of a graph, for cutting, counting and verification."""

    labels: LabelSet
    values: Mapping[str, Any]  # node name → `Value`, a tuple of them, or a concrete number for symbolic sizes
    calls: Mapping[str, Mapping[str, Any]]  # operator call → argument name → `Value` or concrete argument
    params: Mapping[str, Value]  # by parameter or buffer name
    roots: Mapping[str, tuple[int, ...]]  # group name → root label of each unit

    def dead_roots(self, dead: Mapping[str, Sequence[int]]) -> Mask:
        """Return a mask of the roots of the removed units, which are given per group name."""
        mask = np.zeros(self.labels.count, dtype=np.bool_)
        for name, units in dead.items():
            mask[np.asarray(self.roots[name], dtype=np.int64)[list(units)]] = True
        return mask


class Masks:
    """Surviving indices of values, computed once per distinct axis."""

    def __init__(self, labelled: LabelledGraph, dead: Mask) -> None:
        self._labels, self._dead = labelled.labels, dead
        self._known: dict[tuple[int, int], tuple[Value, Mask]] = {}

    def __call__(self, value: Value, axis: int) -> Mask:
        """Return the mask (length of the axis,) of the survivors."""
        key = (id(value), axis)
        if key not in self._known:
            mask = self._labels.keep(value.axes[axis], value.shape[axis], self._dead)
            self._known[key] = (value, mask)
        return self._known[key][1]

    def shape(self, value: Value) -> tuple[int, ...]:
        """Return the compact shape of a value."""
        return tuple(int(self(value, a).sum()) if value.axes[a] else s for a, s in enumerate(value.shape))
