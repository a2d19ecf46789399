"""Head orders: sort the members of each attention head, or convolution group, by importance.

Heads may have independent orders if every value that contains members also identifies their head (known from labels),
and no operator combines members of several heads: the dense program is run with members in random order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import ceil, lgamma, log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.core import TOLERANCE, Arrangement, Coupling, Group, Plan, Program, Site, well_conditioned
from surgery.coupling import Places, positions, reordered, reorderings, values_in
from surgery.cutting import outputs_of, relative_error
from surgery.errors import PlanMismatch
from surgery.importance.scoring import score_members, weights_of

Pair = tuple[Group, Group]
"""Group of members, group of heads."""


def arrange(program: Program, coupling: Coupling, criterion: Any = "l1", *, seed: int = 0) -> tuple[Arrangement, ...]:
    """Sort the members of each head from the most important to the least, where heads may be reordered independently.

    With a callable `criterion`, which scores whole units, the order is unchanged.
    """
    if not isinstance(criterion, str) or not program.has_graph:
        return ()
    places, out = Places(coupling), []
    pairs = _pairs(places, coupling)
    parameters = weights_of(program, coupling) if pairs else {}
    for inner, outer in _reorderable(program, places, coupling, pairs, seed):
        joint, theirs = _joint(places, inner, outer, parameters)
        scores = np.asarray(score_members(joint, theirs, criterion, seed=seed)).reshape(outer.size, inner.size)
        orders = np.argsort(-scores, axis=1, kind="stable")
        out.append(Arrangement(inner.name, outer.name, tuple(map(tuple, orders.tolist()))))
    return tuple(out)


def settled(plan: Plan, arrangements: Sequence[Arrangement]) -> Plan:
    """Return the plan with the arrangements it needs; survivors of a head keep their original order."""
    out = []
    for a in arrangements:
        dead = set(plan.dead.get(a.group, ()))
        slots = [k for k in range(plan.sizes[a.group]) if k not in dead], sorted(dead)
        orders = []
        for order in a.orders:
            row = [0] * len(order)
            for places in slots:
                for slot, member in zip(places, sorted(order[k] for k in places), strict=True):
                    row[slot] = member
            orders.append(tuple(row))
        if any(row != tuple(range(len(row))) for row in orders):
            out.append(Arrangement(a.group, a.outer, tuple(orders)))
    said = [f"other members in each unit of '{a.outer}': {a.group}" for a in out]
    return replace(plan, arranged=tuple(out), notes=(*plan.notes, *said))


def _pairs(places: Places, coupling: Coupling) -> list[Pair]:
    """Return groups of members, each with the group of heads that every value with these members also has."""
    candidates: dict[int, set[int]] = {}
    values = (v for value in places.labelled.values.values() for v in values_in(value))
    for held in (places.held(value) for value in (*places.labelled.params.values(), *values)):
        for members in held:
            for number in set(members.group.tolist()) - {-1}:
                there, found = members.group == number, set[int]()
                for other in held:  # a unit at every position of the members, or on the whole of another axis
                    groups = set((other.group[there] if other.axis == members.axis else other.group).tolist())
                    found |= groups if other is not members and len(groups) == 1 else set()
                found -= {-1, number}
                candidates[number] = candidates[number] & found if number in candidates else found
    named = {number: next(iter(found)) for number, found in candidates.items() if len(found) == 1}
    pairs = []
    for inner, outer in ((coupling.groups[i], coupling.groups[o]) for i, o in sorted(named.items())):
        unchanged = Arrangement(inner.name, outer.name, (tuple(range(inner.size)),) * outer.size)
        with suppress(PlanMismatch):  # unless every tensor contains equally many positions of each member
            reorderings(coupling, [unchanged], places)
            pairs.append((inner, outer))
    return pairs


def _reorderable(program: Program, places: Places, coupling: Coupling, pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Return the pairs whose members may be reordered; of two possible heads, the earlier group is tried first."""
    if not pairs:
        return []
    shuffle = _Shuffle(program, places, coupling, seed)
    order = {group.name: k for k, group in enumerate(coupling.groups)}
    second = [(i, o) for i, o in pairs if (o, i) in pairs and order[i.name] < order[o.name]]
    found = shuffle.passing([pair for pair in pairs if pair not in second])
    taken = {group.name for pair in found for group in pair}
    found += shuffle.passing([(i, o) for i, o in second if not {i.name, o.name} & taken])
    inner = {i.name for i, _ in found}
    return [(i, o) for i, o in found if o.name not in inner]


