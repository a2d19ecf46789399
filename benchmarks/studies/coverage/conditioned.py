"""Weights for judging cuts by numbers: distinct values that let the signal through, whatever a library starts from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def condition(model: nn.Module, inputs: tuple[object, ...], *, seed: int = 0) -> nn.Module:
    """Give every parameter and every norm statistic distinct float64 values, in place, and return the model.

    Matrices and kernels are normal with variance 2 / fan-in, scales uniform in [0.5, 1.5], shifts small. The statistics
    of batch norms are then taken from the random inputs themselves, so that the signal neither dies nor explodes. Give
    several: the variance of one alone over a small feature map is that of no other, and rounding is blown up with it.
    """
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or "running_" in name):
                tensor.copy_(_values(name, tensor, generator))
    _settle(model, inputs)
    return model.eval()


def _values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    leaf = name.rpartition(".")[2]
    normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if leaf == "running_mean" or "bias" in leaf:
        return 0.1 * normal
    if tensor.dim() >= 2 and max(tensor.shape) != tensor.numel():
        return normal * math.sqrt(2.0 / max(1, math.prod(tensor.shape[1:])))
    return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5


def _settle(model: nn.Module, inputs: tuple[object, ...]) -> None:
    """Let every batch norm take its statistics from what reaches it, in one run."""

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        if x.dim() < 2 or x.numel() == x.shape[1]:
            return
        axes = [a for a in range(x.dim()) if a != 1]
        module.running_mean.copy_(x.mean(axes))  # type: ignore[operator]
        var = x.var(axes, unbiased=False)
        module.running_var.copy_(var + 0.1 * var.mean() + 1e-3)  # type: ignore[operator]

    norms = [m for m in model.modules() if getattr(m, "running_mean", None) is not None]
    handles = [norm.register_forward_pre_hook(before) for norm in norms]
    with torch.no_grad():
        model.eval()(*inputs)
    for handle in handles:
        handle.remove()
