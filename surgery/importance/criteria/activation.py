"""Magnitude of weights times that of their inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from surgery.core import Group, Scores
from surgery.importance.elimination import held_out
from surgery.importance.evidence import Evidence, criterion
from surgery.importance.observed_layers import ObservedLayer, consumers_of, observed_on
from surgery.importance.unit_weights import over_mean


@criterion("activation", needs=["images", "graph", "consumers"])
def activation(evidence: Evidence) -> Scores:
    """Sum of the magnitudes of the weights that consume the unit times those of their inputs, over the group's mean.

    Source: after Sun et al. 2023, Wanda (arXiv:2306.11695).
    """
    layers, by_signal = observed_on(evidence, held_out(evidence.images)[0]), evidence.by_signal()
    groups = evidence.coupling.groups
    return {g.name: _scored(g, layers) or tuple(over_mean(by_signal[g.name]).tolist()) for g in groups}


def _scored(group: Group, layers: Mapping[str, ObservedLayer]) -> tuple[float, ...]:
    total, consumers = torch.zeros(group.size, dtype=torch.float64), consumers_of(group, layers)
    for layer, site in consumers:
        each = (layer.weight[:, :-1].abs().sum(-1) * layer.rms).sum(0).reshape(-1, layer.kernel).sum(1)
        total += torch.tensor([float(each[list(owned)].sum()) for owned in site.index], dtype=torch.float64)
    return tuple(over_mean(total).tolist()) if consumers else ()