class _Shuffle:
    """Runs the dense program with members in random order, on well-conditioned weights, at most `_RUNS` times."""

    def __init__(self, program: Program, places: Places, coupling: Coupling, seed: int) -> None:
        self._program, self._places, self._coupling, self._seed = program, places, coupling, seed
        self._state = well_conditioned(program, seed=seed)
        self._wanted = outputs_of(program, self._state, seed)
        self._rng, self._runs = np.random.default_rng(seed), _RUNS

    def passing(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return the pairs whose random orders do not change the outputs.

        All are tested at once, then those of similar blocks (named alike but for numbers), then halves.
        """
        if not pairs or not self._runs:
            return []
        self._runs -= 1
        if self._same(pairs):
            return list(pairs)
        kinds: dict[str, list[Pair]] = {}
        for pair in pairs:
            kinds.setdefault(re.sub(r"\d+", "", pair[0].name), []).append(pair)
        half = len(pairs) // 2
        halves = [pairs[:half], pairs[half:]] if half else []
        return [pair for part in (kinds.values() if len(kinds) > 1 else halves) for pair in self.passing(part)]

    def _same(self, pairs: Sequence[Pair]) -> bool:
        # After so many random orders, two heads have always agreed with probability below 1e-3.
        draws = [max(1, ceil(log(1e3) / lgamma(inner.size + 1))) for inner, _ in pairs]
        for k in range(max(draws)):
            orders = []
            for (inner, outer), count in zip(pairs, draws, strict=True):
                if k < count:
                    rows = (tuple(self._rng.permutation(inner.size).tolist()) for _ in range(outer.size))
                    orders.append(Arrangement(inner.name, outer.name, tuple(rows)))
            state = reordered(self._state, reorderings(self._coupling, orders, self._places))
            error, _ = relative_error(self._wanted, outputs_of(self._program, state, self._seed))
            if not error <= TOLERANCE[torch.float64]:
                return False
        return True


_RUNS = 10


def _joint(
    places: Places, inner: Group, outer: Group, parameters: Mapping[str, Tensor]
) -> tuple[Group, dict[str, Tensor]]:
    """Return a group with every member of every head as a unit, and the weights of which these units own slices."""
    weights, sites, count = dict(parameters), [], inner.size * outer.size
    for layout in places.layouts(inner.name, outer.name):
        name, axis = layout.tensor, layout.axis
        if layout.by is None:
            owned = positions(layout.joint(inner.size), count)
        elif name in parameters:  # concatenate the slices of all heads: (heads * positions, slice)
            rows = positions(layout.outer, outer.size)
            weight = parameters[name].movedim((layout.by, axis), (0, 1))
            weight = weight.reshape(*weight.shape[:2], -1)  # (by, axis, rest)
            name, axis = f"{name}:{axis}", 0  # the tensor may have members on another axis too
            weights[name] = torch.cat([weight[torch.from_numpy(row)].movedim(1, 0).flatten(1) for row in rows])
            per_head = positions(layout.inner, inner.size)
            owned = np.concatenate([per_head + k * len(layout.inner) for k in range(outer.size)])
        else:
            continue
        sites.append(Site(name, axis, tuple(map(tuple, owned.tolist()))))
    return Group(inner.name, tuple(range(count)), tuple(sites), inner.inexact), weights
