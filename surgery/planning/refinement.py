"""Plan refinement: time compact models against the dense one, and correct their plan.

A table contains isolated operators. Effects in the whole network (caches, the runtime's fusions) are measured on the
exported files, in fresh processes, and the plan's aim is adjusted until the measured ratio meets the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from exporters import onnx
from exporters.quantize import FEWEST, Int8, to_int8
from exporters.session import feeds
from exporters.signature import bind
from surgery.config import Recipe
from surgery.core import Program, Progress
from surgery.errors import BudgetUnreachable
from surgery.inputs import Calibration
from surgery.latency import INT8, ratio as timer
from surgery.planning.choice import HIGHEST, LOWEST, Choice, Iteration, RefinementLog

ITERATIONS = 4
NEAR = 0.02  # a ratio from one process this close to the target is also measured in other processes
CLOSE = 0.015  # refinement ends when the measured ratio is this close to the target, relative to it
HIGHEST_AIM = 0.999  # upper limit of corrections, as a fraction of the dense latency


def int8_of(recipe: Recipe) -> Int8:
    """Return the quantization settings."""
    output = recipe.output
    return Int8(output.int8_method, output.int8_keep, output.int8_reduce_range)


class LatencyBench:
    """The dense model as an ONNX file in a folder, and compact ones to be timed against it.

    Files in int8 are calibrated on images `seen`: on all of them with `for_accuracy`, else on a few.
    """

    def __init__(
        self,
        program: Program,
        folder: Path,
        recipe: Recipe,
        seen: Calibration | None = None,
        progress: Progress | None = None,
        *,
        for_accuracy: bool = False,
    ) -> None:
        self._program, self._folder, self._recipe, self._seen = program, folder, recipe, seen
        self._progress, self._for_accuracy = progress, for_accuracy
        _, self._tensors = bind(program.model, program.example_args, program.example_kwargs)
        self._axes = {name: spec.dynamic for name, spec in zip(self._tensors, program.inputs, strict=True)}
        self.dense = self.export(program.model, "dense")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Input name → timed shape."""
        batch = self._recipe.target.batch
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        return {name: (batch, *shape[1:]) if 0 in self._axes[name] else shape for name, shape in shapes.items()}

    def export(self, module: torch.nn.Module, name: str = "compact") -> Path:
        """Export a module with the dense model's inputs; replaces a file of the same name."""
        if self._progress is not None:
            self._progress(f"export {name} to time it", 0.0)
        args, kwargs = self._program.example_args, self._program.example_kwargs
        path, how = self._folder / f"{name}.onnx", onnx.ExportSettings(check=False)
        onnx.export(module, args, path, how, example_kwargs=kwargs, dynamic_axes=self._axes)
        if self._recipe.target.deploy == INT8:
            to_int8(path, path, self._calibration(path), int8_of(self._recipe), check=False)
        return path

    def ratio(self, compact: Path, *, processes: int = timer.PROCESSES, first: int = 0) -> timer.Ratio:
        """Return a file's latency relative to the dense model's; `first` is the number of earlier processes."""
        seed, threads = self._recipe.selection.seed + first, self._recipe.target.threads
        seeds = range(seed, seed + processes)
        return timer.measure(self.dense, compact, self.shapes, threads=threads, seeds=seeds, progress=self._progress)

    def _calibration(self, path: Path) -> list[dict[str, Any]]:
        """Return the calibration images: a few if files are only timed, the example inputs if there are none."""
        seen = self._seen
        batches = seen.batches if seen is not None else [tuple(self._tensors.values())] * FEWEST
        found, count = list[dict[str, Any]](), 0
        for feed in feeds(path, batches):
            if count >= FEWEST and not (self._for_accuracy and seen is not None):
                break
            found.append(feed)
            count += len(next(iter(feed.values())))
        return found


