"""Calibration images: convert tensors, batches, files or folders to batches of a model's inputs, without labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from surgery.capture import Whole, reach
from surgery.core import Callee, InputSpec, Program, first_line
from surgery.errors import InvalidInput
from surgery.inputs.batches import classes_of, derived_seed, read_batches, read_item, split_batch, validated_input
from surgery.inputs.datasets import Images, evenly_spaced

MOST = 512
"""Images at most."""
PIXELS, LARGEST = 1_250_000, 32
"""Maximum number of values, and of images, per batch."""
_GIVE = "give a tensor (N, C, H, W), a Dataset, or a sequence or DataLoader of batches"


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Inputs to calibrate on, on the CPU.

    Attributes:
        batches: each a tuple of the model's tensor inputs in order, with the batch along axis 0.
        count: number of images.
        digest: SHA-256 of shapes and values.
        given: for a submodule, the whole model's inputs from which `batches` were computed.
        classes: minimum and maximum class in the batches or items; None if there are none.
    """

    batches: tuple[tuple[Tensor, ...], ...]
    count: int
    digest: str
    given: tuple[tuple[Tensor, ...], ...] = ()
    classes: tuple[int, int] | None = None

    def described(self) -> dict[str, Any]:
        """Return JSON values for the plan."""
        return {"images": self.count, "sha256": self.digest}

    def through(self, function: Callable[[tuple[Tensor, ...]], Sequence[Tensor]]) -> Calibration:
        """Return a copy with a function applied to each batch, such as the inputs of a submodule."""
        return replace(self, batches=tuple(tuple(function(batch)) for batch in self.batches), given=self.batches)


def calibration_images(
    given: Any, program: Program, whole: Whole | None, most: int = MOST, seed: int = 0
) -> Calibration:
    """Return calibration images as a program's inputs; errors are those of `gather`.

    Args:
        given: inputs of the whole model.
        program: the traced model or submodule.
        whole: the whole model, if a submodule was traced.
        most: maximum number of images.
        seed: seed of a loader's or dataset's random draws.
    """
    if isinstance(given, Calibration):
        return given
    if whole is None:
        return gather(given, program.inputs, most, seed)
    call = whole.example or Callee(whole.model, ())
    seen = gather(given, [_spec_of(x) for x in call.tensors], most, seed)

    def arriving(batch: tuple[Tensor, ...]) -> list[Tensor]:
        inputs = [x.to(example) for x, example in zip(batch, call.tensors, strict=True)]
        found = reach(whole.model, whole.name, *call.arguments(inputs))
        return [x.cpu() for x in found.part.tensors]

    return seen.through(arriving)


def _spec_of(x: Tensor) -> InputSpec:
    """Describe a whole model's input, whose dynamic axes are unknown if a submodule was traced."""
    return InputSpec("input", tuple(x.shape), str(x.dtype).removeprefix("torch."), tuple(range(x.dim())))


def gather(given: Any, inputs: Sequence[InputSpec], most: int = MOST, seed: int = 0) -> Calibration:
    """Return calibration images as batches of a model's inputs.

    Args:
        given: a tensor (N, C, H, W), a Dataset, or a sequence or DataLoader of batches, each the model's input or a
            tuple of its inputs; further elements, such as labels, are ignored.
        inputs: the model's tensor inputs.
        most: maximum number of images.
        seed: seed of a loader's or dataset's random draws, such as its order.

    Raises:
        InvalidInput: the data are of another type, or do not fit the inputs.
    """
    if isinstance(given, Calibration):
        return given
    batches, classes = list[list[Tensor]](), list[Tensor | None]()
    for batch in _batches(given, most, seed):
        found, rest = split_batch(batch, inputs)
        batches.append([x.detach().cpu() for x in found])
        classes.append(classes_of(rest, len(found[0])))
    if not batches:
        raise InvalidInput(f"data holds no images: {_GIVE}")
    try:
        whole = [torch.cat(column)[:most] for column in zip(*batches, strict=True)]
    except RuntimeError as error:
        raise InvalidInput(f"batches of data do not go together ({first_line(error)}): {_GIVE}") from error
    whole = [validated_input(x, spec) for x, spec in zip(whole, inputs, strict=True)]
    fixed = 0 not in inputs[0].dynamic
    size = inputs[0].shape[0] if fixed else max(8, min(LARGEST, PIXELS // max(1, whole[0][:1].numel())))
    count = len(whole[0]) // size * size if fixed else len(whole[0])
    if not count or any(len(x) != len(whole[0]) for x in whole):
        raise InvalidInput(f"data: every input takes equally many images, at least {size if fixed else 1}")
    whole = [x[:count] for x in whole]
    parts = tuple(zip(*(torch.split(x, size) for x in whole), strict=True))
    known = [x for x in classes if x is not None]
    ends = (min(int(x.min()) for x in known), max(int(x.max()) for x in known)) if len(known) == len(classes) else None
    return Calibration(parts, count, _digest(whole), classes=ends)


def _batches(given: Any, most: int, seed: int) -> Iterator[Any]:
    """Yield batches as needed; images of a dataset are evenly spaced."""
    if isinstance(given, Images):
        found = [image for image, _ in given.some(most)]
        yield from [torch.stack(found)] if found else []
        return
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, Tensor) for x in given):
        given = given[0] if given[0].dim() != given[1].dim() else given
    if isinstance(given, Tensor):
        yield given[evenly_spaced(len(given), most)]
        return
    if isinstance(given, Dataset) and hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        for k in evenly_spaced(len(given), most):
            yield read_item(given, k, derived_seed(seed, k))
        return
    if isinstance(given, (str, Path, Mapping)) or not isinstance(given, Iterable):
        raise InvalidInput(f"data is of type {type(given).__name__}: {_GIVE}")
    seen = 0
    for batch in read_batches(given, seed):
        yield batch
        seen += next((len(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), 0)
        if seen >= most:
            return


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
