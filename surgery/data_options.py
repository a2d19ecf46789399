"""What the command line says of images and training, as a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from surgery.config import Recipe
from surgery.delivery import Precisions, refuse_too_few
from surgery.inputs import Images, LoadedModel, open_images
from surgery.recovery import open_evaluation


def with_data(recipe: Recipe, loaded: LoadedModel) -> Recipe:
    """Return the recipe with the images that are named, read as the model expects; and what to do with them.

    Without any, models that were trained are folded.
    """
    given = recipe.data
    changes = {name: x for name in ("mean", "std", "crop", "size") if (x := getattr(given, name)) is not None}
    if "size" in changes:
        changes["size"] = (changes["size"][0], changes["size"][-1])
    how = replace(loaded.preprocessing, **changes)
    first = loaded.example_inputs[0] if isinstance(loaded.example_inputs, tuple) else loaded.example_inputs
    shape = tuple(getattr(first, "shape", ()))
    named = {name: x for name in ("data", "val") if isinstance(x := getattr(given, name), str)}
    opened: dict[str, Any] = {name: open_images(x, shape, how, option=f"--{name}") for name, x in named.items()}
    if isinstance(opened.get("data"), Images):  # before the long work; how many a loader has is known after it
        refuse_too_few(Precisions(recipe.precisions), min(len(opened["data"]), given.max_images))
    level = recipe.recovery.recover
    if level is None and given.data is None:
        level = "fold" if _can_fold(loaded, recipe, shape) else "none"
    if isinstance(given.metric, str):
        opened["metric"] = open_evaluation(given.metric)
    return recipe.but(recover=level, **opened)


def _can_fold(loaded: LoadedModel, recipe: Recipe, shape: Sequence[int]) -> bool:
    """Whether there is something to recover, weights that were trained, and images can be drawn."""
    return not loaded.weights.startswith("random") and recipe.selection.has_graph and len(shape) == 4
