"""Normalisation. Per-channel norms tie index by index; norms that average over a cut axis become inexact.

Normalising over an axis does not commute with zeroing: if the axis is cut, statistics are those of the remaining
units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core import Layers, Value, step
from surgery.ops.examples import WithParameters, between_convs, between_linears
from surgery.ops.moments import Moments
from surgery.ops.registry import Call, Coupled, Dead, Macs, Rule, join, register, to_onnx


def _tied(call: Call, axis: int, other_axis: int, *names: str) -> Layers:
    """Tie an axis of the input to scale, shift and the like, where given."""
    x = call.value("input")
    layers = call.passed(x, axis)
    for name in names or ("weight", "bias"):
        if (other := call.optional(name)) is not None:
            layers = call.tie(x, axis, other, other_axis)
    return layers


def _couple_batch(call: Call) -> Coupled:
    """Input (N, C, ..), every other tensor (C,); statistics of the input are taken over its other axes."""
    x = call.value("input")
    channel = 1 if len(x.shape) > 1 else 0
    layers = _tied(call, channel, 0, "weight", "bias", "running_mean", "running_var")
    own = call.bound.get("training") or call.bound.get("use_input_stats") or call.optional("running_mean") is None
    others = [a for a in range(len(x.shape)) if a != channel]
    if own:
        call.axes(x, others, "normalises over this axis")
    out = call.out({**{a: call.passed(x, a) for a in others}, channel: layers})
    return (out, *(Value.plain(s) for s in call.outputs[1:])) if call.many else out


def _couple_layer(call: Call) -> Value:
    """Input (.., *normalized_shape), weight and bias (*normalized_shape)."""
    x = call.value("input")
    first = len(x.shape) - len(call["normalized_shape"])
    axes = call.axes(x)
    for a in range(first, len(x.shape)):
        axes[a] = _tied(call, a, a - first)
        call.labels.claim(axes[a])
        call.labels.mark_inexact(axes[a], f"{call.labels.where} normalises over the survivors")
    return call.out(axes)


def _couple_group(call: Call) -> Value:
    """Input (N, C, ..): removing whole groups is exact; removing the same members of every group is inexact."""
    x, groups = call.value("input"), call["num_groups"]
    sizes = groups, x.shape[1] // groups
    outer, inner = call.split_layers(_tied(call, 1, 0), sizes)
    call.labels.claim(outer)
    call.labels.claim(inner)
    call.labels.mark_inexact(inner, f"{call.labels.where} normalises over the survivors")
    call.axes(x, range(2, len(x.shape)), "normalises over this axis")
    return call.out({**call.axes(x), 1: join(outer, inner, sizes)})


# What norms compute over the survivors. -----------------------------------------------------------------------------


def _normalised(dead: Dead, x: Tensor, alive: Tensor, axes: int, *, centred: bool = True) -> Tensor:
    """Normalise over the elements of the last axes where `alive` (broadcastable to x) is true."""
    weight, dims = alive.to(x.dtype).expand_as(x), tuple(range(-axes, 0))
    count, eps = weight.sum(dims, keepdim=True), dead.bound["eps"]
    if centred:
        x = x - (x * weight).sum(dims, keepdim=True) / count
    square = (x * x * weight).sum(dims, keepdim=True) / count
    return x / torch.sqrt(square + (torch.finfo(x.dtype).eps if eps is None else eps))


def _affine(dead: Dead, y: Tensor, shape: Sequence[int]) -> Tensor:
    scale, shift = (dead.bound.get(name) for name in ("weight", "bias"))
    y = y if scale is None else y * scale.reshape(shape)
    return y if shift is None else y + shift.reshape(shape)


def _reference_layer(dead: Dead, *, centred: bool = True) -> Tensor:
    shape = dead.bound["normalized_shape"]
    y = _normalised(dead, dead.bound["input"], dead.survivors("input"), len(shape), centred=centred)
    return _affine(dead, y, shape)


def _reference_group(dead: Dead) -> Tensor:
    x: Tensor = dead.bound["input"]
    groups = dead.bound["num_groups"]
    alive = dead.survivors("input")  # (N or 1, ..): heads may have been folded into the batch
    alive = alive.expand(alive.shape[0], *x.shape[1:]).reshape(alive.shape[0], groups, -1)
    alive = alive | ~alive.any(dim=2, keepdim=True)  # the value of a dead group is irrelevant, but must not be NaN
    y = _normalised(dead, x.reshape(x.shape[0], groups, -1), alive, 1).reshape(x.shape)
    return _affine(dead, y, [1, -1] + [1] * (x.dim() - 2))


def _moments(a: Mapping[str, Any], axis: int | None) -> Moments:
    """Of a norm with scale and shift along `axis`, or aligned with the last axes (None).

    Running statistics, if any, determine how far epsilon reduces a small variance.
    """
    seen, weight, bias = (a.get(name) for name in ("running_var", "weight", "bias"))
    one = torch.ones(1, dtype=torch.float64)
    left = seen.mean / (seen.mean + a.get("eps", 1e-5)) if seen is not None else 1.0
    var = left * (weight.mean.square() if weight is not None else one)
    mean = bias.mean if bias is not None else torch.zeros_like(one)
    if axis is None:
        return Moments(mean, var)
    layout = [-1 if k == axis else 1 for k in range(len(a["input"].shape))]
    return Moments(mean.reshape(layout), var.reshape(layout))


def _counted(per_element: int, *, affine: int) -> Macs:
    return lambda shapes, out: prod(shapes["input"]) * (affine if "weight" in shapes else per_element)


def _decomposed(x: Tensor, *own: Tensor) -> Tensor:
    y: Tensor = torch.ops.aten._native_batch_norm_legit_no_training(x, *own, 0.1, 1e-5)[0]
    return y


_AFFINE = ("input", "weight", "bias")
_BATCH = Rule(
    "aten.batch_norm.default",
    "norm",
    _couple_batch,
    between_convs(nn.BatchNorm2d(8)),
    onnx=to_onnx("BatchNormalization", *_AFFINE, "running_mean", "running_var"),
    factors=("weight",),
    macs=_counted(1, affine=2),
    moments=partial(_moments, axis=1),
    summary="one scale and shift per channel: ties them",
)
_LAYER = Rule(
    "aten.layer_norm.default",
    "norm",
    _couple_layer,
    between_linears(nn.LayerNorm(12)),
    lambda r: {"normalized_shape": list(r.mask.shape(r.bound["input"])[-len(r.bound["normalized_shape"]) :])},
    reference=_reference_layer,
    onnx=lambda a, _, out: [step("LayerNormalization", *_AFFINE, axis=-len(a["normalized_shape"]))],
    factors=("weight",),
    macs=_counted(4, affine=5),
    moments=partial(_moments, axis=None),
    summary="inexact where the normalised axis is cut: normalises over the survivors",
)
_INSTANCE = Rule(
    "aten.instance_norm.default",
    "norm",
    _couple_batch,
    between_convs(nn.InstanceNorm2d(8, affine=True)),
    onnx=to_onnx("InstanceNormalization", *_AFFINE),
    macs=_counted(4, affine=5),
    moments=partial(_moments, axis=1),
    summary="normalises each channel over space: ties scale and shift",
)

register(
    _BATCH,
    replace(
        _BATCH,
        op="aten._native_batch_norm_legit_no_training.default",
        example=between_convs(WithParameters(_decomposed, 8, 8, 8, 8)),
    ),
    _INSTANCE,
    _LAYER,
    replace(
        _LAYER,
        op="aten.rms_norm.default",
        example=between_linears(
            WithParameters(lambda x, weight: nn.functional.rms_norm(x, [x.shape[-1]], weight, 1e-6), 12)
        ),
        reference=lambda dead: _reference_layer(dead, centred=False),
        factors=(),
        macs=None,
        onnx=None,
    ),
    replace(
        _INSTANCE,
        op="aten.group_norm.default",
        couple=_couple_group,
        example=between_convs(nn.GroupNorm(4, 8)),
        rewrite=lambda r: {"num_groups": int(r.keep("input", 1).reshape(r.bound["num_groups"], -1).any(axis=1).sum())},
        reference=_reference_group,
        summary="whole groups are removed exactly; the same members of all groups, inexactly",
    ),
)
