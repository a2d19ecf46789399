"""The compact model as a program: slice every tensor and update literal sizes of calls.

The program is always rewritten; the user's own class is returned instead if it computes the same.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture import module_of, source_of
from surgery.core import (
    CompactModel,
    Program,
    Value,
    arguments_of,
    copied,
)
from surgery.coupling import (
    CompactGraph,
    Cut,
    hold,
    rewrite_view,
)
from surgery.cutting.own_class import Literal, lost_in_training, own_class
from surgery.errors import IllegalCut
from surgery.ops import Replacement, Scaled, rules


def rewrite_program(cut: Cut) -> CompactModel:
    """Return the compact model of a traced program: the user's class if possible, else the rewritten program.

    Raises:
        IllegalCut: an axis of a value would become empty.
    """
    sliced = cut.tensors()
    graph, literals = _rewritten(cut, sliced)
    module, why, stuck = own_class(cut, graph, sliced, literals)
    graph.train(cut.program.model.training)
    if module is None:
        return CompactModel(graph, "graph", why, graph, lost_in_training(cut.program), stuck)
    return CompactModel(module, "module", why, graph)


def masked(cut: Cut) -> nn.Module:
    """Return a copy of the dense model with dead slices set to zero, as masking tools do."""
    program = cut.program
    module: nn.Module = copied(program.dense.model)
    tensors = dict(module.named_parameters(remove_duplicate=False))
    left = {name for name, _ in program.model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name in tensors.keys() - left:  # of dropped blocks
            tensors[name].zero_()
        for name, tensor in cut.reordered(module.state_dict()).items():
            module.state_dict()[name].copy_(tensor)
        for c in cut.plan.cuts:
            # The weights behind a parametrisation (weight norm) are divided by their norm: zeros would become NaN.
            if c.tensor in tensors and "parametrizations" not in c.tensor:
                tensors[c.tensor].index_fill_(c.axis, torch.tensor(c.dead, device=tensors[c.tensor].device), 0.0)
    return module


def _rewritten(cut: Cut, sliced: Mapping[str, Tensor]) -> tuple[CompactGraph, list[Literal]]:
    """Copy the graph with arguments at the new sizes; also return the changed sizes."""
    _validate_not_empty(cut)
    program, labelled, table = cut.program, cut.coupling.labelled, rules()
    root = hold(nn.Module(), sliced, program.model)
    graph = torch.fx.Graph()
    graph.set_codegen(copy.deepcopy(program.graph.graph._codegen))
    new: dict[torch.fx.Node, torch.fx.Node] = {}
    literals: list[Literal] = []
    for node in program.graph.graph.nodes:
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], lambda n: new[n]))
            continue
        new[node] = graph.node_copy(node, lambda n: new[n])
        new[node].meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        rule = table.get(str(node.target))
        if node.op == "call_function" and rule is not None and rule.rewrite is not None and node.name in labelled.calls:
            raw = arguments_of(node)
            change = rule.rewrite(rewrite_view(labelled, cut.masks, node.name, raw))
            literals += _literals(node, raw, change)
            new[node] = _apply_change(graph, root, new[node], change, new)
    root.fixed_sizes = _fixed_sizes(program)  # type: ignore[assignment]
    module = CompactGraph(root, graph, "Compact")
    module.eval()
    return module, literals


def _fixed_sizes(program: Program) -> tuple[tuple[int, int, int], ...]:
    leaves = pytree.tree_leaves(program.example_args)
    places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]
    return tuple(
        (place, axis, size)
        for place, spec in zip(places, program.inputs, strict=False)
        for axis, size in enumerate(spec.shape)
        if axis not in spec.dynamic
    )


def _validate_not_empty(cut: Cut) -> None:
    for name, value in cut.coupling.labelled.values.items():
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, Value) and any(x and not cut.masks(v, a).any() for a, x in enumerate(v.axes)):
                raise IllegalCut(f"the plan leaves nothing of a value at node '{name}'; remove fewer units there")


def _apply_change(
    graph: torch.fx.Graph,
    root: nn.Module,
    node: torch.fx.Node,
    change: Mapping[str, Any] | Replacement,
    new: Mapping[torch.fx.Node, torch.fx.Node],
) -> torch.fx.Node:
    def resolved(x: Any) -> Any:
        if isinstance(x, torch.fx.Node):
            return new.get(x, x)
        if isinstance(x, Scaled):
            return _scaled(graph, new[x.node], x.numerator, x.denominator)
        if isinstance(x, Tensor):
            name = f"_index_{node.name}"
            root.register_buffer(name, x, persistent=False)
            return graph.get_attr(name)
        if isinstance(x, (list, tuple)):
            return type(x)(resolved(y) for y in x)
        return x

    with graph.inserting_before(node):
        if isinstance(change, Replacement):
            node.args, node.kwargs, node.target = tuple(resolved(a) for a in change.args), {}, change.op
            return node
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        raw = arguments_of(node)
        for name, value in change.items():
            position = names.index(name)
            if raw.get(name) == value:
                continue
            if position < len(node.args):
                node.update_arg(position, resolved(value))
            else:
                node.update_kwarg(name, resolved(value))
    return node


def _scaled(graph: torch.fx.Graph, size: torch.fx.Node, numerator: int, denominator: int) -> torch.fx.Node:
    shared = gcd(numerator, denominator)
    # Unique names, because values are compared by the names of the dense program's nodes.
    product = graph.create_node("call_function", operator.mul, (size, numerator // shared), name="_scaled_size")
    return graph.create_node("call_function", operator.floordiv, (product, denominator // shared), name="_scaled_size")


def _literals(node: torch.fx.Node, raw: Mapping[str, Any], change: Mapping[str, Any] | Replacement) -> list[Literal]:
    """Return the integers that changed, and where the user's code computed them."""
    if isinstance(change, Replacement):
        return [Literal(module_of(node), None, None, f"{node.target} at {source_of(node)}")]
    out = []
    for name, value in change.items():
        before, after = pytree.tree_leaves(raw[name]), pytree.tree_leaves(value)
        for a, b in zip(before, after, strict=False):
            if isinstance(a, int) and isinstance(b, int) and a != b:
                out.append(Literal(module_of(node), a, b, f"{node.target} at {source_of(node)}"))
    return out
