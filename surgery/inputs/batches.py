"""The user's batches: a model's inputs, optionally followed by classes.

Random draws of a dataset or loader while it is read here are seeded, so that repeated and resumed runs see the same
data. The user's own generators are left unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from surgery.core import InputSpec
from surgery.errors import InvalidInput
from surgery.inputs import random_state
from surgery.inputs.datasets import UNKNOWN, Images
from surgery.inputs.usercode import guarded

_END = object()
_HOLDERS = ("base_dataloader", "batch_sampler", "sampler")
"""Attributes of a DataLoader, or Accelerate's, for samplers and their generators."""


def read_batches(loader: Iterable[Any], seed: int, named: str = "data") -> Iterator[Any]:
    """Yield a loader's batches with seeded draws; raises InvalidInput if the loader or its dataset raises."""
    draws, what = _Draws(seed, loader), f"{named}: reading a batch failed"
    with draws.ours():
        batches = guarded(what, lambda: iter(loader))
    while True:
        with draws.ours():
            batch = guarded(what, lambda: next(batches, _END))
        if batch is _END:
            return
        yield batch


@contextmanager
def seeded(loader: Any, seed: int) -> Iterator[None]:
    """Seed random draws of the block, including generators of a loader, and restore their states after it."""
    with _Draws(seed, loader).ours():
        yield


def derived_seed(seed: int, number: int) -> int:
    """Return a seed derived from another seed and the number of an epoch or an item."""
    return (seed * 1_000_003 + number) % 2**63


def read_item(data: Any, index: int, seed: int, named: str = "data") -> Any:
    """Return an item of a map-style dataset as a batch of one; errors as in `read_batches`.

    Tensors, arrays and numbers get a batch axis; other values are unchanged.
    """
    if isinstance(data, (Images, TensorDataset)):  # no random draws
        item = data[index]
    else:
        with _Draws(seed).ours():
            item = guarded(f"{named}: reading item {index} failed", lambda: data[index])
    kinds = (Tensor, np.ndarray, np.generic, Number)
    return pytree.tree_map(lambda x: torch.as_tensor(x)[None] if isinstance(x, kinds) else x, item)


def split_batch(batch: Any, specs: Sequence[InputSpec], named: str = "data") -> tuple[list[Tensor], list[Tensor]]:
    """Return a batch's tensors: a model's inputs, for `validated_input`, and the others, such as classes.

    Inputs come first; in a dictionary, whose order is arbitrary, each is the first tensor of equal rank and kind.

    Args:
        batch: the input, or a tuple, list or dictionary.
        specs: the model's inputs.
        named: what to call the data in messages.

    Raises:
        InvalidInput: the batch has fewer tensors than the model has inputs.
    """
    leaves = pytree.tree_leaves(batch)
    rest = [x for x in leaves if isinstance(x, Tensor) and x.dim()]
    if len(rest) < len(specs):
        kinds = ", ".join(dict.fromkeys(type(x).__name__ for x in leaves)) or "nothing"
        raise InvalidInput(
            f"a batch of {named} holds {len(rest)} tensors ({kinds}), the model takes {len(specs)}: give a tensor "
            "(N, C, H, W), a Dataset, or a sequence or DataLoader of batches: inputs, then perhaps classes"
        )
    inputs = []
    for spec in specs:
        like = [_like(x, spec) if isinstance(batch, Mapping) else (False, False) for x in rest]
        inputs.append(rest.pop(like.index(max(like))))
    return inputs, rest


def _like(x: Tensor, spec: InputSpec) -> tuple[bool, bool]:
    return x.dim() == len(spec.shape), x.is_floating_point() == getattr(torch, spec.dtype).is_floating_point


def validated_input(x: Tensor, spec: InputSpec, named: str = "data") -> Tensor:
    """Return a model's input in its dtype; raises InvalidInput if the model does not accept its shape."""
    wanted = getattr(torch, spec.dtype)
    free = (0, *spec.dynamic)
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
    """Return the classes of a batch, (N,): one integer per image; None if there are none.

    Args:
        rest: the tensors after the inputs; the first one is used, (N,) or (N, 1).
        count: N.
    """
    if not rest:
        return None
    found = rest[0].squeeze(1) if rest[0].dim() == 2 and rest[0].shape[1] == 1 else rest[0]
    if found.dim() != 1 or len(found) != count or found.is_floating_point() or found.is_complex():
        return None
    return None if unlabelled(found) else found.long()


def unlabelled(classes: Tensor) -> bool:
    """Return whether all images are without a class."""
    return bool((classes == UNKNOWN).all())


class _Draws:
    """Private random states: of the global generators, and of generators that replace a loader's."""

    def __init__(self, seed: int, loader: Any = None) -> None:
        self._generators = [(x, torch.Generator().manual_seed(seed)) for x in _holders(loader)]
        with random_state.states_kept():
            random_state.seed_all(seed)
            self._states = random_state.states()

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Use these states within the block."""
        theirs = [(x, x.generator) for x, _ in self._generators]
        with random_state.states_kept():
            random_state.restore(self._states)
            for x, generator in self._generators:
                x.generator = generator
            try:
                yield
            finally:
                self._states = random_state.states()
                for x, generator in theirs:
                    x.generator = generator


def _holders(loader: Any) -> list[Any]:
    """Return the loader and its samplers that have a torch generator."""
    held = getattr(loader, "__dict__", {})
    found = [x for name in _HOLDERS if name in held for x in _holders(held[name])]
    own = "generator" in held and isinstance(held["generator"], (torch.Generator, type(None)))
    return list({id(x): x for x in [*found, *([loader] if own else [])]}.values())
