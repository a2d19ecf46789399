"""A program run on unit labels, and what that tells: which axis of which value holds which units.

Operator rules tie labels on the way. With open labels this couples a program; given locked ones, the same machine
replays a cut program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.capture import source_of
from surgery.core import LabelledGraph, LabelSet, Layer, Masks, Program, Value, hint
from surgery.ops import Call, Rewrite, Rule, rules

# -- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bound:
    """An operator call with its arguments by name: `raw` as in the graph, `concrete` as the rules see them."""

    raw: Mapping[str, Any]
    concrete: Mapping[str, Any]


def bind(node: torch.fx.Node, lookup: Callable[[torch.fx.Node], Any]) -> Bound:
    """Name a call's arguments by the operator's schema; `lookup` gives the value of an argument node."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raw: dict[str, Any] = {str(k): a for k, a in enumerate(node.args)} | dict(node.kwargs)
    else:
        raw = {}
        for k, argument in enumerate(schema.arguments):
            if k < len(node.args):
                raw[argument.name] = node.args[k]
            elif argument.name in node.kwargs:
                raw[argument.name] = node.kwargs[argument.name]
            elif argument.has_default_value():
                raw[argument.name] = argument.default_value
    concrete = {k: torch.fx.map_arg(v, lookup) for k, v in raw.items()}
    return Bound(raw, concrete)


def run(
    graph: torch.fx.GraphModule,
    params: Callable[[str, Tensor], Value],
    shapes: Callable[[torch.fx.Node], Any],
    labels: LabelSet,
    settled: Callable[[str, Any], Any] = lambda name, value: value,
) -> tuple[dict[str, Any], dict[str, Bound]]:
    """Run a graph on labels.

    Args:
        graph: functional ATen graph.
        params: labels of a parameter or buffer by name.
        shapes: output shape(s) of a node: one shape, a list of shapes, or a number for a symbolic size.
        labels: open, to couple; locked, to verify.
        settled: sees each computed value, by node name, and returns the one to go on with.

    Returns:
        Value of every node, and the bound arguments of every operator call.
    """
    table = rules()
    values: dict[str, Any] = {}
    calls: dict[str, Bound] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            values[node.name] = _input(shapes(node), labels)
        elif node.op == "get_attr":
            values[node.name] = params(str(node.target), attribute(graph, str(node.target)))
        elif node.op == "output":
            _freeze_outputs(node, values, labels)
        else:
            bound = bind(node, lambda n: values[n.name])
            calls[node.name] = bound
            value = _apply(node, bound, table.get(str(node.target)), shapes(node), labels)
            values[node.name] = settled(node.name, value)
    return values, calls


def _input(shape: Any, labels: LabelSet) -> Any:
    """A network input: labels that are frozen from the start, so that what meets them can say why it is."""
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


def _apply(node: torch.fx.Node, bound: Bound, rule: Rule | None, shape: Any, labels: LabelSet) -> Any:
    if node.target is operator.getitem:
        return bound.concrete["0"][bound.concrete["1"]]
    if not isinstance(shape, (tuple, list)):  # a symbolic size: its concrete value is the example's
        return shape
    where = source_of(node)
    labels.where = f"{node.target}" + (f" at {where}" if where else "")
    many = isinstance(shape, list)
    outputs = [s for s in shape if isinstance(s, tuple)] if isinstance(shape, list) else [shape]
    call = Call(node.name, bound.concrete, outputs, labels, many=many, raw=bound.raw)
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
    """The numbers of a tensor of integers along one axis, such as an index buffer; None for any other tensor."""
    whole = tensor.dim() == 1 and tensor.dtype in (torch.int64, torch.int32)
    return tensor.detach().cpu().numpy().astype(np.int64) if whole else None


def attribute(module: Any, path: str) -> Any:
    """Follow a dotted path."""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def dense_shapes(node: torch.fx.Node) -> Any:
    """Shapes of a traced node, symbolic sizes at the example's value."""
    return shapes_of(node.meta.get("val"))


def shapes_of(value: Any) -> Any:
    """A tensor's shape, a list of them, or a plain number."""
    if isinstance(value, Tensor):
        return tuple(hint(s) for s in value.shape)
    if isinstance(value, (tuple, list)):
        return [shapes_of(v) for v in value]
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return hint(value)
    return value


def all_tensors(program: Program) -> dict[str, Tensor]:
    """Every parameter and buffer of the model, and every constant of the graph, by name; tied ones under each name.

    Weights that the model computes stand there ready-made, in the place of what they are computed from.
    """
    model: nn.Module = program.model
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for node in program.graph.graph.nodes if program.graph is not None else ():
        if node.op == "get_attr" and node.target not in tensors:
            tensors[node.target] = attribute(program.graph, node.target)
    replaced = {name for sources in program.materialised.values() for name in sources}
    return {name: tensor for name, tensor in tensors.items() if name not in replaced}


def rewrite_view(labelled: LabelledGraph, masks: Masks, name: str, raw: Mapping[str, Any]) -> Rewrite:
    """What a rule's `rewrite` sees of the call `name`."""
    out = labelled.values[name]
    outputs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    return Rewrite(labelled.calls[name], raw, outputs, masks)
