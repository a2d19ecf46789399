"""Distillation and fine-tuning: the compact model trained on the dense one's outputs, and on labels if given.

Norms keep their statistics and dropout is off. Random draws depend only on the seed, the epoch and the image's index:
the result does not depend on the number of processes, and a resumed run gives the same weights.

Source: Hinton et al. 2015 (arXiv:1503.02531); identical views and mixed images after Beyer et al. 2022 (2106.05237).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from math import cos, isfinite, pi
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.data_loader import SeedableRandomSampler
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from surgery import config
from surgery.capture import evaluating
from surgery.core import Callee, InputSpec, first_line, flat_outputs, replacing
from surgery.errors import InvalidInput
from surgery.inputs import (
    UNKNOWN,
    Images,
    classes_of,
    derived_seed,
    read_batches,
    read_item,
    seeded,
    split_batch,
    validated_input,
)
from surgery.recovery.evaluation import validate_labels

WARM_UP = 0.05
HELD_OUT_LEAST = 64
JUDGED_BY = 512  # images of a DataLoader used to evaluate training, since none can be held out
CHECKPOINT = "training.pt"
"""Name of the file in the folder of checkpoints."""
NO_CLASSES = (
    "finetune learns classes, whole numbers, and these data have none: give a folder for each class, 'labels' in the "
    ".npz file, or batches of images and classes; distill does without"
)


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
    """Training history."""

    marks: list[Mark] = field(default_factory=list)  # one per epoch
    steps: int = 0
    processes: int = 1
    resumed: int = 0  # step at which training resumed from a checkpoint
    passed_over: bool = False  # a checkpoint of another run was ignored
    stopped: str = ""  # why it ended before its last epoch
    best: int = -1  # the mark whose weights are kept; 0 for the initial weights


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRun:
    """A compact model to be trained in place, on the outputs of the dense one."""

    compact: Callee
    dense: Callee
    data: Any  # a map-style Dataset of images and classes, or a DataLoader, used as given
    settings: config.Recovery
    inputs: Sequence[InputSpec]
    parameters: Sequence[nn.Parameter]  # those that may change
    labels: bool  # learn classes too, beside the dense model's outputs
    key: str = ""  # a checkpoint with another key is not resumed
    seed: int = 0


def train(run: TrainingRun, progress: Callable[[float], None]) -> History:
    """Train the compact model in place; must be called by all processes with the same arguments.

    Raises InvalidInput for too few images, no classes where they are needed, or a loss that is not finite.
    """
    learning = {id(p) for p in run.parameters}
    frozen = [p for p in run.compact.parameters() if p.requires_grad and id(p) not in learning]
    shared: dict[str, Any] = AcceleratorState._shared_state  # of the process, and possibly the user's
    known = dict(shared)
    shared.clear()
    try:
        accelerator = _accelerator(run.settings.mixed_precision)
        run.compact.to(accelerator.device)
        run.dense.to(accelerator.device)
        for p in frozen:
            p.requires_grad_(False)
        with evaluating(run.compact), evaluating(run.dense):
            return _Loop(run, accelerator).run(progress)
    finally:
        shared.clear()
        shared.update(known)
        for p in frozen:
            p.requires_grad_(True)
        run.compact.to("cpu")
        run.dense.to("cpu")


def _accelerator(precision: str) -> Accelerator:
    try:
        return Accelerator(
            mixed_precision=precision,
            cpu=not torch.cuda.is_available(),
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except (ValueError, ImportError) as error:
        what = f"mixed precision {precision} is not available on this machine"
        raise InvalidInput(f"{what}: {first_line(error)}") from error


class _Loop:
    """One training run, in each of its processes."""

    def __init__(self, run: TrainingRun, accelerator: Accelerator) -> None:
        self._run, self._how, self._accelerator = run, run.settings, accelerator
        self._history = History(processes=accelerator.num_processes)
        self._loader, self._judged = _loaders(run, accelerator.num_processes)
        self._views = data if isinstance(data := self._loader.dataset, Views) else None
        self._each = len(self._loader)
        self._steps = self._each * self._how.epochs
        self._weights = list[Tensor](run.parameters)
        self._average, self._best = ([p.detach().clone() for p in run.parameters] for _ in range(2))
        groups = [
            {"params": [p for p in run.parameters if p.dim() > 1], "weight_decay": self._how.weight_decay},
            {"params": [p for p in run.parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self._how.lr)
        self._step, self._since, self._summed = 0, 0, 0.0
        self._file = None if self._how.checkpoint is None else Path(self._how.checkpoint, CHECKPOINT)
        self._resume()
        with seeded(self._loader, run.seed):  # Accelerate keeps, and sets, the generators that it finds
            self._wrapped, self._stepper, self._loader = accelerator.prepare(run.compact, self._optimizer, self._loader)

    def run(self, progress: Callable[[float], None]) -> History:
        """Train to the end, and load the best weights into the compact model."""
        history = self._history
        if not history.marks:
            self._mark(0.0)
        while self._step < self._steps and not history.stopped:
            self._epoch(self._step // self._each, progress)
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._best)
        history.steps = self._step
        self._accelerator.wait_for_everyone()
        if self._file is not None and self._accelerator.is_main_process:
            shutil.rmtree(self._file.parent, ignore_errors=True)
        progress(1.0)
        return history

    def _epoch(self, epoch: int, progress: Callable[[float], None]) -> None:
        for batch in self._batches(epoch, self._step - epoch * self._each):
            for group in self._optimizer.param_groups:
                group["lr"] = self._rate()
            inputs, classes = self._split(batch)
            with self._accelerator.autocast():
                with torch.no_grad():
                    wanted = flat_outputs(self._run.dense(*inputs))
                loss = loss_of(flat_outputs(self._wrapped(*inputs)), wanted, classes, self._how.temperature)
            self._accelerator.backward(loss)
            self._stepper.step()
            self._stepper.zero_grad()
            self._step, self._since = self._step + 1, self._since + 1
            mean = float(self._accelerator.reduce(loss.detach(), "mean"))
            self._summed += self._finite(mean, "the loss")
            decay = min(self._how.ema, (1 + self._step) / (10 + self._step)) if self._how.ema else 0.0
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._weights, 1 - decay)
            progress(self._step / self._steps)
            if self._step % self._how.checkpoint_steps == 0:
                self._save()
        self._mark(self._rate())
        self._save()

    def _rate(self) -> float:
        """Return the learning rate of the next step: linear warm-up, then cosine decay."""
        warm = max(1, int(WARM_UP * self._steps))
        if self._step < warm:
            return self._how.lr * (self._step + 1) / warm
        return self._how.lr * 0.5 * (1 + cos(pi * (self._step - warm) / max(1, self._steps - warm)))

    def _batches(self, epoch: int, done: int) -> Iterator[Any]:
        """Yield an epoch's batches after the skipped ones; a user's loader reads those too, to advance its draws."""
        loader = self._loader
        if self._views is not None:
            self._views.epoch = epoch
            loader, done = self._accelerator.skip_first_batches(loader, done), 0
        loader.set_epoch(epoch)
        yield from islice(read_batches(loader, derived_seed(self._run.seed, epoch)), done, None)

    def _split(self, batch: Any) -> tuple[list[Tensor], Tensor | None]:
        """Split a batch into inputs and, if used, classes."""
        specs, device = self._run.inputs, self._accelerator.device
        found, rest = split_batch(batch, specs)
        inputs = [validated_input(x.to(device), spec) for x, spec in zip(found, specs, strict=True)]
        if not self._run.labels:
            return inputs, None
        classes = classes_of(rest, len(inputs[0]))
        if classes is None or bool((classes == UNKNOWN).any()):
            raise InvalidInput(NO_CLASSES)
        return inputs, classes.to(device)

    def _finite(self, value: float, what: str) -> float:
        if not isfinite(value):
            raise InvalidInput(
                f"training: {what} is not a number after {self._step} steps; lower the learning rate (--lr "
                f"{self._how.lr / 10:g}), and look for images that are not finite"
            )
        return value

    def _mark(self, lr: float) -> None:
        """Evaluate the averaged weights on held-out images, and keep them if they are the best so far."""
        history, held_out = self._history, None if self._judged is None else self._held_out(self._judged)
        mean = self._summed / self._since if self._since else float("nan")
        history.marks.append(Mark(self._step, self._step / self._each, lr, mean, held_out))
        self._since, self._summed = 0, 0.0
        if held_out is None or held_out <= min(m.held_out for m in history.marks if m.held_out is not None):
            history.best = len(history.marks) - 1
            torch._foreach_copy_(self._best, self._average)
        elif len(history.marks) - 1 - history.best >= self._how.patience:
            history.stopped = f"no progress in {self._how.patience} epochs"

    @torch.no_grad()
    def _held_out(self, batches: Any) -> float:
        total, count, own = 0.0, 0, [p.clone() for p in self._weights]
        torch._foreach_copy_(self._weights, self._average)
        for batch in read_batches(batches, self._run.seed):
            inputs, classes = self._split(batch)
            found, wanted = (flat_outputs(model(*inputs)) for model in (self._run.compact, self._run.dense))
            loss = loss_of(found, wanted, classes, self._how.temperature)
            total, count = total + float(loss) * len(inputs[0]), count + len(inputs[0])
        torch._foreach_copy_(self._weights, own)
        mean = torch.tensor(total / count, dtype=torch.float64, device=self._accelerator.device)
        mean = self._accelerator.reduce(mean, "mean")  # a DataLoader's batches may differ between processes
        return self._finite(float(mean), "the loss on held-out images")

    def _tensors(self) -> dict[str, list[Tensor]]:
        return {"weights": [p.detach() for p in self._weights], "average": self._average, "best": self._best}

    def _save(self) -> None:
        if self._file is None or not self._accelerator.is_main_process:
            return
        scaler = self._accelerator.scaler
        state = {
            **self._tensors(),
            "key": self._run.key,
            "optimizer": self._optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "counts": (self._step, self._since, self._summed),
            "history": asdict(self._history),
        }
        with suppress(OSError):  # reported by the next line
            self._file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file) as file:
            torch.save(state, file)

    def _resume(self) -> None:
        if self._file is None or not self._file.exists():
            return
        found: dict[str, Any] = {}
        with suppress(OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError):  # damaged
            found = torch.load(self._file, map_location="cpu", weights_only=True)
        self._history.passed_over = found.get("key") != self._run.key
        if self._history.passed_over:
            return
        for name, values in self._tensors().items():
            torch._foreach_copy_(values, found[name])
        self._optimizer.load_state_dict(found["optimizer"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(found["scaler"])
        self._step, self._since, self._summed = found["counts"]
        past = {**found["history"], "marks": [Mark(**mark) for mark in found["history"]["marks"]]}
        self._history = History(**{**past, "processes": self._history.processes, "resumed": self._step})


def loss_of(found: Sequence[Tensor], wanted: Sequence[Tensor], classes: Tensor | None, temperature: float) -> Tensor:
    """Return the loss between outputs and the teacher's outputs `wanted`, and the classes (N,) if given.

    A single output (N, classes) is taken as logits, whose distributions are compared; other outputs by value.
    """
    if len(wanted) == 1 and wanted[0].dim() == 2 and wanted[0].shape[1] > 1:
        ours, theirs = (F.log_softmax(x[0].float() / temperature, 1) for x in (found, wanted))
        loss = F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2
        if classes is None:
            return loss
        validate_labels("data", int(classes.min()), int(classes.max()), wanted[0].shape[1])
        return loss + F.cross_entropy(found[0].float(), classes)
    if classes is not None:
        raise InvalidInput("finetune learns classes, and this model's outputs are no logits (N, classes): use distill")
    return torch.stack(
        [
            F.mse_loss(a.float(), b.float()) / b.float().var(correction=0).clamp_min(1e-12)
            for a, b in zip(found, wanted, strict=True)
        ]
    ).mean()


class Views(Dataset[tuple[Tensor, ...]]):
    """Augmented images of one epoch, with the other inputs and the class; determined by seed, epoch and index."""

    def __init__(
        self,
        images: Any,
        chosen: Sequence[int],
        inputs: Sequence[InputSpec],
        seed: int,
        *,
        shift: float = 0.0,
        flip: bool = False,
        mix: bool = False,
    ) -> None:
        self._images, self._chosen, self._inputs, self._seed = images, chosen, inputs, seed
        self._shift, self._flip, self._mix = shift, flip, mix
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._chosen)

    def __getitem__(self, k: int) -> tuple[Tensor, ...]:
        """Return the image, other inputs, and the class."""
        index = self._chosen[k]
        generator = torch.Generator().manual_seed(self._seed_of(index))
        image, *rest = self._sample(index)
        image = self._augmented(image, generator)
        if self._mix and float(torch.rand((), generator=generator)) < 0.5:
            other = self._chosen[int(torch.randint(len(self._chosen), (), generator=generator))]
            share = float(torch.rand((), generator=generator))
            image = share * image + (1 - share) * self._augmented(self._sample(other)[0], generator)
        return image, *rest

    def _seed_of(self, index: int) -> int:
        return derived_seed(derived_seed(self._seed, self.epoch), index)

    def _sample(self, index: int) -> tuple[Tensor, ...]:
        inputs, rest = split_batch(read_item(self._images, index, self._seed_of(index)), self._inputs)
        label = classes_of(rest, 1)
        return *(x[0] for x in inputs), torch.tensor(UNKNOWN) if label is None else label[0]

    def _augmented(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if image.dim() != 3 or not image.is_floating_point():
            return image
        if self._flip and float(torch.rand((), generator=generator)) < 0.5:
            image = image.flip(2)
        down, right = (int(self._shift * size) for size in image.shape[1:])
        top, left = (int(torch.randint(2 * most + 1, (), generator=generator)) for most in (down, right))
        padded = F.pad(image[None], (right, right, down, down), mode="reflect")[0]
        return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


def validate_batch(data: Any, how: config.Recovery, processes: int) -> None:
    """Raise InvalidInput if the batch cannot be divided evenly among processes."""
    own = isinstance(data, DataLoader)
    batch = (data.batch_size or getattr(data.batch_sampler, "batch_size", 0)) if own else how.train_batch
    if not batch:
        raise InvalidInput("the DataLoader has no batch_size: give it one, so that what is a step of training is known")
    if batch % processes:
        option = "the DataLoader's batch_size" if own else "--train-batch"
        raise InvalidInput(f"batch {batch}: it is shared by {processes} processes; give a multiple of that by {option}")


def _loaders(run: TrainingRun, processes: int) -> tuple[Any, Any]:
    """Return batches to train on, and held-out batches (or None)."""
    data, how = run.data, run.settings
    validate_batch(data, how, processes)
    if not isinstance(data, (Dataset, DataLoader)) or not hasattr(getattr(data, "dataset", data), "__len__"):
        raise InvalidInput("for training, give a folder, an .npz file, a Dataset, or a DataLoader with a length")
    if isinstance(data, DataLoader):
        return data, list(read_batches(data, run.seed, most=JUDGED_BY))
    count = len(data)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(run.seed)).tolist()
    aside = max(int(how.held_out * count), min(HELD_OUT_LEAST, count // 5)) if how.held_out else 0
    batch = min(how.train_batch, (count - aside) // processes * processes)
    if batch < 2:
        raise InvalidInput(f"training: {count} images are too few for {processes} processes; give more with --data")
    flip = not run.labels if how.flip is None else how.flip
    mix = how.mix and not run.labels
    views = Views(data, order[aside:], run.inputs, run.seed, shift=how.shift, flip=flip, mix=mix)
    sampler = SeedableRandomSampler(views, data_seed=run.seed)
    loader = DataLoader(views, batch_size=batch, sampler=sampler, drop_last=True)
    return loader, DataLoader(Views(data, order[:aside], run.inputs, run.seed), batch_size=batch) if aside else None


def classes_in(data: Any, inputs: int) -> Tensor | None:
    """Return the classes of a dataset if they are known without reading its images."""
    if isinstance(data, Images):
        return torch.tensor(data.classes) if data.classes else None
    return data.tensors[inputs] if isinstance(data, TensorDataset) and len(data.tensors) > inputs else None
