"""From units to a plan, and from a plan and its program to a cut: order and surviving positions of each tensor.

Dimension d of all attention heads is one unit, because the remaining tensor must be a rectangle. But the members of
each head may be reordered first (*head order*), so that a unit consists of the least important member of each head, if
no operator combines member d of one head with member d of another. So with the channels of convolution groups.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from surgery.config import Budget
from surgery.core import Arrangement, AxisCut, Coupling, Executor, Group, Masks, Plan, Program, Value, all_tensors
from surgery.coupling.masking import masked_run
from surgery.errors import IllegalCut, PlanMismatch

NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})
Index = NDArray[np.int64]


def plan_from_dead(
    program: Program | Plan,
    coupling: Coupling,
    dead: Mapping[str, Iterable[int]],
    *,
    budget: Budget | None = None,
    settings: Mapping[str, Any] = NO_SETTINGS,
    notes: Sequence[str] = (),
) -> Plan:
    """Return the plan that removes these units, given in any order, for a program or for that of another plan.

    The other arguments are stored, see `Plan`. Raises PlanMismatch if the coupling has no such unit, IllegalCut if a
    group or an axis would become empty.
    """
    units = {name: _valid_units(coupling.group(name), indices) for name, indices in dead.items()}
    units = {group.name: units[group.name] for group in coupling.groups if units.get(group.name)}
    sizes, cuts = {group.name: group.size for group in coupling.groups}, _cuts(coupling, units)
    return Plan(units, sizes, cuts, program.fingerprint, program.inputs, budget, dict(settings), tuple(notes))


def _valid_units(group: Group, indices: Iterable[int]) -> tuple[int, ...]:
    try:
        units = tuple(sorted({operator.index(index) for index in indices}))
    except TypeError as error:
        raise PlanMismatch(f"group '{group.name}': the units to remove must be whole numbers ({error})") from error
    strange = [unit for unit in units if not 0 <= unit < group.size]
    if strange:
        raise PlanMismatch(f"group '{group.name}' has units 0 to {group.size - 1}, the plan removes unit {strange[0]}")
    if len(units) == group.size:
        raise IllegalCut(f"the plan removes all {group.size} units of group '{group.name}': at least one must remain")
    return units


def _cuts(coupling: Coupling, units: Mapping[str, Sequence[int]]) -> tuple[AxisCut, ...]:
    """Return one cut per axis; a position of two units (a head and a head dimension) is removed with either."""
    positions: dict[tuple[str, int], set[int]] = {}
    for group in coupling.groups:
        for site in group.sites if group.name in units else ():
            owned = positions.setdefault((site.tensor, site.axis), set())
            owned.update(position for unit in units[group.name] for position in site.index[unit])
    cuts = [AxisCut(t, axis, coupling.shapes[t][axis], tuple(sorted(owned))) for (t, axis), owned in positions.items()]
    for c in cuts:
        if len(c.dead) == c.size:
            said = f"the plan would leave nothing of axis {c.axis} of {c.tensor}, {c.size} long: remove fewer units"
            raise IllegalCut(said)
    return tuple(cut for cut in cuts if cut.dead)


def require_own_cuts(plan: Plan, coupling: Coupling) -> None:
    """Raise PlanMismatch if the plan's cuts do not follow from its dead units, or the coupling lacks one of them."""
    derived = plan_from_dead(plan, coupling, plan.dead)
    for name, size in derived.sizes.items():
        if plan.sizes.get(name, size) != size:
            raise PlanMismatch(
                f"the plan says that group '{name}' has {plan.sizes[name]} units, this model's has {size}: the file "
                "was edited, or is for another architecture; make a new plan"
            )
    if derived.cuts != plan.cuts:
        raise PlanMismatch("the plan's cuts do not follow from its dead units: the file was edited; make a new plan")


