"""Criteria: their inputs, the decorator that registers one, and scores of all units with checks of inputs and results.

Scores are comparable between groups; the lowest are removed first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.core import (
    Coupling,
    Group,
    Program,
    Scores,
    all_tensors,
    digest_of,
    first_line,
    remembered,
    require_finite,
    state_of,
    user_line,
)
from surgery.errors import InvalidInput, PlanMismatch
from surgery.importance.signal import Signal, signal_of
from surgery.registry import CRITERIA, Entry

GroupCriterion = Callable[[Group, Mapping[str, Tensor]], Sequence[float] | Tensor]
"""A group and the model's parameters by name (detached; not to be written to) → one score per unit of the group."""
Batches = Sequence[Sequence[Tensor]]
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Evidence:
    """The argument of criteria that need more than weights."""

    program: Program
    coupling: Coupling
    weights: Mapping[str, Tensor]  # parameters by name, detached, on the CPU, in head order
    state: Mapping[str, Tensor]  # parameters and buffers of the graph, likewise; empty without one
    images: Batches  # batches of the program's inputs; empty unless needed
    macs: int  # of one image, to limit measurements; 0: no limit
    seed: int
    progress: Callable[[float], None]  # called with the completed fraction

    @cached_property
    def signal(self) -> Signal:
        """The consumers of each group's units, and their output relevance."""
        return signal_of(self.program, self.coupling, self.weights)

    def by_signal(self) -> Scores:
        """Return the scores of criterion `signal`, used for groups without an observed consumer."""
        return {group.name: self.signal.scores(group) for group in self.coupling.groups}


def criterion(
    name: str, *, needs: Collection[str] = (), head_members: GroupCriterion | None = None
) -> Callable[[_Function], _Function]:
    """Register the decorated function as a criterion: units with low scores are removed first, across groups.

    A criterion without needs is a function ``(group, weights) -> score per unit``, called for each group. If it needs
    only `seed`, it receives it as a keyword argument. Others take an `Evidence` and return group name → score per unit.

    Args:
        name: name of the criterion, as in ``surgery.score(..., criterion="mine")``.
        needs: inputs besides weights: `images`, `graph` (the operators that `torch.export` captures), `gradients`,
            `consumers` (the layers that consume the units), `seed`; and `costs` if its scores are losses of the whole
            model, which planning divides by each unit's cost.
        head_members: function ``(group, weights) -> score per unit`` that ranks the members of an attention head, if
            the criterion itself cannot; l1 by default.

    Raises:
        ValueError: the name is already registered, or a need is unknown.
    """

    def register(function: _Function) -> _Function:
        CRITERIA.add(Entry(name, function, frozenset(needs), head_members))
        return function

    return register


