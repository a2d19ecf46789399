"""Run recovery: the methods of a level, one after the other, each evaluated against the dense model."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from surgery import distributed
from surgery.capture import Whole, evaluating
from surgery.config import Recipe, validate
from surgery.core import Callee, Clock, CompactModel, InputSpec, Program, Progress, digest_of, flat_outputs
from surgery.coupling import Cut
from surgery.errors import InvalidInput
from surgery.inputs import Calibration, Images, as_dataset, calibration_images, classes_of, specs_of
from surgery.latency import peak_bytes
from surgery.recovery.evaluation import Agreement, Evaluate, Model, Pairs, Reference, validate_labels
from surgery.recovery.random_images import drawn_batches
from surgery.recovery.reconstruction import Fitted
from surgery.recovery.training import NO_CLASSES, History, classes_in
from surgery.registry import RECOVERY_METHODS, Entry

LOG = logging.getLogger(__name__)

Batches = Sequence[Sequence[Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A compact model and the dense model it was cut from."""

    cut: Cut  # the dense program and its plan
    compact: CompactModel  # the compact model, whose tensors are modified
    dense: Callee  # the dense model, including the model around a submodule
    model: Callee  # the compact model, likewise
    part: Callee  # the compact module with the program's inputs
    whole: Whole | None = None  # the dense model around a submodule, if any

    @classmethod
    def of(cls, cut: Cut, compact: CompactModel, model: torch.nn.Module, whole: Whole | None) -> Subject:
        """Return a compact model with its callables; `model` is the compact model, or the whole one that holds it."""
        part = Callee.of(cut.program, compact.module)
        if whole is None or whole.example is None:
            return cls(cut, compact, part.on(cut.program.dense.model), part, part, whole)
        return cls(cut, compact, whole.example, whole.example.on(model), part, whole)

    @property
    def inputs(self) -> Sequence[InputSpec]:
        """Inputs of `dense` and `model`."""
        return _example_of(self.cut.program, self.whole)[1]


