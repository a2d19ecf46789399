"""What a criterion may read, and the decorator that registers one."""

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
    """What a criterion that needs more than weights is given.

    Attributes:
        program: the dense model.
        coupling: its groups.
        weights: parameters by name, detached, on the CPU, the members of heads in their new order.
        state: likewise all parameters and buffers that the graph reads; empty without a graph.
        images: batches of the program's inputs; empty unless the criterion needs images.
        macs: of one image, which limits how many images are measured on; 0: no limit.
        seed: of everything drawn at random.
        progress: called with the fraction that is done.
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
        """Which layers consume each group's units, and how relevant those are for the outputs."""
        return signal_of(self.program, self.coupling, self.weights)

    def by_signal(self) -> Scores:
        """Return the scores of criterion `signal`: the ranking of groups that no observed layer consumes."""
        return {group.name: self.signal.scores(group) for group in self.coupling.groups}


def criterion(
    name: str, *, needs: Collection[str] = (), head_members: GroupCriterion | None = None
) -> Callable[[_Function], _Function]:
    """Register the decorated function as a criterion: low scores are cut first, and scores compare between groups.

    A criterion without needs is a function ``(group, weights) -> score per unit``, called group by group. One that
    needs `seed` alone takes it as a keyword argument. Others take an `Evidence` and return group name → score per unit.

    Args:
        name: by which it is chosen, as in ``surgery.score(..., criterion="mine")``.
        needs: what it reads besides weights: `images`, `graph` (the operators that `torch.export` captures),
            `gradients`, `consumers` (which layers consume the units), `seed`; and `costs`, where its scores are losses
            of the whole model, which planning divides by what each unit costs.
        head_members: function ``(group, weights) -> score per unit`` that ranks the members of an attention head, where
            the criterion itself cannot; l1 by default.

    Raises:
        ValueError: the name is taken, or a need is not one of these.
    """

    def register(function: _Function) -> _Function:
        CRITERIA.add(Criterion(name, function, frozenset(needs), head_members))
        return function

    return register
