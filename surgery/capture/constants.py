"""Constant folding: weights computed from parameters become parameters, computed numbers become literals."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import fx, nn

from surgery.core import Executor, Frontier, arguments_of, attribute
from surgery.ops import rules

aten = torch.ops.aten
_SCALARS = (aten.item.default, aten._local_scalar_dense.default)
_PER_SLICE = {"movement", "element-wise", "creation", "look-up"}
"""Families of operators that commute with slicing a weight."""
_MIXING = {"norm", "reduction", "attention"}
"""Families of operators whose result at one index depends on other indices (attention: softmax)."""

SOURCES = "computed_from"
"""Key in the meta of a node that reads a computed weight: names of the tensors it was computed from."""

Constants = Mapping[fx.Node, tuple[str, ...]]
"""Nodes that depend only on parameters and literals → the names of those parameters."""


def constants_of(graph: fx.GraphModule) -> Constants:
    """Return the nodes that depend on no input, in order."""
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found[node] = (str(node.target),)
        elif node.op == "call_function" and node.all_input_nodes and all(n in found for n in node.all_input_nodes):
            found[node] = tuple(s for n in node.all_input_nodes for s in found[n])
    return found


def scalars_of_constants(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return numbers read from constant tensors, such as the strides of a detector's levels."""
    constants = constants_of(graph)
    return (n for n in constants if n.target in _SCALARS and not _learned(graph, constants[n]))


def fold_scalars(graph: fx.GraphModule) -> None:
    """Replace numbers read from constant tensors by literals."""
    numbers = {node: _evaluated(graph, node) for node in scalars_of_constants(graph)}
    for user in [user for node in numbers for user in node.users]:
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: numbers.get(n, n))
    for node in numbers:
        graph.graph.erase_node(node)


def computed_weights(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return weights computed from parameters by norms or reductions (weight norm, weight standardisation)."""
    constants = constants_of(graph)
    found = (w for node in graph.graph.nodes for w in _computed_weights_of(node, constants))
    return (weight for weight in dict.fromkeys(found) if _learned(graph, constants[weight]))


def compute_weights(graph: fx.GraphModule) -> None:
    """Replace computed weights by parameters with their values, which can be sliced.

    Weights that are only reshaped or scaled element by element can be sliced as they are, and stay.
    """
    constants = constants_of(graph)
    named: dict[str, tuple[str, ...]] = {}
    values = {weight: _parameter(graph, weight) for weight in computed_weights(graph)}
    for weight, value in values.items():
        origin = tuple(dict.fromkeys(constants[weight]))
        same = (n for n, o in named.items() if o == origin and torch.equal(attribute(graph, n), value))
        # A module that is called twice computes its weight twice.
        name = next(same, None) or _free_name(graph, _learned(graph, origin), named)
        if name not in named:
            owner, _, leaf = name.rpartition(".")
            vars(graph.get_submodule(owner)).pop(leaf, None)
            graph.get_submodule(owner).register_parameter(leaf, value)
        with graph.graph.inserting_before(weight):
            held = graph.graph.get_attr(name)
        held.meta = {"val": weight.meta.get("val"), SOURCES: origin}
        weight.replace_all_uses_with(held)
        named[name] = origin
    graph.graph.eliminate_dead_code()


def sources_of_weights(graph: fx.Graph) -> dict[str, tuple[str, ...]]:
    """Return computed weight → the tensors it was computed from, without those still read elsewhere."""
    reads = [node for node in graph.nodes if node.op == "get_attr"]
    read = {str(node.target) for node in reads}
    return {
        str(node.target): tuple(source for source in node.meta[SOURCES] if source not in read)
        for node in reads
        if SOURCES in node.meta
    }


def _computed_weights_of(node: fx.Node, constants: Container[fx.Node]) -> Iterator[fx.Node]:
    """Tensor operands of a call whose slices do not depend on slices of their sources alone.

    The weight of a convolution or linear layer may be computed in any way; other tensors (biases, gains, operands of
    products) count if computed through a norm, reduction or softmax and no contraction (such as a projected query).
    """
    if node.op != "call_function" or node in constants:
        return
    rule = rules().get(str(node.target))
    own = arguments_of(node)["weight"] if rule is not None and "weight" in rule.contracts else None
    for weight in node.all_input_nodes:
        if weight.op != "call_function" or weight not in constants:
            continue
        families = {_family(n) for n in _ancestors(weight) if n.op == "call_function"}
        mixed = bool(families & _MIXING) and families <= _PER_SLICE | _MIXING and weight.meta["val"].numel() > 1
        if not families <= _PER_SLICE if weight is own else mixed:
            yield weight


def _family(node: fx.Node) -> str:
    if node.target is operator.getitem:  # one of several results
        return "movement"
    rule = rules().get(str(node.target))
    return rule.family if rule else ""


def _learned(graph: fx.GraphModule, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if isinstance(attribute(graph, name), nn.Parameter)]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        if (seen := todo.pop()) not in found:
            found.add(seen)
            todo += seen.all_input_nodes
    return found


def _parameter(graph: fx.GraphModule, weight: fx.Node) -> nn.Parameter:
    read = [attribute(graph, str(n.target)) for n in _ancestors(weight) if n.op == "get_attr"]
    value = _evaluated(graph, weight).detach().clone()
    return nn.Parameter(value, requires_grad=any(getattr(x, "requires_grad", False) for x in read))


def _evaluated(graph: fx.GraphModule, wanted: fx.Node) -> Any:
    with torch.no_grad():
        return Executor(graph, {}, device=None).only(Frontier(0, {}), wanted.name)


def _free_name(graph: fx.GraphModule, sources: list[str], taken: Container[str]) -> str:
    """Return `conv.weight` if no parameter has that name (due to a parametrisation), else `conv.weight_computed`.

    Several weights computed from one parameter share its name, numbered from the second on.
    """
    owner, _, leaf = sources[0].partition(".parametrizations.")
    largest = max(sources, key=lambda s: attribute(graph, s).numel())
    name = f"{owner}.{leaf.partition('.')[0]}" if leaf else f"{largest}_computed"
    numbered = (name if k == 1 else f"{name}_{k}" for k in count(1))
    return next(candidate for candidate in numbered if candidate not in taken)
