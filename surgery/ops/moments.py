"""Mean and variance of activations, estimated from a network's own weights and norm statistics, without images.

The output of a batch norm has its shift as mean and its scale as standard deviation. Moments are propagated assuming
independent positions: through element-wise functions by Gauss-Hermite quadrature, through contractions by weights.
Source: after Nagel et al. 2019 (arXiv:1906.04721), who use clipped normals for rectifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(24)


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Mean and variance of a value in float64, each broadcastable to the value's `shape`."""

    mean: Tensor
    var: Tensor
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, constant: Tensor) -> Moments:
        """Return the moments of a constant."""
        value = constant.detach().cpu().to(torch.float64)
        return cls(value, torch.zeros((), dtype=torch.float64), tuple(value.shape))

    def energies(self, axis: int) -> Tensor:
        """Return mean squares along an axis, averaged over the others."""
        return _over(self.mean.square() + self.var, axis, self.shape)

    @property
    def energy(self) -> float:
        """Sum of the mean squares of a sample's positions."""
        return float((self.mean.square() + self.var).mean()) * prod(self.shape[1:])

    @property
    def variance(self) -> float:
        """Sum of the variances of a sample's positions."""
        return float(self.var.mean()) * prod(self.shape[1:])


def through(function: Callable[[Tensor], Tensor], x: Moments) -> Moments:
    """Return the moments of an element-wise function of a normal variable."""
    mean = x.mean + torch.zeros_like(x.var)
    layout = [-1] + [1] * mean.dim()
    nodes, share = (torch.from_numpy(v).reshape(layout) for v in (_NODES, _WEIGHTS / _WEIGHTS.sum()))
    values = function(mean + x.var.clamp_min(0).sqrt() * nodes)
    first = (share * values).sum(0)
    return Moments(first, (share * (values - first).square()).sum(0))


def contracted(weight: Tensor, bias: Moments | None, x: Moments, axis: int, rank: int) -> Moments:
    """Return the moments of a contraction of one axis of a value, replaced by a new one; `rank`: of the result.

    Weight: (outputs, inputs of its group, positions in space ..); bias: (outputs,), or of length one for all.
    """
    outputs, inside, inputs = weight.shape[0], weight.shape[1], x.shape[axis]
    groups = inputs // inside
    flat = weight.to(torch.float64).reshape(outputs, inside, -1)
    mean, var = (_over(t, axis, x.shape).reshape(groups, 1, inside) for t in (x.mean, x.var))
    sums, squares = (t.reshape(groups, outputs // groups, inside) for t in (flat.sum(2), flat.square().sum(2)))
    shift = 0.0 if bias is None else bias.mean.to(torch.float64).flatten()
    layout = [-1 if a == axis % rank else 1 for a in range(rank)]
    mean, var = (sums * mean).sum(2).flatten() + shift, (squares * var).sum(2).flatten()
    return Moments(mean.reshape(layout), var.reshape(layout))


def _over(values: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """Return values along one axis, averaged over the others."""
    full = values.reshape([1] * (len(shape) - values.dim()) + list(values.shape))
    others = [a for a in range(len(shape)) if a != axis % len(shape)]
    return (full.mean(others) if others else full).expand(shape[axis])


def summed(a: Moments | float, b: Moments | float, scale: float = 1.0) -> Moments:
    """Return the moments of ``a + scale * b``."""
    a, b = _lifted(a), _lifted(b)
    return Moments(a.mean + scale * b.mean, a.var + scale * scale * b.var)


def multiplied(a: Moments | float, b: Moments | float) -> Moments:
    """Return the moments of ``a * b``."""
    a, b = _lifted(a), _lifted(b)
    return Moments(a.mean * b.mean, a.var * b.var + a.var * b.mean.square() + b.var * a.mean.square())


def _lifted(x: Moments | float) -> Moments:
    return x if isinstance(x, Moments) else Moments.of(torch.tensor(float(x)))


def joined(parts: Sequence[Moments], axis: int) -> Moments:
    """Return the moments of values concatenated along an axis."""
    shapes = [part.shape for part in parts]
    axis %= len(shapes[0])

    def laid(pieces: Sequence[Tensor]) -> Tensor:
        full = [p.reshape([1] * (len(s) - p.dim()) + list(p.shape)) for p, s in zip(pieces, shapes, strict=True)]
        others = np.broadcast_shapes(*(f.select(axis, 0).shape for f in full))
        sizes = [[*others[:axis], s[axis], *others[axis:]] for s in shapes]
        return torch.cat([f.expand(size) for f, size in zip(full, sizes, strict=True)], axis)

    return Moments(laid([p.mean for p in parts]), laid([p.var for p in parts]))


def compressed(values: Tensor) -> Tensor:
    """Shrink axes along which values are constant to length 1."""
    for axis in range(values.dim()):
        first = values.narrow(axis, 0, 1) if values.shape[axis] > 1 else values
        if first is not values and torch.equal(first.expand_as(values), values):
            values = first
    return values.contiguous()


MomentRule = Callable[[Mapping[str, Any]], Moments]
"""Arguments by name, tensors as moments → moments of the result, with `shape` not set."""
