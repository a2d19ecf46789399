"""Recovery methods: without gradients on images, and by training on the dense model's outputs."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch.nn.modules.batchnorm import _NormBase

from surgery.capture import evaluating
from surgery.core import BatchStatistics, digest_of
from surgery.errors import InvalidInput
from surgery.inputs import Images, as_dataset
from surgery.recovery import reconstruction
from surgery.recovery.run import Outcome, Task, recovery_method
from surgery.recovery.training import TrainingRun, classes_in, train


@recovery_method("none")
def none(task: Task) -> Outcome:
    """Leave the compact model unchanged."""
    return Outcome()


@recovery_method("bn", needs=["images"])
def bn(task: Task) -> Outcome:
    """Re-estimate the running statistics of all batch norms on images."""
    mode, model = BatchStatistics(), task.subject.part
    with torch.no_grad(), evaluating(model), mode:  # dropouts are off
        for k, batch in enumerate(task.images):
            task.progress(k / len(task.images))
            model(*batch)
    for found in mode.found.values():
        found.running_mean.copy_(found.mean)
        found.running_var.copy_(found.variance * found.rows / max(1, found.rows - 1))
    return Outcome(() if mode.found else ("the model has no batch norms with running statistics",))


@recovery_method("reconstruct", needs=["images"])
def reconstruct(task: Task) -> Outcome:
    """Refit each layer to the dense model's outputs on images; without a graph, re-estimate batch norms instead."""
    subject = task.subject
    if not subject.cut.program.has_graph:
        found = bn(task)
        notes = ("no reconstruction: torch.export cannot capture this model", *found.notes)
        return replace(found, name="bn", notes=notes)
    seed = task.recipe.selection.seed
    layers = reconstruction.reconstruct(subject.cut, subject.compact, task.images, seed=seed, progress=task.progress)
    scarce = [layer for layer in layers if layer.rows < layer.unknowns]  # whose fit depends on the ridge
    if not scarce:
        return Outcome(layers=tuple(layers))
    first = scarce[0]
    note = (
        f"{len(scarce)} layers have fewer positions than weights to fit, the first is {first.name} ({first.rows} for "
        f"{first.unknowns}): they are held near to what they were; more images would help"
    )
    return Outcome((note,), tuple(layers))


@recovery_method("fold", needs=["drawn-images", "graph"])
def fold(task: Task) -> Outcome:
    """Reconstruct on synthetic images, unless the batch norms show that the network was never trained."""
    norms = [m for m in task.subject.dense.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    if norms and not any(bool(m.running_mean.any()) for m in norms):  # type: ignore[union-attr]
        return Outcome(("fold was skipped: no batch norm has recorded statistics, so that there is nothing to keep",))
    return reconstruct(task)


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
    count, items = len(data) if hasattr(data, "__len__") else 0, data.items if isinstance(data, Images) else ()
    states = [x for m in (task.subject.dense, task.subject.model) for _, x in sorted(m.module.state_dict().items())]
    tensors = digest_of([classes_in(data, len(task.subject.inputs)), *states])
    return hashlib.sha256(f"{task.seen.digest} {task.seen.classes} {count} {items} {tensors}".encode()).hexdigest()
