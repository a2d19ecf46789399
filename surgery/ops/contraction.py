"""Contractions: convolutions (block-diagonal over channels), linear layers, matrix products, attention; softmax.

Softmax axes are never cut; attention's scale becomes an explicit argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.core import Layers, Step, Value, step
from surgery.ops.examples import Around, Built, WithParameters, between_convs, between_linears, fork_linears
from surgery.ops.moments import Moments, contracted
from surgery.ops.registry import Call, Example, Rewrite, Rule, Scaled, Shape, join, one_per_axis, register, to_onnx

# Convolutions (dense, grouped, depthwise, transposed). ---------------------------------------------------------------


def _couple_conv(call: Call, *, transposed: bool) -> Value:
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


def _onnx_conv(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape, *, transposed: bool) -> Sequence[Step]:
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


def _conv_moments(a: Mapping[str, Any], *, transposed: bool) -> Moments:
    x, weight = a["input"], a["weight"].mean
    channel = len(x.shape) - weight.dim() + 1
    if transposed:  # (C, O/g, ..) → (O, C/g, ..)
        groups = a["groups"]
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return contracted(weight, a.get("bias"), x, channel, len(x.shape))


def _around(module: nn.Module, *image: int) -> Built:
    """Place a module between two convolutions with the given number of spatial axes."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(image) - 1]
    return Around(module, conv(8, 4, 1), conv(3, 8, 3)), (torch.randn(2, 3, *image),)


_CONVOLUTIONS = {
    "conv1d.default": lambda: _around(nn.Conv1d(8, 8, 3, groups=2), 14),
    "conv2d.default": lambda: _around(nn.Conv2d(8, 8, 3, groups=2), 14, 14),
    "conv3d.default": lambda: _around(nn.Conv3d(8, 8, 3, groups=8), 6, 6, 6),
    "conv1d.padding": lambda: _around(nn.Conv1d(8, 8, 3, padding="same"), 14),
    "conv2d.padding": lambda: _around(nn.Conv2d(8, 8, 3, padding="same", groups=8), 14, 14),
    "conv3d.padding": lambda: _around(nn.Conv3d(8, 8, 3, padding="same"), 6, 6, 6),
    "conv_transpose1d.default": lambda: _around(nn.ConvTranspose1d(8, 8, 3, groups=2), 14),
    "conv_transpose2d.input": lambda: _around(nn.ConvTranspose2d(8, 8, 3, groups=4), 14, 14),
    "conv_transpose3d.input": lambda: _around(nn.ConvTranspose3d(8, 8, 3), 6, 6, 6),
}


def _conv(name: str) -> Rule:
    transposed = "transpose" in name
    return Rule(
        f"aten.{name}",
        "convolution",
        partial(_couple_conv, transposed=transposed),
        _CONVOLUTIONS[name],
        _groups,
        masked=("input",),
        factors=("weight",),
        contracts={"weight": 0 if transposed else 1},
        moments=partial(_conv_moments, transposed=transposed),
        macs=lambda shapes, out: (
            shapes["input"][0] * prod(shapes["weight"]) * prod((shapes["input"] if transposed else out)[2:])
        ),
        onnx=partial(_onnx_conv, transposed=transposed),
        summary="input channels contracted per group; groups are removed whole, or shrink equally; `groups` rewritten",
    )


register(*(_conv(name) for name in _CONVOLUTIONS))


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


# Linear layers and matrix products. ----------------------------------------------------------------------------------


def _couple_linear(call: Call) -> Value:
    """Input (.., I), weight (O, I), bias (O,), output (.., O)."""
    x, weight, bias = call.value("input"), call.value("weight"), call.optional("bias")
    if len(weight.shape) == 1:  # a vector that no pass has made a matrix
        return call.out({})
    call.tie(x, -1, weight, 1)
    out = call.passed(weight, 0)
    if bias is not None:
        out = call.tie(weight, 0, bias, 0)
    return call.out({**call.axes(x), len(x.shape) - 1: out})


