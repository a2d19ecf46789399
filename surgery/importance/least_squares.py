"""Regularised least squares from sums accumulated batch by batch.

For each group of a contraction, the second moments of its inputs (with a one appended for the shift) and of its targets
are accumulated in float64, in folds of images, by which the ridge is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)  # candidate ridges, relative to each input's mean square
FOLDS, WIDE, FEW_RIDGES = 4, 1_500, (1e-3, 3e-2, 1.0)
"""Layers with more than `WIDE` inputs use two folds (one to fit, one to predict) and few ridges: memory per fold grows
quadratically and time per ridge cubically."""
PRECISE = 1_000  # up to this many inputs, products within a batch are float64, else float32; sums are always float64
_LEAST = 1e-12


@dataclass(slots=True, eq=False)
class Moments:
    """Sums over rows, one row for each image and position."""

    count: int  # number of rows
    xx: Tensor  # (groups, n + 1, n + 1), inputs with a one appended
    xy: Tensor  # (groups, n + 1, outputs of a group), inputs times targets
    yy: Tensor  # (groups, outputs of a group), squared targets

    @classmethod
    def none(cls, groups: int, inputs: int, outputs: int) -> Moments:
        """Return zero sums; `inputs` and `outputs` are counts per group."""
        shapes = (inputs + 1, inputs + 1), (inputs + 1, outputs), (outputs,)
        return cls(0, *(torch.zeros(groups, *shape, dtype=torch.float64) for shape in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x (rows, groups, n), y (rows, groups, outputs)."""
        read = _rows_last(x, _precision(x), ones=1)
        self.count += len(x)
        self.xx += read @ read.transpose(1, 2)
        self._want(read, y)

    def want(self, x: Tensor, y: Tensor) -> None:
        """Add targets of rows that are already counted."""
        self._want(_rows_last(x, _precision(x), ones=1), y)

    def _want(self, read: Tensor, y: Tensor) -> None:
        wanted = _rows_last(y, read.dtype)
        self.xy += read @ wanted.transpose(1, 2)
        self.yy += wanted.double().square().sum(2)

    def wanting_nothing(self) -> Moments:
        """Return the moments of the same rows without targets; `want` adds new ones."""
        return Moments(self.count, self.xx, torch.zeros_like(self.xy), torch.zeros_like(self.yy))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.xx - other.xx, self.xy - other.xy, self.yy - other.yy)

    def error(self, weight: Tensor) -> Tensor:
        """Return the mean squared error of weights (groups, n + 1, outputs), per output: (groups, outputs)."""
        squares = (weight * (self.xx @ weight)).sum(1)
        return ((squares - 2 * (weight * self.xy).sum(1) + self.yy) / max(1, self.count)).clamp_min(0)

    def wanted_variance(self) -> Tensor:
        """Variance of the targets: (groups, outputs)."""
        return (self.yy / self.count - (self.xy[:, -1] / self.count).square()).clamp_min(0)

    def moments_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the outputs for weights (groups, n, outputs): (groups, outputs) each."""
        mean = (weight * (self.xx[:, -1, :-1] / self.count).unsqueeze(-1)).sum(1)
        squares = (weight * (self.xx[:, :-1, :-1] @ weight)).sum(1) / self.count
        return mean, (squares - mean.square()).clamp_min(0)


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.shape[-1] <= PRECISE else torch.float32


def _rows_last(x: Tensor, precision: torch.dtype, *, ones: int = 0) -> Tensor:
    """(rows, groups, n), in any memory layout → (groups, n + ones, rows)."""
    rows, groups, width = x.shape
    out = x.new_ones(groups, width + ones, rows, dtype=precision)
    out[:, :width] = x.permute(1, 2, 0)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """Fitted weights, with relative errors of the prior weights and, on held-out rows, of the fitted ones."""

    weight: Tensor  # (groups, n + 1, outputs), the shift last
    ridge: float  # infinite if only the shift was fitted
    before: float
    after: float


def folds_for(inputs: int) -> int:
    """Return the number of folds for a layer with this many inputs."""
    return FOLDS if inputs <= WIDE else 2


def solve(folds: Sequence[Moments], prior: Tensor, *, shift: bool, ridge: float | None = None) -> Solution:
    """Return the least-squares weights, regularised towards the prior ones.

    Minimises ``mean |W x - y|² + ridge * sum_i E[x_i²] |W_i - P_i|²``. `folds` are sums over disjoint sets of images,
    `prior` is (groups, n + 1, outputs), and `shift` says whether the shift may change. Without a ridge, one is chosen.
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
            rest = whole - fold
            residual = rest.xy - rest.xx @ prior
            for tried in scores:
                scores[tried] += float(fold.error(_fitted(rest, residual, prior, tried, shift)).mean()) * fold.count
        ridge = min(scores, key=scores.__getitem__)
        after = scores[ridge] / sum(fold.count for fold in judged) / wanted
    ridge = RIDGES[len(RIDGES) // 2] if ridge is None else ridge
    return Solution(_fitted(whole, whole.xy - whole.xx @ prior, prior, ridge, shift), ridge, before, after)


def _fitted(moments: Moments, residual: Tensor, prior: Tensor, ridge: float, shift: bool) -> Tensor:
    """Return the weights for one ridge; if infinite, only the shift is fitted."""
    change = torch.zeros_like(prior)
    if ridge == inf:
        if shift:
            change[:, -1] = residual[:, -1] / max(1, moments.count)
        return prior + change
    matrix = moments.xx.clone()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    scale = diagonal[:, :-1].clone()
    diagonal[:, :-1] += ridge * scale + (scale.mean(-1, keepdim=True) * 1e-6 + _LEAST)
    if shift:
        diagonal[:, -1] += _LEAST
    else:
        matrix, residual = matrix[:, :-1, :-1], residual[:, :-1]
    change[:, : matrix.shape[1]] = torch.cholesky_solve(residual, torch.linalg.cholesky(matrix))
    return prior + change
