"""In-place operators become functions from values to values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """A value that is written to is read through another view of it, or an operator exists in place only."""


def writes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Operators that write to a value of the graph; state that is written back to a buffer does not count."""
    return (node for node in graph.graph.nodes if mutates(node) and node.args[0].op == "call_function")


def functionalize(graph: fx.GraphModule) -> None:
    """Replace in-place operators by plain ones.

    Where a slice is written to, the result is scattered into what it is a slice of. A read through any other older view
    of the same memory calls for torch's own functionalization, which costs about as much as another capture.

    Raises:
        NeedsFunctionalization: see above; the graph is then of no use any more.
    """
    state = _Memory(graph)
    for node in list(graph.graph.nodes):
        state.visit(node)


class _Memory:
    """What every value holds, node by node.

    Attributes:
        aliases: value → all values that may share its memory.
        whole: slice or element → the value that it was taken of.
        written: result of an in-place operator → the value that it wrote to, which is the same tensor.
        current: value that was written to → the node that computes what it holds now.
        stale: values whose memory was written to through another view.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph, self.aliases = graph.graph, _alias_families(graph)
        self.whole: dict[fx.Node, fx.Node] = {}
        self.written: dict[fx.Node, fx.Node] = {}
        self.current: dict[fx.Node, fx.Node] = {}
        self.stale: set[fx.Node] = set()
        self._visited: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        """Let a node read what its arguments hold now, and write where it writes."""
        first = node.args[0] if node.args else None
        target = self.written.get(first, first) if isinstance(first, fx.Node) else None
        node.args, node.kwargs = fx.map_arg(node.args, self._now), fx.map_arg(node.kwargs, self._now)
        if target is not None and node.target in _SCATTERS:
            self.whole[node] = target
        if mutates(node):
            if target is None:
                raise NeedsFunctionalization
            self._write(node, target)
            self.written[node] = target
        self._visited.add(node)

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
        self.stale.update(n for n in self.aliases[target] if n in self._visited and n not in chain)
        node.target = plain
        changed = self.current[target] = _in_dtype(node, target.meta["val"].dtype)
        for view, whole in pairwise(chain):
            with self.graph.inserting_after(changed):
                arguments = (self._now(whole), changed, *view.args[1:])
                changed = self.graph.call_function(_SCATTERS[view.target], arguments, dict(view.kwargs))
            changed.meta = {**node.meta, "val": whole.meta.get("val")}
            self.current[whole] = changed


def _in_dtype(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The result of a plain operator, cast to the dtype of what its in-place form would have written to."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    if all(x.dtype == dtype for x in values if isinstance(x, torch.Tensor)):
        return node
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta = dict(node.meta)
    return cast


def _plain_overload(op: Any) -> Any:
    """The operator that computes what an in-place operator writes, or None."""
    name = op.name().removeprefix("aten::").split(".")[0]
    if not name.endswith("_") or not hasattr(aten, name[:-1]):
        return None
    return getattr(getattr(aten, name[:-1]), op._overloadname, None)


def _alias_families(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Values that may share memory: joined by operators whose result may be a view of an argument."""
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
