"""Small networks around one operator to test its rule, with prunable layers before and after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...]]


class Around(nn.Module):
    """Layers on one input → the operator under test, on one value per layer → last layer."""

    def __init__(self, middle: Callable[..., Tensor], after: nn.Module, *before: nn.Module) -> None:
        super().__init__()
        self.before, self.middle, self.after = nn.ModuleList(before), middle, after

    def forward(self, x: Tensor) -> Any:
        """Run all layers of the first kind, the operator, the last layer."""
        return self.after(self.middle(*(layer(x) for layer in self.before)))


class WithParameters(nn.Module):
    """A function of an input and of parameters of the given shapes, drawn from [0.5, 1.5]."""

    def __init__(self, function: Callable[..., Tensor], *shapes: int | tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList(torch.rand(shape) + 0.5 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.function(x, *self.tensors)


def between_convs(middle: Callable[..., Tensor], *, after: int = 8, operands: int = 1) -> Callable[[], Built]:
    """A convolution to 8 channels for each operand of the operator, the operator, a convolution from `after`."""

    def build() -> Built:
        before = (nn.Conv2d(3, 8, 3) for _ in range(operands))
        return Around(middle, nn.Conv2d(after, 4, 3), *before), (torch.randn(2, 3, 12, 12),)

    return build


def between_linears(middle: Callable[..., Tensor], *, after: int = 12, operands: int = 1) -> Callable[[], Built]:
    """A linear layer to 12 features over 6 tokens for each operand, the operator, a linear layer from `after`."""

    def build() -> Built:
        before = (nn.Linear(7, 12) for _ in range(operands))
        return Around(middle, nn.Linear(after, 5), *before), (torch.randn(2, 6, 7),)

    return build


fork_convs = partial(between_convs, operands=2)
fork_linears = partial(between_linears, operands=2)
