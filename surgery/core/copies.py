"""Copies of the user's modules: what is shared, what is left behind, and what is said where there can be none."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.core.blame import first_line
from surgery.errors import UnsupportedModel


def copied(model: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a module.

    Args:
        model: left unchanged.
        instead: id of an object → what stands in its place in the copy.

    Raises:
        UnsupportedModel: it holds something that cannot be copied (a lock, an open file).
    """
    try:
        duplicate: nn.Module = copy.deepcopy(model, {**_detached(model), **(instead or {})})
    except Exception as error:  # the user's own __deepcopy__, locks, open files: anything may come
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be copied: {first_line(error)}; keep what cannot be copied outside the "
            "module, or leave it out in a __deepcopy__ of its own"
        ) from error
    return duplicate


def traceable(model: nn.Module) -> nn.Module:
    """Return the module in copies of its modules, its tensors shared and its caches empty.

    What runs the copy with stand-ins for tensors leaves none of them behind in the user's model, and sees a table being
    computed from its parameters where a cache would show it ready-made.
    """
    duplicate = copied(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    empty_caches(duplicate)
    return duplicate


def fresh(tree: Any) -> Any:
    """Return copies of all tensors: a model may write into its inputs."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, tree)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Give buffers back the values they had before the block: a forward pass may count, or average, in them."""
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


def _detached(model: nn.Module) -> dict[int, Any]:
    """Tensors that a module holds as plain attributes and autograd made (the older weight norm): torch copies none."""
    held = (x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor))
    return {id(x): x.detach().clone() for x in held if x.grad_fn is not None}
