"""Run recovery: choose the methods of a level, the images to learn from, and those to evaluate on."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.capture import Whole, evaluating
from surgery.config import Recipe, validate
from surgery.core import Callee, CompactModel, Plan, Program, Progress, flat_outputs
from surgery.errors import InvalidInput
from surgery.inputs import Calibration, Images, as_dataset, calibration_images, classes_of
from surgery.recovery.agreement import Agreement, Judged, Reference
from surgery.recovery.distillation import classes_in
from surgery.recovery.judging import Pairs
from surgery.recovery.random_images import drawn_batches
from surgery.recovery.steps import Judge, Step, Subject, Task, in_eval_mode, input_specs, peak_memory, run_method
from surgery.recovery.teaching import NO_CLASSES, out_of_range
from surgery.registry import RECOVERY_METHODS


@dataclass(frozen=True, slots=True)
class Recovery:
    """Result of recovery.

    Attributes:
        level: the requested level.
        steps: the dense model, the compact one as cut, and each recovery step.
        judged_by: description of the evaluation images; empty for none.
        labelled: whether their classes are known.
        notes: notes for the user.
        reference: reference to evaluate exported files; None without images.
        seen: images learnt from, used to calibrate files in lower precision; None without images.
    """

    level: str
    steps: tuple[Step, ...]
    judged_by: str = ""
    labelled: bool = False
    notes: tuple[str, ...] = ()
    reference: Reference | None = field(default=None, repr=False)
    seen: Calibration | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "level": self.level,
            "judged_by": self.judged_by,
            "labelled": self.labelled,
            "steps": [step.to_dict() for step in self.steps],
            "notes": list(self.notes),
        }


def level_of(recipe: Recipe) -> str:
    """Return the requested level, by default `reconstruct` with data, else `none`."""
    return recipe.recovery.recover or ("reconstruct" if recipe.data.data is not None else "none")


def recovered(
    subject: Subject,
    recipe: Recipe,
    progress: Progress,
    *,
    seen: Calibration | None = None,
    between: Sequence[Step] = (),
    share: Callable[[Plan, torch.nn.Module], None] | None = None,
) -> Recovery | None:
    """Recover a compact model in place; returns None if nothing was requested and there is nothing to evaluate on.

    Args:
        subject: the compact model and the dense model it was cut from.
        recipe: the recipe, with opened data.
        progress: called for each step.
        seen: images read from `data`; None if not read yet.
        between: steps of intermediate models in iterative pruning.
        share: called with the plan and the compact model before distributed training.
    """
    validate(recipe)
    level, program, whole = level_of(recipe), subject.cut.program, subject.whole
    if seen is None and recipe.data.data is not None:
        seen = calibration_images(recipe.data.data, program, whole, recipe.data.max_images, recipe.selection.seed)
    validate_training(program, whole, recipe.but(recover=level), seen)
    reference, notes = _reference(subject, recipe, seen), list[str]()
    steps = list[Step]()
    alike = reference is not None and recipe.data.val is None and whole is None
    judge = Judge(reference, recipe.data.metric, seen.batches if seen is not None and alike else None)
    if reference is not None or recipe.data.metric is not None:
        for name, (agreement, metrics) in (("dense", judge.dense(subject)), ("cut", judge.compact(subject))):
            steps.append(Step(name, 0.0, peak_memory(), agreement, metrics=metrics))
        steps[1:1] = between
    for name in _methods(level):
        if "gradients" in RECOVERY_METHODS[name].needs and share is not None:
            share(subject.cut.plan, subject.compact.module)
        task = _task(name, subject, recipe, seen)
        steps.append(run_method(name, task, judge, steps[-1].agreement if steps else None, progress))
    for given in (recipe.data.data, recipe.data.val):
        notes += given.notes() if isinstance(given, Images) else []
    if reference is not None:
        notes += [*reference.notes, *(reference.batches.notes if isinstance(reference.batches, Pairs) else ())]
    if not steps:
        return None
    named = reference.named if reference is not None else ""
    labelled = reference is not None and reference.labels is not None
    return Recovery(level, tuple(steps), named, labelled, tuple(notes), reference, seen)


def _methods(level: str) -> list[str]:
    if not level or level == "none":
        return []
    return [*_methods(RECOVERY_METHODS[level].after), level]


def _task(name: str, subject: Subject, recipe: Recipe, seen: Calibration | None) -> Task:
    """Return the argument of a method; raises InvalidInput if its needs cannot be met."""
    needs, program = RECOVERY_METHODS[name].needs, subject.cut.program
    if "graph" in needs and not program.has_graph:
        raise InvalidInput(
            f"recover={name!r} needs the operators that torch.export captures; give images with --data, and "
            "--recover bn"
        )
    task = Task(subject, recipe, lambda fraction: None)
    if "images" in needs:
        assert seen is not None, "refused before"
        return dataclasses.replace(task, images=seen.batches, held_out=seen.batches, seen=seen)
    if "drawn-images" not in needs:
        return task
    spec, *others = program.inputs
    if others or len(spec.shape) != 4 or "float" not in spec.dtype:
        raise InvalidInput(f"recover={name!r} draws images (N, C, H, W); this model takes something else: give --data")
    seed = recipe.selection.seed
    images, held_out = (drawn_batches(spec, seed + k) for k in range(2))
    return dataclasses.replace(task, images=images, held_out=held_out[: max(1, len(held_out) // 4)])


def validate_training(program: Program, whole: Whole | None, recipe: Recipe, seen: Calibration | None) -> None:
    """Raise InvalidInput early if training or evaluation would fail; arguments are those of `recovered`.

    Checks for a fixed batch, labels out of range (as far as known without reading all images), and missing labels.
    """
    first = input_specs(program, whole)[0]
    if RECOVERY_METHODS.has_need(recipe.recovery.recover, "gradients") and 0 not in first.dynamic:
        raise InvalidInput(
            f"--recover {recipe.recovery.recover} needs a model that takes any number of images, and this one takes "
            f"{first.shape[0]} at a time, as traced; --recover reconstruct does without"
        )
    given = {"val": recipe.data.val}
    if RECOVERY_METHODS.has_need(recipe.recovery.recover, "labels"):
        given["data"] = recipe.data.data
    inputs = len(input_specs(program, whole))
    read = {"data": seen}
    known = {k: _range_of(as_dataset(x, option=k), inputs, read.get(k)) for k, x in given.items()}
    if "data" in known and known["data"] is None:
        raise InvalidInput(NO_CLASSES)
    if not any(known.values()):
        return
    call = Callee.of(program, program.dense.model) if whole is None or whole.example is None else whole.example
    with evaluating(call), torch.no_grad():
        outputs = flat_outputs(call(*call.tensors))
    if len(outputs) != 1 or outputs[0].dim() != 2:
        return
    for name, ends in known.items():
        low, high = ends or (0, 0)
        if low < 0 or high >= outputs[0].shape[1]:
            option = given[name].option if isinstance(given[name], Images) else name
            raise InvalidInput(out_of_range(option, low if low < 0 else high, outputs[0].shape[1]))


def _range_of(data: Any, inputs: int, seen: Calibration | None) -> tuple[int, int] | None:
    """Return the minimum and maximum class, of the images read so far if not all are known; None if there are none."""
    known = classes_in(data, inputs)
    if known is None:
        return seen.classes if seen is not None else None
    known = classes_of([known], len(known))
    return (int(known.min()), int(known.max())) if known is not None else None


def follow(subject: Subject, recipe: Recipe) -> None:
    """Participate in training led by the first process; arguments are those of `recovered`."""
    data, seed = recipe.data, recipe.selection.seed
    seen = calibration_images(data.data, subject.cut.program, subject.whole, data.max_images, seed)
    method = RECOVERY_METHODS[level_of(recipe)]
    method.function(_task(method.name, subject, recipe, seen))


def _reference(subject: Subject, recipe: Recipe, seen: Calibration | None) -> Reference | None:
    """Return the dense model's reference on the validation images, else on the calibration images."""
    if recipe.data.val is not None:
        pairs = Pairs(recipe.data.val, subject.inputs, recipe.selection.seed)
        found = Reference.of(in_eval_mode(subject.dense), pairs, "--val")
        return dataclasses.replace(found, named=f"{pairs.count} images of --val")
    if seen is None:
        return None
    batches: Judged = [(batch, None) for batch in seen.given or seen.batches]
    return Reference.of(in_eval_mode(subject.dense), batches, f"{seen.count} images of --data, those it was made with")


