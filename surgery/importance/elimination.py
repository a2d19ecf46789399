"""Elimination order of a group's units, with the weights of their consumers refitted after each removal.

Source: block optimal brain surgeon after Hassibi and Stork 1993 and Frantar and Alistarh 2022 (arXiv:2208.11580), with
units as blocks and all consumers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.core import Group
from surgery.importance.evidence import Evidence
from surgery.importance.observed_layers import Batches, ObservedLayer, consumers_of, observed_on

RIDGE = 1e-3
STEPS = 96
"""Units of a group are removed one by one, or in at most this many steps."""
MEASURED_SHARES = (0.25, 0.5, 0.75)
"""Fractions of each group at which refitted weights are kept to measure the outputs."""
HELD_OUT_EVERY = 4
"""Every fourth batch is held out, since weights fitted to few images overfit."""


@dataclass(frozen=True, slots=True)
class Elimination:
    """The order in which a group's units are removed, and the loss of each.

    Attributes:
        units: all units in order; the last is never removed.
        losses: loss of each unit after those before it, in that order.
        weights: number of removed units → refitted weights of each consumer, of the shape of `ObservedLayer.weight`;
        empty if no observed layer consumes the group.
    """

    units: tuple[int, ...]
    losses: tuple[float, ...]
    weights: Mapping[int, tuple[Tensor, ...]]

    def scores(self, losses: Sequence[float]) -> tuple[float, ...]:
        """Return the losses by unit, made non-decreasing along the order."""
        out, least = [0.0] * len(self.units), 0.0
        for unit, value in zip(self.units, losses, strict=True):
            out[unit] = least = max(least, value)
        return tuple(out)


def held_out(batches: Batches) -> tuple[Batches, Batches]:
    """Return the batches to fit on and to measure on; identical if there are too few."""
    last = HELD_OUT_EVERY - 1
    aside = [batch for k, batch in enumerate(batches) if k % HELD_OUT_EVERY == last]
    fitted = [batch for k, batch in enumerate(batches) if k % HELD_OUT_EVERY < last]
    return (fitted, aside) if aside else (batches, batches)


def eliminations(evidence: Evidence) -> tuple[dict[str, Elimination], dict[str, ObservedLayer]]:
    """Return group name → elimination, and the observed layers by weight name.

    Groups without an observed consumer are ranked by `signal`.
    """
    layers, by_signal = observed_on(evidence, held_out(evidence.images)[0]), evidence.by_signal()
    groups = evidence.coupling.groups
    return {g.name: _eliminated(g, layers) or _ranked(g, by_signal[g.name]) for g in groups}, layers


def measured_counts(size: int) -> list[int]:
    """Return the numbers of removed units, for a group of this size, at which refitted weights are kept."""
    return sorted({min(size - 1, max(1, round(share * size))) for share in MEASURED_SHARES} - {0})


def _ranked(group: Group, scores: Sequence[float]) -> Elimination:
    units = tuple(sorted(range(group.size), key=lambda unit: scores[unit]))
    whole = sum(scores) or 1.0
    return Elimination(units, tuple(scores[unit] / whole for unit in units), {})


def _eliminated(group: Group, layers: Mapping[str, ObservedLayer]) -> Elimination | None:
    consumers = [_Consumer(layer, site.index) for layer, site in consumers_of(group, layers)]
    if not consumers:
        return None
    counts = iter(measured_counts(group.size))
    count = next(counts, 0)
    units: list[int] = []
    losses: list[float] = []
    weights: dict[int, tuple[Tensor, ...]] = {}
    step = max(1, group.size // STEPS)
    while len(units) < group.size - 1:
        each = torch.stack([consumer.losses() for consumer in consumers]).sum(0)
        each[units] = float("inf")
        most = min(step, group.size - 1 - len(units), count - len(units) if count else step)
        removed = each.argsort(stable=True)[:most].tolist()
        units += removed
        losses += [float(each[unit]) for unit in removed]
        for consumer in consumers:
            consumer.remove(removed)
        if len(units) == count:
            weights[count] = tuple(consumer.weight.clone() for consumer in consumers)
            count = next(counts, 0)
    units += sorted(set(range(group.size)) - set(units))
    losses.append(2 * losses[-1] if losses else 1.0)
    return Elimination(tuple(units), tuple(losses), weights)


class _Consumer:
    """A consumer of a group while units are removed: the inverse of its second moments, and its refitted weights."""

    def __init__(self, layer: ObservedLayer, owned: Sequence[Sequence[int]]) -> None:
        matrix = layer.moments.xx / layer.moments.count
        scale = matrix.diagonal(dim1=1, dim2=2)[:, :-1]
        scale += RIDGE * scale + 1e-6 * scale.mean(-1, keepdim=True) + 1e-12
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        self.weight, self._error_weight = layer.weight.clone(), layer.error_weight
        longest = max(map(len, owned)) * layer.kernel
        self._index = torch.zeros(len(owned), longest, dtype=torch.long)
        self._mask = torch.zeros(len(owned), longest, dtype=torch.bool)
        for unit, positions in enumerate(owned):
            at = [p * layer.kernel + j for p in positions for j in range(layer.kernel)]
            self._index[unit, : len(at)] = torch.tensor(at)
            self._mask[unit, : len(at)] = True

    def losses(self) -> Tensor:
        """Return (units,): the loss of each unit if it is removed next."""
        total = torch.zeros(len(self._index), dtype=torch.float64)
        if self._index.shape[1] == 1:  # blocks of one
            at = self._index[:, 0]
            for inverse, weight in zip(self._inverse, self.weight, strict=True):
                total += weight[at].square().sum(1) / inverse.diagonal()[at]
            return total * self._error_weight
        both = self._mask[:, :, None] & self._mask[:, None, :]
        eye = torch.eye(self._index.shape[1], dtype=torch.float64)
        for inverse, weight in zip(self._inverse, self.weight, strict=True):
            block = torch.where(both, inverse[self._index[:, :, None], self._index[:, None, :]], eye)
            own = weight[self._index] * self._mask.unsqueeze(-1)
            total += (own * torch.linalg.solve(block, own)).sum((1, 2))
        return total * self._error_weight

    def remove(self, units: Sequence[int]) -> None:
        at = torch.cat([self._index[u][self._mask[u]] for u in units])
        for inverse, weight in zip(self._inverse, self.weight, strict=True):
            columns = inverse[:, at]
            block = columns[at]
            weight -= columns @ torch.linalg.solve(block, weight[at])
            inverse -= columns @ torch.linalg.solve(block, columns.T)
            weight[at] = 0.0
            inverse[at], inverse[:, at] = 0.0, 0.0
            inverse[at, at] = 1.0
