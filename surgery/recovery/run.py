"""The roof of recovery: which steps a level takes, on which images, and by which they are judged."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from surgery.capture import Whole, evaluating
from surgery.config import TAUGHT, Recipe, validate
from surgery.core import Callee, CompactModel, InputSpec, Plan, Program, Progress, flat_outputs
from surgery.coupling import Cut
from surgery.errors import InvalidInput
from surgery.inputs import (
    Calibration,
    Images,
    as_dataset,
    calibration_images,
    classes_of,
    derived_seed,
    evenly_spaced,
    read_item,
)
from surgery.recovery.agreement import Agreement, Judged, Reference
from surgery.recovery.judging import Pairs
from surgery.recovery.steps import (
    Judge,
    Step,
    Subject,
    in_eval_mode,
    peak_memory,
    taught,
    with_data,
    without_data,
)
from surgery.recovery.teaching import NO_CLASSES, Training, out_of_range

SAMPLED = 32
"""Images of what is learnt from that tell it from others."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What recovery did.

    Attributes:
        level: that was asked for.
        steps: the dense model, the compact one as cut, and each step after.
        judged_by: what the images were that it was judged by; empty for none.
        labelled: whether their classes are known.
        notes: what the user should know.
        reference: what exported files can be judged by; None where there are no images.
        seen: images that were learnt from, for files in fewer bits to be calibrated on; None without.
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
    """Return the level that is asked for: by default `reconstruct` with data, else `none`."""
    return recipe.recovery.recover or ("reconstruct" if recipe.data.data is not None else "none")


def recovered(
    cut: Cut,
    compact: CompactModel,
    model: torch.nn.Module,
    whole: Whole | None,
    recipe: Recipe,
    progress: Progress,
    *,
    seen: Calibration | None = None,
    between: Sequence[Step] = (),
    share: Callable[[Plan, torch.nn.Module], None] | None = None,
) -> Recovery | None:
    """Recover a compact model in place; None where nothing was asked for, and there is nothing to judge by.

    Args:
        cut: what was cut, and from which program.
        compact: the compact model; `model` holds it, or is it.
        model: the compact model, the whole one where a part was shrunk.
        whole: where a part was shrunk, the dense model that it belongs to.
        recipe: with the data opened.
        progress: told each step.
        seen: the images of `data` that were looked at; None: not yet.
        between: steps of the models on the way, where it was cut in several steps.
        share: is given the plan and the compact model before that is trained, where other processes take part.
    """
    validate(recipe)
    level = level_of(recipe)
    if seen is None and recipe.data.data is not None:
        seen = calibration_images(recipe.data.data, cut.program, whole, recipe.data.max_images, recipe.selection.seed)
    refuse_lesson(cut.program, whole, recipe.but(recover=level), seen)
    subject = _subject(cut, compact, model, whole)
    reference, notes = _reference(subject, recipe, seen), list[str]()
    steps = list[Step]()
    alike = reference is not None and recipe.data.val is None and whole is None
    judge = Judge(reference, recipe.data.metric, seen.batches if seen is not None and alike else None)
    if reference is not None or recipe.data.metric is not None:
        for name, (agreement, metrics) in (("dense", judge.dense(subject)), ("cut", judge.compact(subject))):
            steps.append(Step(name, 0.0, peak_memory(), agreement, metrics=metrics))
        steps[1:1] = between
    if level == "fold":
        steps += without_data(subject, judge, seed=recipe.selection.seed, progress=progress)
    elif level != "none":
        assert seen is not None, "levels that need data have some"
        before = steps[-1].agreement if steps else None
        seed = recipe.selection.seed
        steps += with_data(subject, level, seen.batches, judge, before=before, seed=seed, progress=progress)
        if level in TAUGHT:
            if share is not None:
                share(cut.plan, compact.module)
            steps.append(_taught(subject, level, recipe, seen, judge, steps[-1].agreement, progress))
    for given in (recipe.data.data, recipe.data.val):
        notes += given.notes() if isinstance(given, Images) else []
    if reference is not None:
        notes += [*reference.notes, *(reference.batches.notes if isinstance(reference.batches, Pairs) else ())]
    if not steps:
        return None
    named = reference.named if reference is not None else ""
    labelled = reference is not None and reference.labels is not None
    return Recovery(level, tuple(steps), named, labelled, tuple(notes), reference, seen)


def _taught(
    subject: Subject,
    level: str,
    recipe: Recipe,
    seen: Calibration,
    judge: Judge,
    before: Agreement | None,
    progress: Progress,
) -> Step:
    training, data = training_of(recipe), as_dataset(recipe.data.data)
    key = f"{subject.cut.plan.digest} {seen.digest} {level} {training} {_identity(data, subject, training.seed)}"
    return taught(subject, level, data, training, judge, seen=seen.batches, before=before, key=key, progress=progress)


