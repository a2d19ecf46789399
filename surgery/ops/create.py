"""Operators that create tensors of a literal size; uniform ones may shrink with the tensors they are combined with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.core import Layers, Value
from surgery.ops.examples import between_convs
from surgery.ops.registry import Call, Rewrite, Rule, register

aten = torch.ops.aten


def _couple_uniform(call: Call) -> Value:
    shape = call.outputs[0]
    for value in call.tensors():  # new_zeros(x, ..) takes only dtype and device from x
        for a in range(len(value.shape)):
            call.passed(value, a)
    axes: dict[int, Layers] = {}
    for a, size in enumerate(shape):
        if size > 1 and isinstance(call.raw_size(a), int):
            axes[a] = (call.labels.created(f"{call.key}:{a}", size),)
    return call.out(axes)


def _rewrite(r: Rewrite) -> Mapping[str, Any]:
    return {"size": r.sizes("size", r.outputs[0].shape, r.shape_of(r.outputs[0]))}


def _uniform(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    return Rule(
        op=f"aten.{name}",
        family="creation",
        couple=_couple_uniform,
        rewrite=_rewrite,
        example=between_convs(function),
        summary="uniform: its literal sizes shrink with what it meets",
    )


def _couple_enumeration(call: Call) -> Value:
    return Value.plain(call.outputs[0])


register(
    _uniform("zeros.default", lambda x: x + torch.zeros(8, 1, 1, dtype=x.dtype)),
    _uniform("ones.default", lambda x: x + torch.ones(8, 1, 1, dtype=x.dtype)),
    _uniform("full.default", lambda x: x + torch.full((8, 1, 1), 0.5, dtype=x.dtype)),
    _uniform("new_zeros.default", lambda x: x + x.new_zeros((8, 1, 1))),
    _uniform("new_ones.default", lambda x: x + x.new_ones((8, 1, 1))),
    _uniform("new_full.default", lambda x: x + x.new_full((8, 1, 1), 0.5)),
    Rule(
        op="aten.arange.default",
        family="creation",
        couple=_couple_enumeration,
        example=between_convs(lambda x: x + aten.arange(10, dtype=x.dtype)),
        summary="counts indices: never cut",
    ),
    Rule(
        op="aten.arange.start_step",
        family="creation",
        couple=_couple_enumeration,
        example=between_convs(lambda x: x + aten.arange.start_step(0, 10, 1, dtype=x.dtype)),
        summary="counts indices: never cut",
    ),
)
