"""Reductions. Sums contract, means and variances over a cut axis use the survivors, order statistics freeze it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core import Step, Value, step
from surgery.ops.examples import between_convs, between_linears
from surgery.ops.registry import Call, Coupled, Dead, Rule, Shape, register

aten = torch.ops.aten


def _dims(call_dim: Any, rank: int) -> list[int]:
    if call_dim is None:
        return list(range(rank))
    dims = [call_dim] if isinstance(call_dim, int) else list(call_dim)
    return [d % rank for d in dims] or list(range(rank))


def _reduction(treat: Callable[[Call, Value, int], object]) -> Callable[[Call], Coupled]:
    """Treat each reduced axis; the others pass."""

    def couple(call: Call) -> Coupled:
        x = call.value("self")
        reduced = _dims(call.bound.get("dim"), len(x.shape))
        for a in reduced:
            treat(call, x, a)
        kept = [a for a in range(len(x.shape)) if call.bound.get("keepdim", False) or a not in reduced]
        return call.outs({k: call.passed(x, a) for k, a in enumerate(kept) if a not in reduced})

    return couple


def _mark_inexact(call: Call, x: Value, axis: int) -> None:
    call.labels.mark_inexact(call.passed(x, axis), f"{call.labels.where} averages over the survivors")


_couple_sum = _reduction(Call.passed)
_couple_frozen = _reduction(lambda call, x, axis: call.freeze(x, axis, "depends on every index of this axis"))


def _reference_moment(dead: Dead) -> Any:
    x: Tensor = dead.bound["self"]
    reduced = _dims(dead.bound.get("dim"), x.dim())
    for (_, axis), alive in dead.alive.items():
        if axis in reduced:
            x = x.index_select(axis, alive.nonzero().flatten())
    return dead.run(self=x)


def _couple_norm(call: Call) -> Coupled:
    """Zeros do not change a norm of order 0 or more, so removed indices count as zeros."""
    return _couple_sum(call) if call.bound.get("ord", 2) >= 0 else _couple_frozen(call)


def _couple_scan(call: Call) -> Coupled:
    """Same shape out: the axis it runs along is never cut."""
    return call.outs(call.axes(call.value("self"), (call["dim"],), "depends on every index of this axis"))


def _frozen(name: str, function: Callable[[Tensor], Tensor], *, scan: bool = False) -> Rule:
    couple, summary = _couple_scan if scan else _couple_frozen, "the axis it runs over is never cut"
    return Rule(f"aten.{name}", "reduction", couple, between_convs(function), summary=summary)


def _onnx_mean(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
    axes = tuple(a.get("dim") or range(len(shapes["self"])))
    return [step("ReduceMean", "self", axes, keepdims=int(a.get("keepdim", False)))]


def _moment(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    return Rule(
        f"aten.{name}",
        "reduction",
        _reduction(_mark_inexact),
        between_linears(function),
        masked=("self",),
        reference=_reference_moment,
        onnx=_onnx_mean if name.startswith("mean") else None,
        summary="inexact where the reduced axis is cut: averages over the survivors",
    )


def _sum(
    name: str,
    function: Callable[[Tensor], Tensor],
    couple: Callable[[Call], Coupled] = _couple_sum,
    summary: str = "a contraction with ones",
) -> Rule:
    return Rule(f"aten.{name}", "reduction", couple, between_linears(function), masked=("self",), summary=summary)


register(
    _sum("sum.dim_IntList", lambda x: x * x.sum(-1, keepdim=True)),
    _sum("sum.default", lambda x: x * x.sum()),
    _sum(
        "linalg_vector_norm.default",
        lambda x: nn.functional.normalize(x, dim=-1),
        _couple_norm,
        "removed indices add nothing; of negative order: never cut",
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
