"""The unit's share of the network's signal, computed from the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.core import Group, Scores
from surgery.importance.evidence import Evidence, criterion
from surgery.importance.unit_weights import owned_weights, power_sum


def energy_shares(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the unit's share of the energy of the weights that consume it, summed over all consumers."""
    owned = list(owned_weights(group, weights))
    consumers = [(site, weight) for site, weight in owned if site.axis == 1] or owned
    total = torch.zeros(group.size, dtype=torch.float64)
    for site, weight in consumers:
        whole = weight.double().square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        total += power_sum(site, weight, order=2) / whole
    return total


@criterion("signal", needs=["consumers"], head_members=energy_shares)
def signal(evidence: Evidence) -> Scores:
    """Energy shares in the layers that consume the unit, each weighted by its output relevance."""
    return evidence.by_signal()