def refine(
    first: Choice, plan: Callable[[float], Choice], cut: Callable[[Choice], torch.nn.Module], bench: LatencyBench
) -> Choice:
    """Correct a plan until its measured ratio is the target, in at most `ITERATIONS` iterations.

    `plan` returns another plan for a fraction of the dense latency, `cut` a plan's compact module. A plan near the
    target in one process is measured in `ratio.PROCESSES` processes. Returns the plan whose measured ratio is nearest
    to the target, preferably within bounds, with the log.
    """

    def distance(relative: float) -> tuple[bool, float]:
        return not LOWEST <= relative <= HIGHEST, abs(relative - 1)

    target = _log(first).target
    choices, files, dense_ms = [first], list[Path](), list[float]()
    iterations: list[Iteration] = []
    aim, why = target, ""
    while True:
        files.append(bench.export(cut(choices[-1]), f"compact {len(files) + 1}"))
        found = bench.ratio(files[-1], processes=1)
        last = len(iterations) + 1 == ITERATIONS
        if last or abs(found.value / target - 1) <= NEAR:
            more = bench.ratio(files[-1], processes=timer.PROCESSES - 1, first=1)
            found = timer.Ratio((*found.processes, *more.processes))
        dense_ms.append(found.dense_ms)
        iterations.append(Iteration(aim, _log(choices[-1]).predicted, found.value, found.ratios))
        if last or abs(found.value / target - 1) <= CLOSE:
            why = f"{ITERATIONS} plans were tried"
            break
        corrected, why = _another(iterations, target, choices, plan)
        if corrected is None:
            break
        aim, choice = corrected
        choices.append(choice)
    best = min(range(len(iterations)), key=lambda k: distance(iterations[k].measured / target))
    if len(iterations[best].ratios) < timer.PROCESSES:
        found = bench.ratio(files[best])
        iterations[best] = replace(iterations[best], measured=found.value, ratios=found.ratios)
    log = replace(_log(choices[best]), dense_ms=median(dense_ms), iterations=tuple(iterations), taken=best)
    return replace(choices[best], refinement=replace(log, verdict=_verdict(log, why)))


def _another(
    iterations: Sequence[Iteration], target: float, choices: Sequence[Choice], plan: Callable[[float], Choice]
) -> tuple[tuple[float, Choice] | None, str]:
    """Return the next aim and a plan not timed yet; if there is none, None and the reason."""
    for aim in dict.fromkeys(_aims(iterations, target)):
        try:
            found = plan(aim)
        except BudgetUnreachable:  # also for the following, smaller aims
            return None, "every group is at its smallest"
        if not any(found.plan.dead == c.plan.dead and found.plan.dropped == c.plan.dropped for c in choices):
            return (aim, found), ""
    if all(i.measured < target for i in iterations):
        return None, "no slower plan was found"
    return None, "no plan was found between those that were timed"


def _aims(iterations: Sequence[Iteration], target: float) -> Iterator[float]:
    """Yield corrections of the last aim, proportional or between one that was too slow and one that was too fast."""
    last = iterations[-1]
    factor = target / last.measured
    across = [i.aim for i in iterations if (i.measured < target) != (last.measured < target)]
    if not across:
        yield from (min(last.aim * factor**power, HIGHEST_AIM) for power in (1, 2, 4))
        return
    other = min(across, key=lambda aim: abs(aim - last.aim))
    if min(last.aim, other) < last.aim * factor < max(last.aim, other):
        yield last.aim * factor
    yield from (last.aim + share * (other - last.aim) for share in (0.5, 0.25, 0.75))


def _log(choice: Choice) -> RefinementLog:
    assert choice.refinement is not None, "only plans for a latency are timed"
    return choice.refinement


def _verdict(log: RefinementLog, why: str) -> str:
    measured = log.iterations[log.taken].measured
    rounds = "1 round" if len(log.iterations) == 1 else f"{len(log.iterations)} rounds"
    reached = f"target {100 * log.target:.4g} % of {log.dense} latency: reached {100 * measured:.4g} % in {rounds}"
    if log.met:
        return reached
    more = "faster than the target, since more was cut than necessary, " if measured < log.target else ""
    return f"NOT met: {reached}, {more}because {why}"
