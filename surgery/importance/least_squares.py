"""Regularised least squares from sums that are gathered batch by batch.

What is kept of the images is, per group of a contraction, the matrix of second moments of what it reads (a one beside
it for the shift), and those of what it should give; float64, and of a size that does not depend on how many images
there were. They are kept in folds, so that the ridge is chosen by how well weights fitted on the others predict a fold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
"""Of each input's own mean square: what is added to it."""
FOLDS, WIDE, FEW_RIDGES = 4, 1_500, (1e-3, 3e-2, 1.0)
"""Two folds and a few ridges do for layers that read more than `WIDE`: a fold takes memory as the square of that, and
each ridge time as the cube; there one fold is fitted and the other predicted."""
PRECISE = 1_000
"""Products within a batch are float64 for layers that read no more than this, else float32; sums always float64."""
_LEAST = 1e-12


@dataclass(slots=True, eq=False)
class Moments:
    """Sums over rows, one row for each image and position.

    Attributes:
        count: of rows.
        xx: (groups, n + 1, n + 1), of what is read, a one behind it.
        xy: (groups, n + 1, outputs of a group), of it with what is wanted.
        yy: (groups, outputs of a group), squares of what is wanted.
    """

    count: int
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def none(cls, groups: int, inputs: int, outputs: int) -> Moments:
        """Return sums over nothing; `inputs` and `outputs` are those of one group."""
        zeros = [
            torch.zeros(groups, *shape, dtype=torch.float64)
            for shape in ((inputs + 1, inputs + 1), (inputs + 1, outputs), (outputs,))
        ]
        return cls(0, *zeros)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x (rows, groups, n), y (rows, groups, outputs)."""
        read = _rows_last(x, _precision(x), ones=1)
        self.count += len(x)
        self.xx += read @ read.transpose(1, 2)
        self._want(read, y)

    def want(self, x: Tensor, y: Tensor) -> None:
        """Add what is wanted of rows that are counted already."""
        self._want(_rows_last(x, _precision(x), ones=1), y)

    def _want(self, read: Tensor, y: Tensor) -> None:
        wanted = _rows_last(y, read.dtype)
        self.xy += read @ wanted.transpose(1, 2)
        self.yy += wanted.double().square().sum(2)

    def wanting_nothing(self) -> Moments:
        """Return the moments of the same rows without targets; `want` adds other ones."""
        return Moments(self.count, self.xx, torch.zeros_like(self.xy), torch.zeros_like(self.yy))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.xx - other.xx, self.xy - other.xy, self.yy - other.yy)

    def error(self, weight: Tensor) -> Tensor:
        """Mean squared error of weights (groups, n + 1, outputs), per output: (groups, outputs)."""
        squares = (weight * (self.xx @ weight)).sum(1)
        return ((squares - 2 * (weight * self.xy).sum(1) + self.yy) / max(1, self.count)).clamp_min(0)

    def mean(self) -> Tensor:
        """Of what is read: (groups, n)."""
        return self.xx[:, -1, :-1] / self.count

    def wanted_variance(self) -> Tensor:
        """Of what is wanted: (groups, outputs)."""
        return (self.yy / self.count - (self.xy[:, -1] / self.count).square()).clamp_min(0)

    def moments_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of what weights (groups, n, outputs) make of what is read: (groups, outputs) each."""
        mean = (weight * self.mean().unsqueeze(-1)).sum(1)
        squares = (weight * (self.xx[:, :-1, :-1] @ weight)).sum(1) / self.count
        return mean, (squares - mean.square()).clamp_min(0)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.shape[-1] <= PRECISE else torch.float32


def _rows_last(x: Tensor, precision: torch.dtype, *, ones: int = 0) -> Tensor:
    """(rows, groups, n), however it lies in memory → (groups, n + ones, rows)."""
    rows, groups, width = x.shape
    out = x.new_ones(groups, width + ones, rows, dtype=precision)
    out[:, :width] = x.permute(1, 2, 0)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Fitted weights.

    Attributes:
        weight: (groups, n + 1, outputs), the shift last.
        ridge: that was chosen; infinite where the weights stay and only the shift was fitted.
        before: error over what is wanted, of the weights as they were.
        after: likewise of the fitted ones, on rows that they were not fitted on.
    """

    weight: Tensor
    ridge: float
    before: float
    after: float


def folds_for(inputs: int) -> int:
    """Return how many folds to keep for a layer that reads so many values."""
    return FOLDS if inputs <= WIDE else 2


def solve(folds: Sequence[Moments], prior: Tensor, *, shift: bool, ridge: float | None = None) -> Solution:
    """Return the weights that fit best, drawn towards those that were there.

    Minimises ``mean |W x - y|² + ridge * sum_i E[x_i²] |W_i - P_i|²``.

    Args:
        folds: sums over disjoint sets of images.
        prior: (groups, n + 1, outputs), the weights as they were.
        shift: whether the shift may change.
        ridge: that was chosen before; None: it is chosen here.
    """
    whole = sum(folds[1:], folds[0])
    wanted = float(whole.wanted_variance().mean()) or 1.0
    used = [fold for fold in folds if fold.count]
    before, after = float(whole.error(prior).mean()) / wanted, float("nan")
    if ridge is None and len(used) > 1:
        wide = whole.xx.shape[1] > WIDE
        judged = used[:1] if wide else used
        scores = dict.fromkeys((*(FEW_RIDGES if wide else RIDGES), inf), 0.0)
        for fold in judged:
            rest = _Fit(whole - fold, prior, shift=shift)
            for tried in scores:
                scores[tried] += float(fold.error(rest.weight(tried)).mean()) * fold.count
        ridge = min(scores, key=scores.__getitem__)
        after = scores[ridge] / sum(fold.count for fold in judged) / wanted
    ridge = RIDGES[len(RIDGES) // 2] if ridge is None else ridge
    return Solution(_Fit(whole, prior, shift=shift).weight(ridge), ridge, before, after)


class _Fit:
    """Sums that weights are fitted to, for one ridge after the other."""

    def __init__(self, moments: Moments, prior: Tensor, *, shift: bool) -> None:
        self._moments, self._prior, self._shift = moments, prior, shift
        self._residual = moments.xy - moments.xx @ prior

    def weight(self, ridge: float) -> Tensor:
        """Weights for one ridge; of an infinite one only the shift is fitted."""
        moments, residual, change = self._moments, self._residual, torch.zeros_like(self._prior)
        if ridge == inf:
            if self._shift:
                change[:, -1] = residual[:, -1] / max(1, moments.count)
            return self._prior + change
        matrix = moments.xx.clone()
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        scale = diagonal[:, :-1].clone()
        floor = scale.mean(-1, keepdim=True) * 1e-6 + _LEAST
        diagonal[:, :-1] += ridge * scale + floor
        if not self._shift:
            matrix, residual = matrix[:, :-1, :-1], residual[:, :-1]
        else:
            diagonal[:, -1] += _LEAST
        factor = torch.linalg.cholesky(matrix)
        change[:, : matrix.shape[1]] = torch.cholesky_solve(residual, factor)
        return self._prior + change
