"""Agreement of a compact model's outputs with the dense model's, and accuracies of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import nan, sqrt
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.stats import bootstrap, norm
from torch import Tensor

from surgery.core import flat_outputs
from surgery.errors import InvalidInput

Model = Callable[[Sequence[Tensor]], Any]
"""A batch of inputs → the model's result."""
Judged = Iterable[tuple[Sequence[Tensor], Tensor | None]]
CONFIDENCE = 0.95
RESAMPLES = 5000
FEW, MANY = 10, 30
"""Images on which two models differ: up to the first number the bootstrap is not used, from the second only it."""
HELD = 2**28
"""Maximum bytes of dense outputs to keep in memory; beyond that, the dense model is run again."""
_NOTHING = 1e-30


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of a model with the dense one on the same images.

    Attributes:
        images: number of images.
        cosine: mean cosine between the two models' outputs, as one vector per image.
        error: squared difference over the variance of the dense model's outputs.
        top1_match: share of images with the same predicted class; None if outputs are not class scores.
        divergence: Kullback-Leibler divergence of the dense distribution from this one, in nats; None likewise.
        accuracy: share of correctly classified images; None without labels.
        drop: accuracy lost against the dense model in points, paired, with its 95 % interval; None without labels.
        traded: numbers of images that only the dense model, and only this one, classifies correctly; None likewise.
        differs: points of images with different predicted classes, with the interval; None like `top1_match`.
        correlation: correlation of the two models' outputs over images, -1 to 1; NaN if not finite.
    """

    images: int
    cosine: float
    error: float
    top1_match: float | None = None
    divergence: float | None = None
    accuracy: float | None = None
    drop: tuple[float, float, float] | None = None
    traded: tuple[int, int] | None = None
    differs: tuple[float, float, float] | None = None
    correlation: float = nan


@dataclass(slots=True, eq=False)
class Reference:
    """The dense model's outputs on evaluation images, with which other models are compared batch by batch.

    Attributes:
        dense_model: run again if its outputs are too large to keep.
        batches: batches of inputs and classes (or None), identical in each iteration.
        labels: class of each image, (N,), or None.
        outputs: outputs of the dense model for each batch, or None if too large.
        classes: number of classes, 0 if outputs are not class scores.
        named: description of the images.
        notes: notes for the user.
    """

    dense_model: Model
    batches: Judged
    labels: Tensor | None
    outputs: Sequence[Sequence[Tensor]] | None
    classes: int
    named: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, dense: Model, batches: Judged, named: str) -> Reference:
        """Run the dense model; raises InvalidInput if labels are out of range."""
        seen, outputs, classes, held = list[Tensor | None](), list[Sequence[Tensor]](), 0, 0
        for inputs, labels in batches:
            found = _flat(dense, inputs)
            classes = _classes_of(found)
            seen.append(labels)
            held += sum(x.numel() * x.element_size() for x in found)
            if held <= HELD:
                outputs.append(found)
        if not seen:
            raise InvalidInput("there are no images to judge by")
        known = torch.cat([x for x in seen if x is not None]) if all(x is not None for x in seen) else None
        notes: tuple[str, ...] = ()
        if known is not None and not classes:
            known, notes = None, (f"the classes of {named} say nothing: the model's output is not (N, classes) alone",)
        if known is not None and not 0 <= int(known.min()) <= int(known.max()) < classes:
            wrong = int(known.min()) if int(known.min()) < 0 else int(known.max())
            raise InvalidInput(
                f"{named}: a label is {wrong}, but the model has {classes} classes, counted from 0; give labels in "
                "the order of the model's outputs"
            )
        return cls(dense, batches, known, outputs if held <= HELD else None, classes, named, notes)

    def dense(self) -> Agreement:
        """Return the agreement of the dense model with itself."""
        found = self._beside(None)
        exact = 0.0, 0.0, 0.0
        drop, differs = (exact if x is not None else None for x in (found.drop, found.differs))
        return replace(found, drop=drop, differs=differs)

    def judge(self, model: Model) -> Agreement:
        """Return the agreement of a model with the dense one."""
        return self._beside(model)

    def _pairs(self, model: Model | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the two models' outputs for each batch, (N, values) in float64; without a model, the dense one's."""
        for k, (inputs, _) in enumerate(self.batches):
            ours = self.outputs[k] if self.outputs is not None else _flat(self.dense_model, inputs)
            yield _rows(ours), _rows(ours if model is None else _flat(model, inputs))

    def _beside(self, model: Model | None) -> Agreement:
        sums, cosines, apart = _Sums(), list[Tensor](), list[Tensor]()
        same, right, rights, at = list[Tensor](), list[Tensor](), list[Tensor](), 0
        for own, other in self._pairs(model):
            sums.add(own, other)
            cosines.append(torch.nn.functional.cosine_similarity(own, other, dim=1))
            if not self.classes:
                continue
            logs = own.log_softmax(1)
            apart.append((logs.exp() * (logs - other.log_softmax(1))).sum(1))
            same.append(own.argmax(1) == other.argmax(1))
            if self.labels is not None:
                wanted = self.labels[at : at + len(own)]
                right.append(own.argmax(1) == wanted)
                rights.append(other.argmax(1) == wanted)
            at += len(own)
        found = Agreement(sums.count, float(torch.cat(cosines).mean()), sums.error(), correlation=sums.correlation())
        if not self.classes:
            return found
        alike = torch.cat(same)
        divergence, match = float(torch.cat(apart).mean()), float(alike.double().mean())
        differs = paired_drop(torch.ones_like(alike), alike)
        differs = differs[0], max(0.0, differs[1]), differs[2]
        found = replace(found, top1_match=match, divergence=divergence, differs=differs)
        if self.labels is None:
            return found
        before, after = torch.cat(right), torch.cat(rights)
        accuracy, drop = float(after.double().mean()), paired_drop(before, after)
        traded = int((before & ~after).sum()), int((after & ~before).sum())
        return replace(found, accuracy=accuracy, drop=drop, traded=traded)


