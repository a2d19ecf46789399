"""Layer-adaptive magnitude."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.core import Group
from surgery.importance.evidence import criterion
from surgery.importance.unit_weights import power_sums


@criterion("lamp")
def lamp(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Squared norm of the unit over the sum of squared norms of all units of the group that are no smaller.

    Source: Lee et al. 2020, Layer-adaptive sparsity (arXiv:2010.07611), with units instead of single weights.
    """
    squares = power_sums(group, weights, order=2)
    ranked, order = torch.sort(squares, stable=True)
    survivors = ranked.flip(0).cumsum(0).flip(0)  # at each rank: sum of the remaining units, including this one
    shares = torch.where(survivors > 0, ranked / survivors.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return torch.empty_like(squares).index_copy_(0, order, shares)
