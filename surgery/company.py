"""What the processes of one run do beside the first, and how they meet."""

from __future__ import annotations

from dataclasses import replace

from surgery import api as pipeline, together
from surgery.config import TAUGHT, Recipe
from surgery.data_options import with_data
from surgery.inputs import LoadedModel
from surgery.planning import as_planned, repeat
from surgery.recovery import refuse_batch, training_of


def meet(loaded: LoadedModel, recipe: Recipe) -> bool:
    """Set up communication with the other processes, where they are to train; return whether they are.

    Raises:
        InvalidInput: data or settings cannot be used, or the batch cannot be shared evenly.
    """
    asked = with_data(recipe, loaded)
    if asked.recovery.recover not in TAUGHT:
        return False
    refuse_batch(asked.data.data, training_of(asked), together.processes())
    together.meet()
    return True


def follow(loaded: LoadedModel, recipe: Recipe) -> None:
    """Do what all processes but the first do: nothing, unless something is trained."""
    if not meet(loaded, recipe):
        return
    plan, tensors = together.receive()
    decision = repeat(plan, loaded.module, loaded.example_inputs, example_kwargs=loaded.example_kwargs)
    pipeline.follow(replace(decision, recipe=with_data(as_planned(recipe, plan), loaded)), tensors)
    together.part()
