"""Tensors that a module keeps between calls in plain attributes: they belong to one call, not to the model."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def traceable(model: nn.Module) -> nn.Module:
    """Return the module in copies of its modules, its tensors shared and its caches empty.

    What runs the copy with stand-ins for tensors leaves none of them behind in the user's model, and sees a table being
    computed from its parameters where a cache would show it ready-made. A model that cannot be copied is returned.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        copied = copy.deepcopy(model, shared)
    except Exception:  # the user's own __deepcopy__, locks, open files: anything may come
        return model
    empty_caches(copied)
    return copied


def empty_caches(model: nn.Module) -> None:
    """Empty every dictionary of tensors that a module calls a cache."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "cache" in name and isinstance(value, dict) and all(isinstance(x, Tensor) for x in value.values()):
                setattr(module, name, type(value)())
