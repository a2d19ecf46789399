"""How much has to go for a wanted ratio: a search on a falling function that is dear to evaluate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST = 0.95
"""Share that may go at most."""
_EDGE = 0.1
"""Of a bracket: a guess keeps this far from its ends."""


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation: with this share gone, this ratio is left."""

    share: float
    ratio: float


def reach(
    ratio_of: Callable[[float], float], wanted: float, *, tolerance: float, most: int, start: float | None = None
) -> Point:
    """Return the point that comes nearest to a ratio, one at most `tolerance` above it before any other.

    Args:
        ratio_of: share that goes, 0 to `MOST` → ratio to the dense model that is left; falls as more goes, in steps
            and with noise perhaps.
        wanted: the ratio.
        tolerance: relative to `wanted`; a point that near ends the search.
        most: evaluations.
        start: the first share to try; by default from a square law, as MACs are quadratic in channel counts.
    """
    guess = min(MOST, max(0.005, 1 - math.sqrt(wanted) if start is None else start))
    low, high = Point(0.0, 1.0), Point(1.0, 0.0)
    found: list[Point] = []
    repeated = 0  # how often in a row the same end of the bracket has moved: the other one may then be far off
    for _ in range(most):
        point = Point(guess, ratio_of(guess))
        found.append(point)
        if abs(point.ratio / wanted - 1) <= tolerance:
            break
        above = point.ratio > wanted
        side = 1 if above else -1
        repeated = repeated + side if repeated * side > 0 else side
        low, high = (point, high) if above else (low, point)
        if high.share - low.share < 0.002 or low.share >= MOST:
            break
        guess = _between(low, high, wanted, repeated=repeated)
    return nearest(found, wanted, tolerance=tolerance)


def nearest(points: Sequence[Point], wanted: float, *, tolerance: float) -> Point:
    """Return the nearest of the points that are at most `tolerance` above what is wanted; of all, if none is."""
    within = [p for p in points if p.ratio <= wanted * (1 + tolerance)]
    return min(within or points, key=lambda p: abs(p.ratio - wanted))


def guess_from(points: Sequence[Point], wanted: float) -> float | None:
    """Return the share for a ratio by linear interpolation between earlier points; None without any."""
    if not points:
        return None
    known = sorted([Point(0.0, 1.0), *points], key=lambda p: p.share)
    for a, b in itertools.pairwise(known):
        if a.ratio >= wanted > b.ratio:
            return a.share + (a.ratio - wanted) / (a.ratio - b.ratio) * (b.share - a.share)
    return min(MOST, 0.5 * (known[-1].share + MOST)) if known[-1].ratio > wanted else known[-1].share


def _between(low: Point, high: Point, wanted: float, *, repeated: int) -> float:
    """The share at which the root of the ratio, drawn straight between the ends, is the root of what is wanted."""
    top, bottom, aim = (math.sqrt(max(0.0, x)) for x in (low.ratio, high.ratio, wanted))
    way = (top - aim) / (top - bottom) if top > bottom else 0.5
    way = min(1 - _EDGE, max(_EDGE, way))
    if abs(repeated) >= 2:
        way = max(way, 0.6) if repeated > 0 else min(way, 0.4)
    return min(MOST, low.share + way * (high.share - low.share))
