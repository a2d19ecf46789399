"""Plan refinement: cut and export a plan, time it against the dense model, and correct it.

A table contains isolated operators. Effects in the whole network (caches, the runtime's fusions) are measured on the
exported files, in fresh processes, and the plan's aim is adjusted until the measured ratio meets the target.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from surgery.core import Clock
from surgery.cutting import tracer_of
from surgery.errors import BudgetUnreachable
from surgery.latency import ratio as timer
from surgery.planning.choice import HIGHEST, LOWEST, Choice, Iteration, RefinementLog
from surgery.planning.decision import Decision
from surgery.planning.latency_bench import LatencyBench
from surgery.planning.latency_planner import LatencyPlanner

ITERATIONS = 4
NEAR = 0.02
"""A ratio from one process this close to the target is also measured in other processes."""
CLOSE = 0.015
"""Refinement ends when the measured ratio is this close to the target, relative to it."""
HIGHEST_AIM = 0.999
"""Upper limit of corrections, as a fraction of the dense latency."""


def refined(decision: Decision, clock: Clock) -> Decision:
    """Time the compact model against the dense one and correct the plan, if the budget is latency on this machine."""
    planner, choice, recipe = decision.planner, decision.choice, decision.recipe
    if planner is None or not (recipe.target.correct and planner.source.live):
        return decision
    tracer = tracer_of(recipe.selection.tracer)

    def compact(choice: Choice) -> torch.nn.Module:
        module: torch.nn.Module = tracer.cut(choice.cut).module
        return module

    with clock("close the loop"), tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        bench = LatencyBench(choice.program.dense, Path(folder), recipe, decision.seen, clock.progress)
        return replace(decision, choice=refine(choice, planner, compact, bench))


def refine(
    first: Choice, planner: LatencyPlanner, cut: Callable[[Choice], torch.nn.Module], bench: LatencyBench
) -> Choice:
    """Correct a plan until its measured ratio is the target, in at most `ITERATIONS` iterations.

    A plan near the target in one process is measured in `ratio.PROCESSES` processes.

    Args:
        first: the plan for the target by the table.
        planner: makes further plans.
        cut: plan → compact module.
        bench: times modules.

    Returns:
        The plan whose measured ratio is nearest to the target, preferably within bounds, with the log.
    """
    target = _log(first).target
    choices, files, dense_ms = [first], list[Path](), list[float]()
    iterations: list[Iteration] = []
    aim, why = target, ""
    while True:
        files.append(bench.export(cut(choices[-1]), f"compact {len(files) + 1}"))
        found = bench.ratio(files[-1], processes=1)
        last = len(iterations) + 1 == ITERATIONS
        if last or abs(found.value / target - 1) <= NEAR:
            found = bench.ratio(files[-1], processes=timer.PROCESSES, after=found)
        dense_ms.append(found.dense_ms)
        iterations.append(Iteration(aim, _log(choices[-1]).predicted, found.value, found.ratios))
        if last or abs(found.value / target - 1) <= CLOSE:
            why = f"{ITERATIONS} plans were tried"
            break
        corrected, why = _another(iterations, target, choices, planner)
        if corrected is None:
            break
        aim, choice = corrected
        choices.append(choice)
    best = min(range(len(iterations)), key=lambda k: _distance(iterations[k].measured / target))
    if len(iterations[best].ratios) < timer.PROCESSES:
        found = bench.ratio(files[best], processes=timer.PROCESSES)
        iterations[best] = replace(iterations[best], measured=found.value, ratios=found.ratios)
    log = replace(_log(choices[best]), dense_ms=median(dense_ms), iterations=tuple(iterations), taken=best)
    return replace(choices[best], refinement=replace(log, verdict=_verdict(log, why)))


def _another(
    iterations: Sequence[Iteration], target: float, choices: Sequence[Choice], planner: LatencyPlanner
) -> tuple[tuple[float, Choice] | None, str]:
    """Return the next aim and a plan not timed yet; if there is none, None and the reason."""
    for aim in dict.fromkeys(_aims(iterations, target)):
        try:
            found = planner.plan(aim)
        except BudgetUnreachable:  # also for the following, smaller aims
            return None, "every group is at its smallest"
        if not any(found.plan.dead == c.plan.dead and found.plan.dropped == c.plan.dropped for c in choices):
            return (aim, found), ""
    if all(i.measured < target for i in iterations):
        return None, "no slower plan was found"
    return None, "no plan was found between those that were timed"


def _aims(iterations: Sequence[Iteration], target: float) -> Iterator[float]:
    """Yield corrections of the last aim, the best first.

    Proportional; interpolated if one aim was too slow and another too fast.
    """
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


def _distance(relative: float) -> tuple[bool, float]:
    return not LOWEST <= relative <= HIGHEST, abs(relative - 1)


def _verdict(log: RefinementLog, why: str) -> str:
    measured = log.iterations[log.taken].measured
    rounds = "1 round" if len(log.iterations) == 1 else f"{len(log.iterations)} rounds"
    reached = f"target {100 * log.target:.4g} % of {log.dense} latency: reached {100 * measured:.4g} % in {rounds}"
    if log.met:
        return reached
    more = "faster than the target, since more was cut than necessary, " if measured < log.target else ""
    return f"NOT met: {reached}, {more}because {why}"
