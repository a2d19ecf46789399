"""Synthetic images: overlapping leaves of many sizes, and noise of all scales.

Edges, occlusion, uniform areas and the spectrum are those of photographs, which is sufficient for a least-squares fit.

Source: dead leaves after Lee, Mumford and Huang 2001; learning from them after Baradad et al. 2021 (arXiv:2106.05963).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from surgery.core import InputSpec
from surgery.inputs import batch_size

DRAWN, VALUES = 512, 20_000_000  # number of images, and the maximum number of values of all batches together
LEAVES = 40  # on each image
_TOGETHER = 0.85  # correlation between channels


def drawn_images(count: int, channels: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    """Return images (count, channels, height, width) of about zero mean and unit variance.

    Half of them have sharp leaves and little noise, the other half weaker leaves and more noise.
    """
    random = np.random.default_rng(seed)
    leaves = np.stack([_leaves(random, channels, height, width) for _ in range(count)])
    noise = _noise(random, count, channels, height, width)
    rough = (np.arange(count) % 2).reshape(-1, 1, 1, 1)
    mixed = np.where(rough, 0.7 * leaves + 0.7 * noise, leaves + 0.2 * noise)
    return torch.from_numpy(mixed.astype(np.float32))


def _leaves(random: np.random.Generator, channels: int, height: int, width: int) -> np.ndarray:
    image = np.broadcast_to(_colour(random, channels, 0.8, 0.5), (channels, height, width)).copy()
    for _ in range(LEAVES):
        radius = random.random() ** 3 * max(height, width) / 2 + 1
        middle, angle, aspect = random.random(2) * (height, width), random.random() * np.pi, 1 + random.random()
        round_, colour = random.random() < 0.5, _colour(random, channels, 0.9, 0.35)
        reach = radius * aspect * (1 if round_ else np.sqrt(2))
        low = np.maximum(0, np.floor(middle - reach)).astype(int)
        high = np.minimum((height, width), np.ceil(middle + reach) + 1).astype(int)
        dy = np.arange(low[0], high[0])[:, None] - middle[0]
        dx = np.arange(low[1], high[1]) - middle[1]
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / aspect
        v = (dy * np.cos(angle) - dx * np.sin(angle)) * aspect
        inside = u * u + v * v < radius * radius if round_ else (abs(u) < radius) & (abs(v) < radius)
        image[:, low[0] : high[0], low[1] : high[1]][:, inside] = colour[:, :, 0]
    return image


def _colour(random: np.random.Generator, channels: int, bright: float, tint: float) -> np.ndarray:
    return (bright * random.standard_normal() + tint * random.standard_normal(channels)).reshape(-1, 1, 1)


def _noise(random: np.random.Generator, count: int, channels: int, height: int, width: int) -> np.ndarray:
    """Return noise with a 1/f spectrum, correlated channels and a random contrast per image."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 0.5 / max(height, width)
    white = np.fft.rfft2(random.standard_normal((count, channels, height, width)))
    pink = np.fft.irfft2(white / frequency, s=(height, width))
    pink /= pink.std(axis=(1, 2, 3), keepdims=True) + 1e-12
    mixing = np.linalg.cholesky(np.full((channels, channels), _TOGETHER) + (1 - _TOGETHER) * np.eye(channels))
    contrast = np.exp(0.4 * random.standard_normal((count, 1, 1, 1)))
    noise: np.ndarray = contrast * np.einsum("ij,njhw->nihw", mixing, pink)
    return noise


def drawn_batches(spec: InputSpec, seed: int, share: int = 1) -> list[tuple[Tensor]]:
    """Return batches of images for an input (N, C, H, W); fewer if they are large, and one in `share` of those."""
    values = max(1, int(torch.Size(spec.shape[1:]).numel()))
    count = max(32, min(DRAWN, VALUES // values) // share)
    size = batch_size(spec.shape) if 0 in spec.dynamic else spec.shape[0]
    images = drawn_images(-(-count // size) * size, *spec.shape[1:], seed=seed)
    return [(x,) for x in torch.split(images.to(getattr(torch, spec.dtype)), size)]
