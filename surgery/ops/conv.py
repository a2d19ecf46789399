"""Convolutions (dense, grouped, depthwise, transposed): block-diagonal contractions over channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from surgery.core import Step, Value, step
from surgery.ops.examples import Between, Built, between_convs
from surgery.ops.moments import Moments, contracted
from surgery.ops.registry import Call, Rewrite, Rule, Scaled, Shape, join, one_per_axis, register


def _couple(call: Call, *, transposed: bool) -> Value:
    """Input (N, C, ..), weight (O, C/g, ..), or (C, O/g, ..) when transposed; output (N, O, ..)."""
    x, weight, groups = call.value("input"), call.value("weight"), call["groups"]
    channel = len(x.shape) - len(weight.shape) + 1  # 0 for an input without batch axis
    inside = x.shape[channel] // groups
    outside = call.outputs[0][channel] // groups
    halves = call.split(weight, 0, (groups, inside if transposed else outside))
    (weight_groups, first), second = halves, call.passed(weight, 1)
    weight_in, weight_out = (first, second) if transposed else (second, first)
    x_groups, x_in = call.split(x, channel, (groups, inside))
    x_in = call.tie_layers(x_in, weight_in, inside)
    whole = call.tie_layers(x_groups, weight_groups, groups)
    call.labels.claim(whole)
    if groups > 1:
        call.labels.claim(x_in)
        call.labels.claim(weight_out)
    out = join(whole, weight_out, (groups, outside))
    bias = call.optional("bias")
    if bias is not None:
        call.tie_layers(out, call.passed(bias, 0), groups * outside)
    return call.out({**({0: call.passed(x, 0)} if channel else {}), channel: out})


def _groups(r: Rewrite) -> Mapping[str, Any]:
    x, weight = r.bound["input"], r.bound["weight"]
    channel = len(x.shape) - len(weight.shape) + 1
    keep = r.keep("input", channel)
    groups = r.bound["groups"]
    alive = int(keep.reshape(groups, -1).any(axis=1).sum())
    known = isinstance(r.raw["groups"], int)  # would depend on the number of samples
    return {"groups": alive if known else Scaled(r.raw["groups"], alive, groups)}


def _macs(shapes: Mapping[str, Shape], out: Shape, *, transposed: bool) -> int:
    x, weight = shapes["input"], shapes["weight"]
    return x[0] * prod(weight) * prod((x if transposed else out)[2:])


def _onnx(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape, *, transposed: bool) -> Sequence[Step]:
    kernel = shapes["weight"][2:]
    dilation, stride = (one_per_axis(a[name], len(kernel)) for name in ("dilation", "stride"))
    pads: list[int] = []
    if isinstance(a["padding"], str):
        whole = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [w // 2 for w in whole] + [w - w // 2 for w in whole]
    else:
        pads = 2 * one_per_axis(a["padding"], len(kernel))
    extra = one_per_axis(a["output_padding"], len(kernel)) if transposed else None
    shape = {"kernel_shape": kernel, "strides": stride, "pads": pads, "dilations": dilation, "output_padding": extra}
    return [step("ConvTranspose" if transposed else "Conv", "input", "weight", "bias", **shape)]


def _moments(a: Mapping[str, Any], *, transposed: bool) -> Moments:
    x, weight = a["input"], a["weight"].mean
    channel = len(x.shape) - weight.dim() + 1
    if transposed:  # (C, O/g, ..) → (O, C/g, ..)
        groups = a["groups"]
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return contracted(weight, a.get("bias"), x, channel, len(x.shape))


def _between(module: nn.Module, *image: int) -> Built:
    """Place a module between two convolutions with the given number of spatial axes."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(image) - 1]
    return Between(conv(3, 8, 3), module, conv(8, 4, 1)), (torch.randn(2, 3, *image),)


_EXAMPLES = {
    "conv1d.default": lambda: _between(nn.Conv1d(8, 8, 3, groups=2), 14),
    "conv2d.default": lambda: _between(nn.Conv2d(8, 8, 3, groups=2), 14, 14),
    "conv3d.default": lambda: _between(nn.Conv3d(8, 8, 3, groups=8), 6, 6, 6),
    "conv1d.padding": lambda: _between(nn.Conv1d(8, 8, 3, padding="same"), 14),
    "conv2d.padding": lambda: _between(nn.Conv2d(8, 8, 3, padding="same", groups=8), 14, 14),
    "conv3d.padding": lambda: _between(nn.Conv3d(8, 8, 3, padding="same"), 6, 6, 6),
    "conv_transpose1d.default": lambda: _between(nn.ConvTranspose1d(8, 8, 3, groups=2), 14),
    "conv_transpose2d.input": lambda: _between(nn.ConvTranspose2d(8, 8, 3, groups=4), 14, 14),
    "conv_transpose3d.input": lambda: _between(nn.ConvTranspose3d(8, 8, 3), 6, 6, 6),
}


def _rule(name: str) -> Rule:
    transposed = "transpose" in name
    return Rule(
        f"aten.{name}",
        "convolution",
        partial(_couple, transposed=transposed),
        _EXAMPLES[name],
        _groups,
        masked=("input",),
        factors=("weight",),
        contracts={"weight": 0 if transposed else 1},
        moments=partial(_moments, transposed=transposed),
        macs=partial(_macs, transposed=transposed),
        onnx=partial(_onnx, transposed=transposed),
        summary="input channels contracted per group; groups die whole, or shrink alike; `groups` rewritten",
    )


register(*(_rule(name) for name in _EXAMPLES))


def _couple_fold(call: Call) -> Value:
    """im2col / col2im: (N, C, H, W) <-> (N, C k k, L): only the channel axis carries labels."""
    x = call.value("input" if "input" in call.bound else "self")
    kernel = prod(call["kernel_size"])
    if len(x.shape) == 4:  # im2col
        layers = join(call.passed(x, 1), (), (x.shape[1], kernel))
    else:
        layers, inner = call.split(x, 1, (x.shape[1] // kernel, kernel))
        call.labels.freeze(inner, f"{call.labels.where}: kernel positions")
    return call.out({0: call.passed(x, 0), 1: layers})


register(
    Rule(
        "aten.im2col.default",
        "convolution",
        _couple_fold,
        between_convs(lambda x: F.unfold(x, 3, padding=1).reshape(-1, 72, *x.shape[2:]), after=72),
        summary="channels repeat once per kernel position",
    ),
    Rule(
        "aten.col2im.default",
        "convolution",
        _couple_fold,
        between_convs(lambda x: F.fold(F.unfold(x, 2, stride=2), (10, 10), 2, stride=2)),
        summary="kernel positions of one channel are added up",
    ),
)
