"""Normalisation. Per-channel norms tie index by index; norms that average over a cut axis become inexact.

Normalising over an axis does not commute with zeroing: if the axis is cut, it means "normalise over the survivors".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core import Step, Value, step
from surgery.ops.examples import WithParameters, between_convs, between_linears
from surgery.ops.moments import Moments, normed
from surgery.ops.registry import Call, Coupled, Dead, Macs, Rewrite, Rule, Shape, join, register, to_onnx


def _couple_batch(call: Call) -> Coupled:
    """Input (N, C, ..), every other tensor (C,); statistics of the input are taken over its other axes."""
    x = call.value("input")
    channel = 1 if len(x.shape) > 1 else 0
    layers = call.passed(x, channel)
    for name in ("weight", "bias", "running_mean", "running_var"):
        other = call.optional(name)
        if other is not None:
            layers = call.tie(x, channel, other, 0)
    kept = {a: call.passed(x, a) for a in range(len(x.shape)) if a != channel}
    if call.bound.get("training") or call.bound.get("use_input_stats") or call.optional("running_mean") is None:
        for a in kept:
            call.freeze(x, a, "normalises over this axis")
    out = call.out({**kept, channel: layers})
    return (out, *(Value.plain(s) for s in call.outputs[1:])) if call.many else out


def _normalised(x: Value, call_shape: Any) -> int:
    return len(x.shape) - len(call_shape)


def _couple_layer(call: Call) -> Value:
    """Input (.., *normalized_shape), weight and bias (*normalized_shape)."""
    x = call.value("input")
    first = _normalised(x, call["normalized_shape"])
    axes = {a: call.passed(x, a) for a in range(len(x.shape))}
    for a in range(first, len(x.shape)):
        for name in ("weight", "bias"):
            other = call.optional(name)
            if other is not None:
                axes[a] = call.tie(x, a, other, a - first)
        call.labels.claim(axes[a])
        call.labels.mark_inexact(axes[a], f"{call.labels.where} normalises over the survivors")
    return call.out(axes)


def _rewrite_layer(r: Rewrite) -> Mapping[str, Any]:
    x = r.bound["input"]
    return {"normalized_shape": list(r.shape("input")[_normalised(x, r.bound["normalized_shape"]) :])}


def _moments(x: Tensor, alive: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and variance over `dims` of the elements where `alive` (broadcastable to x) is true."""
    weight = alive.to(x.dtype).expand_as(x)
    count = weight.sum(dims, keepdim=True)
    mean = (x * weight).sum(dims, keepdim=True) / count
    return mean, ((x - mean) ** 2 * weight).sum(dims, keepdim=True) / count


def _alive(dead: Dead, x: Tensor, name: str = "input") -> Tensor:
    mask = torch.ones([1] * x.dim(), dtype=torch.bool)
    for (owner, axis), alive in dead.alive.items():
        if owner == name:
            mask = mask & alive.reshape([-1 if a == axis else 1 for a in range(x.dim())])
    return mask


def _affine(dead: Dead, y: Tensor, shape: list[int]) -> Tensor:
    if dead.bound.get("weight") is not None:
        y = y * dead.bound["weight"].reshape(shape)
    if dead.bound.get("bias") is not None:
        y = y + dead.bound["bias"].reshape(shape)
    return y


def _reference_layer(dead: Dead) -> Tensor:
    x: Tensor = dead.bound["input"]
    shape = list(dead.bound["normalized_shape"])
    mean, var = _moments(x, _alive(dead, x), tuple(range(x.dim() - len(shape), x.dim())))
    return _affine(dead, (x - mean) / torch.sqrt(var + dead.bound["eps"]), shape)


def _reference_rms(dead: Dead) -> Tensor:
    x: Tensor = dead.bound["input"]
    shape = list(dead.bound["normalized_shape"])
    dims = tuple(range(x.dim() - len(shape), x.dim()))
    weight = _alive(dead, x).to(x.dtype).expand_as(x)
    eps = dead.bound["eps"]
    square = (x * x * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True)
    return _affine(dead, x / torch.sqrt(square + (torch.finfo(x.dtype).eps if eps is None else eps)), shape)


def _couple_group(call: Call) -> Value:
    """Input (N, C, ..): removing whole groups is exact; removing the same members of every group is inexact."""
    x, groups = call.value("input"), call["num_groups"]
    size = x.shape[1] // groups
    flat = call.passed(x, 1)
    for name in ("weight", "bias"):
        other = call.optional(name)
        if other is not None:
            flat = call.tie(x, 1, other, 0)
    outer, inner = call.split_layers(flat, (groups, size))
    call.labels.claim(outer)
    call.labels.claim(inner)
    call.labels.mark_inexact(inner, f"{call.labels.where} normalises over the survivors")
    kept = {a: call.passed(x, a) for a in range(len(x.shape)) if a != 1}
    for a in range(2, len(x.shape)):
        call.freeze(x, a, "normalises over this axis")
    return call.out({**kept, 1: join(outer, inner, (groups, size))})


