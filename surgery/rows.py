"""What a contraction reads, as rows: one for each image and position, in the order of its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution looks at its input; each entry one number per spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, raw: Mapping[str, Any], weight: Tensor) -> Window:
        """Return that of a convolution's arguments by name."""
        rank = weight.dim() - 2
        kernel = tuple(weight.shape[2:])
        stride, dilation = (_each(raw[name], rank) for name in ("stride", "dilation"))
        padding = raw["padding"]
        if isinstance(padding, str):
            whole = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            return cls(kernel, stride, tuple((w // 2, w - w // 2) for w in whole), dilation)
        return cls(kernel, stride, tuple((p, p) for p in _each(padding, rank)), dilation)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return numbers * rank if len(numbers) == 1 else numbers


def windows(x: Tensor, window: Window) -> Tensor:
    """Return all windows of (N, C, *S) as a view (N, *positions, C, *kernel) of the padded input."""
    pads = [p for pair in reversed(window.padding) for p in pair]
    x = F.pad(x, pads).contiguous() if any(pads) else x.contiguous()
    steps = x.stride()[2:]
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], window.kernel, window.stride, window.dilation, strict=True)
    ]
    shape = (x.shape[0], *counts, x.shape[1], *window.kernel)
    stride = (
        x.stride(0),
        *(a * s for a, s in zip(steps, window.stride, strict=True)),
        x.stride(1),
        *(a * d for a, d in zip(steps, window.dilation, strict=True)),
    )
    return x.as_strided(shape, stride)


def drawn(positions: Sequence[int], most: int, generator: torch.Generator) -> tuple[Tensor, ...] | None:
    """Return at most so many positions at random, as one index per axis; None for all."""
    total = prod(positions)
    if total <= most:
        return None
    flat = torch.randperm(total, generator=generator)[:most].sort().values
    return torch.unravel_index(flat, tuple(positions))


def convolution_rows(x: Tensor, window: Window, groups: int, at: tuple[Tensor, ...] | None) -> Tensor:
    """Return (rows, groups, C / groups * prod(kernel)): what each position reads, of those drawn."""
    seen = windows(x, window)
    picked = seen if at is None else _at(seen, at)
    return picked.reshape(-1, groups, x.shape[1] // groups * prod(window.kernel))


def value_rows(y: Tensor, axis: int, groups: int, at: tuple[Tensor, ...] | None) -> Tensor:
    """Return (rows, groups, channels of a group) of a value whose channels are on `axis`, of the positions drawn.

    Positions are all axes but the first and that of the channels.
    """
    last = y.movedim(axis, -1)
    picked = last if at is None else _at(last, at)
    return picked.reshape(-1, groups, y.shape[axis] // groups)


def _at(values: Tensor, at: tuple[Tensor, ...]) -> Tensor:
    index: tuple[Any, ...] = (slice(None), *at)
    return values[index]
