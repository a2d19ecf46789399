"""Settings, loss and history of training."""

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
    """Training settings.

    Attributes:
        epochs: passes over the data.
        batch: images per step, over all processes together.
        lr: maximum learning rate of AdamW, reached after the first 5 % of the steps and followed by cosine decay.
        weight_decay: weight decay of AdamW, on weights of two axes or more.
        temperature: temperature of the compared distributions.
        ema: decay of the moving average of the weights, which is the result; 0 for the last weights.
        mixed_precision: `no`, `fp16` or `bf16`.
        held_out: share of images held out to evaluate progress, at least 64, or a fifth of all if that is fewer; 0:
            none. With a DataLoader, progress is evaluated on its first 512 images, which are also trained on.
        patience: evaluations (one per epoch) without progress after which training ends.
        shift: shift images by up to this share of their size.
        flip: flip half of the images left to right; None: only for distillation, since flipping may change classes.
        mix: mix half of the images in pairs; only for distillation.
        every: steps between checkpoints.
        checkpoint: folder for checkpoints; None for none.
        seed: seed of all random draws.
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
    """One evaluation during training: the step, the mean training loss since the last one, and the held-out loss."""

    step: int
    epoch: float
    lr: float
    loss: float
    held_out: float | None


@dataclass(slots=True)
class History:
    """Training history.

    Attributes:
        marks: one per epoch.
        steps: number of steps.
        processes: number of processes.
        resumed: step at which training resumed from a checkpoint; 0 for none.
        passed_over: whether a checkpoint of another run (other data, weights, plan or settings) was ignored.
        stopped: why it ended before its last epoch; empty if it did not.
        best: the mark whose weights are kept; 0 for the initial weights.
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
    """Return the message for a label that is out of range."""
    return (
        f"{named}: a label is {label}, but the model has {classes} classes, counted from 0; give labels in the order "
        "of the model's outputs"
    )


def loss_of(found: Sequence[Tensor], wanted: Sequence[Tensor], classes: Tensor | None, temperature: float) -> Tensor:
    """Return the loss between outputs and the teacher's outputs, and the classes if given.

    Args:
        found: outputs of the student.
        wanted: outputs of the teacher. A single output (N, classes) is taken as logits, whose distributions are
            compared; other outputs are compared by value.
        classes: (N,), or None.
        temperature: temperature of the distributions.

    Raises:
        InvalidInput: a class is out of range, or there are classes but no logits.
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
