"""What is done to recover a compact model, step by step, each judged beside the dense model."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from surgery.capture import evaluating
from surgery.core import Callee, CompactModel, InputSpec
from surgery.coupling import Cut
from surgery.errors import InvalidInput
from surgery.recovery.agreement import Agreement, Model, Reference
from surgery.recovery.batch_norm import estimate_norms
from surgery.recovery.random_images import drawn_images
from surgery.recovery.reconstruction import Fitted, reconstruct
from surgery.recovery.teaching import History, Training
from surgery.recovery.training import train

LEVELS = ("none", "fold", "bn", "reconstruct", "distill", "finetune")
"""Each of the last four begins with what is best of those before it."""
DRAWN, VALUES = 512, 20_000_000
"""So many images are drawn, fewer where they hold more values than this together."""

Batches = Sequence[Sequence[Tensor]]
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A compact model and what it was cut from.

    Attributes:
        cut: what was cut.
        compact: the compact model, whose tensors are written into.
        dense: the dense model, the whole one where a part was shrunk.
        model: the compact model likewise.
        part: the compact model itself, which takes the program's inputs.
        inputs: of `dense` and `model`.
    """

    cut: Cut
    compact: CompactModel
    dense: Callee
    model: Callee
    part: Callee
    inputs: Sequence[InputSpec]


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """What compact models are judged by: images, the user's own evaluation, both or nothing.

    Attributes:
        reference: the dense model on images.
        evaluate: the user's own evaluation of a model.
        learnt: the images that are learnt from, where `reference` is the dense program on just these.
    """

    reference: Reference | None = None
    evaluate: Callable[[Any], Mapping[str, float]] | None = None
    learnt: Batches | None = None

    def dense(self, subject: Subject) -> tuple[Agreement | None, Mapping[str, float] | None]:
        """Judge the dense model."""
        found = self.reference.dense() if self.reference is not None else None
        return found, self.evaluate(subject.dense.module) if self.evaluate is not None else None

    def compact(self, subject: Subject) -> tuple[Agreement | None, Mapping[str, float] | None]:
        """Judge the compact model as it is."""
        found = self.reference.judge(in_eval_mode(subject.model)) if self.reference is not None else None
        return found, self.evaluated(subject)

    def evaluated(self, subject: Subject) -> Mapping[str, float] | None:
        """Return what the user's own evaluation says of the compact model."""
        return self.evaluate(subject.model.module) if self.evaluate is not None else None

    def beside(self, subject: Subject, batches: Batches) -> Reference:
        """Return the dense program on images: `reference`, where it is that."""
        if self.reference is not None and batches is self.learnt:
            return self.reference
        judged = [(batch, None) for batch in batches]
        return Reference.of(in_eval_mode(subject.part.on(subject.cut.program.dense.model)), judged, "")


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did.

    Attributes:
        name: `dense`, `cut`, or a level.
        seconds: that it took.
        peak_memory_bytes: most that the process has held until its end.
        agreement: with the dense model afterwards; None where nothing was there to judge by.
        kept: whether it stayed: a step that leaves the outputs further from the dense model's is undone.
        notes: what the user should know.
        layers: what came of each layer.
        history: how training went.
        metrics: what the user's own evaluation returned.
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
        """Return plain JSON values: what is not finite is None."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def without_data(subject: Subject, judge: Judge, *, seed: int, progress: Progress) -> list[Step]:
    """Fit the compact model on images that are drawn at random.

    Raises:
        InvalidInput: the model does not take images.
    """
    specs = subject.cut.program.inputs
    if not subject.cut.program.has_graph:
        raise InvalidInput(
            "recover='fold' needs the operators that torch.export captures; give images with --data, and --recover bn"
        )
    if len(specs) != 1 or len(specs[0].shape) != 4 or "float" not in specs[0].dtype:
        raise InvalidInput("recover='fold' draws images (N, C, H, W), and this model takes something else; give --data")
    batches, held_out = (_drawn(specs[0], seed + k) for k in range(2))
    held_out = held_out[: max(1, len(held_out) // 4)]
    return [_reconstructed("fold", subject, batches, held_out, judge, None, seed, progress)]


def _drawn(spec: InputSpec, seed: int) -> Batches:
    values = max(1, int(torch.Size(spec.shape[1:]).numel()))
    count = max(32, min(DRAWN, VALUES // values))
    size = max(8, min(64, 1_250_000 // values)) if 0 in spec.dynamic else spec.shape[0]
    images = drawn_images(-(-count // size) * size, *spec.shape[1:], seed=seed)
    return [(x,) for x in torch.split(images.to(getattr(torch, spec.dtype)), size)]


def with_data(
    subject: Subject,
    level: str,
    batches: Batches,
    judge: Judge,
    *,
    before: Agreement | None,
    seed: int,
    progress: Progress,
) -> list[Step]:
    """Bring the compact model nearer to the dense one without labels or gradients.

    Args:
        subject: the compact model.
        level: `bn`, or one that begins with `reconstruct`.
        batches: of the program's inputs.
        judge: what it is judged by.
        before: what `judge` says of it as it is.
        seed: of all that is drawn.
        progress: told each step.
    """
    if level != "bn" and subject.cut.program.has_graph:
        return [_reconstructed("reconstruct", subject, batches, batches, judge, before, seed, progress)]
    notes: tuple[str, ...] = () if level == "bn" else ("no reconstruction: torch.export cannot capture this model",)
    with _timed("bn", progress) as (told, clock), _undone_if_worse(subject, judge, batches, before) as judged:
        count = estimate_norms(subject.compact, batches, call=lambda batch: subject.part(*batch), progress=told)
    notes = notes if count else (*notes, "the model has no batch norms with running statistics")
    return [_step("bn", clock, judged, subject, judge, notes=notes)]


def taught(
    subject: Subject,
    level: str,
    data: Any,
    training: Training,
    judge: Judge,
    *,
    seen: Batches,
    before: Agreement | None,
    key: str,
    progress: Progress,
) -> Step:
    """Teach the compact model: `distill` by the dense one, `finetune` by classes too.

    What is learnt from the dense one and leaves the outputs further from it is undone.

    Args:
        subject: the compact model; parameters that do not want gradients stay.
        level: which of the two.
        data: a map-style Dataset, or a DataLoader.
        training: how.
        judge: what it is judged by.
        seen: images on which the outputs are compared.
        before: what `judge` says of the model as it is.
        key: of what a checkpoint must be.
        progress: told.
    """
    own = {id(p) for p in subject.compact.module.parameters()}
    learning = [p for p in subject.model.parameters() if id(p) in own and p.requires_grad]
    if not learning:
        raise InvalidInput(f"{level}: no parameter of the compact model wants gradients: call requires_grad_() on some")
    guard = _undone_if_worse(subject, judge, seen, before) if level == "distill" else nullcontext(_Judged())
    with _timed(level, progress) as (told, clock), guard as judged:
        history = train(
            subject.model,
            subject.dense,
            data,
            training,
            inputs=subject.inputs,
            learning=learning,
            labels=level == "finetune",
            key=key,
            progress=told,
        )
    notes = [f"{level}: {history.stopped}, after {history.steps} steps"] if history.stopped else []
    notes += [f"{level}: went on from a checkpoint at step {history.resumed}"] if history.resumed else []
    if history.passed_over:
        notes.append(f"{level}: the checkpoint that was found is of another run: it was not taken up")
    if history.best == 0:
        notes.append(f"{level}: training brought nothing: the weights it began with stay")
    return _step(level, clock, judged, subject, judge, notes=tuple(notes), history=history)


def _reconstructed(
    name: str,
    subject: Subject,
    batches: Batches,
    judged_on: Batches,
    judge: Judge,
    before: Agreement | None,
    seed: int,
    progress: Progress,
) -> Step:
    with _timed(name, progress) as (told, clock), _undone_if_worse(subject, judge, judged_on, before) as judged:
        layers = reconstruct(subject.cut, subject.compact, batches, seed=seed, progress=told)
    scarce = [layer for layer in layers if layer.scarce]
    notes: tuple[str, ...] = ()
    if scarce:
        first = scarce[0]
        notes = (
            f"{len(scarce)} layers have fewer positions than weights to fit, the first is {first.name} ({first.rows} "
            f"for {first.unknowns}): they are held near to what they were; more images would help",
        )
    return _step(name, clock, judged, subject, judge, notes=notes, layers=tuple(layers))


def _step(
    name: str,
    clock: Mapping[str, float],
    judged: _Judged,
    subject: Subject,
    judge: Judge,
    *,
    notes: tuple[str, ...] = (),
    layers: tuple[Fitted, ...] = (),
    history: History | None = None,
) -> Step:
    if not judged.kept:
        notes = (*notes, f"{name} was undone: it left the outputs further from the dense model's than they were")
    known = judged.agreement
    agreement, metrics = judge.compact(subject) if known is None else (known, judge.evaluated(subject))
    seconds = round(clock["seconds"], 3)
    return Step(name, seconds, peak_memory(), agreement, judged.kept, notes, layers, history, metrics)


@contextmanager
def _timed(name: str, progress: Progress) -> Iterator[tuple[Callable[[float], None], dict[str, float]]]:
    clock, start = {"seconds": 0.0}, time.perf_counter()
    progress(name, 0.0)
    yield (lambda fraction: progress(name, min(0.999, fraction))), clock
    clock["seconds"] = time.perf_counter() - start
    progress(name, 1.0)


@dataclass(slots=True)
class _Judged:
    """Whether a step stayed, and what the judge says of the model after it; None where that was not asked."""

    kept: bool = True
    agreement: Agreement | None = None


@contextmanager
def _undone_if_worse(subject: Subject, judge: Judge, batches: Batches, before: Agreement | None) -> Iterator[_Judged]:
    """Put the tensors back where the outputs on these inputs end up further from the dense model's, or not finite.

    Further is what is so by squared error and by correlation: norms alone may bring back the one and not the other.
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
    """Return the most memory that the process has held, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)