@dataclass(slots=True, eq=False)
class _Sums:
    """Sums over two models' outputs, shifted by the first image's, for variance and correlation."""

    count: int = 0
    pivot: tuple[Tensor, Tensor] | None = None
    sums: list[Tensor] = field(default_factory=list)
    own: float = 0.0
    other: float = 0.0
    both: float = 0.0
    between: float = 0.0

    def add(self, own: Tensor, other: Tensor) -> None:
        """Add a batch, (N, values) each."""
        if self.pivot is None:
            self.pivot = own[0].clone(), other[0].clone()
            self.sums = [torch.zeros_like(own[0]), torch.zeros_like(other[0])]
        self.count += len(own)
        self.between += float((own - other).square().sum())
        own, other = own - self.pivot[0], other - self.pivot[1]
        self.sums = [total + x.sum(0) for total, x in zip(self.sums, (own, other), strict=True)]
        self.own += float(own.square().sum())
        self.other += float(other.square().sum())
        self.both += float((own * other).sum())

    def _centred(self) -> tuple[float, float, float]:
        a, b = (total / self.count for total in self.sums)
        pairs = ((self.own, a, a), (self.other, b, b), (self.both, a, b))
        own, other, both = (total - self.count * float((x * y).sum()) for total, x, y in pairs)
        return max(own, 0.0), max(other, 0.0), both

    def error(self) -> float:
        """Squared difference over the variance of the first model's outputs."""
        assert self.pivot is not None, "there are images"
        whole = self.own + self.count * float(self.pivot[0].square().sum())
        return self.between / (self._centred()[0] or whole or 1.0)

    def correlation(self) -> float:
        """Correlation of the two over images, or over values for a single image."""
        assert self.pivot is not None, "there are images"
        own, other, both = self._centred()
        if self.count == 1:
            a, b = self.pivot
            own, other, both = float(a.square().sum()), float(b.square().sum()), float((a * b).sum())
        scale = (own * other) ** 0.5 if own == own and other == other else float("nan")
        return both / scale if not 0 <= scale < _NOTHING else 0.0


def _flat(model: Model, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return all floating outputs of a batch, flattened."""
    with torch.no_grad():
        found = [x.float() for x in flat_outputs(model(inputs))]
    if not found:
        raise InvalidInput("the model returns no floating-point tensor: there is nothing to judge by")
    return found


def _rows(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(len(x), -1).double() for x in outputs], 1)


def _classes_of(found: Sequence[Tensor]) -> int:
    first = found[0]
    return first.shape[1] if first.dim() == 2 and first.shape[1] > 1 and len(found) == 1 else 0


def paired_drop(dense: Tensor, compact: Tensor) -> tuple[float, float, float]:
    """Return the accuracy lost in points, with its 95 % interval, paired on the same images.

    The bootstrap is unreliable if few images differ: up to `FEW`, the interval is Tango's score interval, from `MANY`
    the percentile bootstrap, with a transition in between. Both ends are monotonic in images lost and won.

    Args:
        dense: whether each image is classified correctly, (N,), or the share of several models that do so.
        compact: likewise for the evaluated model.

    Source: Tango 1998, Statistics in Medicine 17(8), 891-908.
    """
    apart = 100.0 * (dense.double() - compact.double()).numpy()
    mean, differing = float(apart.mean()), int(np.count_nonzero(apart))
    share = min(1.0, max(0.0, (differing - FEW) / (MANY - FEW)))
    low = high = 0.0
    if share > 0:
        found = bootstrap(
            (apart,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile",
            batch=100, rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        low, high = share * float(found.low), share * float(found.high)
    if share < 1:
        few = score_interval(float(apart.clip(0).sum()) / 100, float((-apart).clip(0).sum()) / 100, len(apart))
        low, high = low + (1 - share) * 100 * few[0], high + (1 - share) * 100 * few[1]
    return mean, low, high


def score_interval(lost: float, won: float, count: int) -> tuple[float, float]:
    """Return Tango's 95 % score interval of a difference between paired shares, -1 to 1.

    Args:
        lost: number of pairs with only the first correct.
        won: number of pairs with only the second correct.
        count: number of pairs.
    """
    quantile = float(norm.ppf(0.5 + CONFIDENCE / 2))

    def beyond(difference: float, sign: int) -> float:
        """Return the deviation from the expected difference, minus the critical value."""
        b = (2 * count - lost + won) * difference - lost - won
        root = sqrt(max(0.0, b * b + 8 * count * won * difference * (1 - difference)))
        least = (root - b) / (4 * count)  # maximum-likelihood share of pairs won, given the difference
        spread = sqrt(max(0.0, count * (2 * least + difference * (1 - difference))))
        return sign * (lost - won - count * difference) - quantile * spread

    if not lost and not won:
        wide = quantile**2 / (count + quantile**2)
        return -wide, wide
    middle = (lost - won) / count
    low = brentq(beyond, -1.0, middle, args=(1,)) if middle > -1 else -1.0
    high = brentq(beyond, middle, 1.0, args=(-1,)) if middle < 1 else 1.0
    return float(low), float(high)
