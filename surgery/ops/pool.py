"""Pooling and resizing over space: batch and channel axes pass, spatial axes are never cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core import Step, step
from surgery.ops.examples import Built, between_convs
from surgery.ops.registry import Call, Coupled, Lowering, Macs, Rule, Shape, one_per_axis, register

aten = torch.ops.aten


def _onnx_window(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
    spatial = len(shapes[next(iter(shapes))]) - 2
    kernel, stride, pads = (one_per_axis(a[name], spatial) for name in ("kernel_size", "stride", "padding"))
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


def _onnx_resize(mode: str) -> Lowering:
    def onnx(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
        source = next(iter(shapes.values()))
        scales = (1.0, 1.0, *(o / s for o, s in zip(out[2:], source[2:], strict=True)))
        return [step("Resize", next(iter(shapes)), None, scales, mode=mode)]

    return onnx


def _line(function: Callable[[Tensor], Tensor]) -> Callable[[], Built]:
    return between_convs(lambda x: function(x.flatten(2)).reshape(x.shape[0], 8, -1, 5))


def _rule(
    name: str,
    spatial: int,
    function: Callable[[Tensor], Tensor],
    macs: Macs | None = None,
    onnx: Lowering | None = None,
) -> Rule:
    def couple(call: Call) -> Coupled:
        return call.outs(call.axes(call.tensors()[0], range(-spatial, 0), "pooled or resized"))

    example = _line(function) if spatial == 1 else between_convs(function)
    summary = "passes batch and channels"
    return Rule(f"aten.{name}", "pooling and resizing", couple, example, macs=macs, onnx=onnx, summary=summary)


def _volume(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.unsqueeze(2)).squeeze(2)


def _resize(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    linear = "bilinear" in name
    each = 4 if linear else 1
    return _rule(
        name, 2, function, lambda shapes, out: each * prod(out), _onnx_resize("linear" if linear else "nearest")
    )


def _per_input(shapes: Mapping[str, Shape], out: Shape) -> int:
    return prod(next(iter(shapes.values())))


register(
    _rule("max_pool1d.default", 1, lambda x: F.max_pool1d(x, 2)),
    _rule("max_pool2d.default", 2, lambda x: F.max_pool2d(x, 2), onnx=_onnx_window),
    _rule("max_pool3d.default", 3, _volume(lambda x: F.max_pool3d(x, (1, 2, 2)))),
    _rule("max_pool2d_with_indices.default", 2, lambda x: aten.max_pool2d_with_indices(x, [2, 2])[0]),
    _rule("avg_pool1d.default", 1, lambda x: F.avg_pool1d(x, 2)),
    _rule("avg_pool2d.default", 2, lambda x: F.avg_pool2d(x, 2), onnx=_onnx_window),
    _rule("avg_pool3d.default", 3, _volume(lambda x: F.avg_pool3d(x, (1, 2, 2)))),
    _rule("adaptive_avg_pool1d.default", 1, lambda x: F.adaptive_avg_pool1d(x, 50), _per_input),
    _rule("adaptive_avg_pool2d.default", 2, lambda x: F.adaptive_avg_pool2d(x, 5), _per_input, _onnx_adaptive),
    _rule("adaptive_avg_pool3d.default", 3, _volume(lambda x: F.adaptive_avg_pool3d(x, (1, 5, 5))), _per_input),
    _rule(
        "_adaptive_avg_pool2d.default", 2, lambda x: aten._adaptive_avg_pool2d(x, [5, 5]), _per_input, _onnx_adaptive
    ),
    _rule("adaptive_max_pool2d.default", 2, lambda x: aten.adaptive_max_pool2d(x, [5, 5])[0]),
    _resize("upsample_nearest2d.default", lambda x: aten.upsample_nearest2d(x, [20, 20])),
    _resize("upsample_nearest2d.vec", lambda x: aten.upsample_nearest2d.vec(x, [20, 20], None)),
    _resize("upsample_bilinear2d.default", lambda x: aten.upsample_bilinear2d(x, [20, 20], False)),
    _resize("upsample_bilinear2d.vec", lambda x: aten.upsample_bilinear2d.vec(x, [20, 20], False, None)),
    _rule("upsample_bicubic2d.vec", 2, lambda x: aten.upsample_bicubic2d.vec(x, [20, 20], False, None)),
)
