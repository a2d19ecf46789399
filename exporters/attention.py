"""Attention over any number of leading axes in ONNX: torch's translation takes (batch, heads, length, width) only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention as four_axes

SINCE = 23
"""From this operator set on, torch translates to ONNX's own Attention."""


def translations(opset: int) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return ATen operator → translation, for `torch.onnx.export`, at an ONNX operator set."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention} if opset < SINCE else {}


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Softmax of the scaled product of (..., L, E) and (..., S, E) plus the mask, times (..., S, V)."""
    if len(query.shape) == 4 or is_causal or enable_gqa:
        return four_axes(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    axes = list(range(len(key.shape)))
    factor = op.CastLike(op.Constant(value_float=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale), query)
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]]))
    if attn_mask is not None and attn_mask.dtype == 9:  # onnx.TensorProto.BOOL
        never = op.CastLike(op.Constant(value_float=-math.inf), query)
        scores = op.Where(attn_mask, scores, never)
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)
