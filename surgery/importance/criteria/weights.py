"""Criteria from the weights that a unit owns: slices of its producers, norms and consumers.

Biases (which shift an output by a constant) and statistics such as `running_mean` are excluded. Scores are divided by
their group's mean to make layers comparable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from surgery.core import Group, Scores, Site
from surgery.importance.scoring import Evidence, criterion
from surgery.importance.signal import positions_of, power_sum

_TINY = torch.finfo(torch.float64).tiny


def _owned_weights(group: Group, weights: Mapping[str, Tensor]) -> Iterator[tuple[Site, Tensor]]:
    """Yield the sites of a group that are slices of weights, each with its tensor."""
    for site in group.sites:
        last = site.tensor.rpartition(".")[2]
        if site.tensor in weights and not last.endswith("bias") and last != "beta":
            yield site, weights[site.tensor]


def _power_sums(group: Group, weights: Mapping[str, Tensor], *, order: int) -> Tensor:
    """Return per unit the sum of ``|w| ** order`` over all weights it owns: (units,), float64."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for site, weight in _owned_weights(group, weights):
        total += power_sum(site, weight, order=order)
    return total


def over_mean(values: Tensor | Sequence[float]) -> Tensor:
    """Return values over their mean; unchanged if all are zero."""
    found = torch.as_tensor(values, dtype=torch.float64)
    mean = found.mean()
    return found / mean if mean > 0 else found


@criterion("l1")
def l1(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of the magnitudes of all weights the unit owns, over the group's mean."""
    return over_mean(_power_sums(group, weights, order=1))


@criterion("l2")
def l2(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm of all weights the unit owns, over the group's mean."""
    return over_mean(_power_sums(group, weights, order=2).sqrt())


@criterion("lamp")
def lamp(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Squared norm of the unit over the sum of squared norms of all units of the group that are no smaller.

    Source: Lee et al. 2020, Layer-adaptive sparsity (arXiv:2010.07611), with units instead of single weights.
    """
    squares = _power_sums(group, weights, order=2)
    ranked, order = torch.sort(squares, stable=True)
    survivors = ranked.flip(0).cumsum(0).flip(0)  # at each rank: sum of the remaining units, including this one
    shares = torch.where(survivors > 0, ranked / survivors.clamp_min(_TINY), 0.0)
    return torch.empty_like(squares).index_copy_(0, order, shares)


@criterion("bn-gamma")
def bn_gamma(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of the magnitudes of the batch-norm scales the unit passes, over the group's mean.

    Groups with units that pass no batch norm are scored by `l1`.
    Source: Liu et al. 2017, Network Slimming (arXiv:1708.06519).
    """
    total, passed = torch.zeros(group.size, dtype=torch.float64), torch.zeros(group.size, dtype=torch.bool)
    cut = {site.tensor for site in group.sites}
    for site, weight in _owned_weights(group, weights):
        module, _, last = site.tensor.rpartition(".")
        # A norm with running statistics has them cut along with its scale.
        if last == "weight" and f"{module}.running_var".lstrip(".") in cut:
            positions, units = positions_of(site)
            total.index_add_(0, units, weight.double().abs()[positions])
            passed[units] = True
    return over_mean(total) if passed.all() else l1(group, weights)


@criterion("fpgm")
def fpgm(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of the distances to the other units' weights, over the group's mean: low near the geometric median.

    Source: He et al. 2019, Filter pruning via geometric median (arXiv:1811.00250), over all weights the unit owns.
    """
    squared = torch.zeros(group.size, group.size, dtype=torch.float64)
    for site, weight in _owned_weights(group, weights):
        slices = weight.double().movedim(site.axis, 0).flatten(1) if weight.ndim > 1 else weight.double()[:, None]
        widest = max(len(owned) for owned in site.index)
        rows = torch.zeros(len(site.index), widest, slices.shape[1], dtype=torch.float64)  # short ones end in zeros
        positions, units = positions_of(site)
        ranks = torch.tensor([rank for owned in site.index for rank in range(len(owned))], dtype=torch.long)
        rows[units, ranks] = slices[positions]
        flat = rows.flatten(1)  # (units, weights of a unit)
        flat = flat - flat.mean(0)  # reduces rounding, and leaves distances unchanged
        gram = flat @ flat.T
        norms = gram.diagonal()
        squared += norms[:, None] + norms[None, :] - 2 * gram
    return over_mean(squared.clamp_min(0).fill_diagonal_(0).sqrt().sum(1))


@criterion("random", needs=["seed"])
def uniform_random(group: Group, weights: Mapping[str, Tensor], *, seed: int) -> Sequence[float]:
    """Uniform on [0, 1), for comparison; depends only on the seed and the group name."""
    digest = hashlib.sha256(f"{seed}:{group.name}".encode()).digest()
    return [float(value) for value in np.random.default_rng(int.from_bytes(digest, "big")).random(group.size)]


def energy_shares(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the unit's share of the energy of the weights that consume it, summed over all consumers."""
    owned = list(_owned_weights(group, weights))
    total = torch.zeros(group.size, dtype=torch.float64)
    for site, weight in [(site, weight) for site, weight in owned if site.axis == 1] or owned:
        total += power_sum(site, weight, order=2) / weight.double().square().sum().clamp_min(_TINY)
    return total


@criterion("signal", needs=["consumers"], head_members=energy_shares)
def signal(evidence: Evidence) -> Scores:
    """Energy shares in the layers that consume the unit, each weighted by its output relevance."""
    return evidence.by_signal()
