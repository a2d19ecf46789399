"""Random scores, for comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from surgery.core import Group
from surgery.importance.evidence import criterion


@criterion("random", needs=["seed"])
def uniform_random(group: Group, weights: Mapping[str, Tensor], *, seed: int) -> Sequence[float]:
    """Uniform on [0, 1); depends only on the seed and the group name."""
    digest = hashlib.sha256(f"{seed}:{group.name}".encode()).digest()
    return [float(value) for value in np.random.default_rng(int.from_bytes(digest, "big")).random(group.size)]
