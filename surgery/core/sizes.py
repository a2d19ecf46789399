"""Symbolic sizes: sizes that may vary between calls."""

from __future__ import annotations

from typing import Any

import torch


def is_symbolic(size: Any) -> bool:
    """Return whether a traced size may vary between calls."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def hint(size: Any) -> int:
    """Return the example's value of a size that may be symbolic."""
    return int(size.node.hint if is_symbolic(size) else size)
