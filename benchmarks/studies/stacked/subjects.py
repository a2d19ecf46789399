"""What is made faster: networks with real weights and photos, from the data folder or as the user names them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies import distillation
from benchmarks.studies.latency.rivals import Subject
from benchmarks.studies.recovery.subjects import network, rows_of
from surgery.errors import InvalidInput
from surgery.inputs import load_model, open_images

LICENCES = {
    "resnet56": "akamaster/pytorch_resnet_cifar10, BSD-2",
    "mobilenet_v2": "google-coral/test_data, mobilenet_v2_1.0_224_tf2_ptq, Apache-2.0",
}
"""Where the weights of the data folder's networks come from, and their licence."""
PHOTOS = 512


@dataclass(frozen=True, slots=True)
class Judges:
    """Images to judge by (N, C, H, W), and their classes (N,), or None."""

    name: str
    images: Tensor
    labels: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A trained network and the images that go with it.

    Attributes:
        name: of the network.
        weights: what they are, and their licence.
        subject: the network, and what torch-pruning has to leave alone.
        photos: unlabelled images (N, C, H, W) at the network's own size, to calibrate on and to recover with.
        distilled: returns our network planned under a name in a folder, after distillation, and a description; None: no
            distillation.
        judged: sets to judge by, none of whose images is among the photos.
        at: size in pixels → photos and sets of that size; None where images come in one size.
    """

    name: str
    weights: str
    subject: Subject
    photos: Tensor
    judged: tuple[Judges, ...]
    at: Callable[[int], tuple[Tensor, tuple[Judges, ...]]] | None = None
    distilled: Callable[[str, Path], tuple[nn.Module, dict[str, Any]]] | None = None


def known(name: str, root: Path, *, distill: bool = True) -> Case:
    """Return a network of the data folder, distilled or not; raises InvalidInput if a file is missing."""
    found = network(name, root)
    judged = tuple(Judges(by.name, by.images, by.labels) for by in found.judged)

    def at(size: int) -> tuple[Tensor, tuple[Judges, ...]]:
        images, labels = rows_of(root, size, odd=True)
        return rows_of(root, size, odd=False)[0], (Judges(judged[0].name, images, labels),)

    def distilled(planned: str, work: Path) -> tuple[nn.Module, dict[str, Any]]:
        return distillation.distilled(planned, work, root)

    sized = name == "mobilenet_v2"
    photos = found.learnable[0] if sized else found.calibration(0)
    resized = at if sized else None
    return Case(name, LICENCES[name], found.subject, photos, judged, resized, distilled if distill else None)


def named(model: str, weights: str, photos: str, val: str | None) -> Case:
    """Return what the user names.

    Args:
        model: as for `surgery shrink`.
        weights: a checkpoint, or `auto`.
        photos: a folder or an .npz file of images without classes.
        val: likewise, with classes; None: a fifth of the photos is held back, to judge agreement by.

    Raises:
        InvalidInput: the model or the images cannot be read, the weights would be random, or images to judge by are
            among the photos.
    """
    loaded = load_model(model, weights=weights)
    if loaded.weights.startswith("random"):
        raise InvalidInput(
            f"{model} has no trained weights here ({'; '.join(loaded.warnings) or loaded.weights}): give a checkpoint "
            "with --weights"
        )
    first: Any = loaded.example_inputs[0]

    def at(size: int) -> tuple[Tensor, tuple[Judges, ...]]:
        shape = (1, first.shape[1], size, size)
        images, _ = _read(open_images(photos, shape, loaded.preprocessing, option="--photos"), PHOTOS)
        if val is not None:
            own, labels = _read(open_images(val, shape, loaded.preprocessing, option="--val"), None)
            if both := len(_digests(images) & _digests(own)):
                raise InvalidInput(f"{both} of the images of --val are among those of --photos: judge by others")
            return images, (Judges(val, own, labels),)
        return images[len(images) // 5 :], (Judges("photos that were held back", images[: len(images) // 5], None),)

    square = first.dim() == 4 and first.shape[2] == first.shape[3]
    if not square:
        raise InvalidInput(f"{model} takes inputs {tuple(first.shape)}; this comparison is of square images")
    seen, judged = at(first.shape[2])
    subject = Subject(loaded.module, (torch.zeros(1, *first.shape[1:]),))
    return Case(loaded.name, loaded.weights, subject, seen, judged, at)


def _digests(images: Tensor) -> set[bytes]:
    return {hashlib.sha256(x.numpy().tobytes()).digest() for x in images}


def _read(images: Any, most: int | None) -> tuple[Tensor, Tensor | None]:
    pairs = list(images.some(len(images) if most is None else most))
    classes = torch.tensor([label for _, label in pairs])
    return torch.stack([image for image, _ in pairs]), classes if images.classes else None
