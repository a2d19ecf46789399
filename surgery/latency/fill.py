"""Fill latency tables by measuring: choice and order of points, and evaluation of samples.

Temporary slowdowns of the machine affect a reference kernel between samples too, and are divided out. Copied to devices
unchanged: Python 3.8, numpy, onnxruntime.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from surgery.core import Kernel, Operand, Widths, step
from surgery.latency import probe
from surgery.latency.micro import chain_bytes, model_bytes
from surgery.latency.probe import Conditions
from surgery.latency.tables import LADDER, Entry, LatencyTable, Stairs, elements, kind_of, place_of

Progress = Callable[[str, float], None]
Point = Tuple[Kernel, Widths]

ROUNDS, MOST_PROBES = 3, 6
REFERENCE_EVERY = 8
MOST_LEVELS = (4, 7)  # maximum number of grid lines for a kernel's first width, and for its second
DIAGONAL = (0.25, 0.5, 0.75, 1.0)
PROBED = (8, 12, 16, 20, 24, 28, 30, 31, 32, 33, 36, 40, 44, 47, 48, 49, 56, 60, 62, 63, 64)
STEPS = (32, 16, 8, 4)
SLIGHT = 0.02  # savings below this fraction of a time are too small to measure


@dataclass(frozen=True)
class Timer:
    """How kernels are timed on this machine; `rounds` is how often, None as usual."""

    conditions: Conditions
    seed: int = 0
    rounds: Optional[int] = None
    progress: Optional[Progress] = None

    def measure(self, points: Sequence[Point]) -> Dict[Tuple[str, Widths], float]:
        """Return (kernel key, widths) → milliseconds, the median over rounds in shuffled order.

        Kernels that ONNX Runtime cannot run alone are omitted, such as groups that do not divide their channels.
        """
        if not points:
            return {}
        rounds, conditions = self.rounds or ROUNDS, self.conditions
        rng = np.random.default_rng(self.seed)
        samples: Dict[int, List[float]] = {k: [] for k in range(len(points))}
        pulses: List[float] = []
        flushed = np.zeros(max(1, conditions.flush_mib << 18), np.float32)

        def ms(point: Point) -> float:
            return probe.kernel_ms(model_bytes(*point, conditions.precision), conditions.threads, flushed)

        for done in range(rounds):
            for place, k in enumerate(rng.permutation(len(points))):
                if place % REFERENCE_EVERY == 0:
                    pulses.append(ms(REFERENCE))
                with suppress(Exception):  # of ONNX Runtime, whose exceptions have no common base class
                    samples[int(k)].append(ms(points[k]) / pulses[-1])
                if self.progress is not None:
                    self.progress("measure kernels", (done + (place + 1) / len(points)) / rounds)
        usual_ms = float(np.median(pulses))
        return {
            (points[k][0].key, points[k][1]): round(float(np.median(values)) * usual_ms, 6)
            for k, values in samples.items()
            if values
        }


def fill(table: LatencyTable, points: Iterable[Point], timer: Timer) -> LatencyTable:
    """Return the table with the missing kernels of a dense network measured, each up to its largest widths there."""
    missing = [(kernel, widths) for kernel, widths in largest(points) if not table.covers(kernel, widths)]
    grids = [(kernel, grid_of(kernel, widths, table.step(kernel))) for kernel, widths in missing]
    times = timer.measure([(kernel, widths) for kernel, grid in grids for widths in grid])
    entries = {}
    for kernel, grid in grids:
        at = {place_of(kernel, w): times.get((kernel.key, w), _guess(kernel, w, grid[-1], times)) for w in grid}
        axes = tuple(tuple(sorted(set(axis))) for axis in zip(*at))
        entries[kernel.key] = Entry(axes, tuple(at[place] for place in product(*axes)))
    return table.with_entries(entries) if entries else table


def refine(table: LatencyTable, points: Iterable[Point], timer: Timer) -> LatencyTable:
    """Return the table with these points measured too, if they are between grid lines."""
    news: Dict[Tuple[str, Widths], Point] = {}
    for kernel, widths in points:
        entry = table.entries.get(kernel.key)  # None if covered by a similar one
        on_grid = entry and len(kernel.letters) <= LADDER and all(w in a for w, a in zip(widths, entry.axes))
        if entry and not on_grid and widths not in entry.points:
            news[kernel.key, widths] = kernel, widths
    found: Dict[str, Dict[Widths, float]] = {}
    for (key, widths), ms in timer.measure(list(news.values())).items():
        found.setdefault(key, {})[widths] = ms
    return table.with_entries({key: Entry((), (), points) for key, points in found.items()}) if found else table


def largest(points: Iterable[Point]) -> List[Point]:
    """Return each kernel once, with its largest widths."""
    found: Dict[str, Point] = {}
    for kernel, widths in points:
        _, known = found.get(kernel.key, (kernel, widths))
        found[kernel.key] = kernel, tuple(max(pair) for pair in zip(known, widths))
    return list(found.values())


def grid_of(kernel: Kernel, widths: Widths, step_of: int) -> List[Widths]:
    """Return the widths at which a kernel is measured: edges of its staircase, thinned if there are many."""
    if len(kernel.letters) > LADDER:
        return list(dict.fromkeys(tuple(max(1, round(f * w)) for w in widths) for f in DIAGONAL))
    most = MOST_LEVELS if len(widths) > 1 else (MOST_LEVELS[1],)
    return list(product(*(_levels(w, step_of, n) for w, n in zip(widths, most))))


def _levels(width: int, step_of: int, most: int) -> List[int]:
    """Return stair edges up to and including a width, at increasing distances if there are many."""
    stride = max(step_of, 1)
    edges = sorted({*range(stride, width, stride), width})
    if len(edges) <= most:
        return edges
    picks = np.unique(np.round(np.geomspace(1, len(edges), most)).astype(int)) - 1
    if len(picks) < most:
        picks = np.unique(np.round(np.linspace(0, len(edges) - 1, most)).astype(int))
    return [edges[k] for k in picks]


def _guess(kernel: Kernel, widths: Widths, largest: Widths, times: Mapping[Tuple[str, Widths], float]) -> float:
    """Estimate in proportion to the data read and written at the largest widths; 0 if those do not run."""
    here, there = elements(kernel, widths), elements(kernel, largest)
    return times.get((kernel.key, largest), 0.0) * here / max(there, 1)


# The device. ---------------------------------------------------------------------------------------------------------


def new_table(timer: Timer) -> LatencyTable:
    """Return an empty table of this machine with its measured stair steps; takes about fifteen seconds.

    A kind of kernel is measured again until the median of all measurements shows a step that two of them show too, if
    it is the length of the processor's vectors, and three otherwise.
    """
    vector = _vector(probe.processor()[1])
    seen: Dict[Kernel, List[Mapping[int, float]]] = {kernel: [] for kernel in _PROBES}
    for again in range(MOST_PROBES):
        open_ = [kernel for kernel, curves in seen.items() if not _is_decided(curves, vector)]
        points = [(kernel, (width,) * len(kernel.letters)) for kernel in open_ for width in PROBED]
        times = replace(timer, seed=timer.seed + again).measure(points)
        for kernel in open_:
            seen[kernel].append({width: times[kernel.key, (width,) * len(kernel.letters)] for width in PROBED})
    medians = {kind_of(kernel): _median_of(curves) for kernel, curves in seen.items()}
    stairs = {kind: Stairs(step_of(curve), curve) for kind, curve in medians.items()}
    return LatencyTable(probe.describe(timer.conditions), stairs, overhead_ms(timer.conditions.threads), {})


def _is_decided(curves: Sequence[Mapping[int, float]], expected: int) -> bool:
    if not curves:
        return False
    step = step_of(_median_of(curves))
    return [step_of(curve) for curve in curves].count(step) >= (2 if step == expected else 3)


def _vector(flags: Sequence[str]) -> int:
    """Return how many floats fit a vector register of a processor with these instruction sets."""
    return 16 if "avx512f" in flags else 8 if "avx" in flags else 4


def _median_of(curves: Sequence[Mapping[int, float]]) -> Dict[int, float]:
    return {width: round(float(np.median([curve[width] for curve in curves])), 6) for width in curves[0]}


def overhead_ms(threads: int) -> float:
    """Return the overhead per operator, from a chain of trivial operators against a single one."""
    one, many = (probe.wall_ms(chain_bytes(length), threads) for length in (1, 1 + _CHAIN))
    return round(max(0.0, many - one) / _CHAIN, 6)


_CHAIN = 64


def step_of(curve: Mapping[int, float]) -> int:
    """Return the step of the staircase in a curve of milliseconds over widths, 1 if there is none.

    The largest step at which widths between two multiples cost like the upper one rather than in proportion. With a
    step of 16, these are odd widths and odd multiples of 2, 4 and 8; the median in each of these classes decides.
    """
    for size in STEPS:
        parts = [part for part in (*STEPS, 2, 1) if part < size]
        sorts = [[w for w in curve if w % size and w % part == 0 and w % (2 * part)] for part in parts]
        if all(np.median([_evidence(curve, width, size) for width in sort]) >= 0 for sort in sorts):
            return size
    return 1


def _evidence(curve: Mapping[int, float], width: int, size: int) -> float:
    """Return how much a width's time speaks for a step: 0.5 at the time of the next multiple, -0.5 in proportion."""
    below, above = width // size * size, -(-width // size) * size
    if above not in curve or (below and below not in curve):
        return 0.0
    low, high = curve[below] if below else 0.0, curve[above]
    rise = (high - low) * (above - width) / size  # what the width would save in proportion
    if rise < SLIGHT * high:
        return 0.0
    return min(1.0, max(-1.0, (curve[width] - high) / rise + 0.5))


def _probe_conv(size: int, side: int = 28, *, depthwise: bool = False) -> Kernel:
    inputs, outputs = ("a", "a") if depthwise else ("a", "b")
    weight = (outputs, 1 if depthwise else inputs, size, size)
    return Kernel(
        (step("Conv", "x0", "w1", "w2", kernel_shape=[size] * 2, pads=[size // 2] * 4, strides=[1, 1]),),
        (
            Operand("x0", (1, inputs, side, side), "image"),
            Operand("w1", weight, "weight"),
            Operand("w2", (outputs,), "weight"),
        ),
        (1, outputs, side, side),
        True,
    )


_PROBES: tuple[Kernel, ...] = (
    _probe_conv(3),
    _probe_conv(1, 56),
    _probe_conv(3, 112, depthwise=True),
    Kernel(
        (step("MatMul", "x0", "w1:T"),),
        (Operand("x0", (1, 3136, "a"), "value"), Operand("w1", ("b", "a"), "weight")),
        (1, 3136, "b"),
        False,
    ),
)
REFERENCE: tuple[Kernel, Widths] = (_probe_conv(3), (64, 64))
