"""Differences between a network's outputs and those of the dense network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

Batches = Sequence[Sequence[Tensor]]


def first(batches: Batches, most: int | None) -> Batches:
    """Return the first batches with at most this many images in total, but at least one batch."""
    ends = accumulate(len(batch[0]) for batch in batches)
    return [
        batch for k, (batch, end) in enumerate(zip(batches, ends, strict=True)) if not k or most is None or end <= most
    ]


def squared_errors(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the sum of squared differences of each output: (outputs,)."""
    each = [(a.double() - b.double()).square().sum() for a, b in zip(outputs, wanted, strict=True)]
    return torch.stack(each) if each else torch.zeros(0, dtype=torch.float64)


def variations(outputs: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the sum of squared deviations of each output from its mean over images: (outputs,).

    For a constant output, or a single image, it is the sum of squares.

    Args:
        outputs: outputs of each batch.
    """
    found = []
    for batches in zip(*outputs, strict=True):
        rows = torch.cat([x.double().reshape(len(x) if x.dim() else 1, -1) for x in batches])
        squares, deviations = rows.square().sum(), (rows - rows.mean(0)).square().sum()
        found.append((deviations if deviations > 1e-9 * squares else squares).clamp_min(1e-30))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)
