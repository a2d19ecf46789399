"""Dead units make a plan: the one place where dead units become dead positions of tensors."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from surgery.config import Budget
from surgery.core import Coupling, Cut, Group, InputSpec, Plan
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
        fingerprint: of the program.
        inputs: of the program.
        budget: what was asked for, or None for a plan made by hand.
        settings: kept in the plan as given: JSON values.
        notes: decisions with reasons.
        reasons: group name → why it stands where it stands.

    Raises:
        PlanMismatch: a group or a unit that the coupling does not have.
        IllegalCut: a group, or an axis of a tensor, would be left without a unit.
        SurgeryError: two groups bear one name, so that a plan could not tell them apart.
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
    """Raise PlanMismatch where the plan's cuts are not those of its dead units, or the coupling lacks one of them."""
    derived = plan_from_dead(coupling, plan.dead, fingerprint=plan.fingerprint, inputs=plan.inputs)
    if derived.cuts != plan.cuts:
        raise PlanMismatch("the plan's cuts do not follow from its dead units: the file was edited; make a new plan")


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


def _cuts(coupling: Coupling, units: Mapping[str, Sequence[int]]) -> tuple[Cut, ...]:
    """One cut per axis; a position that several units own (a head and a head dimension) dies with the first of them."""
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
            cuts.append(Cut(tensor, axis, size, tuple(sorted(owned))))
    return tuple(cuts)


# The budget. ---------------------------------------------------------------------------------------------------------
