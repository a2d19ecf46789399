"""Magnitude of weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from surgery.core import Group
from surgery.importance.evidence import criterion
from surgery.importance.unit_weights import over_mean, power_sums


@criterion("l1")
def l1(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of the magnitudes of all weights the unit owns, over the group's mean."""
    return over_mean(power_sums(group, weights, order=1))
