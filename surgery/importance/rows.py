"""Inputs of a contraction as rows: one per image and position, in the order of its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """Kernel size, stride, padding and dilation of a convolution, one number per spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any], weight: Tensor) -> Window:
        """Return the window of a convolution's arguments."""
        rank = weight.dim() - 2
        kernel = tuple(weight.shape[2:])
        stride, dilation = (_each(raw[name], rank) for name in ("stride", "dilation"))
        padding = raw["padding"]
        if isinstance(padding, str):
            whole = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            return cls(kernel, stride, tuple((w // 2, w - w // 2) for w in whole), dilation)
        return cls(kernel, stride, tuple((p, p) for p in _each(padding, rank)), dilation)

    def positions(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the number of positions along each spatial axis for an input of these sizes."""
        axes = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + sum(pad) - d * (k - 1) - 1) // s + 1 for size, k, s, pad, d in axes)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return numbers * rank if len(numbers) == 1 else numbers


def drawn(positions: Sequence[int], most: int, generator: torch.Generator) -> tuple[Tensor, ...] | None:
    """Draw at most this many random positions, as one index per axis; None for all."""
    total = prod(positions)
    if total <= most:
        return None
    flat = torch.randperm(total, generator=generator)[:most].sort().values
    return torch.unravel_index(flat, tuple(positions))


def convolution_rows(x: Tensor, window: Window, groups: int, at: tuple[Tensor, ...] | None) -> Tensor:
    """Return (rows, groups, C / groups * prod(kernel)): what each position reads, of those drawn.

    Only these inputs are accessed; no padded copy of the image is made.
    """
    images, channels, *sizes = x.shape
    places = at if at is not None else _everywhere(window.positions(sizes))
    flat, inside = _read(places, window, sizes)
    count, taps = flat.shape
    planes = x.reshape(images, channels, -1)
    seen = planes.gather(2, flat.reshape(-1).expand(images, channels, -1))
    seen = seen.reshape(images, groups, channels // groups, count, taps)
    seen = seen if bool(inside.all()) else seen.masked_fill(~inside, 0.0)
    return seen.permute(1, 0, 3, 2, 4).reshape(groups, images * count, -1).transpose(0, 1)


def _everywhere(counts: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.unravel_index(torch.arange(prod(counts)), tuple(counts))


def _read(places: Sequence[Tensor], window: Window, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the input index of each position and tap, (positions, taps), and whether it is inside the image."""
    count, rank = len(places[0]), len(sizes)
    flat, inside = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
    for axis, (size, place) in enumerate(zip(sizes, places, strict=True)):
        taps = torch.arange(window.kernel[axis]) * window.dilation[axis] - window.padding[axis][0]
        read = place[:, None] * window.stride[axis] + taps
        read = read.reshape(count, *(len(taps) if a == axis else 1 for a in range(rank)))
        flat, inside = flat * size + read.clamp(0, size - 1), inside & (read >= 0) & (read < size)
    return flat.flatten(1), inside.flatten(1)


def value_rows(y: Tensor, axis: int, groups: int, at: tuple[Tensor, ...] | None) -> Tensor:
    """Return (rows, groups, channels of a group) at the drawn positions, for a value with channels on `axis`.

    Positions are all axes except the first and the channel axis.
    """
    last = y.movedim(axis, -1)
    index: tuple[Any, ...] = (slice(None), *(at or ()))
    picked = last[index]
    return picked.reshape(-1, groups, y.shape[axis] // groups)
