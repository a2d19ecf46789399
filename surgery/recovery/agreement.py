"""How far a compact model's outputs are from the dense model's, and how many classes both get right."""

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
"""A batch of inputs → whatever the model returns."""
Judged = Iterable[tuple[Sequence[Tensor], Tensor | None]]
CONFIDENCE = 0.95
RESAMPLES = 5000
FEW, MANY = 10, 30
"""Images on which two models differ: up to the first the bootstrap has no say about them, from the second it alone."""
HELD = 2**28
"""Bytes of the dense model's outputs that are held; where they take more, it is run again."""
_NOTHING = 1e-30


@dataclass(frozen=True, slots=True)
class Agreement:
    """A model beside the dense one, on the same images.

    Attributes:
        images: they are of.
        cosine: between the outputs of the two, all of them as one vector per image; the mean.
        error: squared difference over what varies in the dense model's outputs.
        top1_match: share of images on which both name the same class; None where outputs are no classes.
        divergence: Kullback-Leibler, of the dense model's distribution from this one's, in nats; None likewise.
        accuracy: share of images whose class it names; None without labels.
        drop: points of accuracy that it names less than the dense model, paired, with its 95 % interval; or None.
        traded: images that the dense model alone names right, and images that this one alone does; None likewise.
        differs: points of images on which the two name another class, with the interval; None as `top1_match`.
        correlation: of the two models' outputs over images, -1 to 1; NaN if not finite.
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
    """What the dense model gives on the images to judge by: others are compared with it, batch by batch.

    Attributes:
        dense_model: run again where its outputs are too many to be held.
        batches: of inputs and classes (or None), the same each time they are gone through.
        labels: of each image, (N,), or None.
        outputs: of the dense model, for each batch those of it, or None where they are too many.
        classes: the output's number of classes, 0 where outputs are no classes.
        named: what the images are, for the reader.
        notes: what the user should know.
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
        """Run the dense model; raises InvalidInput where labels are out of its range."""
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
        """Return the dense model beside itself."""
        found = self._beside(None)
        exact = 0.0, 0.0, 0.0
        drop, differs = (exact if x is not None else None for x in (found.drop, found.differs))
        return replace(found, drop=drop, differs=differs)

    def judge(self, model: Model) -> Agreement:
        """Return how a model does beside the dense one."""
        return self._beside(model)

    def _pairs(self, model: Model | None) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch the two models' outputs, (N, values) of float64; without a model those of the dense one."""
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
    """Of two models' outputs over images, less the first image's: what varies, and how far they go together."""

    count: int = 0
    pivot: tuple[Tensor, Tensor] | None = None
    sums: list[Tensor] = field(default_factory=list)
    own: float = 0.0
    other: float = 0.0
    both: float = 0.0
    between: float = 0.0

    def add(self, own: Tensor, other: Tensor) -> None:
        """Take a batch in, (N, values) each."""
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
        """Squared difference over what varies in the first model's outputs."""
        assert self.pivot is not None, "there are images"
        whole = self.own + self.count * float(self.pivot[0].square().sum())
        return self.between / (self._centred()[0] or whole or 1.0)

    def correlation(self) -> float:
        """Of the two, over images; of one image, of its values."""
        assert self.pivot is not None, "there are images"
        own, other, both = self._centred()
        if self.count == 1:
            a, b = self.pivot
            own, other, both = float(a.square().sum()), float(b.square().sum()), float((a * b).sum())
        scale = (own * other) ** 0.5 if own == own and other == other else float("nan")
        return both / scale if not 0 <= scale < _NOTHING else 0.0


def _flat(model: Model, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All floating outputs of a batch."""
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
    """Return by how many points fewer images are right, with the 95 % interval, paired on the same images.

    Resampling a few images that differ tells little, and none nothing: where no more than `FEW` differ, the interval is
    Tango's score interval, from `MANY` the percentile bootstrap; in between one passes into the other. One more image
    lost moves neither end down, one more won neither up.

    Args:
        dense: whether each image is right, (N,), or which share of several models has it right.
        compact: likewise, of the model that is judged.

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
        lost: pairs of which only the first is right.
        won: pairs of which only the second is.
        count: all pairs.
    """
    quantile = float(norm.ppf(0.5 + CONFIDENCE / 2))

    def beyond(difference: float, sign: int) -> float:
        """How far the pairs are from what a difference lets expect, less what chance allows."""
        b = (2 * count - lost + won) * difference - lost - won
        root = sqrt(max(0.0, b * b + 8 * count * won * difference * (1 - difference)))
        least = (root - b) / (4 * count)  # the likeliest share of pairs won, given the difference
        spread = sqrt(max(0.0, count * (2 * least + difference * (1 - difference))))
        return sign * (lost - won - count * difference) - quantile * spread

    if not lost and not won:
        wide = quantile**2 / (count + quantile**2)
        return -wide, wide
    middle = (lost - won) / count
    low = brentq(beyond, -1.0, middle, args=(1,)) if middle > -1 else -1.0
    high = brentq(beyond, middle, 1.0, args=(-1,)) if middle < 1 else 1.0
    return float(low), float(high)
