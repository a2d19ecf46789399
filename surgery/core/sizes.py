"""Sizes that may differ from call to call, which the tracer leaves symbolic."""

from __future__ import annotations

from typing import Any

import torch


def is_symbolic(size: Any) -> bool:
    """Whether a traced size may differ from call to call."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def hint(size: Any) -> int:
    """The example's value of a size that may be symbolic."""
    return int(size.node.hint if is_symbolic(size) else size)
