"""The user's batches: a model's inputs, optionally followed by classes; and those to calibrate on.

Random draws of a dataset or loader while it is read here are seeded, so that repeated and resumed runs see the same
data. The user's own generators are left unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count as counting
from math import inf
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, TensorDataset

from surgery.capture import Whole, reach
from surgery.core import Callee, InputSpec, Program, digest_of, explained
from surgery.errors import InvalidInput
from surgery.inputs.datasets import UNKNOWN, Images, batch_size, evenly_spaced
from surgery.inputs.usercode import guarded

MOST = 512  # images at most
_GIVE = "give a tensor (N, C, H, W), a Dataset, or a sequence or DataLoader of batches"
_END = object()
_HOLDERS = ("base_dataloader", "batch_sampler", "sampler")
"""Attributes of a DataLoader, or Accelerate's, for samplers and their generators."""


def seed_all(seed: int) -> None:
    """Seed the global generators."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def states_kept() -> Iterator[None]:
    """Restore the global generators after the block: torch's on the CPU, numpy's and Python's."""
    before = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.default_generator.set_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def _holders(loader: Any) -> list[Any]:
    """Return the loader and its samplers that have a torch generator."""
    held = getattr(loader, "__dict__", {})
    found = [x for name in _HOLDERS if name in held for x in _holders(held[name])]
    own = "generator" in held and isinstance(held["generator"], (torch.Generator, type(None)))
    return list({id(x): x for x in [*found, *([loader] if own else [])]}.values())


@contextmanager
def seeded(loader: Any, seed: int) -> Iterator[None]:
    """Seed random draws of the block, including generators of a loader, and restore their states after it."""
    theirs = [(holder, holder.generator) for holder in _holders(loader)]
    with states_kept():
        seed_all(seed)
        for holder, _ in theirs:
            holder.generator = torch.Generator().manual_seed(seed)
        try:
            yield
        finally:
            for holder, generator in theirs:
                holder.generator = generator


