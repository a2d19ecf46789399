"""Functional writes to a part of a tensor: the captured form of in-place writes to slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.core import Layers, Value
from surgery.ops.examples import fork_convs
from surgery.ops.registry import Call, Rewrite, Rule, register

aten = torch.ops.aten


def _range(bound: Mapping[str, Any], size: int) -> tuple[int, int, int]:
    return slice(bound.get("start"), bound.get("end"), bound.get("step", 1)).indices(size)


def _couple_slice_scatter(call: Call) -> Value:
    """`x[.., start:end, ..] = src`: the range of the axis is tied to src's, like all other axes."""
    x, src = call.value("self"), call.value("src")
    rank = len(x.shape)
    dim = call["dim"] % rank
    axes = {a: call.tie(x, a, src, a) for a in range(rank) if a != dim and x.shape[a] > 1}
    start, stop, step = _range(call.bound, x.shape[dim])
    if step != 1:
        call.freeze(x, dim, "written at every few indices")
        call.freeze(src, dim, "written at every few indices")
        return call.out(axes)
    inside = tuple(layer[start:stop] for layer in call.labels.canon(call.passed(x, dim)))
    call.tie_layers(inside, call.passed(src, dim), stop - start)
    axes[dim] = call.passed(x, dim)
    return call.out(axes)


def _rewrite_slice_scatter(r: Rewrite) -> Mapping[str, Any]:
    dim = r.bound["dim"] % len(r.bound["self"].shape)
    keep = r.keep("self", dim)
    if keep.all():
        return {}
    start, stop, _ = _range(r.bound, len(keep))
    first = int(keep[:start].sum())
    return {"start": first, "end": first + int(keep[start:stop].sum())}


def _couple_select_scatter(call: Call) -> Value:
    """`x[.., index, ..] = src`: the axis is never cut, the others are tied."""
    x, src = call.value("self"), call.value("src")
    dim = call["dim"] % len(x.shape)
    call.freeze(x, dim, "a single index of this axis is written")
    others = [a for a in range(len(x.shape)) if a != dim]
    return call.out({a: call.tie(x, a, src, k) for k, a in enumerate(others) if x.shape[a] > 1})


def _couple_copy(call: Call) -> Value:
    """`x.copy_(src)`: src broadcast to x, whose own values are lost."""
    x, src = call.value("self"), call.value("src")
    lead = len(x.shape) - len(src.shape)
    axes: dict[int, Layers] = {}
    for a in range(len(x.shape)):
        wide = a >= lead and src.shape[a - lead] == x.shape[a]
        axes[a] = call.tie(x, a, src, a - lead) if wide and x.shape[a] > 1 else call.passed(x, a)
    return call.out(axes)


def _write_channels(a: Tensor, b: Tensor) -> Tensor:
    written: Tensor = aten.slice_scatter.default(a, b[:, 2:5], 1, 2, 5)
    return written


def _write_row(a: Tensor, b: Tensor) -> Tensor:
    written: Tensor = aten.select_scatter.default(a, b[:, :, 0], 2, 3)
    return written


register(
    Rule(
        op="aten.slice_scatter.default",
        family="movement",
        couple=_couple_slice_scatter,
        rewrite=_rewrite_slice_scatter,
        example=fork_convs(_write_channels),
        summary="ties what is written with the range it is written to",
    ),
    Rule(
        op="aten.select_scatter.default",
        family="movement",
        couple=_couple_select_scatter,
        example=fork_convs(_write_row),
        summary="the axis whose index is written is never cut, the others are tied",
    ),
    Rule(
        op="aten.copy.default",
        family="movement",
        couple=_couple_copy,
        example=fork_convs(lambda a, b: aten.copy.default(a, b)),
        summary="ties what is written with where it goes",
    ),
)
