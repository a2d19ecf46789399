"""The fastest compact model that loses no more than so many points: a search over latencies, each one recovered.

Latency and accuracy both fall as more goes, so the search halves an interval: of each latency, a plan by the table is
cut, checked, recovered and judged; those that lose little enough are timed against the dense model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from exporters.session import OnnxModel
from surgery.config import DEPLOYED, MILDEST, Budget, Recipe
from surgery.core import Clock
from surgery.errors import BudgetUnreachable, InvalidInput
from surgery.planning import Decision, LatencyBench
from surgery.recovery import Step, points_lost

FIRST = 0.5
NEAR = 0.04
"""The search ends once the interval is this narrow, in fractions of the dense latency."""
MOST = 7
"""Models that are recovered."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One model of the search.

    Attributes:
        aim: fraction of the dense latency that its plan aims at, by the table.
        lost: points.
        upper: the bound by which it is judged: of the 95 % interval where there is one.
        measured: its latency as a fraction of the dense one's; None where it lost too much to be timed.
    """

    aim: float
    lost: float
    upper: float
    measured: float | None = None


def lost_by(steps: tuple[Step, ...]) -> tuple[float, float, str]:
    """Return points lost from the dense model to the last step, their upper bound, and what they are points of."""
    first, last = steps[0], steps[-1]
    if last.agreement is not None and last.agreement.drop is not None:
        return last.agreement.drop[0], last.agreement.drop[2], "accuracy"
    if first.metrics and last.metrics:
        lost = points_lost(first.metrics, last.metrics)
        return lost, lost, f"'{next(iter(first.metrics))}' of --eval, without an interval"
    if last.agreement is not None and last.agreement.differs is not None:
        return last.agreement.differs[0], last.agreement.differs[2], "agreement with the dense model"
    raise InvalidInput(
        "--max-drop needs something to lose: give labelled images with --val, a measure with --eval, or a classifier "
        "and images with --data"
    )


def fastest(decision: Decision, realise: Callable[[Decision], Any], clock: Clock) -> Any:
    """Return the result with the lowest measured latency among those that lose no more than `max_drop`.

    Args:
        decision: for a latency budget; its `planner` makes the plans.
        realise: decision → checked and recovered result, with its `steps`.
        clock: told progress.

    Raises:
        BudgetUnreachable: even the slowest model that was tried loses more.
    """
    recipe, choice = decision.recipe, decision.choice
    limit = recipe.selection.max_drop
    assert limit is not None and choice.refinement is not None, "the caller makes sure"
    tried: list[Tried] = []
    best: tuple[float, Any] | None = None
    low, high, aim = 0.0, 1.0, FIRST
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        dense, seen = choice.program.dense, decision.seen
        bench = LatencyBench(dense, Path(folder), recipe, seen, clock.progress, for_accuracy=True)
        while len(tried) < MOST and high - low > NEAR and aim <= MILDEST.amount:
            clock.progress(f"within {limit:g} points: {aim:.2f} of the latency", 0.0)
            found, measured = _at(decision, aim, realise), None
            if found is not None:
                file = bench.export(found.compact.module)
                lost, upper, _ = lost_by(_with_last(found, file, recipe))
                if upper <= limit:
                    measured = bench.ratio(file, processes=2).value
                tried.append(Tried(round(aim, 4), round(lost, 3), round(upper, 3), measured))
            if measured is not None and (best is None or measured < best[0]):
                best = measured, found
            low, high = (low, aim) if measured is not None else (aim, high)
            aim = (low + high) / 2
    if best is None:
        nearest = min(tried, key=lambda t: t.upper, default=None)
        told = f"; the nearest, at {nearest.aim:.2f} of the latency, loses up to {nearest.upper:.2f}" if nearest else ""
        raise BudgetUnreachable(
            f"no model within --max-drop {limit:g} was found in {len(tried)} tries{told}; allow more, recover more "
            "(--recover distill), or judge by more images: the bound is that of the 95 % interval"
        )
    result = best[1]
    within = {
        "max_drop": limit,
        "dense": choice.refinement.dense,
        "of": lost_by(result.steps)[2],
        "measured": best[0],
        "tried": [asdict(t) for t in tried],
    }
    verdict = f"measured {best[0]:.4f} of {choice.refinement.dense} latency, the lowest found within {limit:g} points"
    latency = {**result.report["latency"], "target": best[0], "verdict": verdict}
    return replace(result, report={**result.report, "within": within, "latency": latency})


def _with_last(found: Any, file: Path, recipe: Recipe) -> tuple[Step, ...]:
    """The result's steps; where the model will run in fewer bits, the last one as its file does.

    The file of a part does not take the images that the whole model is judged by: of those the float model counts.
    """
    steps: tuple[Step, ...] = found.steps
    if recipe.target.deploy == DEPLOYED[0] or found.whole is not None:
        return steps
    model, reference = OnnxModel(file), found.recovery.reference
    agreement = None if reference is None else reference.judge(lambda inputs: model(*inputs))
    metrics = None if recipe.data.metric is None else recipe.data.metric(model)
    return (*steps, replace(steps[-1], name=recipe.target.deploy, agreement=agreement, metrics=metrics))


def _at(decision: Decision, aim: float, realise: Callable[[Decision], Any]) -> Any:
    """The result for one latency; None where it cannot be reached."""
    assert decision.planner is not None
    try:
        choice = decision.planner.plan(aim)
    except BudgetUnreachable:
        return None
    plan = replace(choice.plan, budget=Budget(latency=aim))
    refinement = replace(choice.refinement, target=aim) if choice.refinement is not None else None
    recipe = decision.recipe.but(budget=plan.budget, correct=False, max_drop=None)
    return realise(replace(decision, choice=replace(choice, plan=plan, refinement=refinement), recipe=recipe))