def score(
    program: Program,
    coupling: Coupling,
    criterion: str | GroupCriterion = "l1",
    *,
    seed: int = 0,
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    images: Batches | None = None,
    macs: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Scores:
    """Return the importance of every unit of every group.

    Args:
        program: the dense program; `program.model` holds the weights.
        coupling: its groups.
        criterion: a name of `CRITERIA`, or a callable ``(group, weights) -> score per unit`` whose scores are
            comparable between groups (if in doubt, divide by the group's mean).
        seed: seed of all random draws.
        prepare: transforms the weights first (head order).
        images: batches of the program's inputs, for criteria that need images.
        macs: MACs of one image, which limit the number of images for measurements; 0: no limit.
        progress: called with the completed fraction.

    Returns:
        Group name → finite score of each unit.

    Raises:
        InvalidInput: the criterion is unknown, its images or graph are missing, weights are not finite, or it does not
            return one finite number per unit.
        PlanMismatch: the coupling was made for another model.
    """
    if isinstance(criterion, str):
        entry = CRITERIA[criterion]
    elif callable(criterion):
        entry = Entry(getattr(criterion, "__name__", "callable"), criterion)
    else:
        raise InvalidInput(f"criterion {criterion!r}: give a name ({', '.join(CRITERIA.names())}) or a callable")
    if "images" in entry.needs and images is None:
        raise InvalidInput(f"criterion {entry.name} uses images: give some (--data, or `data` in Python)")
    if "graph" in entry.needs and not program.has_graph:
        raise InvalidInput(
            f"criterion {entry.name} uses the operators that torch.export captures; with tracer torch-pruning "
            "choose l1, l2, bn-gamma, lamp or fpgm"
        )
    weights = prepare(weights_of(program, coupling))
    if entry.needs <= {"seed"}:
        return {group.name: _score_group(entry, group, weights, seed) for group in coupling.groups}
    state = prepare(state_of(program)) if "graph" in entry.needs else {}
    evidence = Evidence(program, coupling, weights, state, images or (), macs, seed, progress)

    def numbers() -> dict[str, tuple[float, ...]]:
        found = entry.function(evidence)
        return {g.name: _numbers(found.get(g.name), g, entry) for g in coupling.groups}

    if not coupling.groups:
        return {}
    if not evidence.images or not entry.function.__module__.startswith("surgery."):
        return numbers()
    groups = [(group.name, group.size) for group in coupling.groups]
    given = digest_of([*weights.values(), *state.values(), *chain.from_iterable(evidence.images)])
    on = (entry.name, seed, macs, groups, str(program.graph.graph) if program.has_graph else program.fingerprint, given)
    return {name: tuple(values) for name, values in remembered("scores", on, numbers).items()}


def measures_losses(criterion: object) -> bool:
    """Return whether a criterion's scores are losses of the whole model, to be divided by each unit's cost."""
    return isinstance(criterion, str) and "costs" in CRITERIA[criterion].needs


def score_members(group: Group, weights: Mapping[str, Tensor], criterion: str, *, seed: int) -> tuple[float, ...]:
    """Return the importance of the members of heads; the group's sites are axes of these weights.

    Criteria that need more than weights are replaced by their `head_members` function, or by l1.
    """
    entry = CRITERIA[criterion]
    if entry.head_members is not None:
        entry = Entry(entry.name, entry.head_members)
    return _score_group(entry if entry.needs <= {"seed"} else CRITERIA["l1"], group, weights, seed)


def _score_group(entry: Entry, group: Group, weights: Mapping[str, Tensor], seed: int) -> tuple[float, ...]:
    """Return the importance of every unit of one group by a criterion that needs only weights and a seed."""
    try:
        with torch.no_grad():
            values = entry.function(group, weights, **({"seed": seed} if "seed" in entry.needs else {}))
    except Exception as error:  # the user's callable may raise any exception
        said = f"{type(error).__name__}: {first_line(error)}{user_line(error)}"
        raise InvalidInput(f"criterion {entry.name} on group '{group.name}' failed: {said}") from error
    return _numbers(values, group, entry)


def _numbers(values: Any, group: Group, entry: Entry) -> tuple[float, ...]:
    """Return one finite number per unit; raise InvalidInput otherwise."""
    where = f"criterion {entry.name} on group '{group.name}'"
    try:
        numbers = tuple(float(value) for value in (values.tolist() if isinstance(values, Tensor) else values))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{where}: expected {group.size} numbers, got {type(values).__name__} ({error})") from error
    if len(numbers) != group.size:
        raise InvalidInput(f"{where}: expected {group.size} numbers, one per unit, got {len(numbers)}")
    wrong = next((k for k, number in enumerate(numbers) if not math.isfinite(number)), None)
    if wrong is not None:
        raise InvalidInput(f"{where}: the score of unit {wrong} is {numbers[wrong]}; scores must be finite numbers")
    return numbers


def weights_of(program: Program, coupling: Coupling) -> dict[str, Tensor]:
    """Return detached parameters by name, and buffers called `weight` (scales of frozen batch norms), on the CPU.

    Shared parameters are listed under all names, since a site may use any of them.
    """
    tensors = all_tensors(program)
    parameters = [name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)]
    for name in sorted(tensors, key=lambda name: name not in parameters):
        tensor, traced = tensors[name], coupling.shapes.get(name)
        shape = tuple(tensor.shape)
        if traced is not None and tuple(traced) != shape:
            raise PlanMismatch(f"{name} has shape {shape}, but {tuple(traced)} in the coupling: couple this model")
    require_finite(tensors, "the weights to be ranked")
    for group in coupling.groups:
        if not any(site.tensor in tensors for site in group.sites):
            raise PlanMismatch(f"group '{group.name}' touches no tensor of this model: couple this model")
    scales = [name for name in tensors if name not in parameters and name.rpartition(".")[2] == "weight"]
    return {name: tensors[name].detach().cpu() for name in (*scales, *parameters)}
