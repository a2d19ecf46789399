"""Distillation and fine-tuning: the compact model trained on the dense one's outputs, and on labels if given.

Norms keep their statistics and dropout is off: the model is trained as it will be deployed. The result does not depend
on the number of processes. A killed run resumes from its last checkpoint and gives the same weights.

Source: Hinton et al. 2015 (arXiv:1503.02531); identical views for teacher and student, and mixed images, after Beyer et
al. 2022 (arXiv:2106.05237). Processes and precision are handled by Hugging Face Accelerate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import cos, isfinite, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from surgery.capture import evaluating
from surgery.core import Callee, InputSpec, first_line, flat_outputs
from surgery.errors import InvalidInput
from surgery.inputs import UNKNOWN, classes_of, derived_seed, read_batches, seeded, split_batch, validated_input
from surgery.recovery.augmentation import Look, Order, Views
from surgery.recovery.checkpoint import Checkpoint
from surgery.recovery.teaching import NO_CLASSES, History, Mark, Training, loss_of

WARM_UP = 0.05
HELD_OUT_LEAST = 64
JUDGED_BY = 512
"""Images of a DataLoader used to evaluate training, since none can be held out."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingRun:
    """What is trained, on which data, and how.

    Attributes:
        compact: the compact model, trained in place.
        dense: the dense model, whose outputs are the targets; left unchanged.
        data: a map-style Dataset of images and classes, or a DataLoader of batches, used as given.
        settings: of training.
        inputs: the models' tensor inputs.
        parameters: those that may change.
        labels: whether classes are learned too, beside the dense model's outputs.
        key: identifies the run; a checkpoint with another key is not resumed.
    """

    compact: Callee
    dense: Callee
    data: Any
    settings: Training
    inputs: Sequence[InputSpec]
    parameters: Sequence[nn.Parameter]
    labels: bool
    key: str


def train(run: TrainingRun, progress: Callable[[float], None]) -> History:
    """Train the compact model in place; must be called by all processes with the same arguments.

    Args:
        run: what is trained, on which data, and how.
        progress: called with the completed fraction.

    Raises:
        InvalidInput: there are too few images, no classes where they are needed, or the loss is not finite.
    """
    with _own_state():
        return _trained(run, progress)


@contextmanager
def _own_state() -> Iterator[None]:
    """Restore Accelerate's process-wide state, which includes the precision, after the block."""
    from accelerate.state import AcceleratorState

    shared: dict[str, Any] = AcceleratorState._shared_state
    known = dict(shared)
    shared.clear()
    try:
        yield
    finally:
        shared.clear()
        shared.update(known)


