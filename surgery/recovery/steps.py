"""Recovery steps of a compact model, each evaluated against the dense model."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from surgery.capture import Whole, evaluating
from surgery.config import Recipe
from surgery.core import Callee, CompactModel, InputSpec, Program
from surgery.coupling import Cut
from surgery.inputs import Calibration
from surgery.recovery.agreement import Agreement, Model, Reference
from surgery.recovery.reconstruction import Fitted
from surgery.recovery.teaching import History
from surgery.registry import RECOVERY_METHODS, RecoveryMethod

Batches = Sequence[Sequence[Tensor]]
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A compact model and the dense model it was cut from.

    Attributes:
        cut: the dense program and its plan.
        compact: the compact model, whose tensors are modified.
        dense: the dense model, including the model around a submodule.
        model: the compact model, likewise.
        part: the compact module with the program's inputs.
        whole: the dense model around a submodule, if any.
    """

    cut: Cut
    compact: CompactModel
    dense: Callee
    model: Callee
    part: Callee
    whole: Whole | None = None

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
        return input_specs(self.cut.program, self.whole)


def input_specs(program: Program, whole: Whole | None) -> Sequence[InputSpec]:
    """Return the inputs of the program, or of the whole model that it is a submodule of."""
    if whole is None or whole.example is None:
        return program.inputs
    tensors = whole.example.tensors
    names = [str(x.dtype).removeprefix("torch.") for x in tensors]
    return [InputSpec("input", tuple(x.shape), n, tuple(range(x.dim()))) for x, n in zip(tensors, names, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """Evaluates compact models by images, the user's own metric, both or nothing.

    Attributes:
        reference: the dense model on images.
        evaluate: the user's own metric.
        learnt: the images learnt from, if `reference` is the dense program on exactly these.
    """

    reference: Reference | None = None
    evaluate: Callable[[Any], Mapping[str, float]] | None = None
    learnt: Batches | None = None

    def dense(self, subject: Subject) -> tuple[Agreement | None, Mapping[str, float] | None]:
        """Evaluate the dense model."""
        found = self.reference.dense() if self.reference is not None else None
        return found, self.evaluate(subject.dense.module) if self.evaluate is not None else None

    def compact(self, subject: Subject) -> tuple[Agreement | None, Mapping[str, float] | None]:
        """Evaluate the current compact model."""
        found = self.reference.judge(in_eval_mode(subject.model)) if self.reference is not None else None
        return found, self.evaluated(subject)

    def evaluated(self, subject: Subject) -> Mapping[str, float] | None:
        """Return the user's own metric of the compact model."""
        return self.evaluate(subject.model.module) if self.evaluate is not None else None

    def beside(self, subject: Subject, batches: Batches) -> Reference:
        """Return a reference of the dense program on these images, reusing `reference` if possible."""
        if self.reference is not None and batches is self.learnt:
            return self.reference
        judged = [(batch, None) for batch in batches]
        return Reference.of(in_eval_mode(subject.part.on(subject.cut.program.dense.model)), judged, "")


@dataclass(frozen=True, slots=True)
class Step:
    """Result of one step.

    Attributes:
        name: `dense`, `cut`, or a level.
        seconds: duration.
        peak_memory_bytes: peak memory of the process up to its end.
        agreement: agreement with the dense model afterwards; None without evaluation images.
        kept: False if it was undone because it increased the distance to the dense model's outputs.
        notes: notes for the user.
        layers: results of fitted layers.
        history: training history.
        metrics: result of the user's own metric.
    """

    name: str
    seconds: float
    peak_memory_bytes: int
    agreement: Agreement | None
    kept: bool = True
    notes: tuple[str, ...] = ()
    layers: tuple[Fitted, ...] = field(default=(), repr=False)
    history: History | None = field(default=None, repr=False)
    metrics: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with None for values that are not finite."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not isfinite(value) else value


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """The argument of a recovery method.

    Attributes:
        subject: the compact model, to be modified in place, and the dense one.
        recipe: the recipe, with opened data.
        progress: called with the completed fraction.
        images: batches of the program's inputs; empty if the method needs none.
        held_out: batches on which the outputs are compared before and after.
        seen: the user's images as read, if the method needs them.
    """

    subject: Subject
    recipe: Recipe
    progress: Callable[[float], None]
    images: Batches = ()
    held_out: Batches = ()
    seen: Calibration | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a recovery method.

    Attributes:
        notes: notes for the user.
        layers: results of fitted layers.
        history: training history.
        name: name of the method that ran instead of the requested one, or empty.
    """

    notes: tuple[str, ...] = ()
    layers: tuple[Fitted, ...] = ()
    history: History | None = None
    name: str = ""


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
        RECOVERY_METHODS.add(RecoveryMethod(name, function, frozenset(needs), after, undo_if_worse))
        return function

    return register


def run_method(name: str, task: Task, judge: Judge, before: Agreement | None, progress: Progress) -> Step:
    """Run one recovery method and evaluate the compact model after it."""
    method, subject = RECOVERY_METHODS[name], task.subject
    guarded = method.undo_if_worse and len(task.held_out) > 0
    guard = _undone_if_worse(subject, judge, task.held_out, before) if guarded else nullcontext(_Judged())
    with _timed(name, progress) as (report, clock), guard as judged:
        outcome = method.function(replace(task, progress=report))
    ran, notes = outcome.name or name, outcome.notes
    if not judged.kept:
        notes = (*notes, f"{ran} was undone: it left the outputs further from the dense model's than they were")
    known = judged.agreement
    agreement, metrics = judge.compact(subject) if known is None else (known, judge.evaluated(subject))
    seconds = round(clock["seconds"], 3)
    memory = peak_memory()
    return Step(ran, seconds, memory, agreement, judged.kept, notes, outcome.layers, outcome.history, metrics)


@contextmanager
def _timed(name: str, progress: Progress) -> Iterator[tuple[Callable[[float], None], dict[str, float]]]:
    clock, start = {"seconds": 0.0}, time.perf_counter()
    progress(name, 0.0)
    yield (lambda fraction: progress(name, min(0.999, fraction))), clock
    clock["seconds"] = time.perf_counter() - start
    progress(name, 1.0)


@dataclass(slots=True)
class _Judged:
    """Whether a step was kept, and the agreement after it; None if not evaluated."""

    kept: bool = True
    agreement: Agreement | None = None


@contextmanager
def _undone_if_worse(subject: Subject, judge: Judge, batches: Batches, before: Agreement | None) -> Iterator[_Judged]:
    """Restore the tensors if the outputs on these inputs end up further from the dense model's, or not finite.

    Both squared error and correlation must be worse, since batch norms alone may restore one and not the other.
    """
    judged, state = _Judged(), {k: v.clone() for k, v in subject.compact.module.state_dict().items()}
    reference = judge.beside(subject, batches)
    same = reference is judge.reference
    if before is None or not same:
        before = reference.judge(in_eval_mode(subject.part))
    try:
        yield judged
    except BaseException:
        _put_back(subject, state)
        raise
    after = reference.judge(in_eval_mode(subject.part))
    further = after.error > before.error and after.correlation < before.correlation
    if further or not (isfinite(after.error) and isfinite(after.correlation)):
        judged.kept = False
        _put_back(subject, state)
    if same:
        judged.agreement = after if judged.kept else before


def _put_back(subject: Subject, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in subject.compact.module.state_dict().items():
            tensor.copy_(state[name])


def in_eval_mode(callee: Callee) -> Model:
    """Return a function that runs a model on a batch of inputs in eval mode."""

    def run(inputs: Sequence[Tensor]) -> Any:
        with evaluating(callee):
            return callee(*inputs)

    return run


def peak_memory() -> int:
    """Return the peak memory of the process in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)
