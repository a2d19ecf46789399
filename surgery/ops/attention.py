"""Scaled-dot-product attention and softmax. Softmax axes are never cut; the scale becomes an explicit argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core import Layers, Step, Value, step
from surgery.ops.examples import between_convs, between_linears
from surgery.ops.registry import Call, Rewrite, Rule, Shape, register


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
    if r.bound["scale"] is not None:
        return {}
    return {"scale": 1.0 / sqrt(r.bound["query"].shape[-1])}


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
    q, k, v = x.reshape(-1, 6, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


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
