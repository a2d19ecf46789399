"""The Python interface: `shrink` prunes and verifies a model, `recover` improves its accuracy."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from exporters.quantize import FEWEST
from surgery import config, pipeline
from surgery.capture import evaluating
from surgery.config import Recipe
from surgery.core import Callee, Clock, Progress, buffers_kept, flat_outputs
from surgery.errors import InvalidInput
from surgery.inputs import Images, LoadedModel, load_model, open_images
from surgery.latency import Limits, Settings, ort
from surgery.pipeline import Result
from surgery.recovery import Subject, copy_of, open_metric, recovered, with_recovery
from surgery.registry import RECOVERY_METHODS
from surgery.report import with_origin

LOG = logging.getLogger(__name__)


def shrink(
    model: torch.nn.Module | str,
    example_inputs: Any = None,
    recipe: Recipe | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Return a physically smaller, verified copy of the model.

    Args:
        model: the dense model, unchanged; or its name, as in `load_model`.
        example_inputs: a tensor, or a tuple of forward's positional arguments; (N, C, H, W) for most vision models.
            For a name None: the model's own.
        recipe: options, made by `surgery.recipe`; by default, half of the dense model's latency.
        example_kwargs: forward's keyword arguments.
        progress: called with a stage's name and its completed fraction, from 0.0 to 1.0.
        options: deprecated; keyword arguments of earlier versions.

    Returns:
        The compact model, its plan, and the report on both.

    Raises:
        InvalidInput: arguments, shapes or weights are invalid.
        UnsupportedModel: the model cannot be traced or cut; the message names the source line. Or, with `own_class`,
            the class cannot hold any cut model.
        BudgetUnreachable: the budget cannot be met; the message says what is reachable, and what is frozen.
        CheckFailed: the compact model differs from the masked dense model.
    """
    asked = _asked(recipe, options)
    config.validate(asked)
    loaded = _loaded(model, example_inputs, example_kwargs, asked)
    is_named = isinstance(model, str)
    task = opened(asked, loaded, trained=is_named and loaded.is_trained)
    with torch.random.fork_rng(devices=()), buffers_kept(loaded.module):
        decision = pipeline.decide(loaded, task, progress)
        result = pipeline.realise(decision, progress=progress)
    asked = config.resolved(asked.but(recover=task.recovery.recover, model=model if is_named else None))
    return replace(result, recipe=asked, report=with_origin(result.report, loaded) if is_named else result.report)


def recover(
    result: Result, recipe: Recipe | None = None, *, progress: Progress | None = None, **options: Any
) -> Result:
    """Return a result with a recovered compact model; the given result is unchanged.

    Args:
        result: result of `shrink` or `recover`.
        recipe: recovery method and data, as in ``surgery.recipe(recover="distill", data=images)``; by default
            `reconstruct` with data, else `fold`.
        progress: called with a step's name and its completed fraction.
        options: deprecated; keyword arguments of earlier versions.

    Raises:
        InvalidInput: data, method or settings are invalid.
    """
    if not isinstance(result, Result):
        raise InvalidInput(f"recover takes what surgery.shrink returned, not an object of type {type(result).__name__}")
    if recipe is not None and not isinstance(recipe, Recipe):  # data, in earlier versions
        recipe, options = None, {"data": recipe, **options}
    asked = _asked(recipe, options)
    whole = result.whole
    example = whole.example if whole else None
    inputs = example.example[0] if example else result.program.example_args
    model = whole.model if whole else result.program.dense.model
    asked = opened(asked, LoadedModel(model, inputs), trained=True)
    with torch.random.fork_rng(devices=()), buffers_kept(result.model):
        compact = copy_of(result.compact)
        model = whole.around(compact.module) if whole else compact.module
        found = recovered(Subject.of(result.cut, compact, model, whole), asked, Clock(progress))
    report = with_recovery(result.report, found)
    return replace(result, model=model, compact=compact, report=report, recovery=found or result.recovery)


