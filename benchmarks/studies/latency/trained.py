"""Networks with trained weights, calibration images and evaluation images."""

from __future__ import annotations

import copy
import csv
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.studies import data
from benchmarks.studies.latency.rivals import Subject
from surgery.errors import InvalidInput
from surgery.inputs import import_torchvision

CALIBRATION_CIFAR, CALIBRATION_IMAGENET = 512, 200
_BATCH = 50
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OPTION_A = ("conv1", "layer*.conv2")
"""torch-pruning cannot follow padded shortcuts: with the residual streams cut, the network does not run."""


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A trained network, normalised images (N, 3, H, W) that it may look at, and others to judge it by."""

    subject: Subject
    calibration: Tensor
    images: Tensor
    labels: Tensor


def load(network: str, root: Path) -> Trained:
    """Return one of `jobs.TRAINED`; raises InvalidInput where the data folder lacks a file."""
    if network in data.NETWORKS:
        return _cifar(network, root)
    return {"mobilenet_v2": _mobilenet, "squeezenet": _squeezenet}[network](root)


def _cifar(network: str, root: Path) -> Trained:
    tested = data.exact_images(root)
    with np.load(_existing(root / "cifar10" / "train_lossless_7728.npz")) as packed:
        seen = _normalised(packed["images"][:CALIBRATION_CIFAR])
    subject = Subject(data.trained(root, network), (torch.zeros(1, 3, 32, 32),), _OPTION_A)
    return Trained(subject, seen, tested.pixels, tested.labels)


def _mobilenet(root: Path) -> Trained:
    model = import_torchvision().models.mobilenet_v2()
    return _imagenet(
        model,
        _existing(root / "imagenet" / "mobilenetv2_1.0_224_tf2ptq_rot180.pt"),
        224,
        lambda u8: (torch.from_numpy(u8).permute(0, 3, 1, 2).float() / 127.5 - 1).flip(2, 3),
    )


def _squeezenet(root: Path) -> Trained:
    model = import_torchvision().models.squeezenet1_0()
    return _imagenet(model, _existing(root / "imagenet" / "squeezenet1_0_torchvisionnorm.pt"), 227, _normalised)


def _imagenet(model: nn.Module, weights: Path, size: int, prepare: Callable[[NDArray[np.uint8]], Tensor]) -> Trained:
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    pixels, labels = samples(weights.parent, size)
    subject = Subject(model.eval(), (torch.zeros(1, 3, size, size),))
    seen = prepare(pixels[0::2][:CALIBRATION_IMAGENET])
    return Trained(subject, seen, prepare(pixels[1::2]), torch.from_numpy(labels[1::2]))


@lru_cache(maxsize=1)
def samples(folder: Path, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1000 images, their middles cut out, (1000, size, size, 3); and their classes, (1000,)."""
    from PIL import Image

    high = 256 if size == 224 else round(size / 0.875)
    pixels, labels = [], []
    with zipfile.ZipFile(_existing(folder / "imagenet_samples_256.zip")) as archive:
        for row in csv.DictReader(io.StringIO(_existing(folder / "labels.csv").read_text(encoding="utf-8"))):
            image: Image.Image = Image.open(io.BytesIO(archive.read(row["file"])))
            if high != 256:
                scale = high / min(image.size)
                width, height = (round(side * scale) for side in image.size)
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (image.size[0] - size) // 2, (image.size[1] - size) // 2
            pixels.append(np.asarray(image.crop((left, top, left + size, top + size))))
            labels.append(int(row["label"]))
    return np.stack(pixels), np.asarray(labels, np.int64)


def _normalised(u8: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, 3) of bytes → (N, 3, H, W), by the mean and deviation of ImageNet."""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    return (torch.from_numpy(u8).permute(0, 3, 1, 2).float() / 255 - mean) / deviation


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InvalidInput(f"the data folder has no {path.name}: expected {path}")
    return path


# What is done with them. ---------------------------------------------------------------------------------------------


def classes(module: nn.Module, images: Tensor) -> NDArray[np.int64]:
    """Return the predicted class of every image, (N,)."""
    with torch.no_grad():
        found: NDArray[np.int64] = torch.cat([module(part).argmax(1) for part in torch.split(images, _BATCH)]).numpy()
    return found


def reestimated(module: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy whose batch norms have the mean and variance of these images: the plain average over batches.

    In a rewritten program this is set on the operators, since it has no modules for them.
    """
    module = copy.deepcopy(module).eval()
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
    with torch.no_grad():
        for number, part in enumerate(torch.split(images, _BATCH) if has_batch_norms(module) else (), start=1):
            for norm in norms:
                norm.momentum = 1 / number
            _set_operators(module, training=True, momentum=1 / number)
            module(part)
    _set_operators(module, training=False, momentum=0.1)
    return module.eval()


def has_batch_norms(module: nn.Module) -> bool:
    """Tell whether there is anything to re-estimate."""
    return bool(_operators(module)) or any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def _operators(module: nn.Module) -> list[torch.fx.Node]:
    """A rewritten program's batch norms."""
    if not isinstance(module, torch.fx.GraphModule):
        return []
    return [node for node in module.graph.nodes if node.target is torch.ops.aten.batch_norm.default]


def _set_operators(module: nn.Module, *, training: bool, momentum: float) -> None:
    """Set the arguments of a rewritten program's batch norms, but not its dropouts."""
    operators = _operators(module)
    for node in operators:
        node.update_arg(5, training)
        node.update_arg(6, momentum)
    if operators and isinstance(module, torch.fx.GraphModule):
        module.recompile()
