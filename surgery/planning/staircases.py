"""The costliest kernels' times over their widths, for the reader: where a plan stands on the device's stairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.core import Kernel, LabelledGraph, Widths
from surgery.latency import LatencyTable
from surgery.planning.forecast import widths_of
from surgery.planning.lowering import Lowered

SHOWN = 4
_POINTS = 96


@dataclass(frozen=True, slots=True)
class Staircase:
    """A kernel's time over its last width, that of its result as a rule; the others are such as the plan leaves them.

    Attributes:
        title: what kernel it is.
        nodes: the operations that it stands for.
        widths: at which the table was read.
        ms: its milliseconds there.
        dense: the width before.
        kept: the width after.
    """

    title: str
    nodes: tuple[str, ...]
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    dense: int
    kept: int


def staircases(
    lowered: Lowered, labelled: LabelledGraph, table: LatencyTable, dead: Mapping[str, Sequence[int]]
) -> tuple[Staircase, ...]:
    """Return the curves of the kernels that take most of the dense network's time, one of each sort, cut ones first.

    Args:
        lowered: the network's kernels, without the blocks that are gone.
        labelled: of the same program.
        table: of the device.
        dead: the plan's.
    """
    dense, kept = (widths_of(lowered, labelled, gone) for gone in ({}, dead))
    rows = list(zip(lowered.placed, dense, kept, strict=True))
    rows = [row for row in rows if row[1][0].letters]
    rows.sort(key=lambda row: (row[1][1][-1] == row[2][1][-1], -(table.ms(*row[1]) or 0.0)))
    found: dict[str, Staircase] = {}
    for placed, (kernel, before), (_, after) in rows:
        if len(found) == SHOWN:
            break
        if kernel.title not in found and (curve := _curve(kernel, table, before, after, placed.nodes)) is not None:
            found[kernel.title] = curve
    return tuple(found.values())


def _curve(
    kernel: Kernel, table: LatencyTable, before: Widths, after: Widths, nodes: Sequence[str]
) -> Staircase | None:
    """Over the last width; None where the table does not tell."""
    dense = before[-1]
    step = max(1, dense // _POINTS)
    widths = sorted({*range(step, dense + 1, step), dense, max(1, after[-1])})
    times = [table.ms(kernel, (*after[:-1], width)) for width in widths]
    if any(t is None for t in times) or not any(times):
        return None
    ms = tuple(round(t or 0.0, 6) for t in times)
    return Staircase(kernel.title, tuple(nodes), tuple(widths), ms, dense, after[-1])
