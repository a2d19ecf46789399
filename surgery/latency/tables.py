"""Latency tables: milliseconds of kernels by width, on one device.

For each kernel, a table has a grid over its widths, and single points measured later. Times are interpolated linearly
between grid lines, which are edges of the device's latency staircase; a width off an edge costs like the next edge
above it.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product, takewhile
from math import prod
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from surgery.core import Kernel, Size, Widths, replacing, resolved
from surgery.errors import InvalidInput

SCHEMA = 1
LADDER = 2  # kernels with more widths than this are tabulated along the diagonal only, where all widths shrink together


@dataclass(frozen=True)
class Entry:
    """Measurements of one kernel: milliseconds by width.

    `axes` are the measured values of each width, increasing; a single axis with the number of elements if the kernel
    has more than `LADDER` widths.
    """

    axes: tuple[tuple[int, ...], ...]
    grid: tuple[float, ...]  # at each combination, the last axis fastest
    points: Mapping[Widths, float] = field(default_factory=dict)  # at other widths, measured later

    def at(self, place: Sequence[int]) -> float:
        """Return the milliseconds at a position, interpolated within the grid and in proportion outside."""
        corners = [_between(axis, x) for axis, x in zip(self.axes, place)]
        total = 0.0
        for corner in product(*corners):
            index = 0
            for (k, _), axis in zip(corner, self.axes):
                index = index * len(axis) + k
            total += prod(weight for _, weight in corner) * self.grid[index]
        return total


def _between(axis: Sequence[int], x: int) -> list[tuple[int, float]]:
    """Return the neighbouring grid lines and their weights; below the first line, time is proportional."""
    k = bisect_left(axis, x)
    if k < len(axis) and axis[k] == x:
        return [(k, 1.0)]
    if len(axis) == 1 or k == 0:
        return [(0, x / axis[0])]
    k = min(k, len(axis) - 1)
    share = (x - axis[k - 1]) / (axis[k] - axis[k - 1])
    return [(k - 1, 1.0 - share), (k, share)]


@dataclass(frozen=True)
class Stairs:
    """Latency staircase of a kind of kernel on a device.

    Widths that are not a multiple of `step` cost at least as much as the next multiple; 1 if time is linear.
    """

    step: int
    curve: Mapping[int, float]  # width → milliseconds of a square kernel of the kind


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Milliseconds of kernels on one device."""

    device: Mapping[str, Any]  # as `probe.describe` returns it
    stairs: Mapping[str, Stairs]  # by kind of kernel
    overhead_ms: float  # per operator, in addition to its kernel's time
    entries: Mapping[str, Entry]  # by kernel key

    def step(self, kernel: Kernel) -> int:
        """Return the stair step for a kernel's widths."""
        found = self.stairs.get(kind_of(kernel))
        return found.step if found else 1

    def ms(self, kernel: Kernel, widths: Widths) -> Optional[float]:
        """Return the kernel's time at these widths, or None if the kernel is not in the table."""
        for same, theirs in self._like(kernel, widths):
            entry = self.entries[same.key]
            if theirs in entry.points:
                return entry.points[theirs]
            place = place_of(same, theirs)
            if len(same.letters) <= LADDER:  # a width off a stair edge costs like the next edge above it
                step = self.step(same)
                edges = (min(-(-w // step) * step, max(axis[-1], w)) for axis, w in zip(entry.axes, place))
                place = tuple(w if w in axis else edge for axis, w, edge in zip(entry.axes, place, edges))
            return entry.at(place)
        return None

    def covers(self, kernel: Kernel, widths: Widths) -> bool:
        """Return whether the table holds the kernel at all widths up to these."""
        return any(
            all(x <= axis[-1] for x, axis in zip(place_of(same, theirs), self.entries[same.key].axes))
            for same, theirs in self._like(kernel, widths)
            if _bound(same, kernel, {letter: letter for letter in kernel.letters}) is not None
        )

    def _like(self, kernel: Kernel, widths: Widths) -> Iterator[Tuple[Kernel, Widths]]:
        """Yield the table's kernels that match this one at these widths, with the values of their letters.

        The kernel itself comes first. Others have variable widths where this one's are fixed, for example by --keep.
        """
        if kernel.key in self.entries:
            yield kernel, tuple(widths)
        for other in self._by_steps.get(_steps_key(kernel), ()):
            bound = _bound(other, kernel, dict(zip(kernel.letters, widths)))
            if bound is not None and other != kernel:
                yield other, tuple(int(bound[letter]) for letter in other.letters)

    @cached_property
    def _by_steps(self) -> Mapping[str, List[Kernel]]:
        found: Dict[str, List[Kernel]] = {}
        for key in self.entries:
            other = Kernel.from_key(key)
            found.setdefault(_steps_key(other), []).append(other)
        return found

    def only(self, points: Sequence[Tuple[Kernel, Widths]]) -> LatencyTable:
        """Return the table with only the entries used for these kernels."""
        found = (next(self._like(kernel, widths), None) for kernel, widths in points)
        return replace(self, entries={like[0].key: self.entries[like[0].key] for like in found if like is not None})

    def relative(self, kernel: Kernel) -> Optional[Entry]:
        """Return the entry of the kernel most similar to a missing one, or None if there is none.

        Both start with the same operator on tensors of the same shapes; the following operators may differ.
        """

        def start(other: Kernel) -> Tuple[Any, ...]:
            first = other.steps[0]
            names = {str(x).partition(":")[0] for x in first.inputs}
            shapes = [o.shape for o in other.operands if o.name in names]
            return first.op, first.attributes, shapes, len(other.letters)

        def likeness(other: Kernel) -> Tuple[int, int, bool]:
            ours, theirs = ([(s.op, s.attributes) for s in k.steps] for k in (kernel, other))
            same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs))))
            return same, -abs(len(ours) - len(theirs)), kernel.image == other.image

        kin = [other for other in map(Kernel.from_key, self.entries) if start(other) == start(kernel)]
        return self.entries[max(kin, key=likeness).key] if kin else None

    def with_entries(self, entries: Mapping[str, Entry]) -> LatencyTable:
        """Return the table with these entries merged; for existing kernels, the larger grid and all points are kept."""
        merged = dict(self.entries)
        for key, entry in entries.items():
            old = merged.get(key)
            if old is not None:
                wider = max(old, entry, key=lambda e: [axis[-1] for axis in e.axes])
                entry = replace(wider, points={**old.points, **entry.points})
            merged[key] = entry
        return replace(self, entries=merged)

    def to_json(self) -> str:
        """Return the table as JSON text: sorted keys, byte-identical for equal tables."""
        data = {
            "schema": SCHEMA,
            "device": dict(self.device),
            "stairs": {kind: {"step": s.step, "curve": sorted(s.curve.items())} for kind, s in self.stairs.items()},
            "overhead_ms": self.overhead_ms,
            "kernels": {
                key: {"axes": entry.axes, "grid": entry.grid, "points": sorted(entry.points.items())}
                for key, entry in self.entries.items()
            },
        }
        return json.dumps(data, sort_keys=True, indent=None, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Parse the output of `to_json`; raises ValueError or another error of Python if it is damaged."""
        data = json.loads(text)
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, this version reads {SCHEMA}")
        entries = {}
        for key, entry in data["kernels"].items():
            kernel = Kernel.from_key(key)
            kind_of(kernel)
            axes = tuple(tuple(map(_width, axis)) for axis in entry["axes"])
            grid = tuple(_time(ms) for ms in entry["grid"])
            if len(grid) != prod(map(len, axes)):
                raise ValueError(f"kernel {key:.60} has a damaged grid")
            points, widths = {tuple(map(_width, ws)): _time(ms) for ws, ms in entry["points"]}, len(kernel.letters)
            if len(axes) != (widths if widths <= LADDER else 1) or any(len(place) != widths for place in points):
                raise ValueError(f"kernel {key:.60} has other widths")
            if not all(axis and list(axis) == sorted({*axis}) for axis in axes):
                raise ValueError(f"kernel {key:.60} has damaged axes")
            entries[key] = Entry(axes, grid, points)
        given = data["stairs"].items()
        stairs = {kind: Stairs(s["step"], {_width(w): _time(ms) for w, ms in s["curve"]}) for kind, s in given}
        if not all(type(s.step) is int and 1 <= s.step <= _LARGEST_STEP for s in stairs.values()):
            raise ValueError("its stairs are damaged")
        device, known = data["device"], {"threads": int, "precision": str}
        if not isinstance(device, dict) or not all(type(device.get(k, kind())) is kind for k, kind in known.items()):
            raise ValueError("its device is damaged")
        return cls(device, stairs, _time(data["overhead_ms"]), entries)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table; raises InvalidInput if the file is missing or not a table."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, AttributeError, LookupError, StopIteration, RecursionError) as error:
            raise InvalidInput(
                f"cannot read latency table {path} ({error!s:.120}); `surgery profile --out table.json` writes one"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write `to_json` to `path`; raises InvalidInput if it cannot."""
        with replacing(path) as file:
            file.write_text(self.to_json(), encoding="utf-8")


_A_DAY_MS = 1e8
_LARGEST_STEP, _LARGEST_WIDTH = 1024, 2**53


def _time(ms: Any) -> float:
    if not 0.0 <= float(ms) < _A_DAY_MS:
        raise ValueError("damaged: a figure is not a time")
    return float(ms)


def _width(width: Any) -> int:
    if type(width) is not int or not 0 < width < _LARGEST_WIDTH:
        raise ValueError("damaged: a width is not a positive whole number")
    return width


def _steps_key(kernel: Kernel) -> str:
    return repr((kernel.steps, [(o.name, o.kind, len(o.shape)) for o in kernel.operands], kernel.image))


def _bound(pattern: Kernel, kernel: Kernel, sizes: Mapping[str, Size]) -> Optional[Dict[str, Size]]:
    """Bind a pattern's letters to a kernel's shapes; None if a fixed or repeated length differs."""
    bound: Dict[str, Size] = {}
    pairs = list(zip(pattern.operands, kernel.operands))
    shapes = [(p.shape, k.shape) for p, k in pairs] + [(pattern.shape, kernel.shape)]
    for open_shape, shape in shapes:
        for letter, given in zip(open_shape, shape):
            size = sizes[given] if isinstance(given, str) else given
            if (bound.setdefault(letter, size) if isinstance(letter, str) else letter) != size:
                return None
    return bound


def kind_of(kernel: Kernel) -> str:
    """Return the kind of a kernel: ``conv``, ``conv 1x1``, ``depthwise``, ``matmul`` or ``other``."""
    first = kernel.steps[0]
    if first.op == "Conv":
        shape = next(o.shape for o in kernel.operands if o.name == first.inputs[1])
        if shape[1] == 1:
            return "depthwise"
        return "conv 1x1" if all(k == 1 for k in shape[2:]) else "conv"
    return "matmul" if first.op in ("MatMul", "Gemm") else "other"


def place_of(kernel: Kernel, widths: Widths) -> tuple[int, ...]:
    """Return the position of widths on the axes of a kernel's entry: unchanged, or the number of elements."""
    return tuple(widths) if len(kernel.letters) <= LADDER else (elements(kernel, widths),)


def elements(kernel: Kernel, widths: Widths) -> int:
    """Return the number of elements that a kernel reads and writes."""
    sizes = dict(zip(kernel.letters, widths))
    return sum(prod(resolved(shape, sizes)) for shape in (*(o.shape for o in kernel.operands), kernel.shape))
