"""Distance to the other units' weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.core import Group, Site
from surgery.importance.evidence import criterion
from surgery.importance.unit_weights import over_mean, owned_weights, positions_of


@criterion("fpgm")
def fpgm(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of the distances to the other units' weights, over the group's mean: low near the geometric median.

    Source: He et al. 2019, Filter pruning via geometric median (arXiv:1811.00250), over all weights the unit owns.
    """
    squared = torch.zeros(group.size, group.size, dtype=torch.float64)
    for site, weight in owned_weights(group, weights):
        rows = _rows_per_unit(site, weight)  # (units, weights of a unit)
        rows = rows - rows.mean(0)  # distances stay, rounding shrinks
        gram = rows @ rows.T
        norms = gram.diagonal()
        squared += norms[:, None] + norms[None, :] - 2 * gram
    return over_mean(squared.clamp_min(0).fill_diagonal_(0).sqrt().sum(1))


def _rows_per_unit(site: Site, weight: Tensor) -> Tensor:
    """Return (units, weights of a unit) in float64; units with fewer positions are padded with zeros."""
    slices = weight.double().movedim(site.axis, 0).flatten(1) if weight.ndim > 1 else weight.double()[:, None]
    widest = max(len(owned) for owned in site.index)
    rows = torch.zeros(len(site.index), widest, slices.shape[1], dtype=torch.float64)
    positions, units = positions_of(site)
    ranks = torch.tensor([rank for owned in site.index for rank in range(len(owned))], dtype=torch.long)
    rows[units, ranks] = slices[positions]
    return rows.flatten(1)
