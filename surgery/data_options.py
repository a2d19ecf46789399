"""What the command line says of images and training, as a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.delivery import Precisions, refuse_too_few, with_deployed
from surgery.errors import InvalidInput
from surgery.inputs import Images, LoadedModel, open_images
from surgery.recovery import TAUGHT, Training, level_of, open_evaluation, refuse_drop
from surgery.request import Request


def with_data(request: Request, loaded: LoadedModel, given: Mapping[str, Any]) -> Request:
    """Return the request with the images that are named, read as the model expects; and what to do with them.

    Without any, models that were trained are folded.
    """
    how = loaded.preprocessing
    changes = {name: given[name] for name in ("mean", "std", "crop", "size") if given[name] is not None}
    if changes and given["data"] is None and given["val"] is None:
        raise InvalidInput(f"--{next(iter(changes))} is for images: give those with --data or --val, or leave it out")
    first = loaded.example_inputs[0] if isinstance(loaded.example_inputs, tuple) else loaded.example_inputs
    shape = tuple(getattr(first, "shape", ()))
    opened: dict[str, Any] = {
        name: open_images(given[name], shape, replace(how, **changes), option=f"--{name}")
        for name in ("data", "val")
        if given[name] is not None
    }
    if isinstance(opened.get("data"), Images):  # before the long work; how many a loader has is known after it
        chosen = with_deployed(Precisions(given.get("precision", ("fp32",))), request.deploy)
        refuse_too_few(chosen, min(len(opened["data"]), given["images"]))
    level = given["recover"]
    if level is None and "data" not in opened:
        level = "fold" if _can_fold(loaded, request, shape) else "none"
    if given.get("evaluation") is not None:
        opened["evaluate"] = open_evaluation(given["evaluation"])
    lone = next((o for o in ("epochs", "lr", "train_batch", "mixed_precision") if given.get(o) is not None), None)
    if lone is not None and level not in TAUGHT:
        raise InvalidInput(f"--{lone.replace('_', '-')} is for training: add --recover distill or finetune")
    training = _training(level, given) if level in TAUGHT else None
    request = replace(
        request, recover=level, images=given["images"], training=training, share=given.get("share"), **opened
    )
    request = replace(request, max_drop=given.get("max_drop"), steps=given.get("steps") or 1)
    level_of(request)
    refuse_drop(request)
    return request


def _training(level: str, given: Mapping[str, Any]) -> Any:
    """How to train."""
    names = {"epochs": "epochs", "lr": "lr", "train_batch": "batch", "mixed_precision": "mixed_precision"}
    chosen = {field: given[name] for name, field in names.items() if given.get(name) is not None}
    return Training(**chosen, checkpoint=given.get("checkpoint"), seed=given["seed"])


def _can_fold(loaded: LoadedModel, request: Request, shape: Sequence[int]) -> bool:
    """Whether there is something to recover, weights that were trained, and images can be drawn."""
    return not loaded.weights.startswith("random") and request.tracer == "export" and len(shape) == 4
