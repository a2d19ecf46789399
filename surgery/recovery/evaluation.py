"""Evaluation of a compact model: agreement with the dense model, accuracies of both, and the user's own metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import isfinite, nan, sqrt
from numbers import Real
from typing import Any

import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from surgery.capture import evaluating
from surgery.core import InputSpec, flat_outputs
from surgery.errors import InvalidInput
from surgery.inputs import (
    as_loader,
    batch_size,
    classes_of,
    read_batches,
    split_batch,
    unlabelled,
    user_object,
    validated_input,
)

Model = Callable[[Sequence[Tensor]], Any]
"""A batch of inputs → the model's result."""
Pair = tuple[Sequence[Tensor], Tensor | None]
"""A batch of inputs, and their classes if known."""
Evaluate = Callable[[Any], Mapping[str, float]]
"""A model → metrics by name, of which the first is maximised."""
JUDGED = 10_000  # maximum number of evaluation images of a dataset
KEPT, HELD = 2**30, 2**28
"""Maximum bytes of images, and of dense outputs, to keep in memory; beyond that, they are read and computed again."""
CONFIDENCE = 0.95
_EXACT = (0.0, 0.0, 0.0)
_NOTHING = 1e-30


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of a model with the dense one on the same images."""

    images: int
    cosine: float  # mean cosine between the two models' outputs, as one vector per image
    error: float  # squared difference over the variance of the dense model's outputs
    top1_match: float | None = None  # share with the same predicted class; None if outputs are not class scores
    divergence: float | None = None  # Kullback-Leibler, of the dense distribution from this one, in nats; None likewise
    accuracy: float | None = None  # share of correctly classified images; None without labels
    drop: tuple[float, float, float] | None = None  # points of accuracy lost, with 95 % interval; None without labels
    traded: tuple[int, int] | None = None  # images that only the dense model, and only this one, has right
    differs: tuple[float, float, float] | None = None  # points of images with other predicted classes, likewise
    correlation: float = nan  # of the two models' outputs over images; NaN if not finite


class Reference:
    """The dense model's outputs on evaluation images, with which other models are compared batch by batch.

    Outputs that are too large to keep are computed again, from batches that must be identical in each iteration. Raises
    InvalidInput if there are none, or labels are out of range.
    """

    def __init__(self, dense: Model, batches: Iterable[Pair], named: str = "") -> None:
        self._dense, self._batches, self.named = dense, batches, named
        self.labels: Tensor | None = None  # class of each image, (N,)
        self.classes, held = 0, 0  # number of classes; 0 if outputs are not class scores
        seen, outputs = list[Tensor | None](), list[Tensor]()
        for inputs, labels in batches:
            found, self.classes = _outputs(dense, inputs)
            seen.append(labels)
            held += found.numel() * found.element_size()
            if held <= HELD:
                outputs.append(found)
        if not seen:
            raise InvalidInput("there are no images to evaluate on")
        self.outputs = outputs if held <= HELD else None
        self.notes = batches.notes if isinstance(batches, Pairs) else []
        known = [x for x in seen if x is not None]
        if len(known) == len(seen) and not self.classes:
            note = f"the classes of {named} are not used: the model's output is not (N, classes) alone"
            self.notes = [note, *self.notes]
        elif len(known) == len(seen):
            self.labels = torch.cat(known)
            validate_labels(named, int(self.labels.min()), int(self.labels.max()), self.classes)

    def renewed(self) -> Reference:
        """Return the reference of the same model and images, with the weights that the model has now."""
        return Reference(self._dense, self._batches, self.named)

    def judge(self, model: Model | None) -> Agreement:
        """Return the agreement of a model with the dense one; of the dense one with itself for None."""
        sums, cosines, divergences, predicted = _Sums(), list[Tensor](), list[Tensor](), list[Tensor]()
        for k, (inputs, _) in enumerate(self._batches):
            own = self.outputs[k] if self.outputs is not None else _outputs(self._dense, inputs)[0]
            pair = torch.stack([own, own if model is None else _outputs(model, inputs)[0]]).double()
            sums.add(pair)
            cosines.append(torch.nn.functional.cosine_similarity(pair[0], pair[1], dim=1))
            if self.classes:
                logs, others = pair.log_softmax(2)
                divergences.append((logs.exp() * (logs - others)).sum(1))
                predicted.append(pair.argmax(2))
        found = Agreement(sums.count, float(torch.cat(cosines).mean()), sums.error(), correlation=sums.correlation())
        if not self.classes:
            return found
        ours, theirs = torch.cat(predicted, 1)
        value, low, high = paired_drop(torch.ones(sums.count), ours == theirs) if model is not None else _EXACT
        found = replace(
            found,
            top1_match=float((ours == theirs).double().mean()),
            divergence=float(torch.cat(divergences).mean()),
            differs=(value, max(0.0, low), high),
        )
        if self.labels is None:
            return found
        before, after = ours == self.labels, theirs == self.labels
        return replace(
            found,
            accuracy=float(after.double().mean()),
            drop=paired_drop(before, after) if model is not None else _EXACT,
            traded=(int((before & ~after).sum()), int((after & ~before).sum())),
        )


def _outputs(model: Model, inputs: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Return all floating outputs, (N, values), and the number of classes: 0 if they are not (N, classes)."""
    with torch.no_grad():
        found = [x.float() for x in flat_outputs(model(inputs))]
    if not found:
        raise InvalidInput("the model returns no floating-point tensor: there is nothing to evaluate")
    classes = found[0].shape[1] if len(found) == 1 and found[0].dim() == 2 and found[0].shape[1] > 1 else 0
    return torch.cat([x.reshape(len(x), -1) for x in found], 1), classes


