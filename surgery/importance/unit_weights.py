"""The weights of a unit: slices of its producers, norms and consumers.

Biases (which shift an output by a constant) and statistics such as `running_mean` are excluded. Scores are divided by
their group's mean to make layers comparable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from surgery.core import Group, Site


def owned_weights(group: Group, weights: Mapping[str, Tensor]) -> Iterator[tuple[Site, Tensor]]:
    """Yield the sites of a group that are slices of weights, each with its tensor."""
    for site in group.sites:
        last = site.tensor.rpartition(".")[2]
        if site.tensor in weights and not last.endswith("bias") and last != "beta":
            yield site, weights[site.tensor]


def positions_of(site: Site) -> tuple[Tensor, Tensor]:
    """Return positions along the site's axis and the unit that owns each, both of shape (positions,)."""
    owners = [unit for unit, owned in enumerate(site.index) for _ in owned]
    positions = [position for owned in site.index for position in owned]
    return torch.tensor(positions, dtype=torch.long), torch.tensor(owners, dtype=torch.long)


def power_sums(group: Group, weights: Mapping[str, Tensor], *, order: int) -> Tensor:
    """Return per unit the sum of ``|w| ** order`` over all weights it owns: (units,), float64."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for site, weight in owned_weights(group, weights):
        total += power_sum(site, weight, order=order)
    return total


def power_sum(site: Site, weight: Tensor, *, order: int) -> Tensor:
    """Return per unit the sum of ``|w| ** order`` over its slices of one weight: (units,), float64."""
    others = [axis for axis in range(weight.ndim) if axis != site.axis]
    norm = torch.linalg.vector_norm
    per_position = norm(weight, order, dim=others, dtype=torch.float64) if others else weight.double().abs()
    positions, units = positions_of(site)
    total = torch.zeros(len(site.index), dtype=torch.float64)
    return total.index_add_(0, units, per_position.pow(order)[positions])


def over_mean(values: Tensor | Sequence[float]) -> Tensor:
    """Return values over their mean; unchanged if all are zero."""
    found = torch.as_tensor(values, dtype=torch.float64)
    mean = found.mean()
    return found / mean if mean > 0 else found
