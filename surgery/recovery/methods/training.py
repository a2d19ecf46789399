"""Distillation from the dense model, and fine-tuning with labels."""

from __future__ import annotations

import hashlib

import torch

from surgery.errors import InvalidInput
from surgery.inputs import as_dataset
from surgery.recovery.run import Outcome, Task, recovery_method
from surgery.recovery.training import TrainingRun, classes_in, train


@recovery_method("distill", needs=["images", "gradients"], after="reconstruct")
def distill(task: Task) -> Outcome:
    """Train the compact model on the dense model's outputs; no labels are needed."""
    return trained(task, "distill", labels=False)


@recovery_method("finetune", needs=["images", "gradients", "labels"], after="reconstruct", undo_if_worse=False)
def finetune(task: Task) -> Outcome:
    """Train the compact model on the dense model's outputs and on labels."""
    return trained(task, "finetune", labels=True)


def trained(task: Task, name: str, *, labels: bool) -> Outcome:
    """Train the compact model, with labels also on classes; parameters that do not require gradients are frozen."""
    subject, settings, seed = task.subject, task.recipe.recovery, task.recipe.selection.seed
    own = {id(p) for p in subject.compact.module.parameters()}
    learning = [p for p in subject.model.parameters() if id(p) in own and p.requires_grad]
    if not learning:
        raise InvalidInput(f"{name}: no parameter of the compact model requires gradients; call requires_grad_()")
    data = as_dataset(task.recipe.data.data)
    key = f"{task.subject.cut.plan.digest} {name} {settings} {seed} {_digest(task, data)}"
    run = TrainingRun(subject.model, subject.dense, data, settings, subject.inputs, learning, labels, key, seed)
    history = train(run, task.progress)
    notes = {
        f"{history.stopped}, after {history.steps} steps": bool(history.stopped),
        f"resumed from a checkpoint at step {history.resumed}": history.resumed > 0,
        "the checkpoint that was found is of another run: it was not used": history.passed_over,
        "training brought no progress: the weights it began with stay": history.best == 0,
    }
    return Outcome(tuple(f"{name}: {note}" for note, applies in notes.items() if applies), history=history)


def _digest(task: Task, data: object) -> str:
    """Return a digest of both models' weights and of the data, as far as known without reading all of it."""
    assert task.seen is not None, "methods that need images are given some"
    size, files = len(data) if hasattr(data, "__len__") else 0, [str(file) for file in getattr(data, "files", ())]
    digest = hashlib.sha256(f"{task.seen.digest} {task.seen.classes} {size} {files}".encode())
    known = classes_in(data, len(task.subject.inputs))
    tensors = [known] if known is not None else []
    for model in (task.subject.dense.module, task.subject.model.module):
        tensors += [x for _, x in sorted(model.state_dict().items())]
    for x in tensors:
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
