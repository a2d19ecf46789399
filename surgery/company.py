"""What the processes of one run do beside the first, and how they meet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from surgery import api as pipeline, together
from surgery.data_options import with_data
from surgery.inputs import LoadedModel
from surgery.planning import repeat
from surgery.recovery import TAUGHT, refuse_batch
from surgery.request import Request


def meet(loaded: LoadedModel, given: dict[str, Any], request: Request) -> bool:
    """Set up communication with the other processes, where they are to train; return whether they are.

    Raises:
        InvalidInput: data or settings cannot be used, or the batch cannot be shared evenly.
    """
    asked = with_data(request, loaded, given)
    if asked.recover not in TAUGHT:
        return False
    refuse_batch(asked.data, asked.training, together.processes())
    together.meet()
    given["share"] = together.send
    return True


def follow(loaded: LoadedModel, given: dict[str, Any], request: Request) -> None:
    """Do what all processes but the first do: nothing, unless something is trained."""
    if not meet(loaded, given, request):
        return
    plan, tensors = together.receive()
    decision = repeat(plan, loaded.module, loaded.example_inputs, example_kwargs=loaded.example_kwargs)
    pipeline.follow(replace(decision, request=with_data(decision.request, loaded, given)), tensors)
    together.part()