@dataclass(frozen=True, eq=False)
class Cut:
    """A plan, the program it was made for (without its dropped blocks), and derived data; may raise PlanMismatch."""

    program: Program
    coupling: Coupling
    plan: Plan

    def __post_init__(self) -> None:
        if self.plan.fingerprint != self.program.fingerprint:
            raise PlanMismatch(
                "the plan was made for another architecture (its fingerprint differs from this model's); "
                "use the model it was made for, or make a new plan"
            )
        require_own_cuts(self.plan, self.coupling)

    @cached_property
    def masks(self) -> Masks:
        """Surviving indices of every value."""
        labelled = self.coupling.labelled
        return Masks(labelled, labelled.dead_roots(self.plan.dead))

    @cached_property
    def head_order(self) -> tuple[Reordering, ...]:
        """Reorderings of each tensor before its dead positions are removed."""
        return reorderings(self.coupling, self.plan.arranged)

    def reordered(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return dense tensors by name in the plan's head order."""
        return reordered(state, self.head_order)

    def kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by name without the plan's dead positions."""
        out = dict(state)
        for c in self.plan.cuts:
            if c.tensor in out:
                alive = torch.from_numpy(np.delete(np.arange(c.size), c.dead))
                out[c.tensor] = out[c.tensor].detach().index_select(c.axis, alive.to(out[c.tensor].device))
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of every parameter and buffer of model and graph, in head order, without dead positions.

        Parameters stay parameters, with their `requires_grad`; tied ones stay one object.
        """
        tensors = all_tensors(self.program)
        first = {id(tensor): name for name, tensor in reversed(tensors.items())}
        copies = self.kept(self.reordered({name: tensors[name] for name in first.values()}))
        for name, value in copies.items():
            copies[name] = value.detach().clone(memory_format=torch.contiguous_format)
            if isinstance(tensors[name], nn.Parameter):
                copies[name] = nn.Parameter(copies[name], requires_grad=tensors[name].requires_grad)
        return {name: copies[first[id(tensor)]] for name, tensor in tensors.items()}

    def masked_run(self, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Executor:
        """Return the masked dense program on these tensors in head order; see `coupling.masked_run`."""
        return masked_run(self.program, self.coupling.labelled, self.masks, state, dtype)


# Head orders: positions of the members of heads. --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """Positions of the members of heads on an axis of a parameter or buffer."""

    tensor: str
    axis: int
    inner: Index  # member at each position along `axis`, -1 for none
    by: int | None  # axis of the heads; None if it is the same one
    outer: Index  # head at each position along that axis, -1 for none

    def joint(self, members: int) -> Index:
        """Return head and member, as one number, at each position of an axis that holds both; -1 for none."""
        return np.where(self.inner >= 0, self.outer * members + self.inner, -1)


@dataclass(frozen=True, slots=True)
class Reordering:
    """Position p along `axis` of `tensor` receives position `orders[which[q]][p]`; q is the position along `by`."""

    tensor: str
    axis: int
    orders: Index
    by: int | None = None
    which: Index | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """One layer of one axis of a value: group number and unit at each position, -1 for none."""

    axis: int
    group: Index
    unit: Index


class Places:
    """Locates the groups of a coupling on the axes of values."""

    def __init__(self, coupling: Coupling) -> None:
        self.labelled = coupling.labelled
        self.number = {group.name: k for k, group in enumerate(coupling.groups)}
        self._group, self._unit = np.full((2, self.labelled.labels.count), -1, dtype=np.int64)
        for k, group in enumerate(coupling.groups):
            self._group[list(group.units)], self._unit[list(group.units)] = k, np.arange(group.size)
        self._params = {name: self.held(value) for name, value in self.labelled.params.items()}

    def held(self, value: Value) -> list[Held]:
        """Return the layers of a value that contain units."""
        layers = [(a, layer) for a, axis in enumerate(value.axes) for layer in self.labelled.labels.canon(axis)]
        return [Held(a, self._group[x], self._unit[x]) for a, x in layers if (self._group[x] >= 0).any()]

    def layouts(self, inner: str, outer: str) -> Iterator[Layout]:
        """Yield the layout of each tensor with members `inner` of heads `outer`; PlanMismatch if it lacks the heads."""
        within, heads = self.number[inner], self.number[outer]
        for name, held in self._params.items():
            for members in held:
                there = members.group == within
                if not there.any():
                    continue
                unit = np.where(there, members.unit, -1)
                same = [h for h in held if h.axis == members.axis and (h.group[there] == heads).all()]
                other = [h for h in held if h.axis != members.axis and (h.group == heads).all()]
                if same:
                    yield Layout(name, members.axis, unit, None, np.where(there, same[0].unit, -1))
                elif other:
                    yield Layout(name, members.axis, unit, other[0].axis, other[0].unit)
                else:
                    said = f"'{name}' holds members of '{inner}' without heads of '{outer}'; make a new plan"
                    raise PlanMismatch(said)


def positions(owner: Index, count: int) -> Index:
    """Return the positions of each of `count` owners (count, positions of one); PlanMismatch if some own more."""
    found = np.argsort(owner, kind="stable")[int((owner < 0).sum()) :]
    if len(found) % count or (np.bincount(owner[owner >= 0], minlength=count) != len(found) // count).any():
        raise PlanMismatch("members of one head own more positions than those of another; make a new plan")
    return found.reshape(count, -1)


def reorderings(
    coupling: Coupling, arranged: Sequence[Arrangement], places: Places | None = None
) -> tuple[Reordering, ...]:
    """Return the reorderings of each tensor; PlanMismatch if made for another architecture, or not permutations."""
    if not arranged:
        return ()
    places, out = places or Places(coupling), []
    for a in arranged:
        inner, outer = coupling.group(a.group), coupling.group(a.outer)
        if len(a.orders) != outer.size or any(sorted(order) != list(range(inner.size)) for order in a.orders):
            raise PlanMismatch(f"the arrangement of '{a.group}' is no order of its members in each unit of '{a.outer}'")
        orders = np.asarray(a.orders, dtype=np.int64)
        out += [_reordering(layout, orders) for layout in places.layouts(a.group, a.outer)]
    return tuple(out)


def _reordering(layout: Layout, orders: Index) -> Reordering:
    """The positions of member m of a head receive those of member `orders[head][m]`, in order."""
    heads, members = orders.shape
    if layout.by is not None:
        owned, _ = positions(layout.inner, members), positions(layout.outer, heads)  # (members, positions of one)
        rows = np.tile(np.arange(len(layout.inner)), (heads, 1))
        rows[:, owned.reshape(-1)] = owned[orders].reshape(heads, -1)
        return Reordering(layout.tensor, layout.axis, rows, layout.by, layout.outer)
    owned = positions(layout.joint(members), heads * members).reshape(heads, members, -1)
    row = np.arange(len(layout.inner))
    row[owned.reshape(-1)] = np.take_along_axis(owned, orders[:, :, None], axis=1).reshape(-1)
    return Reordering(layout.tensor, layout.axis, row[None])


def reordered(state: Mapping[str, Tensor], orders: Sequence[Reordering]) -> dict[str, Tensor]:
    """Return reordered copies of the tensors by name."""
    out = dict(state)
    for order in orders:
        if order.tensor not in out:
            continue
        tensor = out[order.tensor].detach()
        if order.by is None or order.which is None:
            out[order.tensor] = tensor.index_select(order.axis, torch.from_numpy(order.orders[0]).to(tensor.device))
            continue
        index = torch.from_numpy(order.orders[order.which]).to(tensor.device)  # (size of `by`, size of `axis`)
        shape = [size if a in (order.by, order.axis) else 1 for a, size in enumerate(tensor.shape)]
        index = (index.T if order.by > order.axis else index).reshape(shape)
        out[order.tensor] = torch.take_along_dim(tensor, index, dim=order.axis)
    return out
