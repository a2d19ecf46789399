"""Head orders: reorder the members of each head as given by a plan's arrangements.

Dimension d of all attention heads is one unit, and so is channel d of all convolution groups, because the remaining
tensor must be a rectangle. But the members of each head may be reordered first. If no operator combines member d of
one head with member d of another, the network computes the same, and a unit can consist of the least important member
of each head.
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
    """Positions of the members of heads on a tensor axis.

    Attributes:
        tensor: name of a parameter or buffer.
        axis: axis of the members.
        inner: member at each position along it, -1 for none.
        by: axis of the heads; None if it is the same one.
        outer: head at each position along that axis, -1 for none.
    """

    tensor: str
    axis: int
    inner: Index
    by: int | None
    outer: Index


@dataclass(frozen=True, slots=True)
class Reordering:
    """Position p along `axis` of `tensor` receives position `orders[which[q]][p]`; q is the position along `by`."""

    tensor: str
    axis: int
    orders: Index
    by: int | None = None
    which: Index | None = None


# Positions of members. -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """One layer of one axis of a value: group number and unit at each position, -1 for none."""

    axis: int
    group: Index
    unit: Index

    def wholly(self, number: int, among: Any = slice(None)) -> bool:
        """Return whether every position (of those in `among`) is a unit of this group."""
        return bool((self.group[among] == number).all())


class Places:
    """Locates the groups of a coupling on the axes of values."""

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
        """Return the layers of a value that contain units."""
        layers = [(a, layer) for a, axis in enumerate(value.axes) for layer in self.labelled.labels.canon(axis)]
        return [Held(a, self._group[x], self._unit[x]) for a, x in layers if (self._group[x] >= 0).any()]

    def of(self, number: int) -> list[tuple[str, list[Held]]]:
        """Return the parameters and buffers that contain units of a group, with their layers."""
        return self._in.get(number, [])


def layouts(places: Places, inner: str, outer: str) -> Iterator[Layout]:
    """Return the layout of each parameter and buffer that contains members `inner` of heads `outer`.

    Raises:
        PlanMismatch: a tensor contains members without their heads.
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
    """Return the reorderings of each tensor; pass `places` to avoid computing it again.

    Raises:
        PlanMismatch: made for another architecture, or not permutations of the members.
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
    """The positions of member m of a head receive those of member `orders[head][m]`, in order."""
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
    """Return the positions of each of `count` owners, of shape (count, positions per owner).

    Raises:
        PlanMismatch: some own more than others.
    """
    found = np.argsort(owner, kind="stable")[int((owner < 0).sum()) :]
    if len(found) % count or (np.bincount(owner[owner >= 0], minlength=count) != len(found) // count).any():
        raise PlanMismatch("members of one head own more positions than those of another; make a new plan")
    return found.reshape(count, -1)


# Applying them. ------------------------------------------------------------------------------------------------------


def reorder(tensor: Tensor, by: Reordering) -> Tensor:
    """Return a reordered copy of the tensor."""
    if by.by is None or by.which is None:
        return tensor.index_select(by.axis, torch.from_numpy(by.orders[0]).to(tensor.device))
    index = torch.from_numpy(by.orders[by.which]).to(tensor.device)  # (size of `by`, size of `axis`)
    if by.by > by.axis:
        index = index.T
    shape = [size if a in (by.by, by.axis) else 1 for a, size in enumerate(tensor.shape)]
    return torch.take_along_dim(tensor, index.reshape(shape), dim=by.axis)


def reordered(state: Mapping[str, Tensor], orders: Sequence[Reordering]) -> dict[str, Tensor]:
    """Return reordered copies of the tensors by name."""
    out = dict(state)
    for order in orders:
        if order.tensor in out:
            out[order.tensor] = reorder(out[order.tensor].detach(), order)
    return out
