"""How far a compact model's outputs are from the dense model's, and how many classes both get right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from surgery.errors import InvalidInput
from surgery.numerics import flat_outputs

Model = Callable[[Sequence[Tensor]], Any]
"""A batch of inputs → whatever the model returns."""
Judged = Iterable[tuple[Sequence[Tensor], Tensor | None]]
CONFIDENCE = 0.95
RESAMPLES = 5000


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
        differs: points of images on which the two name another class, with the interval; None as `top1_match`.
    """

    images: int
    cosine: float
    error: float
    top1_match: float | None = None
    divergence: float | None = None
    accuracy: float | None = None
    drop: tuple[float, float, float] | None = None
    differs: tuple[float, float, float] | None = None


@dataclass(slots=True, eq=False)
class Reference:
    """What the dense model gives on the images to judge by: others are compared with it.

    Attributes:
        batches: of inputs and classes (or None), the same each time they are gone through.
        labels: of each image, (N,), or None.
        outputs: of the dense model, each (N, values of an image).
        classes: the output's number of classes, 0 where outputs are no classes.
        named: what the images are, for the reader.
    """

    batches: Judged
    labels: Tensor | None
    outputs: Sequence[Tensor]
    classes: int
    named: str
    right: Tensor | None = field(default=None)

    @classmethod
    def of(cls, dense: Model, batches: Judged, named: str) -> Reference:
        """Run the dense model; raises InvalidInput where labels are out of its range."""
        seen: list[Tensor | None] = []
        outputs, classes = _outputs(dense, batches, seen)
        labels = torch.cat([x for x in seen if x is not None]) if seen and all(x is not None for x in seen) else None
        if labels is not None and not classes:
            labels = None
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
            raise InvalidInput(
                f"{named}: a label is {wrong}, but the model has {classes} classes, counted from 0; give labels in "
                "the order of the model's outputs"
            )
        right = outputs[0].argmax(1) == labels if labels is not None else None
        return cls(batches, labels, outputs, classes, named, right)

    def dense(self) -> Agreement:
        """Return the dense model beside itself."""
        return self._beside(self.outputs)

    def judge(self, model: Model) -> Agreement:
        """Return how a model does beside the dense one."""
        return self._beside(_outputs(model, self.batches, [])[0])

    def correlation(self, model: Model) -> float:
        """Return how far a model's outputs go along with the dense model's, over images: -1 to 1; NaN if not finite."""
        own, other = (
            torch.cat([x.double() for x in xs], 1) for xs in (self.outputs, _outputs(model, self.batches, [])[0])
        )
        if len(own) > 1:
            own, other = own - own.mean(0), other - other.mean(0)
        both = own.norm() * other.norm()
        return float((own * other).sum() / both) if not 0 <= float(both) < 1e-30 else 0.0

    def _beside(self, found: Sequence[Tensor]) -> Agreement:
        own, other = (torch.cat([x.double() for x in xs], 1) for xs in (self.outputs, found))
        cosine = float(torch.nn.functional.cosine_similarity(own, other, dim=1).mean())
        varies = float((own - own.mean(0)).square().sum()) or float(own.square().sum()) or 1.0
        error = float((own - other).square().sum()) / varies
        if not self.classes:
            return Agreement(len(own), cosine, error)
        ours, theirs = self.outputs[0].double(), found[0].double()
        logs = ours.log_softmax(1)
        divergence = float((logs.exp() * (logs - theirs.log_softmax(1))).sum(1).mean())
        same = ours.argmax(1) == theirs.argmax(1)
        match, differs = float(same.double().mean()), paired_drop(torch.ones_like(same), same)
        if self.labels is None or self.right is None:
            return Agreement(len(own), cosine, error, match, divergence, differs=differs)
        right = theirs.argmax(1) == self.labels
        accuracy = float(right.double().mean())
        return Agreement(len(own), cosine, error, match, divergence, accuracy, paired_drop(self.right, right), differs)


def paired_drop(dense: Tensor, compact: Tensor) -> tuple[float, float, float]:
    """Return by how many points fewer images are right, and the bootstrap's 95 % interval, on the same images."""
    apart = 100.0 * (dense.double() - compact.double()).numpy()
    mean = float(apart.mean())
    if len(apart) < 2 or not apart.any() or (apart == apart[0]).all():
        return mean, mean, mean
    found = bootstrap(
        (apart,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile",
        batch=100, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return mean, float(found.low), float(found.high)


def _outputs(model: Model, batches: Judged, seen: list[Tensor | None]) -> tuple[list[Tensor], int]:
    """All outputs, each (N, values of an image), and how many classes the first has; labels go into `seen`."""
    each = []
    with torch.no_grad():
        for inputs, labels in batches:
            each.append([x.float() for x in flat_outputs(model(inputs))])
            seen.append(labels)
    if not each or not each[0]:
        raise InvalidInput("the model returns no floating-point tensor: there is nothing to judge by")
    first = each[0][0]
    classes = first.shape[1] if first.dim() == 2 and first.shape[1] > 1 and len(each[0]) == 1 else 0
    return [torch.cat([x.reshape(len(x), -1) for x in column]) for column in zip(*each, strict=True)], classes
