"""Fill latency tables by measuring: choice and order of points, and evaluation of samples.

Samples are taken in shuffled rounds over all points, with a reference kernel between every few of them: temporary
slowdowns of the machine affect the reference too and are divided out. The step of the device's latency staircase is
measured first, by timing kernels of each kind at many widths. Copied to devices unchanged: Python 3.8, numpy,
onnxruntime.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from surgery.core import Kernel, Operand, Widths, resolved, step
from surgery.latency import probe
from surgery.latency.micro import chain_bytes, model_bytes
from surgery.latency.probe import Conditions
from surgery.latency.tables import LADDER, Entry, LatencyTable, Stairs, kind_of, place_of

Progress = Callable[[str, float], None]
Point = Tuple[Kernel, Widths]

ROUNDS = 3
PROBE_ROUNDS = 5
REFERENCE_EVERY = 8
MOST_LEVELS = (4, 7)
"""Maximum number of grid lines for a kernel's first width, and for its second."""
DIAGONAL = (0.25, 0.5, 0.75, 1.0)
PROBED = (8, 12, 16, 20, 24, 28, 30, 31, 32, 33, 36, 40, 44, 47, 48, 49, 56, 60, 62, 63, 64)
STEPS = (32, 16, 8, 4)
TOLERANCE = 0.06
"""A width is useful if it saves more than this fraction against the next step."""


@dataclass(frozen=True)
class Wanted:
    """A kernel to tabulate, from one unit up to these widths."""

    kernel: Kernel
    widths: Widths


def grid_of(wanted: Wanted, step_of: int) -> List[Widths]:
    """Return the widths at which a kernel is measured: edges of its staircase, thinned if there are many."""
    if len(wanted.kernel.letters) > LADDER:
        return [tuple(max(1, round(f * w)) for w in wanted.widths) for f in DIAGONAL]
    most = MOST_LEVELS if len(wanted.widths) > 1 else (MOST_LEVELS[1],)
    return list(product(*(_levels(w, step_of, n) for w, n in zip(wanted.widths, most))))


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


def fill(
    table: LatencyTable,
    wanted: Iterable[Wanted],
    *,
    conditions: Conditions,
    seed: int = 0,
    rounds: int = ROUNDS,
    progress: Optional[Progress] = None,
) -> LatencyTable:
    """Return the table with missing kernels measured on this machine."""
    news = {w.kernel.key: w for w in wanted if not table.covers(w.kernel, w.widths)}
    grids = {key: grid_of(w, table.step(w.kernel)) for key, w in news.items()}
    points = [(news[key].kernel, widths) for key, grid in grids.items() for widths in grid]
    times = measure(points, conditions=conditions, seed=seed, rounds=rounds, progress=progress)
    entries = {}
    for key, grid in grids.items():
        kernel = news[key].kernel
        places = [place_of(kernel, widths) for widths in grid]
        axes = tuple(tuple(sorted(set(axis))) for axis in zip(*places))
        known = {place: times[key, widths] for place, widths in zip(places, grid) if (key, widths) in times}
        at = {place: known.get(place, _guess(kernel, widths, grid[-1], times)) for place, widths in zip(places, grid)}
        entries[key] = Entry(axes, tuple(at[place] for place in product(*axes)))
    return table.with_entries(entries)


def _guess(kernel: Kernel, widths: Widths, largest: Widths, times: Mapping[Tuple[str, Widths], float]) -> float:
    """Estimate in proportion to the data read and written at the largest widths; None if those do not run."""
    there, here = (sum(_elements(kernel, w)) for w in (largest, widths))
    return times.get((kernel.key, largest), 0.0) * here / max(there, 1)


def _elements(kernel: Kernel, widths: Widths) -> List[int]:
    sizes = dict(zip(kernel.letters, widths))
    return [prod(resolved(shape, sizes)) for shape in (*(o.shape for o in kernel.operands), kernel.shape)]


def refine(
    table: LatencyTable,
    points: Iterable[Point],
    *,
    conditions: Conditions,
    seed: int = 0,
    rounds: int = ROUNDS,
    progress: Optional[Progress] = None,
) -> LatencyTable:
    """Return the table with these points measured too, if they are between grid lines."""
    news: Dict[Tuple[str, Widths], Point] = {}
    for kernel, widths in points:
        if kernel.key not in table.entries:
            continue  # covered by a similar one
        entry = table.entries[kernel.key]
        on_grid = len(kernel.letters) <= LADDER and all(w in a for w, a in zip(widths, entry.axes))
        if not on_grid and widths not in entry.points:
            news[kernel.key, widths] = kernel, widths
    times = measure(list(news.values()), conditions=conditions, seed=seed, rounds=rounds, progress=progress)
    found: Dict[str, Dict[Widths, float]] = {}
    for (key, widths), ms in times.items():
        found.setdefault(key, {})[widths] = ms
    return table.with_entries({key: Entry((), (), points) for key, points in found.items()})