def derived_seed(seed: int, number: int) -> int:
    """Return a seed derived from another seed and the number of an epoch, batch or item; no two draws are alike."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]) % 2**63


def read_batches(loader: Iterable[Any], seed: int, named: str = "data", most: float = inf) -> Iterator[Any]:
    """Yield a loader's batches with seeded draws until they hold `most` samples; errors of the loader: InvalidInput."""
    what, seen = f"{named}: reading a batch failed", 0
    with seeded(loader, seed):
        batches = guarded(what, lambda: iter(loader))
    for k in counting():
        with seeded(loader, derived_seed(seed, k) if k else seed):
            batch = guarded(what, lambda: next(batches, _END))
        if batch is _END:
            return
        yield batch
        seen += next((len(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), 0)
        if seen >= most:
            return


def read_item(data: Any, index: int, seed: int) -> Any:
    """Return an item of a map-style dataset, with a batch axis before tensors, arrays and numbers."""
    if isinstance(data, (Images, TensorDataset)):  # no random draws
        item = data[index]
    else:
        with seeded(None, seed):
            item = guarded(f"data: reading item {index} failed", lambda: data[index])
    kinds = (Tensor, np.ndarray, np.generic, Number)
    return pytree.tree_map(lambda x: torch.as_tensor(x)[None] if isinstance(x, kinds) else x, item)


def split_batch(batch: Any, specs: Sequence[InputSpec], named: str = "data") -> tuple[list[Tensor], list[Tensor]]:
    """Return a batch's tensors: a model's inputs, for `validated_input`, and the others, such as classes.

    Inputs come first; in a dictionary, whose order is arbitrary, each is the first tensor of equal rank and kind.
    Raises InvalidInput for too few.
    """
    leaves = pytree.tree_leaves(batch)
    rest = [x for x in leaves if isinstance(x, Tensor) and x.dim()]
    if len(rest) < len(specs):
        kinds = ", ".join(dict.fromkeys(type(x).__name__ for x in leaves)) or "nothing"
        raise InvalidInput(
            f"a batch of {named} holds {len(rest)} tensors ({kinds}), the model takes {len(specs)}: {_GIVE}: inputs, "
            "then perhaps classes"
        )

    inputs = []
    for spec in specs:
        likeness = [_likeness(x, spec) if isinstance(batch, Mapping) else (False, False) for x in rest]
        inputs.append(rest.pop(likeness.index(max(likeness))))
    return inputs, rest


def _likeness(x: Tensor, spec: InputSpec) -> tuple[bool, bool]:
    return x.dim() == len(spec.shape), x.is_floating_point() == getattr(torch, spec.dtype).is_floating_point


def validated_input(x: Tensor, spec: InputSpec, named: str = "data") -> Tensor:
    """Return a model's input in its dtype; raises InvalidInput if the model does not accept its shape."""
    wanted, free = getattr(torch, spec.dtype), (0, *spec.dynamic)
    same = x.dim() == len(spec.shape) and all(a in free or size == spec.shape[a] for a, size in enumerate(x.shape))
    if not same or x.is_floating_point() != wanted.is_floating_point:
        sizes = ", ".join("N" if a in free else str(size) for a, size in enumerate(spec.shape))
        raise InvalidInput(
            f"{named}: images are {tuple(x.shape)} of {x.dtype}, but input '{spec.name}' takes ({sizes}) of "
            f"{spec.dtype}; normalise and resize them as the model expects"
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        raise InvalidInput(f"{named}: images hold NaN or infinite values; repair or remove them")
    return x.to(wanted)


def classes_of(rest: Sequence[Tensor], count: int) -> Tensor | None:
    """Return the classes of `count` images, (N,), from the first tensor after the inputs, (N,) or (N, 1), if any."""
    if not rest:
        return None
    found = rest[0].squeeze(1) if rest[0].dim() == 2 and rest[0].shape[1] == 1 else rest[0]
    if found.dim() != 1 or len(found) != count or found.is_floating_point() or found.is_complex():
        return None
    return None if unlabelled(found) else found.long()


def unlabelled(classes: Tensor) -> bool:
    """Return whether all images are without a class."""
    return bool((classes == UNKNOWN).all())


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Inputs to calibrate on, on the CPU."""

    batches: tuple[tuple[Tensor, ...], ...]  # of the model's tensor inputs in order, with the batch along axis 0
    count: int  # number of images
    digest: str  # SHA-256 of shapes and values
    given: tuple[tuple[Tensor, ...], ...] = ()  # for a submodule, the whole model's inputs behind `batches`
    classes: tuple[int, int] | None = None  # minimum and maximum; None if there are none

    def described(self) -> dict[str, Any]:
        """Return JSON values for the plan."""
        return {"images": self.count, "sha256": self.digest}


def calibration_images(
    given: Any, program: Program, whole: Whole | None, most: int = MOST, seed: int = 0
) -> Calibration:
    """Return calibration images as a program's inputs; other arguments and errors are those of `gather`.

    If a submodule was traced, the images are inputs of the whole model, whose dynamic axes are unknown.
    """
    if isinstance(given, Calibration):
        return given
    if whole is None:
        return gather(given, program.inputs, most, seed)
    call = whole.example or Callee(whole.model, ())
    found, arriving = gather(given, specs_of(call), most, seed), []
    for batch in found.batches:
        inputs = [x.to(example) for x, example in zip(batch, call.tensors, strict=True)]
        part = reach(whole.model, whole.name, *call.arguments(inputs)).part
        arriving.append(tuple(x.cpu() for x in part.tensors))
    return replace(found, batches=tuple(arriving), given=found.batches)


def specs_of(call: Callee) -> list[InputSpec]:
    """Return a whole model's inputs by an example; any axis may be dynamic."""
    return [
        InputSpec("input", tuple(x.shape), str(x.dtype)[len("torch.") :], tuple(range(x.dim()))) for x in call.tensors
    ]


def gather(given: Any, inputs: Sequence[InputSpec], most: int = MOST, seed: int = 0) -> Calibration:
    """Return at most `most` calibration images as batches of a model's inputs; raises InvalidInput if they do not fit.

    `given` is a tensor (N, C, H, W), a Dataset, or a sequence or DataLoader of batches, each the model's input or a
    tuple of its inputs; further elements, such as labels, are ignored.
    """
    batches, classes = list[list[Tensor]](), list[Tensor | None]()
    for batch in _batches(given, most, seed):
        found, rest = split_batch(batch, inputs)
        batches.append([x.detach().cpu() for x in found])
        classes.append(classes_of(rest, len(found[0])))
    if not batches:
        raise InvalidInput(f"data holds no images: {_GIVE}")
    with explained("cannot join the batches of data"):
        whole = [torch.cat(column)[:most] for column in zip(*batches, strict=True)]
    whole = [validated_input(x, spec) for x, spec in zip(whole, inputs, strict=True)]
    fixed = 0 not in inputs[0].dynamic
    size = inputs[0].shape[0] if fixed else batch_size(whole[0].shape, 32)
    count = len(whole[0]) // size * size if fixed else len(whole[0])
    if not count or any(len(x) != len(whole[0]) for x in whole):
        raise InvalidInput(f"data: every input takes equally many images, at least {size if fixed else 1}")
    whole = [x[:count] for x in whole]
    parts = tuple(zip(*(torch.split(x, size) for x in whole), strict=True))
    known = [x for x in classes if x is not None]
    ends = (min(int(x.min()) for x in known), max(int(x.max()) for x in known)) if len(known) == len(classes) else None
    return Calibration(parts, count, digest_of(whole), classes=ends)


def _batches(given: Any, most: int, seed: int) -> Iterator[Any]:
    """Yield batches as needed; images of a dataset are evenly spaced."""
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, Tensor) for x in given):
        given = given[0] if given[0].dim() != given[1].dim() else given
    if isinstance(given, Images):
        found = [image for image, _ in given.some(most)]
        yield from [torch.stack(found)] if found else []
    elif isinstance(given, Tensor):
        yield given[evenly_spaced(len(given), most)]
    elif isinstance(given, Dataset) and hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        for k in evenly_spaced(len(given), most):
            yield read_item(given, k, derived_seed(seed, k))
    elif isinstance(given, (str, Path, Mapping)) or not isinstance(given, Iterable):
        raise InvalidInput(f"data is of type {type(given).__name__}: {_GIVE}")
    else:
        yield from read_batches(given, seed, most=most)
