"""Batches of augmented images, computed on the training device: shifted, zoomed, flipped and mixed.

`surgery` makes such views image by image, on the processor, which a network on an accelerator would wait for.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

RATIO = 4 / 3
"""Of a zoomed view's sides at most, as in Szegedy et al. 2015 (arXiv:1409.4842)."""


@dataclass(frozen=True, slots=True)
class Sight:
    """How images are seen.

    Attributes:
        size: pixels of a view's side.
        shift: pixels that a view is moved by at most, at the images' own scale; for `area` 1.
        area: smallest share of an image that a view shows; 1 for views at the images' own scale.
        often: relative frequency of each image; None for equal frequencies.
    """

    size: int
    shift: int = 0
    area: float = 1.0
    often: Tensor | None = None


class Seen(Dataset[int]):
    """Numbers of views, which `drawn` makes batches of; it draws from the generator that training sets.

    Args:
        images: (N, C, H, W).
        sight: how they are seen.
        batch: views in a batch.
        batches: of them.
        labels: (N,), for batches of views, none of them mixed, and classes; None: half of the views are mixed.
    """

    def __init__(self, images: Tensor, sight: Sight, batch: int, batches: int, labels: Tensor | None = None) -> None:
        device = accelerator()
        self._images, self._labels = images.to(device), None if labels is None else labels.to(device)
        self._sight, self._batch, self._batches = sight, batch, batches
        self._often = torch.ones(len(images)) if sight.often is None else sight.often

    def __len__(self) -> int:
        """Return the number of views."""
        return self._batches * self._batch

    def __getitem__(self, k: int) -> int:
        """Return the number itself: which image it is, and how it is seen, is drawn for the batch."""
        return k

    def drawn(self, numbers: list[int]) -> tuple[Tensor, ...]:
        """Return a batch of views (N, C, size, size), and their classes (N,) where there are any."""
        count = 2 * len(numbers) if self._labels is None else len(numbers)
        chosen = torch.multinomial(self._often, count, replacement=count > len(self._images))
        chosen = chosen.to(self._images.device)
        views = seen(self._images[chosen], self._sight)
        if self._labels is not None:
            return views, self._labels[chosen]
        mixed = torch.rand(len(numbers), 1, 1, 1) < 0.5
        share = torch.where(mixed, torch.rand(len(numbers), 1, 1, 1), torch.ones(())).to(views.device)
        first, second = views[: len(numbers)], views[len(numbers) :]
        return (share * first + (1 - share) * second,)


def seen(images: Tensor, sight: Sight) -> Tensor:
    """Return a view of each image, (N, C, H, W) → (N, C, size, size), half of them flipped."""
    count, _, *sides = images.shape
    if sight.area < 1:
        area = torch.empty(count).uniform_(sight.area, 1)
        ratio = torch.empty(count).uniform_(-log(RATIO), log(RATIO)).exp()
        extent = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # of width and height
        middle = (torch.rand(count, 2) * 2 - 1) * (1 - extent)
    else:
        whole = torch.tensor([sides[1], sides[0]])
        extent = (sight.size / whole).expand(count, 2)
        middle = torch.randint(-sight.shift, sight.shift + 1, (count, 2)) * 2 / whole
    flip = 1 - 2 * torch.randint(2, (count,))
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = extent[:, 0] * flip, extent[:, 1], middle
    shape = [count, images.shape[1], sight.size, sight.size]
    grid = F.affine_grid(theta.to(images), shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def batches(images: Tensor, sight: Sight, batch: int, count: int, labels: Tensor | None = None) -> DataLoader[int]:
    """Return a loader of so many batches, on the accelerator where there is one."""
    views = Seen(images, sight, batch, count, labels)
    return DataLoader(views, batch_size=batch, collate_fn=views.drawn)


def accelerator() -> torch.device:
    """Return the device to train on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