class _Sums:
    """Sums over two models' outputs, shifted by the first image's, for variance and correlation."""

    def __init__(self) -> None:
        self.count, self._between, self._products = 0, 0.0, torch.zeros(2, 2, dtype=torch.float64)
        self._pivot = self._sums = torch.zeros(2, 0)

    def add(self, pair: Tensor) -> None:
        """Add a batch, (2, N, values)."""
        if not self.count:
            self._pivot, self._sums = pair[:, 0].clone(), torch.zeros_like(pair[:, 0])
        self.count += pair.shape[1]
        self._between += float((pair[0] - pair[1]).square().sum())
        pair = pair - self._pivot.unsqueeze(1)
        self._sums += pair.sum(1)
        self._products += pair.flatten(1) @ pair.flatten(1).T

    def _covariance(self) -> Tensor:
        """Covariance of the two over images, times their number, (2, 2); of the values for a single image."""
        if self.count == 1:
            return self._pivot @ self._pivot.T
        return self._products - self._sums @ self._sums.T / self.count

    def error(self) -> float:
        """Squared difference over the variance of the first model's outputs, or over their square if it is 0."""
        variance = max(float(self._covariance()[0, 0]), 0.0) if self.count > 1 else 0.0
        whole = float(self._products[0, 0]) + self.count * float(self._pivot[0].square().sum())
        return self._between / (variance or whole or 1.0)

    def correlation(self) -> float:
        """Correlation of the two over images, or over values for a single image."""
        covariance = self._covariance()
        scale = float(covariance.diagonal().clamp_min(0).prod().sqrt())
        return 0.0 if scale < _NOTHING else float(covariance[0, 1]) / scale


def validate_labels(named: str, lowest: int, highest: int, classes: int) -> None:
    """Raise InvalidInput if the smallest or largest label is not among the model's classes."""
    if lowest < 0 or highest >= classes:
        raise InvalidInput(
            f"{named}: a label is {lowest if lowest < 0 else highest}, but the model has {classes} classes, counted "
            "from 0; give labels in the order of the model's outputs"
        )


def paired_drop(dense: Tensor, compact: Tensor) -> tuple[float, float, float]:
    """Return the accuracy lost in points, with its 95 % score interval, paired on the same images.

    Both are given as whether each image is classified correctly, (N,), or the share of several models that do so. Both
    ends are monotonic in images lost and won, and the interval does not collapse if none are.

    Source: Tango 1998, Statistics in Medicine 17(8), 891-908.
    """
    apart, count = dense.double() - compact.double(), len(dense)
    lost, won = float(apart.clamp_min(0).sum()), float((-apart).clamp_min(0).sum())
    middle, quantile = (lost - won) / count, float(norm.ppf(0.5 + CONFIDENCE / 2))

    def beyond(difference: float, sign: int) -> float:
        """Return the deviation from the expected difference, minus the critical value."""
        b = (2 * count - lost + won) * difference - lost - won
        root = sqrt(max(0.0, b * b + 8 * count * won * difference * (1 - difference)))
        least = (root - b) / (4 * count)  # maximum-likelihood share of pairs won, given the difference
        spread = sqrt(max(0.0, count * (2 * least + difference * (1 - difference))))
        return sign * (lost - won - count * difference) - quantile * spread

    wide = quantile**2 / (count + quantile**2)
    low, high = (-wide, wide) if not lost and not won else (-1.0, 1.0)
    if low < middle and (lost or won):
        low = float(brentq(beyond, low, middle, args=(1,)))
    if middle < high and (lost or won):
        high = float(brentq(beyond, middle, high, args=(-1,)))
    return 100 * middle, 100 * low, 100 * high


