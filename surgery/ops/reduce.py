"""Reductions, and pooling and resizing over space.

Sums contract, means and variances over a cut axis use the survivors, order statistics freeze it. Pooling and resizing
pass batch and channels, and never cut spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core import Step, Value, step
from surgery.ops.examples import between_convs, between_linears
from surgery.ops.registry import Call, Coupled, Dead, Lowering, Macs, Rule, Shape, one_per_axis, register

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


def _frozen(name: str, function: Callable[[Tensor], Tensor], *, scan: bool = False) -> Rule:
    """Of a scan, the result has the shape of the input."""

    def couple(call: Call) -> Coupled:
        if not scan:
            return _couple_frozen(call)
        return call.outs(call.axes(call.value("self"), (call["dim"],), "depends on every index of this axis"))

    summary = "the axis it runs over is never cut"
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
        lambda x: F.normalize(x, dim=-1),
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
    _frozen("argmin.default", lambda x: x + x.argmin(2, keepdim=True)),
    _frozen("median.dim", lambda x: x + x.median(2, keepdim=True)[0]),
    _frozen("mode.default", lambda x: x + x.mode(2, keepdim=True)[0]),
    _frozen("kthvalue.default", lambda x: x + x.kthvalue(3, 2, keepdim=True)[0]),
    _frozen("quantile.scalar", lambda x: x + x.quantile(0.3, 2, keepdim=True)),
    _frozen("cumsum.default", lambda x: x.cumsum(2), scan=True),
    _frozen("cumprod.default", lambda x: x.cumprod(2), scan=True),
    _frozen("cummax.default", lambda x: x.cummax(2)[0], scan=True),
    _frozen("cummin.default", lambda x: x.cummin(2)[0], scan=True),
    _frozen("logcumsumexp.default", lambda x: x.logcumsumexp(2), scan=True),
    _frozen("sort.default", lambda x: x.sort(2)[0], scan=True),
    _frozen("topk.default", lambda x: x.topk(5, 2)[0], scan=True),
)


# Pooling and resizing. -----------------------------------------------------------------------------------------------


def _onnx_window(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
    kernel, stride, pads = (one_per_axis(a[name], len(out) - 2) for name in ("kernel_size", "stride", "padding"))
    op, ceil = "MaxPool" if "dilation" in a else "AveragePool", int(a["ceil_mode"])
    return [step(op, "self", kernel_shape=kernel, strides=stride or kernel, pads=2 * pads, ceil_mode=ceil)]


def _onnx_adaptive(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step] | None:
    """Global average pooling, or average pooling with equal windows; unequal windows are not timed."""
    before, after = shapes["self"][2:], out[2:]
    if all(size == 1 for size in after):
        return [step("GlobalAveragePool", "self")]
    if not all(isinstance(b, int) and isinstance(s, int) and b % s == 0 for b, s in zip(before, after, strict=True)):
        return None
    kernel = [b // s for b, s in zip(before, after, strict=True)]
    return [step("AveragePool", "self", kernel_shape=kernel, strides=kernel)] if max(kernel) > 1 else []


def _window(
    name: str,
    spatial: int,
    function: Callable[[Tensor], Tensor],
    macs: Macs | None = None,
    onnx: Lowering | None = None,
) -> Rule:
    def couple(call: Call) -> Coupled:
        return call.outs(call.axes(call.tensors()[0], range(-spatial, 0), "pooled or resized"))

    around = {
        1: lambda x: function(x.flatten(2)).reshape(x.shape[0], 8, -1, 5),
        2: function,
        3: lambda x: function(x.unsqueeze(2)).squeeze(2),
    }
    example, summary = between_convs(around[spatial]), "passes batch and channels"
    return Rule(f"aten.{name}", "pooling and resizing", couple, example, macs=macs, onnx=onnx, summary=summary)


def _resize(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    mode, spatial = "linear" if "linear" in name else "nearest", int(name.partition("d.")[0][-1])
    each = 2**spatial if mode == "linear" else 1

    def onnx(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
        (name, source), *_ = shapes.items()
        scales = (1.0, 1.0, *(o / s for o, s in zip(out[2:], source[2:], strict=True)))
        return [step("Resize", name, None, scales, mode=mode)]

    return _window(name, spatial, function, lambda shapes, out: each * prod(out), onnx)


def _couple_grid_sampler(call: Call) -> Value:
    """Input (N, C, H, W), grid (N, H', W', 2), output (N, C, H', W')."""
    x = call.value("input")
    return call.out({0: call.tie(x, 0, call.value("grid"), 0), 1: call.passed(x, 1)})


def _per_input(shapes: Mapping[str, Shape], out: Shape) -> int:
    return prod(next(iter(shapes.values())))


register(
    _window("max_pool1d.default", 1, lambda x: F.max_pool1d(x, 2)),
    _window("max_pool2d.default", 2, lambda x: F.max_pool2d(x, 2), onnx=_onnx_window),
    _window("max_pool3d.default", 3, lambda x: F.max_pool3d(x, (1, 2, 2))),
    _window("max_pool2d_with_indices.default", 2, lambda x: aten.max_pool2d_with_indices(x, [2, 2])[0]),
    _window("avg_pool1d.default", 1, lambda x: F.avg_pool1d(x, 2)),
    _window("avg_pool2d.default", 2, lambda x: F.avg_pool2d(x, 2), onnx=_onnx_window),
    _window("avg_pool3d.default", 3, lambda x: F.avg_pool3d(x, (1, 2, 2))),
    _window("adaptive_avg_pool1d.default", 1, lambda x: F.adaptive_avg_pool1d(x, 50), _per_input),
    _window("adaptive_avg_pool2d.default", 2, lambda x: F.adaptive_avg_pool2d(x, 5), _per_input, _onnx_adaptive),
    _window("adaptive_avg_pool3d.default", 3, lambda x: F.adaptive_avg_pool3d(x, (1, 5, 5)), _per_input),
    _window(
        "_adaptive_avg_pool2d.default", 2, lambda x: aten._adaptive_avg_pool2d(x, [5, 5]), _per_input, _onnx_adaptive
    ),
    _window("adaptive_max_pool3d.default", 3, lambda x: aten.adaptive_max_pool3d(x, [1, 5, 5])[0]),
    _window("adaptive_max_pool2d.default", 2, lambda x: aten.adaptive_max_pool2d(x, [5, 5])[0]),
    _resize("upsample_nearest2d.default", lambda x: aten.upsample_nearest2d(x, [20, 20])),
    _resize("upsample_nearest2d.vec", lambda x: aten.upsample_nearest2d.vec(x, [20, 20], None)),
    _resize("upsample_bilinear2d.default", lambda x: aten.upsample_bilinear2d(x, [20, 20], False)),
    _resize("upsample_bilinear2d.vec", lambda x: aten.upsample_bilinear2d.vec(x, [20, 20], False, None)),
    _resize("upsample_nearest1d.vec", lambda x: aten.upsample_nearest1d.vec(x, [200], None)),
    _resize("upsample_nearest3d.vec", lambda x: aten.upsample_nearest3d.vec(x, [1, 20, 20], None)),
    _resize("upsample_linear1d.vec", lambda x: aten.upsample_linear1d.vec(x, [200], False, None)),
    _resize("upsample_trilinear3d.vec", lambda x: aten.upsample_trilinear3d.vec(x, [1, 20, 20], False, None)),
    _resize("_upsample_nearest_exact1d.vec", lambda x: aten._upsample_nearest_exact1d.vec(x, [200], None)),
    _resize("_upsample_nearest_exact2d.vec", lambda x: aten._upsample_nearest_exact2d.vec(x, [20, 20], None)),
    _resize("_upsample_nearest_exact3d.vec", lambda x: aten._upsample_nearest_exact3d.vec(x, [1, 20, 20], None)),
    _window("upsample_bicubic2d.vec", 2, lambda x: aten.upsample_bicubic2d.vec(x, [20, 20], False, None)),
    _window("_upsample_bicubic2d_aa.vec", 2, lambda x: aten._upsample_bicubic2d_aa.vec(x, [20, 20], False, None)),
    _window("_upsample_bilinear2d_aa.vec", 2, lambda x: aten._upsample_bilinear2d_aa.vec(x, [20, 20], False, None)),
    Rule(
        "aten.grid_sampler.default",
        "pooling and resizing",
        _couple_grid_sampler,
        between_convs(lambda x: F.grid_sample(x, x[:, 3:5].tanh().permute(0, 2, 3, 1), align_corners=False)),
        summary="passes batch and channels; the grid is never cut",
    ),
)
