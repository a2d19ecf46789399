"""Images for calibration, training and evaluation: folders, archives, or the result of a user's callable.

Datasets are map-style: pairs of a normalised image (C, H, W) and its class, -1 if unknown. Files are read on access;
unreadable ones are skipped and counted.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from surgery.config import ACCEPTED_IMAGES
from surgery.core import explained, first_line
from surgery.errors import InvalidInput
from surgery.inputs.classes import outputs_by_name, read_classes
from surgery.inputs.libraries import Preprocessing, import_torchvision
from surgery.inputs.usercode import user_object

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
UNREADABLE = 0.01  # raise if more than this share of the files cannot be read
UNKNOWN = -1  # the class of an unlabelled image


@dataclass(eq=False)
class Images(Dataset[tuple[Tensor, int]]):
    """Images of a folder or an archive, normalised."""

    option: str  # the command-line option that named them, for messages
    place: Path  # folder or archive
    shape: tuple[int, int, int]  # (C, H, W) of each image
    how: Preprocessing
    items: Sequence[Path] | np.ndarray  # files, or pixels: (N, H, W, 3) or (N, H, W) of uint8
    classes: Sequence[int] = ()  # of each image; empty if unknown
    folders: Sequence[str] = ()  # those of classes; empty if classes are unknown, or not from folders
    folder_notes: Sequence[str] = ()  # on how the folder was read
    unreadable: dict[str, str] = field(default_factory=dict)  # files that could not be read as images, and why

    def __len__(self) -> int:
        """Return the number of images, unreadable ones included."""
        return len(self.items)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        """Return an image and its class; if unreadable, the next readable one."""
        found = next(self._readable((k + step) % len(self) for step in range(len(self))), None)
        if found is None:
            raise InvalidInput(f"{self.option} {self.place}: none of its {len(self)} files can be read as an image")
        return found

    def some(self, most: int) -> Iterator[tuple[Tensor, int]]:
        """Yield at most this many images, evenly spaced, with their classes, skipping unreadable ones."""
        chosen = evenly_spaced(len(self), most)
        yield from self._readable(chosen)
        self._require_readable(len(chosen))

    def _readable(self, indices: Iterable[int]) -> Iterator[tuple[Tensor, int]]:
        for k in indices:
            if (image := self._image(k)) is not None:
                yield image, self.classes[k] if self.classes else UNKNOWN

    def _image(self, k: int) -> Tensor | None:
        """Return the centre crop at the model's size, normalised, (C, H, W); None if the file cannot be read."""
        item, (channels, height, width) = self.items[k], self.shape
        try:
            with Image.open(item) if isinstance(item, Path) else Image.fromarray(item) as opened:
                turn, image = _turn_of(opened), _in_8_bits(opened).convert("RGB" if channels == 3 else "L")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's on broken files
            self.unreadable[str(item)] = first_line(error)
            self._require_readable(len(self))
            return None
        image = image if turn is None else image.transpose(turn)
        if image.size != (width, height) or self.how.crop < 1:
            method = Image.Resampling[self.how.interpolation.upper()]
            image = ImageOps.fit(image, (width, height), method, bleed=(1 - self.how.crop) / 2)
        transforms = import_torchvision().transforms.functional
        found: Tensor = transforms.normalize(transforms.to_tensor(image), self.how.mean, self.how.std)
        return found

    def _require_readable(self, count: int) -> None:
        if len(self.unreadable) > UNREADABLE * count:
            file, why = min(self.unreadable.items())
            raise InvalidInput(
                f"{self.option} {self.place}: at least {len(self.unreadable)} of {count} images cannot be read, the "
                f"first is {file} ({why}); remove, restore or convert them"
            )

    def __str__(self) -> str:
        (_, height, width), how = self.shape, self.how
        of = f" of {len(set(self.classes))} classes" if self.classes else ""
        mean, std = (",".join(f"{x:g}" for x in values) for values in (how.mean, how.std))
        return (
            f"{self.option} {self.place}: {len(self)} images{of}, --size {height},{width} --crop {how.crop:g} "
            f"--mean {mean} --std {std}"
        )

    def assign_classes(self, outputs: int, known: Sequence[str], file: str | None, *, needed: bool) -> None:
        """Assign folders to the model's outputs by name where names are known; arguments of `outputs_by_name`.

        Raises InvalidInput if classes are `needed`, names unknown, and there are not as many folders as outputs.
        """
        lines = known if len(known) == outputs else ("",) * outputs
        lines = read_classes(file, outputs) if file is not None else lines
        found = outputs_by_name(self.folders, lines, file, self.option)
        if found is not None and found != list(range(outputs)):
            self.classes = tuple(found[label] for label in self.classes)
            note = f"{self.option}: {len(found)} folders are classes of the model's {outputs}, by name"
            self.folder_notes = [*self.folder_notes, note]
        elif found is None and needed and len(self.folders) != outputs:
            raise InvalidInput(
                f"{self.option} has {len(self.folders)} folders of classes and the model has {outputs} outputs, so "
                "that folders cannot be matched to outputs; name the model's classes with --classes FILE, a line for "
                "each output, or give a folder for each class, empty ones too"
            )

    def notes(self) -> list[str]:
        """Return notes for the user."""
        broken = [f"{self.option}: {len(self.unreadable)} files could not be read and were left out"]
        return [*self.folder_notes, *(broken if self.unreadable else ())]


