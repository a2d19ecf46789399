"""Networks with real weights, images to learn from, and images to judge by."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.studies import data
from benchmarks.studies.latency.rivals import Subject
from benchmarks.studies.latency.trained import load, samples
from surgery.recovery import paired_drop

SEEDS = (0, 1, 2)
CALIBRATION = {"resnet20": 512, "resnet56": 512, "mobilenet_v2": 400}
"""Images that a seed draws, without their labels, to choose and to reconstruct by."""
BATCH = 64
SLOPED = 128
LOSSLESS, ODD = "lossless 932", "odd rows of the ImageNet samples"


@dataclass(frozen=True, eq=False)
class Judged:
    """Images to judge by, with the dense model's logits on them, which are made when they are first asked for."""

    name: str
    images: Tensor
    labels: Tensor
    dense: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, images: Tensor, labels: Tensor, dense: nn.Module) -> Judged:
        """Return the images with what the dense model gives on them."""
        return cls(name, images, labels, lambda: logits(dense, images))

    @cached_property
    def logits(self) -> Tensor:
        """(N, classes)."""
        return self.dense()


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A trained network.

    Attributes:
        subject: the network, and the layers that torch-pruning must ignore.
        learnable: training images (N, C, H, W), and their labels, which only `finetune` uses.
        judged: evaluation sets, disjoint from the training images.
    """

    name: str
    subject: Subject
    learnable: tuple[Tensor, Tensor]
    judged: tuple[Judged, ...]

    def calibration(self, seed: int) -> Tensor:
        """Return the calibration images of a seed."""
        order = torch.randperm(len(self.learnable[0]), generator=torch.Generator().manual_seed(seed))
        return self.learnable[0][order[: CALIBRATION[self.name]]].contiguous()


def network(name: str, root: Path, *, jpeg: bool = True) -> Network:
    """Return one of `CALIBRATION`; raises InvalidInput where the data folder lacks a file."""
    known = load(name, root)
    dense = known.subject.module
    if name == "mobilenet_v2":
        seen = rows_of(root, 224, odd=False)
        judged = (Judged.of(ODD, known.images, known.labels, dense),)
        return Network(name, _sampled(known.subject, seen), seen, judged)
    with np.load(root / "cifar10" / "train_lossless_7728.npz") as packed:
        seen = data.normalised(packed["images"]), torch.from_numpy(packed["labels"].astype(np.int64))
    sets = [Judged.of(LOSSLESS, known.images, known.labels, dense)]
    if jpeg:
        pixels, labels = packed_jpegs(root / "cifar10" / "test_jpeg_packed.npz")
        sets.append(Judged.of("JPEG 10,000", data.normalised(pixels), torch.from_numpy(labels), dense))
    return Network(name, _sampled(known.subject, seen), seen, tuple(sets))


def _sampled(subject: Subject, seen: tuple[Tensor, Tensor]) -> Subject:
    """The same, with labelled images for rivals that take slopes of the loss."""
    order = torch.randperm(len(seen[0]), generator=torch.Generator().manual_seed(SEEDS[0]))[:SLOPED]
    return replace(subject, labelled=(seen[0][order], seen[1][order]))


def rows_of(root: Path, size: int, *, odd: bool) -> tuple[Tensor, Tensor]:
    """Return the even or the odd rows of the ImageNet samples, as MobileNetV2 takes them, and their classes."""
    pixels, labels = samples(root / "imagenet", size)
    first = 1 if odd else 0
    images = (torch.from_numpy(pixels[first::2]).permute(0, 3, 1, 2).float() / 127.5 - 1).flip(2, 3)
    return images.contiguous(), torch.from_numpy(labels[first::2])


def to_learn_from(known: Network, root: Path) -> Tensor:
    """Return all images that a network may be distilled with, without their labels."""
    if known.name == "mobilenet_v2":
        return known.learnable[0]
    pixels, _ = packed_jpegs(root / "cifar10" / "train_jpeg_packed.npz")
    return torch.cat([known.learnable[0], data.normalised(pixels)])


def packed_jpegs(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images (N, 32, 32, 3) and labels (N,) of an archive of JPEG files that share one header."""
    from PIL import Image

    with np.load(path) as packed:
        header, content, ends = packed["header"].tobytes(), packed["data"].tobytes(), packed["offsets"]
        labels = packed["labels"].astype(np.int64)
    files = (header + content[a:b] for a, b in pairwise(ends.tolist()))
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]), labels


def logits(module: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs for all images, (N, classes)."""
    with torch.no_grad():
        return torch.cat([module(part) for part in torch.split(images, BATCH)])


def judged(found: Sequence[Tensor], by: Judged) -> dict[str, Any]:
    """Return accuracy and agreement of a network, averaged over several seeds.

    Args:
        found: logits of each seed's network.
        by: the images.
    """
    dense = by.logits.double()
    logs = dense.log_softmax(1)
    apart = [float((logs.exp() * (logs - x.double().log_softmax(1))).sum(1).mean()) for x in found]
    match = [float((x.argmax(1) == dense.argmax(1)).double().mean()) for x in found]
    right, ours = _hits([by.logits], by.labels), _hits(found, by.labels)
    itself = all(torch.equal(x, by.logits) for x in found)
    return {
        "images": by.name,
        "dense": round(100 * float(right.mean()), 2),
        "accuracy": round(100 * float(ours.mean()), 2),
        "each": [round(100 * float(x.mean()), 2) for x in ours],
        **({"drop": 0.0, "low": 0.0, "high": 0.0} if itself else _paired(right, ours)),
        "match": round(100 * float(np.mean(match)), 2),
        "divergence": round(float(np.mean(apart)), 4),
    }


def judged_all(known: Network, modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """Return `judged` of these networks, one for each seed, for every set of images."""
    return [judged([logits(module, by.images) for module in modules], by) for by in known.judged]


def against(known: Network, ours: nn.Module, theirs: nn.Module) -> list[dict[str, Any]]:
    """Return by how many points our network is below another on each set of images, paired, with its interval."""
    return [
        {"images": by.name, **_paired(*(_hits([logits(m, by.images)], by.labels) for m in (theirs, ours)))}
        for by in known.judged
    ]


def _hits(found: Sequence[Tensor], labels: Tensor) -> Tensor:
    return torch.stack([(x.argmax(1) == labels).double() for x in found])


def _paired(before: Tensor, after: Tensor) -> dict[str, float]:
    """Points lost from one to the other, networks by images, with the 95 % interval."""
    drop, low, high = paired_drop(before.mean(0), after.mean(0))
    return {"drop": round(drop, 2), "low": round(low, 2), "high": round(high, 2)}


def goal_of(drop: Mapping[str, float], goal: float) -> str:
    """Return whether the interval meets a goal: `met`, `missed` or `undecided`."""
    if drop["high"] <= goal:
        return "met"
    return "missed" if drop["low"] > goal else "undecided"