class Pairs:
    """Batches of inputs with their classes, kept in memory or read again, and then required to be the same."""

    def __init__(self, given: Any, specs: Sequence[InputSpec], seed: int = 0, most: int = JUDGED) -> None:
        fixed = 0 not in specs[0].dynamic
        size = specs[0].shape[0] if fixed else batch_size(specs[0].shape)
        loader = as_loader(given, batch=size, most=most, option="val")
        self._loader: Any = list(read_batches(loader, seed, "val")) if isinstance(loader, Iterator) else loader
        self._specs, self._size, self._seed, self._most = specs, size if fixed else None, seed, most
        self._sums: list[list[float]] = []
        self._held: list[Pair] | None = None
        self._dropped = False
        self.count = self._left = 0

    @property
    def notes(self) -> list[str]:
        """Notes for the user after the first iteration."""
        left = f"the model takes {self._size} images at a time: the last {self._left} of --val are left out"
        classes = "the classes of --val are not one whole number for each image: they are left out"
        return [*[classes] * self._dropped, *[left] * (self._left > 0)]

    def __iter__(self) -> Iterator[Pair]:
        if self._held is not None:
            yield from self._held
            return
        held, kept, count, pairs = list[Pair](), 0, 0, self._pairs()
        for k, (inputs, classes) in enumerate(pairs if self._size is None else self._regrouped(pairs, self._size)):
            sums = [float(x.double().sum()) for x in inputs]
            if k == len(self._sums):
                self._sums.append(sums)
            elif self._sums[k] != sums:
                raise InvalidInput(
                    "val gives other images each time it is read: give them in one order, without augmentation "
                    "(shuffle=False)"
                )
            count += len(inputs[0])
            kept += sum(x.numel() * x.element_size() for x in inputs)
            if kept <= KEPT:
                held.append((inputs, classes))
            yield inputs, classes
        if not count:
            few = f"only {self._left} images, and the model takes {self._size} at a time" if self._left else "no images"
            raise InvalidInput(f"val holds {few}: give a folder, an .npz file or a DataLoader with more")
        self.count, self._held = count, held if kept <= KEPT else None

    def _pairs(self) -> Iterator[Pair]:
        for batch in read_batches(self._loader, self._seed, "val", self._most):
            inputs, rest = split_batch(batch, self._specs, "val")
            inputs = [validated_input(x, spec, "val") for x, spec in zip(inputs, self._specs, strict=True)]
            classes = classes_of(rest, len(inputs[0]))
            self._dropped |= bool(rest) and classes is None and not unlabelled(rest[0])
            yield inputs, classes

    def _regrouped(self, pairs: Iterable[Pair], size: int) -> Iterator[Pair]:
        """Yield the same images in batches of the given size, dropping an incomplete last batch."""
        held, labels = [list[Tensor]() for _ in self._specs], list[Tensor | None]()
        for inputs, classes in pairs:
            labels += torch.split(classes, 1) if classes is not None else [None] * len(inputs[0])
            for column, x in zip(held, inputs, strict=True):
                column += torch.split(x, 1)
            while len(labels) >= size:
                first = [x for x in labels[:size] if x is not None]
                yield [torch.cat(column[:size]) for column in held], torch.cat(first) if len(first) == size else None
                held, labels = [column[size:] for column in held], labels[size:]
        self._left = len(labels)


def open_metric(given: str | Callable[[Any], Any]) -> Evaluate:
    """Return the user's function of a model, or `FILE.py:CALLABLE`, which must give finite numbers by name."""
    named, function = "metric", given
    if isinstance(given, str):
        named, (owner, _, name) = f"--metric {given}", given.rpartition(":")
        if not owner:
            raise InvalidInput(f"{named}: write FILE.py:CALLABLE, a function of a model that returns {{metric: value}}")
        function = user_object(owner, name)
    if not callable(function):
        raise InvalidInput(f"{named} is of type {type(function).__name__}, not a function of a model")

    def run(model: Any) -> dict[str, float]:
        with evaluating(model) if isinstance(model, torch.nn.Module) else nullcontext(), torch.no_grad():
            found = function(model)
        if not isinstance(found, Mapping) or not found:
            raise InvalidInput(f"{named} returned {type(found).__name__}; return figures by name, as in {{'mAP': 0.4}}")
        wrong = [k for k, v in found.items() if not isinstance(v, Real) or not isfinite(float(v))]
        if wrong:
            raise InvalidInput(f"{named}: '{wrong[0]}' is {found[wrong[0]]!r}; every figure must be a finite number")
        return {str(name): float(value) for name, value in found.items()}

    return run


def points_lost(dense: Mapping[str, float], compact: Mapping[str, float]) -> float:
    """Return the decrease of the first figure, times 100 if the dense model's is between -1 and 1."""
    name, value = next(iter(dense.items()))
    if name not in compact:
        raise InvalidInput(f"--metric: '{name}' was returned for the dense model and not for the compact one")
    return (value - compact[name]) * (100.0 if abs(value) <= 1 else 1.0)
