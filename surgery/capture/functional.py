"""Functionalization: replace in-place operators by out-of-place ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from surgery.core import mutates

aten = torch.ops.aten

_SCATTERS: Mapping[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


class NeedsFunctionalization(Exception):
    """A modified value is read through another view, or an operator exists only in place."""


def writes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return operators that write to a value of the graph, except state written back to a buffer."""
    return (node for node in graph.graph.nodes if mutates(node) and node.args[0].op == "call_function")


def functionalize(graph: fx.GraphModule) -> None:
    """Replace in-place operators by out-of-place ones.

    A write to a slice becomes a scatter into its base. A read through any other older view of the same memory requires
    torch's functionalization, which takes about as long as another capture.

    Raises:
        NeedsFunctionalization: see above; the graph is then unusable.
    """
    state = _Memory(_alias_families(graph))
    for node in list(graph.graph.nodes):
        state.visit(node)


@dataclass
class _Memory:
    """Aliases and current contents of values, updated node by node.

    Attributes:
        aliases: value → all values that may share its memory.
        whole: slice or element → the value it was taken from.
        written: result of an in-place operator → the value it wrote to, which is the same tensor.
        current: modified value → the node that computes its current contents.
        stale: values whose memory was written to through another view.
    """

    aliases: Mapping[fx.Node, list[fx.Node]]
    whole: dict[fx.Node, fx.Node] = field(default_factory=dict)
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)
    current: dict[fx.Node, fx.Node] = field(default_factory=dict)
    stale: set[fx.Node] = field(default_factory=set)
    visited: set[fx.Node] = field(default_factory=set)

    def visit(self, node: fx.Node) -> None:
        """Redirect a node's arguments to their current contents, and record its writes."""
        first = node.args[0] if node.args else None
        target = self.written.get(first, first) if isinstance(first, fx.Node) else None
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), self._now)
        if target is not None and node.target in _SCATTERS:
            self.whole[node] = target
        if mutates(node):
            if target is None:
                raise NeedsFunctionalization
            self._write(node, target)
            self.written[node] = target
        self.visited.add(node)

    def _now(self, argument: fx.Node) -> fx.Node:
        value = self.written.get(argument, argument)
        if value in self.stale:
            raise NeedsFunctionalization
        return self.current.get(value, value)

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        chain, plain = [target], _plain_overload(node.target)
        while chain[-1] in self.whole:
            chain.append(self.whole[chain[-1]])
        if chain[-1].op != "call_function" or plain is None:
            raise NeedsFunctionalization
        self.stale.update(n for n in self.aliases[target] if n in self.visited and n not in chain)
        node.target = plain
        changed = self.current[target] = _in_dtype(node, target.meta["val"].dtype)
        for view, whole in pairwise(chain):
            with node.graph.inserting_after(changed):
                arguments = (self._now(whole), changed, *view.args[1:])
                changed = node.graph.call_function(_SCATTERS[view.target], arguments, dict(view.kwargs))
            changed.meta = {**node.meta, "val": whole.meta.get("val")}
            self.current[whole] = changed


def _in_dtype(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The result of an out-of-place operator, cast to the dtype of the tensor that its in-place form writes to."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    if all(x.dtype == dtype for x in values if isinstance(x, torch.Tensor)):
        return node
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta = dict(node.meta)
    return cast


def _plain_overload(op: Any) -> Any:
    """The out-of-place form of an in-place operator, or None."""
    name = op.name().removeprefix("aten::").split(".")[0]
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, op._overloadname, None)


def _alias_families(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Group values that may share memory, because an operator may return a view of its argument."""
    family: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        family[node] = [node]
        schema = getattr(node.target, "_schema", None)
        views = schema is None or any(r.alias_info is not None for r in schema.returns) or "dropout" in str(node.target)
        if node.op == "call_function" and views:
            for source in node.all_input_nodes[:1] if mutates(node) else node.all_input_nodes:
                merged = list(dict.fromkeys(family[source] + family[node]))
                for member in merged:
                    family[member] = merged
    return family
