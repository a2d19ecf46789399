"""Run a program on unit labels to find which units are on which axis of each value.

Operator rules tie labels. With open labels this couples a program; with locked labels the same code replays a cut
program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.capture import source_of
from surgery.core import (
    LabelledGraph,
    LabelSet,
    Layer,
    Masks,
    Value,
    arguments_of,
    attribute,
    interpret,
    shapes_of,
    with_values,
)
from surgery.ops import Call, Rewrite, Rule, rules


def propagate_labels(
    graph: torch.fx.GraphModule,
    params: Callable[[str, Tensor], Value],
    shapes: Callable[[torch.fx.Node], Any],
    labels: LabelSet,
    settled: Callable[[str, Any], Any] = lambda name, value: value,
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Run a graph on labels.

    Args:
        graph: functional ATen graph.
        params: returns the labels of a parameter or buffer by name.
        shapes: returns the output shape of a node: one shape, a list of shapes, or a number for a symbolic size.
        labels: open to couple, locked to verify.
        settled: called with each computed value and its node name; returns the value to continue with.

    Returns:
        The value of every node, and the arguments of every operator call by name.
    """
    table = rules()
    calls: dict[str, Mapping[str, Any]] = {}

    def call(node: torch.fx.Node, values: Mapping[str, Any]) -> Any:
        raw = arguments_of(node)
        bound = calls[node.name] = with_values(raw, lambda n: values[n.name])
        if node.target is operator.getitem:
            return settled(node.name, bound["0"][bound["1"]])
        return settled(node.name, _apply(node, bound, raw, table.get(str(node.target)), shapes(node), labels))

    values = interpret(
        graph.graph,
        placeholder=lambda node: _input(shapes(node), labels),
        parameter=lambda name: params(name, attribute(graph, name)),
        call=call,
    )
    _freeze_outputs(next(n for n in graph.graph.nodes if n.op == "output"), values, labels)
    return values, calls


def _input(shape: Any, labels: LabelSet) -> Any:
    """A network input: frozen labels, so that labels tied to them report this as the reason."""
    value = _plain(shape)
    if labels.is_locked or not isinstance(value, Value):
        return value
    axes = tuple((labels.fresh(size),) if size > 1 and a > 0 else () for a, size in enumerate(value.shape))
    for layers in axes:
        labels.freeze(layers, "network input")
    return Value(value.shape, axes)


def _plain(shape: Any) -> Any:
    if isinstance(shape, tuple):
        return Value.plain(shape)
    return [_plain(s) for s in shape] if isinstance(shape, list) else shape


def _apply(
    node: torch.fx.Node,
    bound: Mapping[str, Any],
    raw: Mapping[str, Any],
    rule: Rule | None,
    shape: Any,
    labels: LabelSet,
) -> Any:
    if not isinstance(shape, (tuple, list)):  # a symbolic size: its concrete value is the example's
        return shape
    where = source_of(node)
    labels.where = f"{node.target}" + (f" at {where}" if where else "")
    many = isinstance(shape, list)
    outputs = [s for s in shape if isinstance(s, tuple)] if isinstance(shape, list) else [shape]
    call = Call(node.name, bound, outputs, labels, many=many, raw=raw)
    if rule is None:
        call.freeze_the_rest("no rule for this operator; to cut through it, add one in surgery/ops/")
        return _plain(shape)
    result = rule.couple(call)
    call.freeze_the_rest("the operator needs this axis whole")
    return result


def _freeze_outputs(node: torch.fx.Node, values: Mapping[str, Any], labels: LabelSet) -> None:
    labels.where = "network output"
    for source in node.all_input_nodes:
        value = values[source.name]
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, Value):
                for layers in v.axes:
                    labels.freeze(layers, "network output")


def index_table(tensor: Tensor) -> Layer | None:
    """Return the values of a one-dimensional integer tensor, such as an index buffer; None for any other tensor."""
    whole = tensor.dim() == 1 and tensor.dtype in (torch.int64, torch.int32)
    return tensor.detach().cpu().numpy().astype(np.int64) if whole else None


def dense_shapes(node: torch.fx.Node) -> Any:
    """Return the shapes of a traced node, symbolic sizes at the example's value."""
    return shapes_of(node.meta.get("val"))


def rewrite_view(labelled: LabelledGraph, masks: Masks, name: str, raw: Mapping[str, Any]) -> Rewrite:
    """Return the argument of a rule's `rewrite` for the call `name`."""
    out = labelled.values[name]
    outputs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    return Rewrite(labelled.calls[name], raw, outputs, masks)