def _trained(run: TrainingRun, progress: Callable[[float], None]) -> History:
    from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs

    try:
        accelerator = Accelerator(
            mixed_precision=run.settings.mixed_precision,
            cpu=not torch.cuda.is_available(),
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    except (ValueError, ImportError) as error:
        what = f"mixed precision {run.settings.mixed_precision}"
        raise InvalidInput(f"{what} is not available on this machine: {first_line(error)}") from error
    for module in (run.compact, run.dense):
        module.to(accelerator.device)
    loop = _Loop(run, accelerator)
    with evaluating(run.compact), evaluating(run.dense), _alone(run.compact, run.parameters):
        loop.all(progress)
    run.compact.to("cpu")
    run.dense.to("cpu")
    progress(1.0)
    return loop.history


@contextmanager
def _alone(student: nn.Module, learning: Sequence[nn.Parameter]) -> Iterator[None]:
    chosen = {id(p) for p in learning}
    before = [(p, p.requires_grad) for p in student.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, wanted in before:
            p.requires_grad_(wanted)
            p.grad = None


class _Loop:
    """One training run, in each of its processes."""

    def __init__(self, run: TrainingRun, accelerator: Any) -> None:
        how, learning = run.settings, run.parameters
        self._student, self._teacher, self._how, self._accelerator = run.compact, run.dense, how, accelerator
        self._inputs, self._labels = run.inputs, run.labels
        self.history = History(processes=accelerator.num_processes)
        self._loader, self._judged = _loaders(run.data, how, accelerator.num_processes, run.labels, run.inputs)
        views = isinstance(self._loader.dataset, Views)
        self._views = (self._loader.dataset, self._loader.sampler) if views else None
        self._each = len(self._loader)
        self._steps = self._each * how.epochs
        self._learning = list[Tensor](learning)
        groups = [
            {"params": [p for p in learning if p.dim() > 1], "weight_decay": how.weight_decay},
            {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=how.lr)
        self._slots = [p for g in self._optimizer.param_groups for p in g["params"]]
        self._average = [p.detach().clone() for p in self._learning]
        self._best = [p.detach().clone() for p in self._learning]
        self._step, self._since, self._summed = 0, 0, 0.0
        self._checkpoint = Checkpoint(how.checkpoint, run.key) if how.checkpoint is not None else None
        self._resume()
        with seeded(self._loader, how.seed):  # Accelerate keeps, and sets, the generators that it finds
            self._wrapped, self._stepper, self._loader = accelerator.prepare(run.compact, self._optimizer, self._loader)

    def all(self, progress: Callable[[float], None]) -> None:
        """Train to the end, and load the best weights into the student."""
        if not self.history.marks:
            self._mark(0.0)
        while self._step < self._steps and not self.history.stopped:
            self._epoch(self._step // self._each, progress)
        with torch.no_grad():
            for p, best in zip(self._learning, self._best, strict=True):
                p.copy_(best)
        self.history.steps = self._step
        self._accelerator.wait_for_everyone()
        if self._checkpoint is not None and self._accelerator.is_main_process:
            self._checkpoint.clear()

    def _epoch(self, epoch: int, progress: Callable[[float], None]) -> None:
        done = self._step - epoch * self._each
        for batch in self._batches(epoch, done):
            rate = _rate(self._step, self._steps)
            for group in self._optimizer.param_groups:
                group["lr"] = self._how.lr * rate
            inputs, classes = self._parted(batch)
            with torch.no_grad(), self._accelerator.autocast():
                wanted = flat_outputs(self._teacher(*inputs))
            with self._accelerator.autocast():
                loss = loss_of(flat_outputs(self._wrapped(*inputs)), wanted, classes, self._how.temperature)
            self._accelerator.backward(loss)
            self._stepper.step()
            self._stepper.zero_grad()
            self._after(float(self._accelerator.reduce(loss.detach(), "mean")))
            progress(self._step / self._steps)
            if self._step % self._how.every == 0:
                self._save()
        self._mark(self._how.lr * _rate(self._step, self._steps))
        self._save()

    def _batches(self, epoch: int, done: int) -> Iterator[Any]:
        """Yield an epoch's batches after the skipped ones; a user's loader reads those too, to advance its draws."""
        seed = derived_seed(self._how.seed, epoch)
        if self._views is None:
            yield from islice(read_batches(self._loader, seed), done, None)
            return
        for x in self._views:
            x.epoch = epoch
        yield from read_batches(
            self._accelerator.skip_first_batches(self._loader, done) if done else self._loader, seed
        )

    def _parted(self, batch: Any) -> tuple[list[Tensor], Tensor | None]:
        """Split a batch into inputs and, if used, classes."""
        specs, device = self._inputs, self._accelerator.device
        found, rest = split_batch(batch, specs)
        inputs = [validated_input(x.to(device), spec) for x, spec in zip(found, specs, strict=True)]
        if not self._labels:
            return inputs, None
        classes = classes_of(rest, len(inputs[0]))
        if classes is None or bool((classes == UNKNOWN).any()):
            raise InvalidInput(NO_CLASSES)
        return inputs, classes.to(device)

    def _after(self, loss: float) -> None:
        self._step += 1
        if not isfinite(loss):
            raise InvalidInput(
                f"training: the loss is not a number after {self._step} steps; lower the learning rate (--lr "
                f"{self._how.lr / 10:g}), and look for images that are not finite"
            )
        self._since, self._summed = self._since + 1, self._summed + loss
        decay = min(self._how.ema, (1 + self._step) / (10 + self._step)) if self._how.ema else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._learning, 1 - decay)

    def _mark(self, lr: float) -> None:
        """Evaluate the averaged weights on held-out images, and keep them if they are the best so far."""
        history, held_out = self.history, self._held_out()
        if held_out is not None and not isfinite(held_out):
            raise InvalidInput(
                f"training: the loss on images held out is not a number after {self._step} steps; look for images that "
                f"are not finite, or lower the learning rate (--lr {self._how.lr / 10:g})"
            )
        mean = self._summed / self._since if self._since else float("nan")
        history.marks.append(Mark(self._step, self._step / self._each, lr, mean, held_out))
        self._since, self._summed = 0, 0.0
        known = [m.held_out for m in history.marks if m.held_out is not None]
        if held_out is None or held_out <= min(known):
            history.best = len(history.marks) - 1
            for best, kept in zip(self._best, self._average, strict=True):
                best.copy_(kept)
        elif len(history.marks) - 1 - history.best >= self._how.patience:
            history.stopped = f"no progress in {self._how.patience} epochs"

    def _held_out(self) -> float | None:
        if self._judged is None:
            return None
        total, count = 0.0, 0
        with torch.no_grad(), self._averaged():
            for batch in read_batches(self._judged, self._how.seed):
                inputs, classes = self._parted(batch)
                found, wanted = (flat_outputs(model(*inputs)) for model in (self._student, self._teacher))
                loss = loss_of(found, wanted, classes, self._how.temperature)
                total, count = total + float(loss) * len(inputs[0]), count + len(inputs[0])
        mean = torch.tensor(total / count, dtype=torch.float64, device=self._accelerator.device)
        return float(self._accelerator.reduce(mean, "mean"))  # a DataLoader's batches may differ between processes

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        own = [p.detach().clone() for p in self._learning]
        for p, kept in zip(self._learning, self._average, strict=True):
            p.detach().copy_(kept)
        try:
            yield
        finally:
            for p, value in zip(self._learning, own, strict=True):
                p.detach().copy_(value)

    # Checkpoints. ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self._checkpoint is None or not self._accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {}
        for name, values in (("weight", self._learning), ("average", self._average), ("best", self._best)):
            tensors |= {f"{name}.{k}": p.detach() for k, p in enumerate(values)}
        for k, p in enumerate(self._slots):
            tensors |= {f"{kind}.{k}": x for kind, x in self._optimizer.state[p].items() if isinstance(x, Tensor)}
        told = {"step": self._step, "since": self._since, "summed": self._summed, "history": self.history.to_dict()}
        if self._accelerator.scaler is not None:
            told["scaler"] = self._accelerator.scaler.state_dict()
        self._checkpoint.save(tensors, told)

    def _resume(self) -> None:
        if self._checkpoint is None:
            return
        found = self._checkpoint.load()
        self.history.passed_over = self._checkpoint.passed_over
        if found is None:
            return
        tensors, told = found
        with torch.no_grad():
            for name, values in (("weight", self._learning), ("average", self._average), ("best", self._best)):
                for k, p in enumerate(values):
                    p.copy_(tensors[f"{name}.{k}"])
        for k, p in enumerate(self._slots):
            self._optimizer.state[p] = {
                kind: tensors[f"{kind}.{k}"].to("cpu" if kind == "step" else p.device)
                for kind in ("step", "exp_avg", "exp_avg_sq")
                if f"{kind}.{k}" in tensors
            }
        if self._accelerator.scaler is not None and told.get("scaler"):
            self._accelerator.scaler.load_state_dict(told["scaler"])
        self._step, self._since, self._summed = told["step"], told["since"], told["summed"]
        past = told["history"]
        self.history.marks = [Mark(**mark) for mark in past["marks"]]
        self.history.best, self.history.stopped, self.history.resumed = past["best"], past["stopped"], self._step


def _rate(step: int, steps: int) -> float:
    """Return the learning rate relative to its maximum: linear warm-up, then cosine decay."""
    warm = max(1, int(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + cos(pi * (step - warm) / max(1, steps - warm)))


def refuse_batch(data: Any, how: Training, processes: int) -> None:
    """Raise InvalidInput if the batch cannot be divided evenly among processes."""
    own = isinstance(data, DataLoader)
    batch = (data.batch_size or getattr(data.batch_sampler, "batch_size", 0)) if own else how.batch
    if not batch:
        raise InvalidInput("the DataLoader has no batch_size: give it one, so that what is a step of training is known")
    if batch % processes:
        told = "the DataLoader's batch_size" if own else "--train-batch"
        raise InvalidInput(f"batch {batch}: it is shared by {processes} processes; give a multiple of that by {told}")


def _loaders(data: Any, how: Training, processes: int, labels: bool, inputs: Sequence[InputSpec]) -> tuple[Any, Any]:
    """Return batches to train on, and held-out batches (or None)."""
    refuse_batch(data, how, processes)
    if not isinstance(data, (Dataset, DataLoader)) or not hasattr(getattr(data, "dataset", data), "__len__"):
        raise InvalidInput("to be taught with, data are a folder, an .npz file, a Dataset or a DataLoader of a length")
    if isinstance(data, DataLoader):
        return data, _first(data, how.seed)
    count = len(data)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(how.seed)).tolist()
    aside = max(int(how.held_out * count), min(HELD_OUT_LEAST, count // 5)) if how.held_out else 0
    learnt, judged = order[aside:], order[:aside]
    batch = min(how.batch, len(learnt) // processes * processes)
    if batch < 2:
        raise InvalidInput(f"training: {count} images are too few for {processes} processes; give more with --data")
    flip = not labels if how.flip is None else how.flip
    views = Views(data, Look(how.shift, flip, how.mix and not labels, how.seed), learnt, inputs)
    loader = DataLoader(views, batch_size=batch, sampler=Order(len(learnt), how.seed), drop_last=True)
    plain = Views(data, Look(0.0, False, False, how.seed), judged, inputs)
    return loader, DataLoader(plain, batch_size=batch) if judged else None


def _first(loader: Any, seed: int) -> list[Any]:
    """The first batches of a DataLoader, used for both training and evaluation since none can be held out."""
    found, count = [], 0
    for batch in read_batches(loader, seed):
        found.append(batch)
        count += next((len(x) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), 0)
        if count >= JUDGED_BY:
            break
    return found
