"""Small networks around one operator to test its rule, with prunable layers before and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...]]


class Between(nn.Module):
    """first layer → the operator under test → last layer."""

    def __init__(self, before: nn.Module, middle: Callable[[Tensor], Tensor], after: nn.Module) -> None:
        super().__init__()
        self.before, self.middle, self.after = before, middle, after

    def forward(self, x: Tensor) -> Any:
        """Run the three in a row."""
        return self.after(self.middle(self.before(x)))


class Fork(nn.Module):
    """Two layers on one input, joined by the operator under test, and a layer after it."""

    def __init__(self, left: nn.Module, right: nn.Module, join: Callable[[Tensor, Tensor], Tensor], after: nn.Module):
        super().__init__()
        self.left, self.right, self.after, self.join = left, right, after, join

    def forward(self, x: Tensor) -> Any:
        """Run both branches, join them, run the last layer."""
        return self.after(self.join(self.left(x), self.right(x)))


class WithParameters(nn.Module):
    """A function of an input and of parameters of the given shapes, drawn from [0.5, 1.5]."""

    def __init__(self, function: Callable[..., Tensor], *shapes: int | tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList(torch.rand(shape) + 0.5 for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.function(x, *self.tensors)


def between_convs(middle: Callable[[Tensor], Tensor], *, after: int = 0) -> Callable[[], Built]:
    """A convolution to 8 channels, the operator, a convolution from `after` or 8 channels."""
    return lambda: (Between(nn.Conv2d(3, 8, 3), middle, nn.Conv2d(after or 8, 4, 3)), (torch.randn(2, 3, 12, 12),))


def between_linears(middle: Callable[[Tensor], Tensor], *, after: int = 0) -> Callable[[], Built]:
    """A linear layer to 12 features over 6 tokens, the operator, a linear layer from `after` or 12."""
    return lambda: (Between(nn.Linear(7, 12), middle, nn.Linear(after or 12, 5)), (torch.randn(2, 6, 7),))


def fork_convs(join: Callable[[Tensor, Tensor], Tensor], *, after: int = 8) -> Callable[[], Built]:
    """Two convolutions to 8 channels each, joined."""

    def build() -> Built:
        return Fork(nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), join, nn.Conv2d(after, 4, 3)), (torch.randn(2, 3, 12, 12),)

    return build


def fork_linears(join: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Built]:
    """Two linear layers to 12 features each, joined."""
    return lambda: (Fork(nn.Linear(7, 12), nn.Linear(7, 12), join, nn.Linear(12, 5)), (torch.randn(2, 6, 7),))
