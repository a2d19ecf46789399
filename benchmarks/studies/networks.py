"""Networks of the studies that no library defines: the CIFAR residual networks of He et al. 2016, section 4.2.

`FILE.py:CALLABLE` of the command line reads this file as it stands::

    surgery shrink benchmarks/studies/networks.py:resnet20 --weights resnet20.pt --input-shape 1,3,32,32
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXAMPLE_SHAPE = (1, 3, 32, 32)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of the paper).

    Where the block halves the resolution, the shortcut takes every other pixel and pads the channels with zeros on both
    sides, (N, C, H, W) → (N, 2C, H/2, W/2).
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.padding = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual + shortcut)."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(residual + x)


class CifarResNet(nn.Module):
    """6n + 2 layers in three stages of 16, 32 and 64 channels; parameter names as in pytorch_resnet_cifar10."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, 3, 32, 32) → (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Chain(nn.Module):
    """A chain of equal blocks: only the size of the graph grows."""

    def __init__(self, blocks: int, channels: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.blocks = _stage(channels, channels, blocks, stride=1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, 3, H, W) → (N, num_classes)."""
        x = self.blocks(self.conv1(x))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _stage(channels_in: int, channels_out: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = Block(channels_in, channels_out, stride)
    return nn.Sequential(first, *(Block(channels_out, channels_out, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10) -> tuple[nn.Module, Tensor]:
    """Return ResNet-20 with random weights, and an example input."""
    return CifarResNet(3, num_classes), torch.zeros(EXAMPLE_SHAPE)


def resnet56(num_classes: int = 10) -> tuple[nn.Module, Tensor]:
    """Return ResNet-56 with random weights, and an example input."""
    return CifarResNet(9, num_classes), torch.zeros(EXAMPLE_SHAPE)


class ProjectedBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where sizes differ (option B of the paper)."""

    def __init__(self, widths: tuple[int, int, int], stride: int, *, projected: bool) -> None:
        super().__init__()
        channels_in, inner, channels_out = widths
        self.conv1 = nn.Conv2d(channels_in, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
        self.downsample = nn.Sequential(*((shortcut, nn.BatchNorm2d(channels_out)) if projected else ()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class ProjectedResNet(nn.Module):
    """Three stages of `ProjectedBlock`, with the depth and channel counts of a state dict."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        width = state["conv1.weight"].shape[0]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3 = (_projected_stage(state, stage) for stage in (1, 2, 3))
        self.fc = nn.Linear(state["fc.weight"].shape[1], state["fc.weight"].shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, 3, 32, 32) → (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def _projected_stage(state: Mapping[str, Tensor], stage: int) -> nn.Sequential:
    count = len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")})
    strides = [2 if stage > 1 and k == 0 else 1 for k in range(count)]
    return nn.Sequential(*(_projected(state, f"layer{stage}.{k}", stride) for k, stride in enumerate(strides)))


def _projected(state: Mapping[str, Tensor], name: str, stride: int) -> ProjectedBlock:
    first, second = state[f"{name}.conv1.weight"], state[f"{name}.conv2.weight"]
    widths = first.shape[1], first.shape[0], second.shape[0]
    return ProjectedBlock(widths, stride, projected=f"{name}.downsample.0.weight" in state)


def projected_resnet(state: Mapping[str, Tensor]) -> nn.Module:
    """Return the residual network that a state dict belongs to, with its weights."""
    model = ProjectedResNet(state)
    model.load_state_dict(dict(state))
    return model
