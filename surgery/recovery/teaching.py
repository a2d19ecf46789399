"""What a lesson is: its settings, its loss, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.errors import InvalidInput

PRECISIONS = ("no", "fp16", "bf16")
NO_CLASSES = (
    "finetune learns classes, whole numbers, and these data have none: give a folder for each class, 'labels' in the "
    ".npz file, or batches of images and classes; distill does without"
)


@dataclass(frozen=True, slots=True)
class Training:
    """How to train.

    Attributes:
        epochs: over the data.
        batch: images a step, over all processes together.
        lr: highest learning rate of AdamW, reached after the first twentieth of the steps; then it falls as a cosine.
        weight_decay: of AdamW, on weights of two axes or more.
        temperature: of the distributions that are compared.
        ema: decay of the moving average of the weights, which is what is kept; 0 for the last weights.
        mixed_precision: `no`, `fp16` or `bf16`.
        held_out: share of the images by which it is judged how far training has come; at least 64 of them, or a fifth
            of all where that is fewer. With 0 nothing is. With a DataLoader, its first 512 images judge, which are
            learnt from as well.
        patience: judgements in a row without progress, one each epoch, after which training ends.
        shift: images are shifted by up to this share of their size.
        flip: images are flipped left to right, half of them; None: for distillation alone, since classes may not
            survive it.
        mix: pairs of images are mixed, half of them; for distillation alone.
        every: steps between checkpoints.
        checkpoint: folder for them; None for none.
        seed: of all that is drawn.
    """

    epochs: int = 10
    batch: int = 128
    lr: float = 3e-4
    weight_decay: float = 1e-4
    temperature: float = 2.0
    ema: float = 0.99
    mixed_precision: str = "no"
    held_out: float = 0.05
    patience: int = 5
    shift: float = 0.125
    flip: bool | None = None
    mix: bool = True
    every: int = 200
    checkpoint: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"epochs": self.epochs, "batch": self.batch, "patience": self.patience, "every": self.every}
        for name, value in whole.items():
            if not isinstance(value, int) or value < 1:
                raise InvalidInput(f"{name}={value!r}: give a whole number of at least 1")
        if not 0 < self.lr < 10 or not 0 <= self.ema < 1 or not 0 <= self.held_out < 1 or not 0 <= self.shift < 1:
            raise InvalidInput("lr is above 0; ema, held_out and shift are from 0 to less than 1")
        if self.mixed_precision not in PRECISIONS:
            raise InvalidInput(f"mixed_precision={self.mixed_precision!r}: there are {', '.join(PRECISIONS)}")


@dataclass(frozen=True, slots=True)
class Mark:
    """One judgement on the way: after so many steps, the mean loss since the last one and that on what is held out."""

    step: int
    epoch: float
    lr: float
    loss: float
    held_out: float | None


@dataclass(slots=True)
class History:
    """How training went.

    Attributes:
        marks: one each epoch.
        steps: taken in all.
        processes: that took part.
        resumed: the step at which a checkpoint was taken up; 0 for none.
        passed_over: whether there was a checkpoint of another run: of other data, weights, plan or settings.
        stopped: why it ended before its last epoch; empty if it did not.
        best: the mark whose weights are kept; 0 for those that it began with.
    """

    marks: list[Mark] = field(default_factory=list)
    steps: int = 0
    processes: int = 1
    resumed: int = 0
    passed_over: bool = False
    stopped: str = ""
    best: int = -1

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def out_of_range(named: str, label: int, classes: int) -> str:
    """Return the sentence on a label that is none of the model's classes."""
    return (
        f"{named}: a label is {label}, but the model has {classes} classes, counted from 0; give labels in the order "
        "of the model's outputs"
    )


def loss_of(found: Sequence[Tensor], wanted: Sequence[Tensor], classes: Tensor | None, temperature: float) -> Tensor:
    """Return how far outputs are from the teacher's, and from the classes where they are given.

    Args:
        found: outputs of the student.
        wanted: of the teacher. (N, classes) alone are logits: distributions are compared, else values.
        classes: (N,), or None.
        temperature: of the distributions.

    Raises:
        InvalidInput: a class is out of range, or there are classes and no logits.
    """
    if len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1:
        ours, theirs = found[0].float(), wanted[0].float()
        soft = F.kl_div(
            F.log_softmax(ours / temperature, 1),
            F.log_softmax(theirs / temperature, 1),
            log_target=True,
            reduction="batchmean",
        )
        loss = soft * temperature**2
        if classes is None:
            return loss
        if not 0 <= int(classes.min()) <= int(classes.max()) < ours.shape[1]:
            wrong = int(classes.min()) if int(classes.min()) < 0 else int(classes.max())
            raise InvalidInput(out_of_range("data", wrong, ours.shape[1]))
        return loss + F.cross_entropy(ours, classes)
    if classes is not None:
        raise InvalidInput("finetune learns classes, and this model's outputs are no logits (N, classes): use distill")
    apart = [(a.float() - b.float()).square().mean() for a, b in zip(found, wanted, strict=True)]
    spread = [b.float().var(correction=0).clamp_min(1e-12) for b in wanted]
    return torch.stack([a / s for a, s in zip(apart, spread, strict=True)]).mean()
