"""Reductions. Sums contract, means and variances over a cut axis use the survivors, order statistics freeze it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core import Layers, Step, Value, step
from surgery.ops.examples import between_convs, between_linears
from surgery.ops.registry import Call, Coupled, Dead, Rule, Shape, register

aten = torch.ops.aten


def _dims(call_dim: Any, rank: int) -> list[int]:
    if call_dim is None:
        return list(range(rank))
    dims = [call_dim] if isinstance(call_dim, int) else list(call_dim)
    return [d % rank for d in dims] or list(range(rank))


def _passed(call: Call, x: Value, reduced: list[int]) -> Coupled:
    keepdim = bool(call.bound.get("keepdim", False))
    axes: dict[int, Layers] = {}
    position = 0
    for a in range(len(x.shape)):
        if a not in reduced:
            axes[position] = call.passed(x, a)
        position += a not in reduced or keepdim
    outs = tuple(call.out(axes, index=k) for k in range(len(call.outputs)))
    return outs if call.many else outs[0]


def _couple_sum(call: Call) -> Coupled:
    x = call.value("self")
    reduced = _dims(call.bound.get("dim"), len(x.shape))
    for a in reduced:
        call.passed(x, a)
    return _passed(call, x, reduced)


def _couple_moment(call: Call) -> Coupled:
    x = call.value("self")
    reduced = _dims(call.bound.get("dim"), len(x.shape))
    for a in reduced:
        call.labels.mark_inexact(call.passed(x, a), f"{call.labels.where} averages over the survivors")
    return _passed(call, x, reduced)


def _reference_moment(dead: Dead) -> Any:
    x: Tensor = dead.bound["self"]
    reduced = _dims(dead.bound.get("dim"), x.dim())
    for (_, axis), alive in dead.alive.items():
        if axis in reduced:
            x = x.index_select(axis, alive.nonzero().flatten())
    return dead.run(self=x)


def _couple_frozen(call: Call) -> Coupled:
    """Axes on whose every index the result depends are never cut; the others pass."""
    x = call.value("self")
    reduced = _dims(call.bound.get("dim"), len(x.shape))
    for a in reduced:
        call.freeze(x, a, "depends on every index of this axis")
    return _passed(call, x, reduced)


def _couple_norm(call: Call) -> Coupled:
    """Zeros do not change a norm of order 0 or more, so removed indices count as zeros."""
    return _couple_sum(call) if call.bound.get("ord", 2) >= 0 else _couple_frozen(call)


def _couple_scan(call: Call) -> Coupled:
    """Same shape out: the axis it runs along is never cut."""
    x = call.value("self")
    dim = call["dim"] % len(x.shape)
    call.freeze(x, dim, "depends on every index of this axis")
    kept = {a: call.passed(x, a) for a in range(len(x.shape)) if a != dim}
    outs = tuple(call.out(kept, index=k) for k in range(len(call.outputs)))
    return outs if call.many else outs[0]


def _frozen(name: str, function: Callable[[Tensor], Tensor], *, scan: bool = False) -> Rule:
    return Rule(
        op=f"aten.{name}",
        family="reduction",
        couple=_couple_scan if scan else _couple_frozen,
        example=between_convs(function),
        summary="the axis it runs over is never cut",
    )


def _onnx_mean(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
    axes = tuple(a.get("dim") or range(len(shapes["self"])))
    return [step("ReduceMean", "self", axes, keepdims=int(a.get("keepdim", False)))]


def _moment(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    return Rule(
        op=f"aten.{name}",
        family="reduction",
        couple=_couple_moment,
        masked=("self",),
        reference=_reference_moment,
        onnx=_onnx_mean if name.startswith("mean") else None,
        example=between_linears(function),
        summary="inexact where the reduced axis is cut: averages over the survivors",
    )


_SUM = Rule(
    op="aten.sum.dim_IntList",
    family="reduction",
    couple=_couple_sum,
    masked=("self",),
    example=between_linears(lambda x: x * x.sum(-1, keepdim=True)),
    summary="a contraction with ones",
)

register(
    _SUM,
    replace(_SUM, op="aten.sum.default", example=between_linears(lambda x: x * x.sum())),
    Rule(
        op="aten.linalg_vector_norm.default",
        family="reduction",
        couple=_couple_norm,
        masked=("self",),
        example=between_linears(lambda x: nn.functional.normalize(x, dim=-1)),
        summary="removed indices add nothing; of negative order: never cut",
    ),
    _moment("mean.dim", lambda x: x * x.mean(-1, keepdim=True)),
    _moment("mean.default", lambda x: x * x.mean()),
    _moment("var.dim", lambda x: x * x.var(-1, keepdim=True)),
    _moment("std.dim", lambda x: x * x.std(-1, keepdim=True)),
    _moment("var_mean.dim", lambda x: x * torch.var_mean(x, -1, keepdim=True)[0]),
    _moment("var.correction", lambda x: x * x.var(-1, correction=0, keepdim=True)),
    _moment("std.correction", lambda x: x * x.std(-1, correction=0, keepdim=True)),
    _moment("var_mean.correction", lambda x: x * torch.var_mean(x, -1, correction=0, keepdim=True)[0]),
    _frozen("amax.default", lambda x: x + x.amax((2, 3), keepdim=True)),
    _frozen("amin.default", lambda x: x + x.amin((2, 3), keepdim=True)),
    _frozen("max.dim", lambda x: x + x.max(2, keepdim=True)[0]),
    _frozen("min.dim", lambda x: x + x.min(2, keepdim=True)[0]),
    _frozen("logsumexp.default", lambda x: x + x.logsumexp(2, keepdim=True)),
    _frozen("prod.dim_int", lambda x: x + x.prod(2, keepdim=True)),
    _frozen("argmax.default", lambda x: x + x.argmax(2, keepdim=True)),
    _frozen("cumsum.default", lambda x: x.cumsum(2), scan=True),
    _frozen("sort.default", lambda x: x.sort(2)[0], scan=True),
)
