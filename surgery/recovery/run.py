"""The roof of recovery: which steps a level takes, on which images, and by which they are judged."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from surgery.capture import evaluating
from surgery.core import Callee, CompactModel, Coupling, InputSpec, Plan, Program, Progress
from surgery.coupling import flat_outputs
from surgery.cutting import Whole
from surgery.errors import InvalidInput
from surgery.inputs import Calibration, Images, as_dataset, classes_of, mixed, one, seen_by, spaced
from surgery.recovery.agreement import Agreement, Judged, Reference
from surgery.recovery.judging import Pairs
from surgery.recovery.steps import (
    LEVELS,
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
from surgery.request import Request

NEEDS_DATA = ("bn", "reconstruct", "distill", "finetune")
TAUGHT = ("distill", "finetune")
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


def level_of(request: Request) -> str:
    """Return the level that is asked for: by default `reconstruct` with data, else `none`.

    Raises:
        InvalidInput: there is no such level, or it needs data.
    """
    level = request.recover or ("reconstruct" if request.data is not None else "none")
    if level not in LEVELS:
        raise InvalidInput(f"recover={level!r}: there are {', '.join(LEVELS)}")
    if request.training is not None and not isinstance(request.training, Training):
        raise InvalidInput(f"training={request.training!r:.60}: give a surgery.Training, such as Training(epochs=5)")
    if not isinstance(request.images, int) or request.images < 1:
        raise InvalidInput(f"images={request.images!r}: give a whole number of at least 1")
    if level in NEEDS_DATA and request.data is None:
        raise InvalidInput(f"--recover {level} learns from images: give them with --data; fold does without any")
    return level


def refuse_drop(request: Request) -> None:
    """Raise InvalidInput where `max_drop` does not go with the rest."""
    if request.max_drop is None:
        return
    if not isinstance(request.max_drop, (int, float)) or not 0 < request.max_drop < 100:
        raise InvalidInput(
            f"max_drop={request.max_drop!r}: give points that may be lost, more than 0 and less than 100"
        )
    if request.budget is not None:
        raise InvalidInput("--max-drop looks for the lowest latency: give no budget with it")
    if request.deploy != "fp32" and request.data is None:
        raise InvalidInput(f"--max-drop judges files in {request.deploy}: give images to calibrate them on with --data")
    if request.data is None and request.val is None and request.evaluate is None:
        raise InvalidInput("--max-drop needs something to judge by: give --val with labels, --eval, or --data")
    if request.latency_table is not None or request.tracer == "torch-pruning":
        raise InvalidInput("--max-drop times models on this machine: leave --latency-table and --tracer out")


def recovered(
    program: Program,
    plan: Plan,
    coupling: Coupling,
    compact: CompactModel,
    model: torch.nn.Module,
    whole: Whole | None,
    request: Request,
    progress: Progress,
) -> Recovery | None:
    """Recover a compact model in place; None where nothing was asked for, and there is nothing to judge by.

    Args:
        program: what is left of the traced one without the blocks that went.
        plan: what was cut.
        coupling: the groups.
        compact: the compact model; `model` holds it, or is it.
        model: the compact model, the whole one where a part was shrunk.
        whole: where a part was shrunk, the dense model that it belongs to.
        request: with the data.
        progress: told each step.
    """
    level = level_of(request)
    seen = request.seen
    if seen is None and request.data is not None:
        seen = seen_by(request.data, program, whole, request.images, request.seed)
    refuse_lesson(program, whole, dataclasses.replace(request, recover=level, seen=seen))
    subject = _subject(program, plan, coupling, compact, model, whole)
    reference, notes = _reference(subject, request, seen), list[str]()
    steps = list[Step]()
    alike = reference is not None and request.val is None and whole is None
    judge = Judge(reference, request.evaluate, seen.batches if seen is not None and alike else None)
    if reference is not None or request.evaluate is not None:
        for name, (agreement, metrics) in (("dense", judge.dense(subject)), ("cut", judge.compact(subject))):
            steps.append(Step(name, 0.0, peak_memory(), agreement, metrics=metrics))
        steps[1:1] = request.between
    if level == "fold":
        steps += without_data(subject, judge, seed=request.seed, progress=progress)
    elif level != "none":
        assert seen is not None, "levels that need data have some"
        before = steps[-1].agreement if steps else None
        steps += with_data(subject, level, seen.batches, judge, before=before, seed=request.seed, progress=progress)
        if level in TAUGHT:
            if request.share is not None:
                request.share(plan, compact.module)
            steps.append(_taught(subject, level, request, seen, judge, steps[-1].agreement, progress))
    for given in (request.data, request.val):
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
    request: Request,
    seen: Calibration,
    judge: Judge,
    before: Agreement | None,
    progress: Progress,
) -> Step:
    training, data = request.training or Training(seed=request.seed), as_dataset(request.data)
    key = f"{subject.plan.digest} {seen.digest} {level} {training} {_identity(data, subject, training.seed)}"
    return taught(subject, level, data, training, judge, seen=seen.batches, before=before, key=key, progress=progress)


def _classes_of(data: Any, inputs: int) -> Tensor | None:
    """What follows the inputs in a data set, where it can be had without reading its images."""
    if isinstance(data, Images):
        return torch.tensor(data.classes) if data.classes else None
    return data.tensors[inputs] if isinstance(data, TensorDataset) and len(data.tensors) > inputs else None


def refuse_lesson(program: Program, whole: Whole | None, request: Request) -> None:
    """Raise InvalidInput before the work where training would fail, or judging; arguments are those of `recovered`.

    The batch may be fixed, a label be none of the model's classes, as far as that can be told without reading all
    images, or there be none to learn.
    """
    first = _specs(whole, program)[0]
    if request.recover in TAUGHT and 0 not in first.dynamic:
        raise InvalidInput(
            f"--recover {request.recover} needs a model that takes any number of images, and this one takes "
            f"{first.shape[0]} at a time, as traced; --recover reconstruct does without"
        )
    given = {"val": request.val} | ({"data": request.data} if request.recover == "finetune" else {})
    inputs = len(_specs(whole, program))
    seen = {"data": request.seen}
    known = {k: _range_of(as_dataset(x, option=k), inputs, seen.get(k)) for k, x in given.items()}
    if "data" in known and known["data"] is None:
        raise InvalidInput(NO_CLASSES)
    if not any(known.values()):
        return
    model, args, kwargs = program.dense.model, program.example_args, program.example_kwargs
    if whole is not None:
        model, args, kwargs = whole.model, whole.example_args or (), whole.example_kwargs or {}
    with evaluating(model), torch.no_grad():
        outputs = flat_outputs(model(*args, **kwargs))
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
        samples = [one(data, k, mixed(seed, k)) for k in spaced(len(data), SAMPLED)]
        tensors += [x for x in pytree.tree_leaves(samples) if isinstance(x, Tensor)]
    for model in (subject.dense.module, subject.model.module):
        tensors += [x for _, x in sorted(model.state_dict().items())]
    for x in tensors:
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def follow(
    program: Program,
    plan: Plan,
    coupling: Coupling,
    compact: CompactModel,
    model: torch.nn.Module,
    whole: Whole | None,
    request: Request,
) -> None:
    """Take part in the training that the first process leads; arguments are those of `recovered`."""
    subject = _subject(program, plan, coupling, compact, model, whole)
    seen = seen_by(request.data, program, whole, request.images, request.seed)
    _taught(subject, level_of(request), request, seen, Judge(), None, lambda step, fraction: None)


def _subject(
    program: Program,
    plan: Plan,
    coupling: Coupling,
    compact: CompactModel,
    model: torch.nn.Module,
    whole: Whole | None,
) -> Subject:
    part = Callee.of(program, compact.module)
    if whole is None or whole.example_args is None:
        dense, ours = part.on(program.dense.model), part
    else:
        dense = Callee(whole.model, whole.example_args, whole.example_kwargs)
        ours = dense.on(model)
    return Subject(program, plan, coupling, compact, dense, ours, part, _specs(whole, program))


def _reference(subject: Subject, request: Request, seen: Calibration | None) -> Reference | None:
    """The dense model on what is judged by: the user's own images to validate on, else those to calibrate on."""
    if request.val is not None:
        pairs = Pairs(request.val, subject.inputs, request.seed)
        found = Reference.of(in_eval_mode(subject.dense), pairs, "--val")
        return dataclasses.replace(found, named=f"{pairs.count} images of --val")
    if seen is None:
        return None
    batches: Judged = [(batch, None) for batch in seen.given or seen.batches]
    return Reference.of(in_eval_mode(subject.dense), batches, f"{seen.count} images of --data, those it was made with")


def _specs(whole: Whole | None, program: Program) -> Sequence[InputSpec]:
    if whole is None or whole.example_args is None:
        return program.inputs
    tensors = Callee(whole.model, whole.example_args, whole.example_kwargs).tensors
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
        return {"status": "measured", "verdict": f"by --eval: {told}"}
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
