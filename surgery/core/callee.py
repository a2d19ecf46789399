"""A module as a function of flat tensors, however its arguments and outputs are nested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.core.copies import fresh
from surgery.core.ir import Program


class Callee(nn.Module):
    """A module with an example call: takes the call's tensors in order; other arguments are the example's.

    Attributes:
        module: the module to call.
        leaves: flattened arguments of the example call, tensors and constants.
        spec: pytree structure of ``(args, kwargs)``.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.module = module
        leaves, self.spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
        self.leaves = tuple(leaves)

    @classmethod
    def of(cls, program: Program, module: nn.Module | None = None) -> Callee:
        """Return the example call of a program, for its own model or another module."""
        return cls(program.model if module is None else module, program.example_args, program.example_kwargs)

    def on(self, module: nn.Module) -> Callee:
        """Return the same call of another module."""
        return Callee(module, *self.example)

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example call's own ``(args, kwargs)``."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        return tuple(args), dict(kwargs)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The example call's tensors, in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def arguments(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` with copies of these tensors, since a module may write into its inputs.

        Args:
            inputs: one tensor per tensor of the example; other values are ignored.
        """
        given = iter(fresh([x for x in inputs if isinstance(x, Tensor)]))
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return all tensors among the outputs, in order."""
        args, kwargs = self.arguments(inputs)
        return tuple(x for x in pytree.tree_leaves(self.module(*args, **kwargs)) if isinstance(x, Tensor))
