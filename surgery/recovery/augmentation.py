"""Training images: shuffled, shifted, flipped and mixed, all determined by a seed.

Random draws depend only on the seed, the epoch and the image's index, so they do not depend on the number of processes
or on resuming.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from surgery.core import InputSpec
from surgery.inputs import UNKNOWN, classes_of, derived_seed, read_item, split_batch


@dataclass(frozen=True, slots=True)
class Look:
    """Augmentation settings.

    Attributes:
        shift: shift images by up to this share of their size.
        flip: flip half of the images left to right.
        mix: mix half of the images with another one.
        seed: seed of all random draws.
    """

    shift: float
    flip: bool
    mix: bool
    seed: int


class Views(Dataset[tuple[Tensor, ...]]):
    """Dataset of augmented images of one epoch; the augmentation is determined by the index."""

    def __init__(self, images: Any, how: Look, chosen: Sequence[int], inputs: Sequence[InputSpec]) -> None:
        self._images, self._how, self._chosen, self._inputs = images, how, chosen, inputs
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._chosen)

    def __getitem__(self, k: int) -> tuple[Tensor, ...]:
        """Return the image's inputs and its class."""
        how, index = self._how, self._chosen[k]
        generator = torch.Generator().manual_seed(self._seed(index))
        *inputs, label = self._sample(index)
        image = self._seen(inputs[0], generator)
        if how.mix and float(torch.rand((), generator=generator)) < 0.5:
            other = self._chosen[int(torch.randint(len(self._chosen), (), generator=generator))]
            share = float(torch.rand((), generator=generator))
            image = share * image + (1 - share) * self._seen(self._sample(other)[0], generator)
        return image, *inputs[1:], label

    def _seed(self, index: int) -> int:
        key = hashlib.sha256(f"{self._how.seed}:{self.epoch}:{index}".encode()).digest()
        return int.from_bytes(key[:8], "big") >> 1

    def _sample(self, index: int) -> tuple[Tensor, ...]:
        inputs, rest = split_batch(read_item(self._images, index, self._seed(index)), self._inputs)
        label = classes_of(rest, 1)
        return *(x[0] for x in inputs), torch.tensor(UNKNOWN) if label is None else label[0]

    def _seen(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if image.dim() != 3 or not image.is_floating_point():
            return image
        far = [int(self._how.shift * size) for size in image.shape[1:]]
        if self._how.flip and float(torch.rand((), generator=generator)) < 0.5:
            image = image.flip(2)
        if not any(far):
            return image
        top, left = (int(torch.randint(2 * f + 1, (), generator=generator)) for f in far)
        padded = F.pad(image[None], (far[1], far[1], far[0], far[0]), mode="reflect")[0]
        return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


class Order(Sampler[int]):
    """Sampler with a new order for each epoch, determined by the seed."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return self._count

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of all images."""
        generator = torch.Generator().manual_seed(derived_seed(self._seed, self.epoch))
        yield from torch.randperm(self._count, generator=generator).tolist()
