"""Calibration images: tensors, batches, files or folders → batches of a model's inputs, with the digest plans record.

Nothing here needs labels. What is read from files is scaled to 0..1, brought to the model's input size and normalised.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.blame import first_line
from surgery.errors import InvalidInput
from surgery.ir import InputSpec, Program
from surgery.part import Whole, reach

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's images, by which most published weights are normalised."""
MOST = 256
"""At most so many images are read from files: by name, evenly spaced."""
BATCH = 8
"""Images that are run at a time, however they were given."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
_GIVE = "give a tensor (N, C, H, W), or a sequence or DataLoader of batches"


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Inputs to calibrate on, on the CPU.

    Attributes:
        batches: each a tuple of the model's tensor inputs in order, the batch along axis 0.
        count: number of images.
        digest: SHA-256 of shapes and values.
    """

    batches: tuple[tuple[Tensor, ...], ...]
    count: int
    digest: str

    def described(self) -> dict[str, Any]:
        """Return what a plan records."""
        return {"images": self.count, "sha256": self.digest}

    def through(self, function: Callable[[tuple[Tensor, ...]], Sequence[Tensor]]) -> Calibration:
        """Return each batch as a function of it: what a part of the model is given, say."""
        return replace(self, batches=tuple(tuple(function(batch)) for batch in self.batches))


def seen_by(given: Any, program: Program, whole: Whole | None) -> Calibration:
    """Return calibration images as a program's inputs; arguments and errors are those of `gather`.

    Args:
        given: inputs of the model, of the whole one where a part of it was traced.
        program: the traced model or part.
        whole: where it is a part, what that belongs to.
    """
    if isinstance(given, Calibration):
        return given
    if whole is None:
        return gather(given, program.inputs)
    args = whole.example_args or ()
    seen = gather(given, [_spec_of(x) for x in pytree.tree_leaves(args) if isinstance(x, Tensor)])

    def arriving(batch: tuple[Tensor, ...]) -> list[Tensor]:
        inputs = iter(batch)
        given = pytree.tree_map(lambda x: next(inputs).to(x) if isinstance(x, Tensor) else x, args)
        found = reach(whole.model, whole.name, given, whole.example_kwargs)
        return [x.cpu() for x in pytree.tree_leaves((found.args, dict(found.kwargs))) if isinstance(x, Tensor)]

    return seen.through(arriving)


def _spec_of(x: Tensor) -> InputSpec:
    """A whole model's input: of a part it is not known which axes are free."""
    return InputSpec("input", tuple(x.shape), str(x.dtype).removeprefix("torch."), tuple(range(x.dim())))


def gather(given: Any, inputs: Sequence[InputSpec]) -> Calibration:
    """Return calibration images as batches of a model's inputs.

    Args:
        given: a tensor (N, C, H, W); or a sequence or DataLoader of batches, each the model's input or a tuple of its
            inputs; what follows them in a batch, such as labels, is left out.
        inputs: the model's tensor inputs.

    Raises:
        InvalidInput: that is not what was given, or it does not fit the inputs.
    """
    if isinstance(given, Calibration):
        return given
    if isinstance(given, (str, Path, Mapping)) or not isinstance(given, (Tensor, Iterable)):
        raise InvalidInput(f"calibration is of type {type(given).__name__}: {_GIVE}")
    batches = [_inputs_of(batch, len(inputs)) for batch in ([given] if isinstance(given, Tensor) else given)]
    if not batches:
        raise InvalidInput(f"calibration holds no images: {_GIVE}")
    try:
        whole = [torch.cat(column) for column in zip(*batches, strict=True)]
    except RuntimeError as error:
        raise InvalidInput(f"calibration batches do not go together ({first_line(error)}): {_GIVE}") from error
    whole = [_fitting(x, spec) for x, spec in zip(whole, inputs, strict=True)]
    fixed = 0 not in inputs[0].dynamic
    size = inputs[0].shape[0] if fixed else BATCH
    count = len(whole[0]) // size * size if fixed else len(whole[0])
    if not count or any(len(x) != len(whole[0]) for x in whole):
        raise InvalidInput(f"calibration: every input takes equally many images, at least {size if fixed else 1}")
    whole = [x[:count] for x in whole]
    return Calibration(tuple(zip(*(torch.split(x, size) for x in whole), strict=True)), count, _digest(whole))


