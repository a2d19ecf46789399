"""Images to judge by, with their classes: the same ones for each model that is judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.datasets import UNKNOWN, Images, as_loader
from surgery.errors import InvalidInput
from surgery.images import fitting
from surgery.ir import InputSpec

JUDGED = 10_000
"""At most so many images of a data set are judged by."""
KEPT = 2**30
"""Bytes of images that are held."""
Pair = tuple[Sequence[Tensor], Tensor | None]


class Pairs:
    """Batches of inputs with their classes, the same each time they are gone through.

    They are held as long as they take no more than `KEPT` bytes; beyond that they are read anew, and have to be the
    same ones.
    """

    def __init__(self, given: Any, specs: Sequence[InputSpec]) -> None:
        values = max(1, int(torch.Size(specs[0].shape[1:]).numel()))
        fixed = 0 not in specs[0].dynamic
        size = specs[0].shape[0] if fixed else max(8, min(64, 1_250_000 // values))
        loader = as_loader(given, batch=size, option="val")
        self._loader: Any = list(loader) if isinstance(loader, Iterator) else loader
        self._given, self._specs, self._size = given, specs, size if fixed else None
        self._held: list[Pair] = []
        self._digests: list[int] = []
        self._whole = self._dropped = False

    @property
    def notes(self) -> list[str]:
        """What the user should know, once they were gone through."""
        told = "the classes of --val are not one whole number for each image: they are left out"
        return [told] if self._dropped else []

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
            raise InvalidInput("val holds no images: give a folder, an .npz file or a DataLoader that has some")
        if isinstance(self._given, Images):
            self._given.refuse_broken(seen)
        if kept <= KEPT:
            self._held, self._whole = held, True

    def _recognise(self, k: int, pair: Pair) -> None:
        """Refuse batches that are others than the first time: whatever was found then would not belong to them."""
        digest = hash(tuple(float(x.double().sum()) for x in pair[0]))
        if k == len(self._digests):
            self._digests.append(digest)
        elif self._digests[k] != digest:
            raise InvalidInput(
                "val gives other images each time it is gone through: give them in one order, without augmentation "
                "(shuffle=False)"
            )

    def _read(self) -> Iterator[Pair]:
        seen = 0
        for batch in self._loader:
            tensors = [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.dim()]
            inputs = tensors[: len(self._specs)]
            if len(inputs) < len(self._specs):
                raise InvalidInput(
                    f"a batch of val holds {len(inputs)} tensors, the model takes {len(self._specs)}: give pairs of "
                    "images and classes"
                )
            if self._size is not None and len(inputs[0]) != self._size:
                continue
            inputs = [fitting(x, spec, "val") for x, spec in zip(inputs, self._specs, strict=True)]
            rest = tensors[len(self._specs) :]
            classes = _classes(rest, len(inputs[0]))
            self._dropped |= bool(rest) and classes is None and not _unknown(rest[0])
            yield inputs, classes
            seen += len(inputs[0])
            if seen >= JUDGED:
                break


def _classes(rest: Sequence[Tensor], count: int) -> Tensor | None:
    """The classes of a batch: whole numbers, one for each image, none of them unknown."""
    if not rest:
        return None
    found = rest[0].squeeze(1) if rest[0].dim() == 2 and rest[0].shape[1] == 1 else rest[0]
    if found.dim() != 1 or len(found) != count or found.is_floating_point() or found.is_complex():
        return None
    if _unknown(found):
        return None
    if int(found.min()) < 0:
        raise InvalidInput(f"val: a label is {int(found.min())}; classes are counted from 0")
    return found.long()


def _unknown(classes: Tensor) -> bool:
    """Whether no image has a class."""
    return bool((classes == UNKNOWN).all())
