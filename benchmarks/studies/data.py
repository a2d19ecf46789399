"""Real checkpoints and images for the studies, found under a data folder that is not part of the repository.

The folder is the one given, else that of the variable ``SURGERY_DATA``, else ``shared/data`` next to the checkout. It
holds ``cifar10/test_lossless_932.npz`` (``images`` (N, 32, 32, 3) of uint8, ``labels`` (N,)), the first images of
CIFAR-10's test set, and ``cifar10_weights/resnet{20,56}_cifar10.pt``, state dicts of pytorch_resnet_cifar10 (BSD-2).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.studies import networks
from surgery.errors import InvalidInput

VARIABLE = "SURGERY_DATA"
BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"
NETWORKS = MappingProxyType({"resnet20": networks.resnet20, "resnet56": networks.resnet56})
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the checkpoints were trained with


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Normalised images (N, 3, 32, 32) and their classes (N,)."""

    pixels: Tensor
    labels: Tensor


def find_root(given: str | Path | None = None) -> Path:
    """Return the data folder; raises InvalidInput where there is none."""
    root = Path(given or os.environ.get(VARIABLE) or BESIDE)
    if not root.is_dir():
        raise InvalidInput(f"no data folder at {root}; give one with --data-root or in the variable {VARIABLE}")
    return root


def checkpoint(root: Path, network: str) -> Path:
    """Return the path of the trained weights of `resnet20` or `resnet56`."""
    return _existing(root / "cifar10_weights" / f"{network}_cifar10.pt")


def trained(root: Path, network: str) -> nn.Module:
    """Return `resnet20` or `resnet56` with its trained weights, in eval mode."""
    model, _ = NETWORKS[network]()
    state: Mapping[str, Tensor] = torch.load(checkpoint(root, network), map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model.eval()


def exact_images(root: Path) -> Images:
    """Return the 932 test images, exact pixels, normalised as the checkpoints expect."""
    with np.load(_existing(root / "cifar10" / "test_lossless_932.npz")) as data:
        return Images(normalised(data["images"]), torch.from_numpy(data["labels"].astype(np.int64)))


def normalised(pixels: np.ndarray) -> Tensor:
    """Return images (N, H, W, 3) of uint8 as the checkpoints expect them, (N, 3, H, W)."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    return (scaled - mean) / deviation


def predictions(model: nn.Module, images: Images, batch: int = 233) -> Tensor:
    """Return the predicted class of every image, (N,)."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in torch.split(images.pixels, batch)])


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InvalidInput(f"the data folder has no {path.name}: expected {path}")
    return path
