"""Evaluation images with their classes, identical for each evaluated model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.core import InputSpec
from surgery.errors import InvalidInput
from surgery.inputs import as_loader, classes_of, read_batches, split_batch, unlabelled, validated_input

JUDGED = 10_000
"""Maximum number of evaluation images of a dataset."""
KEPT = 2**30
"""Maximum bytes of images to keep in memory."""
Pair = tuple[Sequence[Tensor], Tensor | None]


class Pairs:
    """Batches of inputs with their classes, identical in each iteration.

    Up to `KEPT` bytes are kept in memory; beyond that batches are read again, and must be the same.

    Args:
        given: `Images`, whose unreadable files are skipped, or any other argument of `as_loader`.
        specs: the model's inputs, which may fix the batch size.
        seed: seed of a loader's random draws, such as its order.
    """

    def __init__(self, given: Any, specs: Sequence[InputSpec], seed: int = 0) -> None:
        values = max(1, int(torch.Size(specs[0].shape[1:]).numel()))
        fixed = 0 not in specs[0].dynamic
        size = specs[0].shape[0] if fixed else max(8, min(64, 1_250_000 // values))
        loader = as_loader(given, batch=size, most=JUDGED, option="val")
        self._loader: Any = list(read_batches(loader, seed, "val")) if isinstance(loader, Iterator) else loader
        self._given, self._specs, self._size, self._seed = given, specs, size if fixed else None, seed
        self._held: list[Pair] = []
        self._digests: list[int] = []
        self._whole = self._dropped = False
        self.count = self._left = 0

    @property
    def notes(self) -> list[str]:
        """Notes for the user after the first iteration."""
        told = []
        if self._dropped:
            told.append("the classes of --val are not one whole number for each image: they are left out")
        if self._left:
            told.append(f"the model takes {self._size} images at a time: the last {self._left} of --val are left out")
        return told

    def __iter__(self) -> Iterator[Pair]:
        if self._whole:
            yield from self._held
            return
        held, kept, seen = list[Pair](), 0, 0
        for k, pair in enumerate(self._read()):
            seen += len(pair[0][0])
            kept += sum(x.numel() * x.element_size() for x in pair[0])
            if kept <= KEPT:
                held.append(pair)
            self._recognise(k, pair)
            yield pair
        if not seen:
            few = f"only {self._left} images, and the model takes {self._size} at a time" if self._left else "no images"
            raise InvalidInput(f"val holds {few}: give a folder, an .npz file or a DataLoader with more")
        self.count = seen
        if kept <= KEPT:
            self._held, self._whole = held, True

    def _recognise(self, k: int, pair: Pair) -> None:
        """Raise if a batch differs from the first iteration, since stored results would not apply."""
        digest = hash(tuple(float(x.double().sum()) for x in pair[0]))
        if k == len(self._digests):
            self._digests.append(digest)
        elif self._digests[k] != digest:
            raise InvalidInput(
                "val gives other images each time it is gone through: give them in one order, without augmentation "
                "(shuffle=False)"
            )

    def _read(self) -> Iterator[Pair]:
        pairs = self._pairs()
        return pairs if self._size is None else self._regrouped(pairs, self._size)

    def _pairs(self) -> Iterator[Pair]:
        seen = 0
        for batch in read_batches(self._loader, self._seed, "val"):
            inputs, rest = split_batch(batch, self._specs, "val")
            inputs = [validated_input(x, spec, "val") for x, spec in zip(inputs, self._specs, strict=True)]
            classes = classes_of(rest, len(inputs[0]))
            self._dropped |= bool(rest) and classes is None and not unlabelled(rest[0])
            yield inputs, classes
            seen += len(inputs[0])
            if seen >= JUDGED:
                break

    def _regrouped(self, pairs: Iterable[Pair], size: int) -> Iterator[Pair]:
        """Yield the same images in batches of the given size, dropping an incomplete last batch."""
        held, labels = [list[Tensor]() for _ in self._specs], list[Tensor | None]()
        for inputs, classes in pairs:
            labels += torch.split(classes, 1) if classes is not None else [None] * len(inputs[0])
            for column, x in zip(held, inputs, strict=True):
                column += torch.split(x, 1)
            while len(labels) >= size:
                first = [x for x in labels[:size] if x is not None]
                yield [torch.cat(column[:size]) for column in held], torch.cat(first) if len(first) == size else None
                held, labels = [column[size:] for column in held], labels[size:]
        self._left = len(labels)
