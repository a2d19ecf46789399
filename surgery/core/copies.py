"""Copies of the user's modules and inputs, and restoring buffers after a forward pass."""

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
        instead: id of an object → its replacement in the copy.

    Raises:
        UnsupportedModel: the module holds something that cannot be copied (a lock, an open file).
    """
    try:
        duplicate: nn.Module = copy.deepcopy(model, {**_detached(model), **(instead or {})})
    except Exception as error:  # the user's own __deepcopy__, locks, open files: any exception is possible
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be copied: {first_line(error)}; keep what cannot be copied outside the "
            "module, or leave it out in a __deepcopy__ of its own"
        ) from error
    return duplicate


def traceable(model: nn.Module) -> nn.Module:
    """Return a copy of the module that shares its tensors and has empty caches.

    Tracing the copy leaves no fake tensors in the user's model, and records how a cached table is computed.
    """
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


def _detached(model: nn.Module) -> dict[int, Any]:
    """Copies of plain attributes with a `grad_fn` (the older weight norm), which `deepcopy` refuses."""
    held = (x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor))
    return {id(x): x.detach().clone() for x in held if x.grad_fn is not None}
