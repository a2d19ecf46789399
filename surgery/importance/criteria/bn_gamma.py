"""Scales of batch norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.core import Group, Site
from surgery.importance.criteria.l1 import l1
from surgery.importance.evidence import criterion
from surgery.importance.unit_weights import over_mean, owned_weights, positions_of


@criterion("bn-gamma")
def bn_gamma(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of the magnitudes of the batch-norm scales the unit passes, over the group's mean.

    Groups with units that pass no batch norm are scored by `l1`.
    Source: Liu et al. 2017, Network Slimming (arXiv:1708.06519).
    """
    total, passed = torch.zeros(group.size, dtype=torch.float64), torch.zeros(group.size, dtype=torch.bool)
    for site, weight in owned_weights(group, weights):
        if _is_batch_norm_scale(site, group):
            positions, units = positions_of(site)
            total.index_add_(0, units, weight.double().abs()[positions])
            passed[units] = True
    return over_mean(total) if passed.all() else l1(group, weights)


def _is_batch_norm_scale(site: Site, group: Group) -> bool:
    """A norm with running statistics has them cut along with its scale: they are sites of the same group."""
    module, _, last = site.tensor.rpartition(".")
    return last == "weight" and any(other.tensor == f"{module}.running_var".lstrip(".") for other in group.sites)
