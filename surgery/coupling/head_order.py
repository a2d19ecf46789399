"""Members in another order for each head: what a plan's arrangements do to tensors.

Dimension d of every attention head lives and dies as one unit, and so does channel d of every convolution group: what
is left has to be a rectangle. But a head's members may be put in an order of its own first. Where nothing joins
member d of one head with member d of another, the network computes the same, and the unit then holds the member that
is least important to its head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.core import Arrangement, Coupling
from surgery.errors import PlanMismatch

Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one tensor axis holds the members of heads.

    Attributes:
        tensor: name of a parameter or buffer.
        axis: the axis that the members are on.
        inner: for each position along it the member, -1 where there is none.
        by: another axis, along which the heads are; None where they are on the same one.
        outer: for each position along that axis the head, -1 where there is none.
    """

    tensor: str
    axis: int
    inner: Index
    by: int | None
    outer: Index


@dataclass(frozen=True, slots=True)
class Reordering:
    """Along `axis` of `tensor` position p takes what is at `orders[which[q]][p]`, q being the position along `by`."""

    tensor: str
    axis: int
    orders: Index
    by: int | None = None
    which: Index | None = None


# Where the members are. ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """One layer of one axis of a value: for each position the group's number and the unit within it, -1 for none."""

    axis: int
    group: Index
    unit: Index

    def wholly(self, number: int, among: Any = slice(None)) -> bool:
        """Whether every position, or every one `among` them, is a unit of this group."""
        return bool((self.group[among] == number).all())


class Places:
    """Finds the groups of a coupling in the axes of values."""

    def __init__(self, coupling: Coupling) -> None:
        self.labelled = coupling.labelled
        self.number = {group.name: k for k, group in enumerate(coupling.groups)}
        self._group = np.full(self.labelled.labels.count, -1, dtype=np.int64)
        self._unit = np.full(self.labelled.labels.count, -1, dtype=np.int64)
        for k, group in enumerate(coupling.groups):
            roots = np.asarray(group.units, dtype=np.int64)
            self._group[roots], self._unit[roots] = k, np.arange(len(roots))
        self._in: dict[int, list[tuple[str, list[Held]]]] = {}
        for name, value in self.labelled.params.items():
            held = self.held(value)
            for number in {int(k) for members in held for k in np.unique(members.group)}:
                self._in.setdefault(number, []).append((name, held))

    def held(self, value: Any) -> list[Held]:
        """The layers of a value that hold units."""
        layers = [(a, layer) for a, axis in enumerate(value.axes) for layer in self.labelled.labels.canon(axis)]
        return [Held(a, self._group[x], self._unit[x]) for a, x in layers if (self._group[x] >= 0).any()]

    def of(self, number: int) -> list[tuple[str, list[Held]]]:
        """The parameters and buffers that hold units of a group, and what they hold."""
        return self._in.get(number, [])


def layouts(places: Places, inner: str, outer: str) -> Iterator[Layout]:
    """How each parameter and buffer holds the members of one group in the heads of another.

    Raises:
        PlanMismatch: one holds members without their heads.
    """
    within, heads = places.number[inner], places.number[outer]
    for name, held in places.of(within):
        for members in held:
            there = members.group == within
            if not there.any():
                continue
            own = next((h for h in held if h.axis == members.axis and h.wholly(heads, there)), None)
            other = next((h for h in held if h.axis != members.axis and h.wholly(heads)), None)
            if own is None and other is None:
                raise PlanMismatch(f"'{name}' holds members of '{inner}' without heads of '{outer}'; make a new plan")
            unit = np.where(there, members.unit, -1)
            if own is not None:
                yield Layout(name, members.axis, unit, None, np.where(there, own.unit, -1))
            elif other is not None:
                yield Layout(name, members.axis, unit, other.axis, other.unit)


# From arrangements to reorderings. -----------------------------------------------------------------------------------


def reorderings(
    coupling: Coupling, arranged: Sequence[Arrangement], places: Places | None = None
) -> tuple[Reordering, ...]:
    """Return what the arrangements do to each tensor; `places` of the coupling spares finding them again.

    Raises:
        PlanMismatch: they were made for another architecture, or are no orders of its members.
    """
    if not arranged:
        return ()
    places = places or Places(coupling)
    out = []
    for a in arranged:
        inner, outer = coupling.group(a.group), coupling.group(a.outer)
        if len(a.orders) != outer.size or any(sorted(order) != list(range(inner.size)) for order in a.orders):
            raise PlanMismatch(f"the arrangement of '{a.group}' is no order of its members in each unit of '{a.outer}'")
        orders = np.asarray(a.orders, dtype=np.int64)
        out += [_reordering(layout, orders) for layout in layouts(places, a.group, a.outer)]
    return tuple(out)


def _reordering(layout: Layout, orders: Index) -> Reordering:
    """Positions of member m of a head take those of member `orders[head][m]`, first to first and so on."""
    if layout.by is not None:
        owned = positions(layout.inner, orders.shape[1])  # (members, positions of one)
        rows = np.tile(np.arange(len(layout.inner)), (len(orders), 1))
        rows[:, owned.reshape(-1)] = owned[orders].reshape(len(orders), -1)
        return Reordering(layout.tensor, layout.axis, rows, layout.by, layout.outer)
    heads, members = orders.shape
    joint = np.where(layout.inner >= 0, layout.outer * members + layout.inner, -1)
    owned = positions(joint, heads * members).reshape(heads, members, -1)
    row = np.arange(len(layout.inner))
    row[owned.reshape(-1)] = np.take_along_axis(owned, orders[:, :, None], axis=1).reshape(-1)
    return Reordering(layout.tensor, layout.axis, row[None])


def positions(owner: Index, count: int) -> Index:
    """Positions of each of `count` owners, of shape (count, positions of one).

    Raises:
        PlanMismatch: some own more than others.
    """
    found = np.argsort(owner, kind="stable")[int((owner < 0).sum()) :]
    if len(found) % count or (np.bincount(owner[owner >= 0], minlength=count) != len(found) // count).any():
        raise PlanMismatch("members of one head own more positions than those of another; make a new plan")
    return found.reshape(count, -1)


# Applying them. ------------------------------------------------------------------------------------------------------


def reorder(tensor: Tensor, by: Reordering) -> Tensor:
    """Return the tensor with the positions of one axis in their new order."""
    if by.by is None or by.which is None:
        return tensor.index_select(by.axis, torch.from_numpy(by.orders[0]).to(tensor.device))
    index = torch.from_numpy(by.orders[by.which]).to(tensor.device)  # (size of `by`, size of `axis`)
    if by.by > by.axis:
        index = index.T
    shape = [size if a in (by.by, by.axis) else 1 for a, size in enumerate(tensor.shape)]
    return torch.take_along_dim(tensor, index.reshape(shape), dim=by.axis)


def reordered(state: Mapping[str, Tensor], orders: Sequence[Reordering]) -> dict[str, Tensor]:
    """Return the tensors by name, reordered; the given ones stay as they are."""
    out = dict(state)
    for order in orders:
        if order.tensor in out:
            out[order.tensor] = reorder(out[order.tensor].detach(), order)
    return out
