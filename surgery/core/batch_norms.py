"""Statistics of what reaches the batch norms of a model, and a copy of the model with well-conditioned values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.core.conditioning import conditioned


class NormInput(NamedTuple):
    """A norm's running statistics, and those of its input: mean and mean square over `rows`, by channel."""

    running_mean: Tensor
    running_var: Tensor
    rows: int
    mean: Tensor
    square: Tensor

    @property
    def variance(self) -> Tensor:
        """The input's variance."""
        return (self.square - self.mean.square()).clamp_min(0)


class BatchStatistics(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Norms use batch statistics, as in training; those of all batches together are accumulated in `found`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, NormInput] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        if func is not torch.ops.aten.native_batch_norm.default:
            return func(*args, **(kwargs or {}))
        x, weight, bias, running_mean, running_var, _, momentum, eps = args
        if running_mean is not None:
            rows, before = x.double().movedim(1, 0).flatten(1), self.found.get(id(running_mean))
            count, mean, square = rows.shape[1], rows.mean(1), rows.square().mean(1)
            if before is not None:
                count += before.rows
                share = rows.shape[1] / count
                mean, square = before.mean.lerp(mean, share), before.square.lerp(square, share)
            self.found[id(running_mean)] = NormInput(running_mean, running_var, count, mean, square)
        return func(x, weight, bias, None, None, True, momentum, eps)


def conditioned_copy(model: nn.Module, run: Callable[[nn.Module], object] | None = None, seed: int = 0) -> nn.Module:
    """Return a deep copy whose parameters and norm statistics are random, distinct and of ordinary size.

    Fresh networks often have a zero head or layer scales of 1e-6, so that errors are not detected. `run` calls the
    model on inputs, from which batch norms take their statistics; other buffers (index tables, anchors) are unchanged.
    """
    made, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    statistics = [(n, b) for n, b in made.named_buffers() if n.endswith(("running_mean", "running_var"))]
    with torch.no_grad():
        for name, tensor in (*made.named_parameters(), *statistics):
            if tensor.is_floating_point() and tensor.numel():
                tensor.copy_(conditioned(name, tensor, generator))
        if run is not None:
            with _Settling():
                run(made)
    return made


class _Settling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Norms take the statistics of their input, varied by their own values, before they use them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        if func is torch.ops.aten.native_batch_norm.default and args[3] is not None:
            x, (mean, variance) = args[0], args[3:5]
            shift, scale = self._own.setdefault(id(mean), (mean.clone(), variance.clone()))
            found, centre = torch.var_mean(x, [a for a in range(x.dim()) if a != 1], correction=0)
            mean.copy_(centre + 0.1 * found.sqrt() * shift)
            variance.copy_(found * scale + 0.1 * found.mean() + 1e-6)  # channels of small variance get more
        return func(*args, **(kwargs or {}))
