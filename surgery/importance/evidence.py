"""The inputs of criteria, and the decorator that registers one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from surgery.core import Coupling, Group, Program, Scores
from surgery.importance.signal import Signal, signal_of
from surgery.registry import CRITERIA, Criterion

GroupCriterion = Callable[[Group, Mapping[str, Tensor]], Sequence[float] | Tensor]
"""A group and the model's parameters by name (detached; not to be written to) → one score per unit of the group."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Evidence:
    """The argument of criteria that need more than weights.

    Attributes:
        program: the dense model.
        coupling: its groups.
        weights: parameters by name, detached, on the CPU, in head order.
        state: all parameters and buffers that the graph reads, likewise; empty without a graph.
        images: batches of the program's inputs; empty unless the criterion needs images.
        macs: MACs of one image, which limit the number of images for measurements; 0: no limit.
        seed: seed of all random draws.
        progress: called with the completed fraction.
    """

    program: Program
    coupling: Coupling
    weights: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    images: Sequence[Sequence[Tensor]]
    macs: int
    seed: int
    progress: Callable[[float], None]

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
        CRITERIA.add(Criterion(name, function, frozenset(needs), head_members))
        return function

    return register