def _example_of(program: Program, whole: Whole | None) -> tuple[Callee, Sequence[InputSpec]]:
    """Return an example call and the inputs of the dense program, or of the whole model that it is a submodule of."""
    if whole is None or whole.example is None:
        return Callee.of(program, program.dense.model), program.inputs
    return whole.example, specs_of(whole.example)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """The argument of a recovery method."""

    subject: Subject  # the compact model, to be modified in place, and the dense one
    recipe: Recipe  # the recipe, with opened data
    progress: Callable[[float], None] = lambda fraction: None  # called with the completed fraction
    images: Batches = ()  # batches of the program's inputs; empty if the method needs none
    held_out: Batches = ()  # batches on which the outputs are compared before and after
    seen: Calibration | None = None  # the user's images as read, if the method needs them


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a recovery method."""

    notes: tuple[str, ...] = ()  # for the user
    layers: tuple[Fitted, ...] = ()  # that were fitted
    history: History | None = None  # of training
    name: str = ""  # of the method that ran instead of the requested one


def recovery_method(
    name: str, *, needs: Collection[str] = (), after: str = "", undo_if_worse: bool = True
) -> Callable[[Callable[[Task], Outcome]], Callable[[Task], Outcome]]:
    """Register the decorated function as a recovery method, which modifies the compact model of a `Task` in place.

    Args:
        name: name of the method, as in ``surgery.recipe(recover="mine")``.
        needs: `images` (of the user), `drawn-images` (synthetic), `graph` (of operators), `gradients` (it trains, in
            all processes), `labels`.
        after: name of the method that runs before it.
        undo_if_worse: undo its changes if they increase the distance to the dense model's outputs.

    Raises:
        ValueError: the name is already registered, or a need is unknown.
    """

    def register(function: Callable[[Task], Outcome]) -> Callable[[Task], Outcome]:
        RECOVERY_METHODS.add(Entry(name, function, frozenset(needs), after=after, undo_if_worse=undo_if_worse))
        return function

    return register


def _task(name: str, subject: Subject, recipe: Recipe, seen: Calibration | None) -> Task:
    """Return the argument of a method; raises InvalidInput if its needs cannot be met."""
    needs, program = RECOVERY_METHODS[name].needs, subject.cut.program
    if "graph" in needs and not program.has_graph:
        raise InvalidInput(
            f"recover={name!r} needs the operators that torch.export captures; give images with --data, and "
            "--recover bn"
        )
    if "images" in needs:
        assert seen is not None, "validated"
        return Task(subject, recipe, images=seen.batches, held_out=seen.batches, seen=seen)
    if "drawn-images" not in needs:
        return Task(subject, recipe)
    spec, *others = program.inputs
    if others or len(spec.shape) != 4 or "float" not in spec.dtype:
        raise InvalidInput(f"recover={name!r} draws images (N, C, H, W); this model takes something else: give --data")
    seed = recipe.selection.seed
    return Task(subject, recipe, images=drawn_batches(spec, seed), held_out=drawn_batches(spec, seed + 1, share=4))


@dataclass(frozen=True, slots=True)
class Step:
    """Result of one step."""

    name: str  # `dense`, `cut`, or a method
    seconds: float
    peak_memory_bytes: int  # of the process, up to its end
    agreement: Agreement | None  # with the dense model afterwards; None without evaluation images
    kept: bool = True  # False if it was undone, since it led further from the dense model's outputs
    notes: tuple[str, ...] = ()  # for the user
    layers: tuple[Fitted, ...] = field(default=(), repr=False)
    history: History | None = field(default=None, repr=False)
    metrics: Mapping[str, float] | None = None  # the user's own


@dataclass(frozen=True, slots=True)
class Recovery:
    """Result of recovery."""

    level: str  # as requested
    steps: tuple[Step, ...]  # the dense model, the compact one as cut, and each method
    notes: tuple[str, ...] = ()
    reference: Reference | None = field(default=None, repr=False)
    seen: Calibration | None = field(default=None, repr=False)
    weights: tuple[str, str] = ("", "")  # digests of the dense and the compact state that the figures are of

    @property
    def judged_by(self) -> str:
        """Description of the evaluation images; empty for none."""
        return self.reference.named if self.reference is not None else ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with None for values that are not finite."""
        return {
            "level": self.level,
            "judged_by": self.judged_by,
            "labelled": self.reference is not None and self.reference.labels is not None,
            "steps": [_plain(asdict(step)) for step in self.steps],
            "notes": list(self.notes),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not isfinite(value) else value


@dataclass(frozen=True, slots=True, eq=False)
class _Judge:
    """Evaluates models by images, the user's own metric, both or nothing."""

    reference: Reference | None
    metric: Evaluate | None

    def step(self, model: Callee, name: str, seconds: float = 0.0, **values: Any) -> Step:
        """Return a step, with the evaluation of its result as far as not among `values`."""
        if "agreement" not in values:
            values["agreement"] = None if self.reference is None else self.reference.judge(in_eval_mode(model))
        metrics = None if self.metric is None else self.metric(model.module)
        return Step(name, round(seconds, 3), peak_bytes(), metrics=metrics, **values)


def recovered(
    subject: Subject,
    recipe: Recipe,
    clock: Clock,
    *,
    seen: Calibration | None = None,
    between: Sequence[Step] = (),
    shared: bool = False,
) -> Recovery | None:
    """Recover a compact model in place; returns None if nothing was requested and there is nothing to evaluate on.

    `seen` are images already read from `data`, `between` the steps of intermediate models in iterative pruning. Other
    processes train along if `shared`; they are sent the plan and the compact model.
    """
    validate(recipe)
    program, whole, data = subject.cut.program, subject.whole, recipe.data
    level = recipe.recovery.recover or ("reconstruct" if data.data is not None else "none")
    if seen is None and data.data is not None:
        seen = calibration_images(data.data, program, whole, data.max_images, recipe.selection.seed)
    validate_training(program, whole, recipe.but(recover=level), seen)
    judge = _Judge(_reference(subject, recipe, seen), data.metric)
    reference, steps = judge.reference, list[Step]()
    if reference is not None or judge.metric is not None:
        with clock("evaluate"):
            exact = None if reference is None else reference.judge(None)
            steps = [judge.step(subject.dense, "dense", agreement=exact), *between, judge.step(subject.model, "cut")]
    by_data = data.val is None and whole is None
    for name in _methods(level):
        if "gradients" in RECOVERY_METHODS[name].needs and shared:
            distributed.send(subject.cut.plan, subject.compact.module)
        task, before = _task(name, subject, recipe, seen), steps[-1].agreement if steps else None
        with clock(name):
            before = before if by_data and task.seen is not None else None
            steps.append(_run_method(name, task, judge, before, clock.progress))
    notes = [note for given in (data.data, data.val) if isinstance(given, Images) for note in given.notes()]
    notes += reference.notes if reference is not None else ()
    fitted, held = (x.place.resolve() if isinstance(x, Images) else id(x) for x in (data.data, data.val))
    if data.data is not None and fitted == held:
        notes.append("--val has the images of --data, to which the model is fitted: expect less on other images")
    return Recovery(level, tuple(steps), tuple(notes), reference, seen, _digests(subject)) if steps else None


def _digests(subject: Subject) -> tuple[str, str]:
    dense, compact = (digest_of(callee.module.state_dict().values()) for callee in (subject.dense, subject.model))
    return dense, compact


def evaluated_again(recovery: Recovery, subject: Subject, metric: Evaluate | None) -> Recovery:
    """Return the recovery with one more step if weights have been changed since, as by training.

    If the dense model's have, earlier steps, which were compared with it, are left out.
    """
    weights, (dense, _) = _digests(subject), recovery.weights
    if weights == recovery.weights:
        return recovery
    reference, steps, whose = recovery.reference, recovery.steps, "the"
    if weights[0] != dense:
        reference, whose = None if reference is None else reference.renewed(), "the dense model's"
        exact = None if reference is None else reference.judge(None)
        steps = (_Judge(reference, metric).step(subject.dense, "dense", agreement=exact),)
    notes = (*recovery.notes, f"{whose} weights changed after recovery; figures are for the current ones")
    step = _Judge(reference, metric).step(subject.model, "current weights")
    return replace(recovery, steps=(*steps, step), notes=notes, weights=weights, reference=reference)


def _methods(level: str) -> list[str]:
    return [] if level in ("", "none") else [*_methods(RECOVERY_METHODS[level].after), level]


def _run_method(name: str, task: Task, judge: _Judge, before: Agreement | None, progress: Progress) -> Step:
    """Run one recovery method and evaluate the compact model after it; `before`: its agreement on the held-out images.

    Its changes are undone if squared error and correlation with the dense outputs on the held-out images are both worse
    (as batch norms alone may restore one and not the other), or not finite.
    """
    method, subject, guard = RECOVERY_METHODS[name], task.subject, None
    state = {k: v.clone() for k, v in subject.compact.module.state_dict().items()}
    if method.undo_if_worse and task.held_out:
        guard = (judge.reference if before is not None else None) or _reference_on(subject, task.held_out)
        before = before or guard.judge(in_eval_mode(subject.part))
    start = time.perf_counter()
    outcome = method.function(replace(task, progress=lambda fraction: progress(name, min(0.999, fraction))))
    seconds = time.perf_counter() - start
    values: dict[str, Any] = {"notes": outcome.notes, "layers": outcome.layers, "history": outcome.history}
    ran = outcome.name or name
    if guard is not None and before is not None:
        after = guard.judge(in_eval_mode(subject.part))
        further = after.error > before.error and after.correlation < before.correlation
        values["kept"] = not further and isfinite(after.error) and isfinite(after.correlation)
        if not values["kept"]:
            values["notes"] += (f"{ran} was undone: it left the outputs further from the dense model's than they were",)
            with torch.no_grad():
                for key, tensor in subject.compact.module.state_dict().items():
                    tensor.copy_(state[key])
        if guard is judge.reference:
            values["agreement"] = after if values["kept"] else before
    return judge.step(subject.model, ran, seconds, **values)


def follow(subject: Subject, recipe: Recipe) -> None:
    """Participate in training led by the first process; arguments are those of `recovered`."""
    data = recipe.data
    seen = calibration_images(data.data, subject.cut.program, subject.whole, data.max_images, recipe.selection.seed)
    assert recipe.recovery.recover is not None, "the first process trains"
    method = RECOVERY_METHODS[recipe.recovery.recover]
    method.function(_task(method.name, subject, recipe, seen))


def validate_training(program: Program, whole: Whole | None, recipe: Recipe, seen: Calibration | None) -> None:
    """Raise InvalidInput early for a fixed batch, or labels out of range or missing; arguments as of `recovered`."""
    (call, specs), method = _example_of(program, whole), recipe.recovery.recover
    if RECOVERY_METHODS.has_need(method, "gradients") and 0 not in specs[0].dynamic:
        raise InvalidInput(
            f"--recover {method} needs a model that takes any number of images, and this one takes "
            f"{specs[0].shape[0]} at a time, as traced; --recover reconstruct does without"
        )
    known = {"--val": _class_range(recipe.data.val, len(specs), "val")}
    if RECOVERY_METHODS.has_need(method, "labels"):
        found = _class_range(recipe.data.data, len(specs), "data") or (seen.classes if seen is not None else None)
        if found is None:
            raise InvalidInput(NO_CLASSES)
        known["--data"] = found
    if not any(known.values()):
        return
    with evaluating(call), torch.no_grad():
        outputs = flat_outputs(call(*call.tensors))
    for option, ends in known.items():
        if ends is not None and len(outputs) == 1 and outputs[0].dim() == 2:
            validate_labels(option, *ends, outputs[0].shape[1])


EARLY, DOUBT = 256, 0.01
"""Images on which the dense model is evaluated before any work, and the p-value above which it is at chance."""


def validate_dense(program: Program, whole: Whole | None, recipe: Recipe) -> None:
    """Raise InvalidInput if the dense model is at chance on some labelled images; arguments as of `recovered`.

    Its accuracy is logged.
    """
    call, specs = _example_of(program, whole)
    reference = Reference(in_eval_mode(call), Pairs(recipe.data.val, specs, recipe.selection.seed, EARLY), "--val")
    if (accuracy := reference.judge(None).accuracy) is None or reference.labels is None:
        return
    count = len(reference.labels)
    LOG.info("dense model: accuracy %.2f %% on %d images of --val", 100 * accuracy, count)
    if binomtest(round(accuracy * count), count, 1 / reference.classes, alternative="greater").pvalue > DOUBT:
        raise InvalidInput(
            f"the dense model classifies {accuracy:.1%} of {count} images of --val correctly, no better than chance: "
            "labels or preprocessing do not fit the model; check the order of the classes (that of folders is "
            "alphabetical, unless --classes FILE names them), --mean, --std, --size and --crop, or go on with "
            "--allow-chance"
        )


def _class_range(data: Any, inputs: int, option: str) -> tuple[int, int] | None:
    """Return the minimum and maximum class of a dataset; None if unknown without reading its images."""
    known = classes_in(as_dataset(data, option=option), inputs)
    classes = classes_of([known], len(known)) if known is not None else None
    return (int(classes.min()), int(classes.max())) if classes is not None else None


def _reference(subject: Subject, recipe: Recipe, seen: Calibration | None) -> Reference | None:
    """Return the dense model's reference on the validation images, else on the calibration images."""
    if recipe.data.val is not None:
        pairs = Pairs(recipe.data.val, subject.inputs, recipe.selection.seed)
        found = Reference(in_eval_mode(subject.dense), pairs, "--val")
        found.named = f"{pairs.count} images of --val"
        return found
    if seen is None:
        return None
    batches = [(batch, None) for batch in seen.given or seen.batches]
    return Reference(in_eval_mode(subject.dense), batches, f"{seen.count} images of --data, to which it was fitted")


def _reference_on(subject: Subject, batches: Batches) -> Reference:
    """Return the dense program's reference on these images."""
    dense = subject.part.on(subject.cut.program.dense.model)
    return Reference(in_eval_mode(dense), [(batch, None) for batch in batches])


def in_eval_mode(callee: Callee) -> Model:
    """Return a function that runs a model on a batch of inputs in eval mode."""

    def run(inputs: Sequence[Tensor]) -> Any:
        with evaluating(callee):
            return callee(*inputs)

    return run


def copy_of(compact: CompactModel) -> CompactModel:
    """Return a copy whose graph and module share tensors, like the original's."""
    module, graph = copy.deepcopy((compact.module, compact.graph))
    return replace(compact, module=module, graph=graph)


def with_recovery(data: Mapping[str, Any], recovery: Recovery | None) -> dict[str, Any]:
    """Return the report with the recovery steps and the verdict on accuracy."""
    if recovery is None:
        return {**data, "recovery": data.get("recovery")}
    last, before, after = recovery.steps[-1].agreement, recovery.steps[0].metrics, recovery.steps[-1].metrics
    verdict = verdict_on(recovery, last)
    if before and after and (last is None or last.accuracy is None):
        values = ", ".join(f"{name} {after[name]:.4g}, dense {before[name]:.4g}" for name in before if name in after)
        verdict = {"status": "measured", "verdict": f"by --metric: {values}"}
    accuracy, notes = {**data["accuracy"], **verdict}, [*data["notes"], *recovery.notes]
    return {**data, "accuracy": accuracy, "recovery": recovery.to_dict(), "notes": notes}


def verdict_on(recovery: Recovery, last: Agreement | None, name: str = "") -> dict[str, Any]:
    """Return the verdict on a model, by its agreement `last`, as a sentence that may name it and as a keyword."""
    dense, of = recovery.steps[0].agreement, f"{name}: " if name else ""
    if dense is None or last is None:
        return {"verdict": "accuracy unknown: recovered without images; not fit to deploy before it is evaluated"}
    if last.accuracy is not None and last.drop is not None and dense.accuracy is not None:
        value, low, high = last.drop
        lost, won = last.traded or (0, 0)
        verdict = (
            f"{of}accuracy {100 * last.accuracy:.2f} %, dense {100 * dense.accuracy:.2f} %: {value:.2f} points lost "
            f"[{low:.2f}, {high:.2f}], paired, on {recovery.judged_by}: {lost} lost, {won} won"
        )
        return {"status": "measured", "verdict": verdict}
    match = f"top-1 match {100 * last.top1_match:.1f} %, " if last.top1_match is not None else ""
    verdict = f"{of}agreement with the dense model: {match}logit cosine {last.cosine:.4f}, on {recovery.judged_by}"
    return {"status": "agreement", "verdict": f"accuracy unknown; {verdict}"}