def _rewrite_group(r: Rewrite) -> Mapping[str, Any]:
    keep = r.keep("input", 1).reshape(r.bound["num_groups"], -1)
    return {"num_groups": int(keep.any(axis=1).sum())}


def _reference_group(dead: Dead) -> Tensor:
    x: Tensor = dead.bound["input"]
    groups = dead.bound["num_groups"]
    split = x.reshape(x.shape[0], groups, -1)
    alive = _alive(dead, x)  # (N or 1, ..): heads may have been folded into the batch
    alive = alive.expand(alive.shape[0], *x.shape[1:]).reshape(alive.shape[0], groups, -1)
    alive = alive | ~alive.any(dim=2, keepdim=True)  # the value of a dead group is irrelevant, but must not be NaN
    mean, var = _moments(split, alive, (2,))
    y = ((split - mean) / torch.sqrt(var + dead.bound["eps"])).reshape(x.shape)
    return _affine(dead, y, [1, -1] + [1] * (x.dim() - 2))


def _channel_moments(a: Mapping[str, Any]) -> Moments:
    """Running statistics, if any, determine how far epsilon reduces a small variance."""
    seen = a.get("running_var")
    left = seen.mean / (seen.mean + a.get("eps", 1e-5)) if seen is not None else 1.0
    return normed(a["input"], a.get("weight"), a.get("bias"), 1, left)


def _last_axis_moments(a: Mapping[str, Any]) -> Moments:
    return normed(a["input"], a.get("weight"), a.get("bias"), None)


def _counted(per_element: int, *, affine: int) -> Macs:
    return lambda shapes, out: prod(shapes["input"]) * (affine if "weight" in shapes else per_element)


def _onnx_layer(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
    return [step("LayerNormalization", "input", "weight", "bias", axis=-len(a["normalized_shape"]))]


class _Decomposed(nn.BatchNorm2d):
    """Batch norm as in programs exported to core ATen."""

    def forward(self, x: Tensor) -> Tensor:
        """Use the running statistics."""
        normalise = torch.ops.aten._native_batch_norm_legit_no_training
        y: Tensor = normalise(x, self.weight, self.bias, self.running_mean, self.running_var, 0.1, 1e-5)[0]
        return y


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, [x.shape[-1]], weight, 1e-6)


_BATCH = Rule(
    op="aten.batch_norm.default",
    family="norm",
    couple=_couple_batch,
    onnx=to_onnx("BatchNormalization", "input", "weight", "bias", "running_mean", "running_var"),
    factors=("weight",),
    macs=_counted(1, affine=2),
    moments=_channel_moments,
    example=between_convs(nn.BatchNorm2d(8)),
    summary="one scale and shift per channel: ties them",
)
_LAYER = Rule(
    op="aten.layer_norm.default",
    family="norm",
    couple=_couple_layer,
    onnx=_onnx_layer,
    factors=("weight",),
    rewrite=_rewrite_layer,
    reference=_reference_layer,
    macs=_counted(4, affine=5),
    moments=_last_axis_moments,
    example=between_linears(nn.LayerNorm(12)),
    summary="inexact where the normalised axis is cut: normalises over the survivors",
)
_INSTANCE = Rule(
    op="aten.instance_norm.default",
    family="norm",
    couple=_couple_batch,
    onnx=to_onnx("InstanceNormalization", "input", "weight", "bias"),
    macs=_counted(4, affine=5),
    moments=_channel_moments,
    example=between_convs(nn.InstanceNorm2d(8, affine=True)),
    summary="normalises each channel over space: ties scale and shift",
)

register(
    _BATCH,
    replace(_BATCH, op="aten._native_batch_norm_legit_no_training.default", example=between_convs(_Decomposed(8))),
    _INSTANCE,
    _LAYER,
    replace(
        _LAYER,
        op="aten.rms_norm.default",
        reference=_reference_rms,
        factors=(),
        macs=None,
        onnx=None,
        example=between_linears(WithParameters(_rms, 12)),
    ),
    replace(
        _INSTANCE,
        op="aten.group_norm.default",
        couple=_couple_group,
        rewrite=_rewrite_group,
        reference=_reference_group,
        example=between_convs(nn.GroupNorm(4, 8)),
        summary="whole groups die exactly; members of all groups alike, inexactly",
    ),
)