def measure(
    points: Sequence[Point],
    *,
    conditions: Conditions,
    seed: int = 0,
    rounds: int = ROUNDS,
    progress: Optional[Progress] = None,
) -> Dict[Tuple[str, Widths], float]:
    """Return (kernel key, widths) → milliseconds, the median over rounds in shuffled order.

    Kernels that ONNX Runtime cannot run alone are omitted, such as groups that do not divide their channels.
    """
    if not points:
        return {}
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        timer = probe.KernelTimer(conditions, folder)
        reference = model_bytes(REFERENCE[0], REFERENCE[1], conditions.precision)
        samples: Dict[int, list[float]] = {k: [] for k in range(len(points))}
        pulses: List[float] = []
        done = 0
        for _ in range(rounds):
            order = rng.permutation(len(points))
            for start in range(0, len(order), REFERENCE_EVERY):
                pulse = timer.kernel_ms(reference)
                pulses.append(pulse)
                for k in order[start : start + REFERENCE_EVERY]:
                    taken = timer.try_ms(model_bytes(points[k][0], points[k][1], conditions.precision))
                    if taken is not None:
                        samples[int(k)].append(taken / pulse)
                    done += 1
                    if progress is not None:
                        progress("measure kernels", done / (rounds * len(points)))
    usual = float(np.median(pulses))
    return {
        (points[k][0].key, points[k][1]): round(float(np.median(values)) * usual, 6)
        for k, values in samples.items()
        if values
    }


# The device. ---------------------------------------------------------------------------------------------------------


def new_table(
    *, conditions: Conditions, rounds: int = PROBE_ROUNDS, progress: Optional[Progress] = None
) -> LatencyTable:
    """Return an empty table of this machine with its measured stair steps; takes about ten seconds."""
    kinds = {kind_of(kernel): kernel for kernel in _PROBES}
    points = [(kernel, (width,) * len(kernel.letters)) for kernel in kinds.values() for width in PROBED]
    times = measure(points, conditions=conditions, rounds=rounds, progress=progress)
    curves = {
        kind: {width: times[kernel.key, (width,) * len(kernel.letters)] for width in PROBED}
        for kind, kernel in kinds.items()
    }
    stairs = {kind: Stairs(step_of(curve), curve) for kind, curve in curves.items()}
    return LatencyTable(json.loads(json.dumps(probe.describe(conditions))), stairs, overhead_ms(conditions.threads), {})


def overhead_ms(threads: int) -> float:
    """Return the overhead per operator, from a chain of trivial operators against a single one."""
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        timer = probe.KernelTimer(Conditions(threads), folder)
        one, many = (timer.wall_ms(chain_bytes(length)) for length in (1, 1 + _CHAIN))
    return round(max(0.0, many - one) / _CHAIN, 6)


_CHAIN = 64


def step_of(curve: Mapping[int, float]) -> int:
    """Return the step of the staircase in a curve of milliseconds over widths, 1 if there is none.

    A width between two multiples of the step is useful if it is faster than the upper one, and not slower than linear
    interpolation between the two. With a step of 16, odd widths and odd multiples of 2, 4 and 8 are not useful; the
    majority in each of these classes decides.
    """
    for size in STEPS:
        sorts = [[w for w in curve if w % size and w % part == 0 and w % (2 * part)] for part in _parts(size)]
        if all(sum(_is_worth(curve, w, size) for w in sort) <= len(sort) // 3 for sort in sorts):
            return size
    return 1


def _parts(size: int) -> List[int]:
    return [part for part in (*STEPS, 2, 1) if part < size]


def _is_worth(curve: Mapping[int, float], width: int, size: int) -> bool:
    below, above = width // size * size, -(-width // size) * size
    if above not in curve or (below and below not in curve):
        return False
    low, high = curve[below] if below else 0.0, curve[above]
    share = low + (high - low) * (width - below) / size
    return curve[width] < high * (1 - TOLERANCE) and curve[width] < share * (1 + TOLERANCE)


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
    _probe_conv(3, 56, depthwise=True),
    Kernel(
        (step("MatMul", "x0", "w1:T"),),
        (Operand("x0", (1, 784, "a"), "value"), Operand("w1", ("b", "a"), "weight")),
        (1, 784, "b"),
        False,
    ),
)
REFERENCE: tuple[Kernel, Widths] = (_probe_conv(3), (64, 64))


def wanted_of(placed: Iterable[Point]) -> List[Wanted]:
    """Return what to tabulate for the kernels of a dense network: each up to its largest widths there."""
    largest: Dict[str, Wanted] = {}
    for kernel, widths in placed:
        known = largest.get(kernel.key)
        if known is not None:
            widths = tuple(max(pair) for pair in zip(known.widths, widths))
        largest[kernel.key] = Wanted(kernel, widths)
    return list(largest.values())