def _inputs_of(batch: Any, count: int) -> list[Tensor]:
    leaves = [batch] if isinstance(batch, Tensor) else pytree.tree_leaves(batch)
    tensors = [x.detach().cpu() for x in leaves if isinstance(x, Tensor) and x.dim()]
    if len(tensors) < count:
        raise InvalidInput(f"a calibration batch holds {len(tensors)} tensors, the model takes {count}: {_GIVE}")
    return tensors[:count]


def _fitting(x: Tensor, spec: InputSpec) -> Tensor:
    """A model's input in its dtype; raises where its shape is none that the model takes."""
    wanted = getattr(torch, spec.dtype)
    free = (0, *spec.dynamic)
    same = x.dim() == len(spec.shape) and all(a in free or size == spec.shape[a] for a, size in enumerate(x.shape))
    if not same or x.is_floating_point() != wanted.is_floating_point:
        told = ", ".join("N" if a in free else str(size) for a, size in enumerate(spec.shape))
        raise InvalidInput(
            f"calibration images are {tuple(x.shape)} of {x.dtype}, but input '{spec.name}' takes ({told}) of "
            f"{spec.dtype}; normalise and resize them as the model expects"
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise InvalidInput("calibration images hold NaN or infinite values")
    return x.to(wanted)


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Files. --------------------------------------------------------------------------------------------------------------


def read(path: str | Path, shape: Sequence[int], *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Return the images of a file or folder, normalised: (N, C, H, W), float32.

    Args:
        path: an .npz file with `images` (N, H, W, C) of uint8, or a folder of image files, nested or not.
        shape: of the model's input, (N, C, H, W): images of another size are resized, those of files cropped as well.
        mean: of each channel, where pixels are 0 to 1.
        std: likewise.

    Raises:
        InvalidInput: there are no such images.
    """
    if len(shape) != 4:
        raise InvalidInput(f"--calibrate takes images (N, C, H, W), but this model's input is {tuple(shape)}")
    _, channels, height, width = shape
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise InvalidInput(f"--mean and --std: give one number for each of {channels} channels, --std above 0")
    place = Path(path)
    pixels = _of_folder(place, channels, (height, width)) if place.is_dir() else _of_archive(place, channels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255  # (N, C, H, W)
    if images.shape[2:] != (height, width):
        images = torch.nn.functional.interpolate(images, (height, width), mode="bilinear", antialias=True)
    shift, scale = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return (images - shift) / scale


def _spaced(count: int) -> list[int]:
    return sorted({round(float(k)) for k in np.linspace(0, count - 1, min(count, MOST))})


def _of_archive(path: Path, channels: int) -> np.ndarray:
    """(N, H, W, C) of uint8."""
    try:
        with np.load(path) as data:
            pixels = data["images"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f"--calibrate {path}: give an .npz file with 'images' (N, H, W, C) of uint8, or a folder of images "
            f"({'no such file' if not path.exists() else 'this is none'})"
        ) from error
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[3] != channels or pixels.dtype != np.uint8 or not len(pixels):
        raise InvalidInput(
            f"--calibrate {path}: 'images' is {pixels.shape} of {pixels.dtype}; expected (N, H, W, {channels}) of uint8"
        )
    return np.ascontiguousarray(pixels[_spaced(len(pixels))])


def _of_folder(folder: Path, channels: int, size: tuple[int, int]) -> np.ndarray:
    """(N, H, W, C) of uint8: each image's middle, in the shape that is wanted."""
    from PIL import Image, ImageOps  # Here: Python calls bring tensors.

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files or channels not in (1, 3):
        raise InvalidInput(f"--calibrate {folder}: no images ({', '.join(SUFFIXES)}) for {channels} channels")
    out = []
    for k in _spaced(len(files)):
        try:
            with Image.open(files[k]) as image:
                whole = image.convert("RGB" if channels == 3 else "L")
        except (OSError, ValueError) as error:
            raise InvalidInput(f"--calibrate: {files[k]} cannot be read ({first_line(error)})") from error
        fitted = ImageOps.fit(whole, (size[1], size[0]), Image.Resampling.BILINEAR)
        out.append(np.asarray(fitted).reshape(*size, channels))
    return np.stack(out)