def _matmul(call: Call, a: Value, b: Value) -> Value:
    """(.., M, K) @ (.., K, N); leading axes broadcast; a pass makes matrices of vectors, or they stay whole."""
    if 1 in (len(a.shape), len(b.shape)):
        return call.out({})
    call.labels.claim(call.tie(a, -1, b, -2))
    rank = len(call.outputs[0])
    axes: dict[int, Layers] = {rank - 2: call.passed(a, -2), rank - 1: call.passed(b, -1)}
    for back in range(3, max(len(a.shape), len(b.shape)) + 1):  # tied if neither operand is broadcast
        wide = [v for v in (a, b) if len(v.shape) >= back and v.shape[-back] > 1]
        found = [call.passed(v, -back) for v in wide]
        axes[rank - back] = call.tie(a, -back, b, -back) if len(wide) == 2 else next(iter(found), ())
    for layers in axes.values():
        call.labels.claim(layers)
    return call.out(axes)


def _couple_addmm(call: Call) -> Value:
    """Bias (.., N) + a (M, K) @ b (K, N)."""
    out = _matmul(call, call.value("mat1"), call.value("mat2"))
    bias = call.value("self")
    axes = dict(enumerate(out.axes))
    for back in range(1, len(bias.shape) + 1):
        a = len(out.shape) - back
        if bias.shape[-back] > 1:
            axes[a] = call.tie_layers(call.passed(bias, -back), out.axes[a], out.shape[a])
    return call.out(axes)


