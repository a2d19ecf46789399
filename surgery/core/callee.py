"""Copies of the user's modules and inputs, and modules as functions of flat tensors."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.core.blame import first_line
from surgery.core.ir import Program
from surgery.errors import InvalidInput, UnsupportedModel


def copied(model: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a deep copy, or UnsupportedModel if impossible; `instead`: id of an object → its replacement."""
    # Plain attributes with a `grad_fn` (the older weight norm), which `deepcopy` refuses.
    held = (x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor))
    detached = {id(x): x.detach().clone() for x in held if x.grad_fn is not None}
    try:
        duplicate: nn.Module = copy.deepcopy(model, {**detached, **(instead or {})})
    except Exception as error:  # the user's own __deepcopy__, locks, open files: any exception is possible
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be copied: {first_line(error)}; keep what cannot be copied outside the "
            "module, or leave it out in a __deepcopy__ of its own"
        ) from error
    return duplicate


def traceable(model: nn.Module) -> nn.Module:
    """Return a copy that shares the tensors and has empty caches: tracing it leaves no fake tensors in the original."""
    duplicate = copied(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    empty_caches(duplicate)
    return duplicate


def fresh(tree: Any) -> Any:
    """Return copies of all tensors: a model may write into its inputs."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore buffers after the block: a forward pass may update them."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    held = [(buffer, buffer.clone()) for buffer in buffers if not (nn.parameter.is_lazy(buffer) or buffer.is_meta)]
    try:
        yield
    finally:
        for buffer, before in held:
            if buffer.shape == before.shape and not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)


def empty_caches(model: nn.Module) -> None:
    """Empty every dictionary of tensors that a module calls a cache."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "cache" in name and isinstance(value, dict) and all(isinstance(x, Tensor) for x in value.values()):
                setattr(module, name, type(value)())


def digest_of(tensors: Iterable[Any]) -> str:
    """Return the SHA-256 of the tensors' shapes, types and values, hexadecimal; other objects are ignored."""
    digest = hashlib.sha256()
    for x in (x for x in tensors if isinstance(x, Tensor)):
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_finite(tensors: Mapping[str, Any], origin: str) -> None:
    """Raise InvalidInput if a parameter or norm statistic is NaN or infinite, or another tensor contains NaN.

    Attention masks are buffers that may contain minus infinity. `tensors` may contain other objects, as a state dict.
    """
    for name, x in tensors.items():
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
            strict = isinstance(x, nn.Parameter) or name.endswith(("running_mean", "running_var"))
            bad = int((~torch.isfinite(x) if strict else torch.isnan(x)).sum())
            if bad:
                what = f"{name} holds {bad} NaN or infinite values out of {x.numel()}"
                raise InvalidInput(f"{origin}: {what}; use a checkpoint from before training diverged")


class Callee(nn.Module):
    """A module with an example call: takes the call's tensors in order; other arguments are the example's."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.module = module
        leaves, self.spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
        self.leaves = tuple(leaves)  # tensors and constants

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
        """Return ``(args, kwargs)`` with copies of these tensors, one per tensor of the example; others are ignored."""
        given = iter(fresh([x for x in inputs if isinstance(x, Tensor)]))
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return all tensors among the outputs, in order."""
        args, kwargs = self.arguments(inputs)
        return tuple(x for x in pytree.tree_leaves(self.module(*args, **kwargs)) if isinstance(x, Tensor))
