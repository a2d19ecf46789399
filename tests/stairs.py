"""A made-up device for tests: widths are paid in steps of 16, off multiples of 4 at twice the price."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import ceil, prod
from typing import Any

from surgery.core.kernels import Kernel, Widths, resolved
from surgery.latency.fill import grid_of, largest
from surgery.latency.tables import Entry, LatencyTable, Stairs, place_of

STEP = 16
CURVE = {w: ceil(w / STEP) ** 2 * (1.0 if w % 4 == 0 else 1.7) for w in (8, 15, 16, 24, 31, 32, 47, 48, 63, 64)}
KINDS = ("conv", "conv 1x1", "depthwise", "matmul")


def device_ms(kernel: Kernel, widths: Widths) -> float:
    """Milliseconds on the made-up device: by multiply-adds at widths rounded up, and a little more."""
    padded = tuple(ceil(w / STEP) * STEP for w in widths)
    sizes = dict(zip(kernel.letters, padded, strict=True))
    weights = [prod(resolved(o.shape, sizes)) for o in kernel.operands if o.kind == "weight" and len(o.shape) > 1]
    out = prod(resolved(kernel.shape, sizes))
    per_output = weights[0] / max(1, resolved(kernel.shape, sizes)[1]) if weights else 1.0
    return (out * (per_output + 2.0)) * 1e-6 + 1e-3


class MadeUp:
    """A source of latency tables that measures nothing."""

    live = False

    def __init__(self) -> None:
        self.table = LatencyTable(self.device, {kind: Stairs(STEP, CURVE) for kind in KINDS}, 0.001, {})

    @property
    def device(self) -> Mapping[str, Any]:
        return {"cpu": "made up", "onnxruntime": "0", "threads": 1}

    def cover(self, placed: Sequence[tuple[Kernel, Widths]]) -> LatencyTable:
        entries = {}
        for kernel, widest in largest(placed):
            at = {place_of(kernel, w): device_ms(kernel, w) for w in grid_of(kernel, widest, self.table.step(kernel))}
            axes = tuple(tuple(sorted(set(axis))) for axis in zip(*at, strict=True))
            entries[kernel.key] = Entry(axes, tuple(at[p] for p in product(*axes)))
        self.table = self.table.with_entries(entries)
        return self.table

    def refine(self, points: Iterable[tuple[Kernel, Widths]]) -> LatencyTable | None:
        return None


def table_of(program: Any, coupling: Any, *, batch: int = 1) -> LatencyTable:
    """The made-up device's table for a network."""
    from surgery.planning.lowering import lower

    return MadeUp().cover(lower(program, coupling, batch=batch).points())
