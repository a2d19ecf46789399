"""From units to a plan, and from a plan and its program to a cut: the surviving positions of each tensor."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from surgery.config import Budget
from surgery.core import AxisCut, Coupling, Executor, Group, InputSpec, Masks, Plan, Program, all_tensors
from surgery.coupling.head_order import Reordering, reorder, reordered, reorderings
from surgery.coupling.masking import masked_run
from surgery.errors import IllegalCut, PlanMismatch, SurgeryError

NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


def plan_from_dead(
    coupling: Coupling,
    dead: Mapping[str, Iterable[int]],
    *,
    fingerprint: str,
    inputs: tuple[InputSpec, ...],
    budget: Budget | None = None,
    settings: Mapping[str, Any] = NO_SETTINGS,
    notes: Sequence[str] = (),
    reasons: Mapping[str, str] = NO_SETTINGS,
) -> Plan:
    """Return the plan that removes these units.

    Args:
        coupling: the groups.
        dead: group name → indices of the removed units within the group, in any order; groups may be missing.
        fingerprint: fingerprint of the program.
        inputs: input signature of the program.
        budget: the requested budget, or None for a plan made by hand.
        settings: JSON values, stored unchanged.
        notes: decisions with reasons.
        reasons: group name → why it has its size.

    Raises:
        PlanMismatch: the coupling does not have this group or unit.
        IllegalCut: a group, or an axis of a tensor, would become empty.
        SurgeryError: two groups have the same name.
    """
    shared = [name for name, count in Counter(group.name for group in coupling.groups).items() if count > 1]
    if shared:
        raise SurgeryError(
            f"{len(shared)} names are borne by several groups, the first is '{shared[0]}': please report it"
        )
    units = {name: _valid_units(coupling.group(name), indices) for name, indices in dead.items()}
    units = {group.name: units[group.name] for group in coupling.groups if units.get(group.name)}
    return Plan(
        dead=units,
        sizes={group.name: group.size for group in coupling.groups},
        cuts=_cuts(coupling, units),
        fingerprint=fingerprint,
        inputs=inputs,
        budget=budget,
        settings=dict(settings),
        notes=tuple(notes),
        reasons=dict(reasons),
    )


def require_own_cuts(plan: Plan, coupling: Coupling) -> None:
    """Raise PlanMismatch if the plan's cuts do not follow from its dead units, or the coupling lacks one of them."""
    derived = plan_from_dead(coupling, plan.dead, fingerprint=plan.fingerprint, inputs=plan.inputs)
    if derived.cuts != plan.cuts:
        raise PlanMismatch("the plan's cuts do not follow from its dead units: the file was edited; make a new plan")


# Plan and program. --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cut:
    """A plan, the program it was made for, and derived data.

    Attributes:
        program: the dense model, traced, without the blocks that the plan drops.
        coupling: groups of the program.
        plan: the plan.

    Raises:
        PlanMismatch: the plan was made for another architecture, or contradicts itself.
    """

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
                out[c.tensor] = out[c.tensor].detach().index_select(c.axis, survivors(c))
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of every parameter and buffer of model and graph, in head order, without dead positions.

        Parameters stay parameters, with their `requires_grad`; tied ones stay one object.
        """
        tensors = all_tensors(self.program)
        moving = {(id(tensors[x.tensor]), x.axis, x.orders.tobytes()): x for x in self.head_order}  # tied ones once
        cuts: dict[int, dict[int, Tensor]] = {}
        for c in self.plan.cuts:
            cuts.setdefault(id(tensors[c.tensor]), {})[c.axis] = survivors(c)
        copies: dict[int, Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) in copies:
                continue
            value = tensor.detach()
            for key, reordering in moving.items():
                value = reorder(value, reordering) if key[0] == id(tensor) else value
            for axis, index in cuts.get(id(tensor), {}).items():
                value = value.index_select(axis, index.to(value.device))
            value = value.clone(memory_format=torch.contiguous_format)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = value
        return {name: copies[id(tensor)] for name, tensor in tensors.items()}

    def masked_run(
        self, state: Mapping[str, Tensor], dtype: torch.dtype | None = None, *, batch: int | None = None
    ) -> Executor:
        """Return the masked dense program on these tensors in head order; see `coupling.masked_run`."""
        return masked_run(self.program, self.coupling.labelled, self.masks, state, dtype, batch=batch)


def survivors(cut: AxisCut) -> Tensor:
    """Return the surviving positions along an axis."""
    return _others(cut.size, cut.dead)


@lru_cache(maxsize=256)  # consecutive cuts of one group share their positions
def _others(size: int, dead: tuple[int, ...]) -> Tensor:
    alive = torch.ones(size, dtype=torch.bool)
    alive[list(dead)] = False
    return alive.nonzero().squeeze(1)


# From units to positions. --------------------------------------------------------------------------------------------


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
    cuts = []
    for (tensor, axis), owned in positions.items():
        size = coupling.shapes[tensor][axis]
        if len(owned) == size:
            raise IllegalCut(
                f"the plan would leave nothing of axis {axis} of {tensor}, {size} long: remove fewer units"
            )
        if owned:
            cuts.append(AxisCut(tensor, axis, size, tuple(sorted(owned))))
    return tuple(cuts)