def copy_of(compact: CompactModel) -> CompactModel:
    """Return a copy whose graph and module share tensors, like the original's."""
    module, graph = copy.deepcopy((compact.module, compact.graph))
    return dataclasses.replace(compact, module=module, graph=graph)


def with_recovery(data: Mapping[str, Any], recovery: Recovery | None) -> dict[str, Any]:
    """Return the report with the recovery steps and the verdict on accuracy."""
    if recovery is None:
        return {**data, "recovery": data.get("recovery")}
    accuracy = {**data["accuracy"], **_verdict(recovery)}
    return {**data, "accuracy": accuracy, "recovery": recovery.to_dict(), "notes": [*data["notes"], *recovery.notes]}


def _verdict(recovery: Recovery) -> dict[str, Any]:
    last = recovery.steps[-1].agreement
    before, after = recovery.steps[0].metrics, recovery.steps[-1].metrics
    if before and after and (last is None or last.accuracy is None):
        told = ", ".join(f"{name} {after[name]:.4g}, dense {before[name]:.4g}" for name in before if name in after)
        return {"status": "measured", "verdict": f"by --metric: {told}"}
    return verdict_on(recovery, last)


def verdict_on(recovery: Recovery, last: Agreement | None, name: str = "") -> dict[str, Any]:
    """Return the verdict on a model as a sentence and as a keyword.

    Args:
        recovery: recovery with the dense model as its first step.
        last: agreement of the model with it.
        name: name of the model in the sentence; empty for the compact model.
    """
    dense, of = recovery.steps[0].agreement, f"{name}: " if name else ""
    if dense is None or last is None:
        return {"verdict": "accuracy unknown: recovered without images; not fit to deploy before it is evaluated"}
    if last.accuracy is not None and last.drop is not None and dense.accuracy is not None:
        value, low, high = last.drop
        lost, won = last.traded or (0, 0)
        return {
            "status": "measured",
            "verdict": (
                f"{of}accuracy {100 * last.accuracy:.2f} %, dense {100 * dense.accuracy:.2f} %: {value:.2f} points "
                f"lost [{low:.2f}, {high:.2f}], paired, on {recovery.judged_by}: {lost} lost, {won} won"
            ),
        }
    told = f"logit cosine {last.cosine:.4f}"
    if last.top1_match is not None:
        told = f"top-1 match {100 * last.top1_match:.1f} %, {told}"
    return {
        "status": "agreement",
        "verdict": f"accuracy unknown; {of}agreement with the dense model: {told}, on {recovery.judged_by}",
    }
