"""The states of the global random generators: torch's on the CPU, numpy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

States = tuple[torch.Tensor, Any, Any]


def states() -> States:
    """Return the states of the three generators."""
    return torch.default_generator.get_state(), np.random.get_state(), random.getstate()


def restore(found: States) -> None:
    """Set the generators to states that `states` returned."""
    torch.default_generator.set_state(found[0])
    np.random.set_state(found[1])
    random.setstate(found[2])


def seed_all(seed: int) -> None:
    """Seed the three generators."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def states_kept() -> Iterator[None]:
    """Restore the generators after the block."""
    before = states()
    try:
        yield
    finally:
        restore(before)