def _onnx_linear(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
    if len(out) == 2:
        return [step("Gemm", "input", "weight", "bias", transB=1)]
    product = step("MatMul", "input", "weight:T")
    return [product] if "bias" not in shapes else [product, step("Add", "%0", "bias")]


def _product(
    name: str,
    first: str,
    second: str,
    function: Callable[..., Tensor],
    summary: str,
    *,
    weights: tuple[tuple[int, ...], ...] = (),
    bias: str = "",
) -> Rule:
    """A product of two values or, with `weights`, of tokens (M, K) and a weight (K, N), with an optional bias."""
    return Rule(
        f"aten.{name}",
        "matrix product",
        _couple_addmm if bias else lambda call: _matmul(call, call.value(first), call.value(second)),
        _over_tokens(function, *weights) if weights else fork_linears(function),
        masked=(first,) if weights else (first, second),
        contracts={second: 0} if weights else {},
        moments=(lambda a: contracted(a[second].mean.T, a.get(bias), a[first], -1, 2)) if weights else None,
        macs=lambda shapes, out: prod(out) * shapes[first][-1],
        onnx=to_onnx("Gemm", first, second, bias) if bias else to_onnx("MatMul", first, second),
        summary=summary,
    )


def _twice(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: product(product(a, b.transpose(1, 2)), b)


def _over_tokens(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Example:
    """A function of a matrix and of parameters, between two linear layers."""

    def each(x: Tensor, *parameters: Tensor) -> Tensor:
        return function(x.flatten(0, 1), *parameters).reshape(*x.shape[:2], 10)

    return between_linears(WithParameters(each, *shapes), after=10)


register(
    Rule(
        "aten.linear.default",
        "matrix product",
        _couple_linear,
        between_linears(nn.Linear(12, 9), after=9),
        factors=("weight",),
        contracts={"weight": 1},
        moments=lambda a: contracted(a["weight"].mean, a.get("bias"), a["input"], -1, len(a["input"].shape)),
        masked=("input",),
        macs=lambda shapes, out: prod(shapes["input"]) * shapes["weight"][0],
        onnx=_onnx_linear,
        summary="input features contracted",
    ),
    _product(
        "matmul.default", "self", "other", _twice(torch.matmul), "inner axes contracted, outer pass, leading ones tied"
    ),
    _product("bmm.default", "self", "mat2", _twice(torch.bmm), "inner axes contracted, batch axis tied"),
    _product("mm.default", "self", "mat2", torch.mm, "inner axes contracted", weights=((12, 10),)),
    _product(
        "addmm.default",
        "mat1",
        "mat2",
        lambda x, weight, bias: torch.addmm(bias, x, weight),
        "inner axes contracted, bias tied to the outputs",
        weights=((12, 10), (10,)),
        bias="self",
    ),
)


# Attention and softmax. ----------------------------------------------------------------------------------------------


def _couple_sdpa(call: Call) -> Value:
    """Query (.., L, E), key (.., S, E), value (.., S, V), mask (.., L, S); output (.., L, V)."""
    q, k, v, mask = call.value("query"), call.value("key"), call.value("value"), call.optional("attn_mask")
    features = call.tie(q, -1, k, -1)
    call.labels.claim(features)
    for tokens in (k, v):
        call.freeze(tokens, -2, "softmax runs over these tokens")
    call.freeze(q, -2, "attention tokens")
    out = call.passed(v, -1)
    call.labels.claim(out)
    rank = len(q.shape)
    axes: dict[int, Layers] = {rank - 1: out}
    for back in range(3, rank + 1):
        axes[rank - back] = _heads(call, (q, k, v), back)
        if mask is not None and len(mask.shape) >= back and mask.shape[-back] > 1:
            call.tie_layers(call.passed(mask, -back), axes[rank - back], mask.shape[-back])
    if mask is not None:
        call.freeze(mask, -1, "softmax runs over these tokens")
        call.freeze(mask, -2, "attention tokens")
    return call.out(axes)


def _heads(call: Call, operands: tuple[Value, Value, Value], back: int) -> Layers:
    q, k, v = operands
    if not q.shape[-back] == k.shape[-back] == v.shape[-back]:  # grouped queries: heads are shared in a pattern
        for operand in operands:
            call.freeze(operand, -back, "heads shared between queries")
        return ()
    call.tie(q, -back, k, -back)
    layers = call.tie(q, -back, v, -back)
    call.labels.claim(layers)
    return layers


def _explicit_scale(r: Rewrite) -> Mapping[str, Any]:
    """Where features are cut; else their number may be another in another call."""
    whole = r.bound["scale"] is not None or r.keep("query", -1).all()
    return {} if whole else {"scale": 1.0 / sqrt(r.bound["query"].shape[-1])}


def _sdpa_macs(shapes: Mapping[str, Shape], out: Shape) -> int:
    q, k, v = shapes["query"], shapes["key"], shapes["value"]
    return prod(q) * k[-2] + prod(q[:-1]) * k[-2] * v[-1]


def _onnx_sdpa(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
    rank = len(out)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scaled = [step("Mul", "query", 0.5), step("Transpose", "key", perm=swapped), step("Mul", "%1", 0.5)]
    mask = [step("Add", "%3", "attn_mask")] if "attn_mask" in shapes else []
    last = len(scaled) + len(mask)
    return [
        *scaled,
        step("MatMul", "%0", "%2"),
        *mask,
        step("Softmax", f"%{last}", axis=-1),
        step("MatMul", f"%{last + 1}", "value"),
    ]


def _attention(x: Tensor) -> Tensor:
    """Query, key and value side by side in 2 heads of 2 features each."""
    q, k, v = (part.reshape(-1, 6, 2, 2).transpose(1, 2) for part in x.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _softmax_rule(op: str, function: Callable[[Tensor], Tensor]) -> Rule:
    def couple(call: Call) -> Value:
        return call.out(call.axes(call.value("self"), (call["dim"],), "softmax runs over this axis"))

    def onnx(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
        return [step("LogSoftmax" if "log" in op else "Softmax", "self", axis=a["dim"])]

    summary = "the axis it runs over is never cut"
    return Rule(op, "attention", couple, between_convs(function), onnx=onnx, summary=summary)


register(
    Rule(
        "aten.scaled_dot_product_attention.default",
        "attention",
        _couple_sdpa,
        between_linears(_attention, after=4),
        _explicit_scale,
        masked=("query", "key", "value"),
        macs=_sdpa_macs,
        onnx=_onnx_sdpa,
        summary="heads tied, head dimensions of query and key contracted, tokens never cut; scale made explicit",
    ),
    _softmax_rule("aten.softmax.int", lambda x: torch.softmax(x, 3)),
    _softmax_rule("aten._softmax.default", lambda x: torch.ops.aten._softmax(x, 3, False)),
    _softmax_rule("aten.log_softmax.int", lambda x: torch.log_softmax(x, 2)),
)