def training_of(recipe: Recipe) -> Training:
    """Return how to train."""
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


def _classes_of(data: Any, inputs: int) -> Tensor | None:
    """What follows the inputs in a data set, where it can be had without reading its images."""
    if isinstance(data, Images):
        return torch.tensor(data.classes) if data.classes else None
    return data.tensors[inputs] if isinstance(data, TensorDataset) and len(data.tensors) > inputs else None


def refuse_lesson(program: Program, whole: Whole | None, recipe: Recipe, seen: Calibration | None) -> None:
    """Raise InvalidInput before the work where training would fail, or judging; arguments are those of `recovered`.

    The batch may be fixed, a label be none of the model's classes, as far as that can be told without reading all
    images, or there be none to learn.
    """
    first = _specs(whole, program)[0]
    if recipe.recovery.recover in TAUGHT and 0 not in first.dynamic:
        raise InvalidInput(
            f"--recover {recipe.recovery.recover} needs a model that takes any number of images, and this one takes "
            f"{first.shape[0]} at a time, as traced; --recover reconstruct does without"
        )
    given = {"val": recipe.data.val} | ({"data": recipe.data.data} if recipe.recovery.recover == "finetune" else {})
    inputs = len(_specs(whole, program))
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
    """The least and the greatest class; of what was seen, where all cannot be had; None for none."""
    known = _classes_of(data, inputs)
    if known is None:
        return seen.classes if seen is not None else None
    known = classes_of([known], len(known))
    return (int(known.min()), int(known.max())) if known is not None else None


def _identity(data: Any, subject: Subject, seed: int) -> str:
    """Digest of what is learnt from, as far as it can be told quickly, and of both models' weights."""
    digest = hashlib.sha256()
    tensors = [] if (known := _classes_of(data, len(subject.inputs))) is None else [known]
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


def follow(
    cut: Cut,
    compact: CompactModel,
    model: torch.nn.Module,
    whole: Whole | None,
    recipe: Recipe,
) -> None:
    """Take part in the training that the first process leads; arguments are those of `recovered`."""
    subject = _subject(cut, compact, model, whole)
    seen = calibration_images(recipe.data.data, cut.program, whole, recipe.data.max_images, recipe.selection.seed)
    _taught(subject, level_of(recipe), recipe, seen, Judge(), None, lambda step, fraction: None)


def _subject(
    cut: Cut,
    compact: CompactModel,
    model: torch.nn.Module,
    whole: Whole | None,
) -> Subject:
    program = cut.program
    part = Callee.of(program, compact.module)
    if whole is None or whole.example is None:
        dense, ours = part.on(program.dense.model), part
    else:
        dense, ours = whole.example, whole.example.on(model)
    return Subject(cut, compact, dense, ours, part, _specs(whole, program))


def _reference(subject: Subject, recipe: Recipe, seen: Calibration | None) -> Reference | None:
    """The dense model on what is judged by: the user's own images to validate on, else those to calibrate on."""
    if recipe.data.val is not None:
        pairs = Pairs(recipe.data.val, subject.inputs, recipe.selection.seed)
        found = Reference.of(in_eval_mode(subject.dense), pairs, "--val")
        return dataclasses.replace(found, named=f"{pairs.count} images of --val")
    if seen is None:
        return None
    batches: Judged = [(batch, None) for batch in seen.given or seen.batches]
    return Reference.of(in_eval_mode(subject.dense), batches, f"{seen.count} images of --data, those it was made with")


def _specs(whole: Whole | None, program: Program) -> Sequence[InputSpec]:
    if whole is None or whole.example is None:
        return program.inputs
    tensors = whole.example.tensors
    names = [str(x.dtype).removeprefix("torch.") for x in tensors]
    return [InputSpec("input", tuple(x.shape), n, tuple(range(x.dim()))) for x, n in zip(tensors, names, strict=True)]


def twin(compact: CompactModel) -> CompactModel:
    """Return a copy whose graph and module share their tensors, as those of the original do."""
    module, graph = copy.deepcopy((compact.module, compact.graph))
    return dataclasses.replace(compact, module=module, graph=graph)


def with_recovery(data: Mapping[str, Any], recovery: Recovery | None) -> dict[str, Any]:
    """Return the report with what recovery did, and the verdict that follows."""
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
    """Return what is known of a model, in a sentence and in a word.

    Args:
        recovery: with the dense model as its first step.
        last: how the model does beside it.
        name: of the model, for the reader; empty for the compact one itself.
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
