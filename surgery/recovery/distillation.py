"""A distillation run of a compact model: its data, settings and report."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from surgery.config import Recipe
from surgery.errors import InvalidInput
from surgery.inputs import Images, as_dataset, derived_seed, evenly_spaced, read_item
from surgery.recovery.steps import Outcome, Subject, Task
from surgery.recovery.teaching import History, Training
from surgery.recovery.training import TrainingRun, train

SAMPLED = 32
"""Number of images whose content identifies a run."""


def distilled(task: Task, name: str, *, labels: bool) -> Outcome:
    """Train the compact model in place; parameters that do not require gradients are frozen.

    Args:
        task: the task, with the user's images.
        name: name of the method, for messages.
        labels: whether to train on classes in addition to the dense model's outputs.
    """
    subject, recipe = task.subject, task.recipe
    assert task.seen is not None, "methods that need images are given some"
    own = {id(p) for p in subject.compact.module.parameters()}
    learning = [p for p in subject.model.parameters() if id(p) in own and p.requires_grad]
    if not learning:
        raise InvalidInput(f"{name}: no parameter of the compact model wants gradients: call requires_grad_() on some")
    training, data = training_of(recipe), as_dataset(recipe.data.data)
    identity = _identity(data, subject, training.seed)
    key = f"{subject.cut.plan.digest} {task.seen.digest} {name} {training} {identity}"
    run = TrainingRun(subject.model, subject.dense, data, training, subject.inputs, learning, labels, key)
    history = train(run, task.progress)
    return Outcome(tuple(f"{name}: {note}" for note in _notes(history)), history=history)


def _notes(history: History) -> list[str]:
    notes = [f"{history.stopped}, after {history.steps} steps"] if history.stopped else []
    if history.resumed:
        notes.append(f"resumed from a checkpoint at step {history.resumed}")
    if history.passed_over:
        notes.append("the checkpoint that was found is of another run: it was not used")
    if history.best == 0:
        notes.append("training brought no progress: the weights it began with stay")
    return notes


def training_of(recipe: Recipe) -> Training:
    """Return the training settings."""
    how = recipe.recovery
    return Training(
        epochs=how.epochs,
        batch=how.train_batch,
        lr=how.lr,
        weight_decay=how.weight_decay,
        temperature=how.temperature,
        ema=how.ema,
        mixed_precision=how.mixed_precision,
        held_out=how.held_out,
        patience=how.patience,
        shift=how.shift,
        flip=how.flip,
        mix=how.mix,
        every=how.checkpoint_steps,
        checkpoint=None if how.checkpoint is None else Path(how.checkpoint),
        seed=recipe.selection.seed,
    )


def classes_in(data: Any, inputs: int) -> Tensor | None:
    """Return the classes of a dataset if they are known without reading its images."""
    if isinstance(data, Images):
        return torch.tensor(data.classes) if data.classes else None
    return data.tensors[inputs] if isinstance(data, TensorDataset) and len(data.tensors) > inputs else None


def _identity(data: Any, subject: Subject, seed: int) -> str:
    """Return a digest of the data, as far as cheaply available, and of both models' weights."""
    digest = hashlib.sha256()
    tensors = [] if (known := classes_in(data, len(subject.inputs))) is None else [known]
    if isinstance(data, Images):
        digest.update("\n".join(map(str, data.files)).encode())
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        digest.update(str(len(data)).encode())
        samples = [read_item(data, k, derived_seed(seed, k)) for k in evenly_spaced(len(data), SAMPLED)]
        tensors += [x for x in pytree.tree_leaves(samples) if isinstance(x, Tensor)]
    for model in (subject.dense.module, subject.model.module):
        tensors += [x for _, x in sorted(model.state_dict().items())]
    for x in tensors:
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