def compare(
    files: Sequence[str | Path],
    recipe: Recipe | None = None,
    *,
    baseline: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time ONNX files that take the same inputs against each other in ONNX Runtime, as `surgery bench` does.

    Args:
        files: paths of the files.
        recipe: the options `threads`, `batch`, `seed` and `runs` are used.
        baseline: the file that ratios refer to; None: the first.
        progress: called with the current stage and its completed fraction.

    Returns:
        The measurements as plain JSON values: a row for each file, with its ratio to the baseline and 95 % interval.

    Raises:
        InvalidInput: files that cannot be read, or more threads than cores.
    """
    asked = recipe or Recipe()
    settings = Settings(asked.target.batch, asked.target.threads, asked.selection.seed)
    limits, first = Limits(max_runs=asked.output.runs), None if baseline is None else Path(baseline)
    return ort.compare([Path(file) for file in files], settings, limits, baseline=first, progress=progress)


def load_named(recipe: Recipe) -> LoadedModel:
    """Return the model that a recipe names; errors are those of `load_model`."""
    asked, seed = recipe.model, recipe.selection.seed
    return load_model(
        asked.model,
        weights=asked.weights,
        ignore_extra=asked.ignore_extra,
        input_shape=asked.input_shape,
        model_args=asked.model_arg,
        seed=seed,
        trust=asked.trust,
    )


def opened(recipe: Recipe, loaded: LoadedModel, *, trained: bool) -> Recipe:
    """Return the recipe with named images, prepared for the model, and metric opened, and a method of recovery.

    Raises:
        InvalidInput: there are no such images, too few of them, or they do not fit.
    """
    given, inputs = recipe.data, loaded.example_inputs
    size = None if given.size is None else (given.size[0], given.size[-1])
    asked = {"mean": given.mean, "std": given.std, "crop": given.crop, "size": size}
    how: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    first = inputs[0] if isinstance(inputs, Sequence) and inputs else inputs
    shape = tuple(getattr(first, "shape", ()))
    found: dict[str, Any] = {
        name: open_images(x, shape, replace(loaded.preprocessing, **how), option=f"--{name}")
        for name in ("data", "val")
        if isinstance(x := getattr(given, name), str)
    }
    _assign_classes(recipe, loaded, found)
    for images in found.values():
        if isinstance(images, Images):
            LOG.info("%s", images)
    if isinstance(images := found.get("data"), Images) and "int8" in recipe.precisions:
        count = min(len(images), given.max_images)  # how many a loader has is known later
        if count < FEWEST:
            raise InvalidInput(f"too few images to calibrate int8 files on ({count}); give {FEWEST} or more")
    if given.metric is not None:
        found["metric"] = open_metric(given.metric)
    can_fold = trained and recipe.selection.has_graph and len(shape) == 4
    return recipe.but(recover=config.resolved(recipe, trained=can_fold).recovery.recover, **found)


def _assign_classes(recipe: Recipe, loaded: LoadedModel, found: Mapping[str, Any]) -> None:
    """Assign folders of images to the model's outputs; errors are those of `Images.assign_classes`."""
    named = {name: images for name, images in found.items() if isinstance(images, Images) and images.folders}
    module, given, kwargs = loaded.call
    outputs = list[torch.Tensor]()
    if named:
        call = Callee(module, given if isinstance(given, tuple) else (given,), kwargs)
        with suppress(Exception), torch.no_grad(), evaluating(call):  # tracing will say what is wrong
            outputs = flat_outputs(call(*call.tensors))
    if len(outputs) == 1 and outputs[0].dim() == 2:
        needed = {"val": True, "data": RECOVERY_METHODS.has_need(recipe.recovery.recover, "labels")}
        for name, images in named.items():
            count = outputs[0].shape[1]
            images.assign_classes(count, loaded.classes, recipe.data.classes, needed=needed[name])


def _loaded(model: Any, example_inputs: Any, example_kwargs: Mapping[str, Any] | None, recipe: Recipe) -> LoadedModel:
    """The model that is named or given, with its example inputs."""
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise InvalidInput(f"example_kwargs is of type {type(example_kwargs).__name__}: give a dictionary of inputs")
    if not isinstance(model, str):
        return LoadedModel(model, example_inputs, example_kwargs or {}, type(model).__name__)
    found = load_named(recipe.but(model=model))
    for warning in found.warnings:
        warnings.warn(warning, stacklevel=3)
    if example_inputs is not None:
        found = replace(found, example_inputs=example_inputs, example_kwargs=example_kwargs or {})
    return found


def training_options(**fields: Any) -> dict[str, Any]:
    """Return options by the names that they had as fields of `surgery.Training`."""
    former = {"batch": "train_batch", "every": "checkpoint_steps"}
    return {former.get(name, name): value for name, value in fields.items()}


def _asked(recipe: Recipe | None, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe with keyword arguments of earlier versions."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise InvalidInput(f"recipe is of type {type(recipe).__name__}; make one with surgery.recipe(latency=0.5)")
    if not options:
        return recipe or Recipe()
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name == "int8" and value is not None:
            found |= {f"int8_{part}": getattr(value, part) for part in ("method", "keep", "reduce_range")}
        elif name == "training" and isinstance(value, Mapping):
            found |= value
        elif value is not None:
            found["recover" if name == "level" else name] = value
    found, _ = config.current(found)
    now = f"pass surgery.recipe({', '.join(found)})"
    message = f"{', '.join(options)}: keyword arguments are options of a recipe now: {now}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return (recipe or Recipe()).but(**found)