def batch_size(shape: Sequence[int], most: int = 64) -> int:
    """Return how many images of this shape, its first axis aside, make a batch of moderate memory."""
    return max(8, min(most, 1_250_000 // max(1, prod(shape[1:]))))


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return the image with values up to 255: PIL would clip those of 16 bits, instead of scaling them.

    Raises ValueError for values in floating point or 32 bits, whose range is unknown.
    """
    in_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not in_16_bits and image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"{kind}, whose range is unknown: convert it to 8 or 16 bits")
    return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)) if in_16_bits else image


_TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by EXIF orientation


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return how an image is to be turned; None where damaged EXIF data, for which PIL raises anything, do not say."""
    with suppress(Exception), warnings.catch_warnings(action="ignore"):
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, evenly spaced."""
    return sorted({round(float(k)) for k in np.linspace(0, count - 1, min(count, most))})


def open_images(given: str, input_shape: Sequence[int], how: Preprocessing, *, option: str = "--data") -> Any:
    """Return the `Images` named by an option, for an input (N, C, H, W), or what the user's callable returns.

    `given` is an .npz file with `images` (N, H, W, C) of uint8 and optional `labels` (N,); a folder of images, with or
    without a folder per class; or `FILE.py:CALLABLE` that returns a DataLoader. Raises InvalidInput if they do not fit.
    """
    owner, colon, name = given.rpartition(":")
    if colon and owner and not Path(given).exists():
        return _called(owner, name, option)
    if len(input_shape) != 4:
        raise InvalidInput(
            f"{option} takes images (N, C, H, W), but this model's input is {tuple(input_shape)}; give "
            "FILE.py:CALLABLE that returns a DataLoader of its inputs"
        )
    channels = input_shape[1]
    height, width = how.size or (input_shape[2], input_shape[3])
    finite = all(isfinite(x) for x in (*how.mean, *how.std))
    if len(how.mean) != channels or len(how.std) != channels or not finite or min(how.std) <= 0:
        hint = "" if channels == 3 else "; without them ImageNet's are taken, which are for 3"
        raise InvalidInput(
            f"{option} {given}: with --mean and --std give one finite number for each of {channels} channels of the "
            f"model's input, --std above 0{hint}"
        )
    place, shape = Path(given).expanduser(), (channels, height, width)
    return _folder(place, shape, how, option) if place.is_dir() else _archive(place, shape, how, option)


def _called(owner: str, name: str, option: str) -> Any:
    maker = user_object(owner, name)
    made = maker() if callable(maker) and not isinstance(maker, (DataLoader, Dataset)) else maker
    if isinstance(made, (str, bytes, Mapping)) or not isinstance(made, (Iterable, Dataset)):
        raise InvalidInput(
            f"{option} {owner}:{name} returned {type(made).__name__}; return a torch DataLoader, or another iterable "
            "of batches"
        )
    return made


def _archive(place: Path, shape: tuple[int, int, int], how: Preprocessing, option: str) -> Images:
    with explained(f"{option} {place}: give {ACCEPTED_IMAGES}"), np.load(place) as data:
        pixels, labels = data["images"], data.get("labels")
    channels = pixels.shape[3] if pixels.ndim == 4 else 1
    if pixels.ndim not in (3, 4) or channels != shape[0] or pixels.dtype != np.uint8 or not pixels.size:
        raise InvalidInput(
            f"{option} {place}: 'images' is {pixels.shape} of {pixels.dtype}; expected (N, H, W, {shape[0]}) of uint8"
        )
    fits = labels is None or (labels.shape == (len(pixels),) and labels.dtype.kind in "iu")
    if labels is not None and not (fits and labels.min() >= 0 and labels.max() < 2**31):
        raise InvalidInput(
            f"{option} {place}: 'labels' is {labels.shape} of {labels.dtype}; expected ({len(pixels)},) whole numbers "
            "from 0 on"
        )
    pixels = pixels.squeeze(3) if pixels.ndim == 4 and channels == 1 else pixels
    return Images(option, place, shape, how, np.ascontiguousarray(pixels), () if labels is None else labels.tolist())


def _folder(place: Path, shape: tuple[int, int, int], how: Preprocessing, option: str) -> Images:
    """Read several folders like torchvision's ImageFolder: each is a class, sorted by name."""
    names = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    beside = [path for path in sorted(place.iterdir()) if path.is_file() and _is_image(path.name)]
    tops = {os.path.realpath(path) for path in (place, *(place / name for name in names))}
    found = [(file, label) for label, name in enumerate(names) for file in _files(place / name, tops)]
    files, classes = [file for file, _ in found], tuple(label for _, label in found)
    if len(set(classes)) > 1:
        notes = [f"{option}: {len(beside)} images beside the folders of classes are left out"] if beside else []
        empty = [name for k, name in enumerate(names) if k not in classes]
        if empty:
            more = f"and {len(empty) - 1} others hold no images, and count as classes"
            said = "holds no images, and counts as a class" if len(empty) == 1 else more
            notes.append(f"{option}: folder '{empty[0]}' {said}")
    else:
        files, classes = [*beside, *files], ()
        notes = [f"{option}: all images are in one folder, so that no classes are known"] if names and files else []
    if not files or shape[0] not in (1, 3):
        raise InvalidInput(f"{option} {place}: no images ({', '.join(SUFFIXES)}) for {shape[0]} channels")
    return Images(option, place, shape, how, files, classes, names if classes else (), notes)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")  # as macOS puts beside each file


def _files(folder: Path, tops: Collection[str]) -> list[Path]:
    """Return the images below a folder. Links are followed, but to none of `tops` and to no folder visited before."""
    found, seen = list[Path](), {*tops}
    for path, names, files in os.walk(folder, followlinks=True):
        found += [Path(path, name) for name in files if _is_image(name)]
        inner = {os.path.realpath(Path(path, name)): name for name in sorted(names)}
        names[:] = [name for real, name in inner.items() if real not in seen]
        seen.update(inner)
    return sorted(found, key=lambda file: (str(file.parent), file.name))


def as_dataset(given: Any, *, option: str = "data") -> Any:
    """Return a tensor, or a pair of tensors (images, classes), as a Dataset; anything else unchanged."""
    if isinstance(given, Tensor):
        return TensorDataset(given, torch.full((len(given),), UNKNOWN))
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, Tensor) for x in given):
        if len(given[0]) != len(given[1]):
            raise InvalidInput(f"{option}: {len(given[0])} images, but {len(given[1])} labels")
        return TensorDataset(*given)
    return given


def as_loader(given: Any, *, batch: int, most: int, option: str = "data") -> Any:
    """Return batches (images, classes) of a DataLoader or another iterable, or of what can be read as a dataset.

    That is `Images`, of which at most `most` are read, unreadable ones skipped; a Dataset; a tensor (N, C, H, W), or a
    pair of it with classes (N,).
    """
    given = _Readable(given, most) if isinstance(given, Images) else as_dataset(given, option=option)
    if isinstance(given, Dataset) and not isinstance(given, DataLoader):
        return DataLoader(given, batch_size=batch)
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise InvalidInput(
            f"{option} is of type {type(given).__name__}: give a tensor (N, C, H, W), a pair of it with classes (N,), "
            "a Dataset, a DataLoader, or a sequence of batches"
        )
    return given


class _Readable(IterableDataset[tuple[Tensor, int]]):
    """Iterates over readable images."""

    def __init__(self, images: Images, most: int) -> None:
        self._images, self._most = images, most

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return self._images.some(self._most)
