"""Tolerances by dtype: the largest relative error at which two results count as equal."""

from __future__ import annotations

from types import MappingProxyType

import torch

TOLERANCE = MappingProxyType(
    {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2},
)
"""Relative to the part of the output that varies with the input."""

BLIND = 1e-3
"""If less than this share of the output varies with the input, a comparison is inconclusive."""

ROUNDINGS = 16
"""On the real weights, the error accepted as rounding, as a multiple of the effect of one ulp in every weight."""
