"""Least-squares reconstruction, layer by layer."""

from __future__ import annotations

from dataclasses import replace

from surgery.recovery import reconstruction
from surgery.recovery.methods.bn import bn
from surgery.recovery.run import Outcome, Task, recovery_method


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
    scarce = [layer for layer in layers if layer.scarce]
    if not scarce:
        return Outcome(layers=tuple(layers))
    first = scarce[0]
    note = (
        f"{len(scarce)} layers have fewer positions than weights to fit, the first is {first.name} ({first.rows} for "
        f"{first.unknowns}): they are held near to what they were; more images would help"
    )
    return Outcome((note,), tuple(layers))
