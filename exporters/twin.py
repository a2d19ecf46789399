"""A copy of a network with values on which a comparison can see something.

Freshly initialised networks often have a head of zeros or layer scales of 1e-6: their output hardly depends on the
input, and a wrong program agrees with a right one. The twin runs the same program on distinct values of ordinary size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def well_conditioned(
    model: torch.nn.Module, *, seed: int = 0, run: Callable[[torch.nn.Module], object] | None = None
) -> torch.nn.Module:
    """Return a deep copy whose parameters and norm statistics are random, distinct and of ordinary size.

    Weights have the variance that keeps signals in scale through ReLU (He et al. 2015, arXiv:1502.01852), per-channel
    scales and variances lie in [0.5, 1.5], biases and means are normal with deviation 0.1. Buffers that are not norm
    statistics (tables of indices, anchors) stay, and so does everything that is not floating point. Batch norms then
    take the statistics of what `run` brings to them, so that no signal dies or explodes on a long way.

    Args:
        model: left unchanged.
        seed: the same seed gives the same values.
        run: calls the model on inputs like those that it will be compared on.
    """
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _changeable(twin):
            tensor.copy_(_values(name, tensor.shape, generator))
        if run is not None:
            with _Settling():
                run(twin)
    return twin


_BATCH_NORMS: Mapping[Any, tuple[str, ...]] = MappingProxyType(
    {
        torch.nn.functional.batch_norm: ("input", "running_mean", "running_var"),
        torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var"),
        torch.ops.aten.batch_norm.default: ("input", "weight", "bias", "running_mean", "running_var"),
    }
)
"""What their positional arguments are called."""


class _Settling(TorchFunctionMode):
    """Batch norms keep the statistics of what reaches them, channels of small variance those of an ordinary one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(_BATCH_NORMS.get(func, ()), args, strict=False)) | (kwargs or {})
        x, mean, variance = (given.get(name) for name in ("input", "running_mean", "running_var"))
        if x is not None and mean is not None and variance is not None:
            axes = [a for a in range(x.dim()) if a != 1]
            mean.copy_(x.mean(axes))
            spread = x.var(axes, correction=0)
            variance.copy_(spread + 0.1 * spread.mean() + 1e-6)
        return func(*args, **(kwargs or {}))


def _changeable(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    statistics = ((n, b) for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var")))
    for source in (model.named_parameters(), statistics):
        for name, tensor in source:
            if tensor.is_floating_point() and tensor.numel():
                yield name, tensor


def _values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    last = name.rpartition(".")[2]
    if max(shape, default=1) < shape.numel():  # a matrix or a kernel, rather than one value per channel
        fan_in = shape.numel() // shape[0]
        gain = math.sqrt(2.0 / fan_in)
        return gain * torch.randn(shape, generator=generator)
    if "bias" in last or "mean" in last:
        return 0.1 * torch.randn(shape, generator=generator)
    return 0.5 + torch.rand(shape, generator=generator)
