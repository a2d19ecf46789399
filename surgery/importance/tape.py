"""A traced graph run in stretches: up to a place, from where it was, holding only what is still needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.capture import mutates
from surgery.coupling import bind
from surgery.importance.contractions import CONVOLUTIONS, find_contractions


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """A run that stands before the node at `position`: `values` are those that nodes from there on read."""

    position: int
    values: Mapping[torch.fx.Node, Any]

    @property
    def bytes(self) -> int:
        """What its tensors take in memory, views counted as if they were copies."""
        tensors = [x for x in pytree.tree_leaves(list(self.values.values())) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)


class Tape:
    """A graph and the parameters that it runs on.

    Args:
        graph: of ATen operators, functional but for what the traced program itself writes into.
        state: parameter or buffer name → tensor, looked up when it is read; others are taken from the graph.
        device: that literals of a device are brought to.
    """

    def __init__(
        self, graph: torch.fx.GraphModule, state: Mapping[str, Tensor], device: torch.device | None = None
    ) -> None:
        self._graph, self.state, self._device = graph, state, device or torch.device("cpu")
        self.nodes: list[torch.fx.Node] = list(graph.graph.nodes)
        self.place = {node.name: k for k, node in enumerate(self.nodes)}
        """Node name → position."""
        self._writes = any(map(mutates, self.nodes))
        self._last = {node: max((self.place[user.name] for user in node.users), default=-1) for node in self.nodes}

    def start(self, inputs: Sequence[Any]) -> Frontier:
        """Return the run before its first node, on these inputs in the order of the placeholders."""
        places = [node for node in self.nodes if node.op == "placeholder"]
        return self._own(Frontier(0, dict(zip(places, inputs, strict=True))))

    def _own(self, run: Frontier) -> Frontier:
        """The run with values of its own, where the program writes into any: others may go on from there again."""
        if not self._writes:
            return run
        own = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, dict(run.values))
        return replace(run, values=own)

    def advance(self, run: Frontier, to: int, *, keep: frozenset[str] = frozenset()) -> Frontier:
        """Run up to, and without, the node at `to`; values of the nodes in `keep` stay although nothing reads them."""
        values = dict(run.values)
        for k in range(run.position, to):
            node = self.nodes[k]
            if node.op == "call_function":
                values[node] = self.call(node, values)
            for source in (node, *node.all_input_nodes):
                if self._last[source] <= k and source.name not in keep:
                    values.pop(source, None)
        return Frontier(to, values)

    def only(self, run: Frontier, wanted: str) -> Any:
        """Return one value, running what it takes and nothing else; raises KeyError where that is no longer held."""
        values = dict(run.values)
        target = self.nodes[self.place[wanted]]
        pending = [target]
        while pending:
            node = pending[-1]
            if node in values or node.op == "get_attr":
                pending.pop()
                continue
            if node.op != "call_function" or self.place[node.name] < run.position:
                raise KeyError(node.name)
            missing = [n for n in node.all_input_nodes if n not in values and n.op != "get_attr"]
            if missing:
                pending.extend(missing)
                continue
            values[node] = self.call(node, values)
            pending.pop()
        return values[target]

    def output(self, run: Frontier) -> Any:
        """Run to the end and return what the graph returns."""
        last = self.nodes[-1]
        end = self.advance(self._own(run), len(self.nodes) - 1)
        return torch.fx.map_arg(last.args[0], lambda n: self.value(n, end.values))

    def value(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any]) -> Any:
        """Return what a node holds: a parameter is looked up."""
        if node.op != "get_attr":
            return values[node]
        name = str(node.target)
        found = self.state[name] if name in self.state else _attribute(self._graph, name)
        return found.clone() if any(map(mutates, node.users)) else found

    def call(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], **changed: Any) -> Any:
        """Run one node."""
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.value(n, values))
        args, kwargs = pytree.tree_map(self._here, (args, kwargs))
        return node.target(*args, **{**kwargs, **changed})  # type: ignore[operator]

    def _here(self, x: Any) -> Any:
        return self._device if isinstance(x, torch.device) else x


class Folded(Tape):
    """A tape on which batch norms are folded into the convolutions before them, as runtimes fold them.

    The value of such a convolution is what its norm would give, and the norm passes it on; all others are as they were,
    but for rounding. On CPUs norms are a third of the time of networks such as MobileNetV2.
    """

    def __init__(
        self, graph: torch.fx.GraphModule, state: Mapping[str, Tensor], device: torch.device | None = None
    ) -> None:
        super().__init__(graph, state, device)
        found = find_contractions(graph, self.place.keys())
        self._folds = {c.node: c for c in found if c.norm and self.nodes[self.place[c.node]].target in CONVOLUTIONS}
        self._passed = {c.norm: c for c in self._folds.values()}
        self._given = {
            name: bind(self.nodes[self.place[name]], _same).raw for name in self._folds.keys() | self._passed.keys()
        }

    def call(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], **changed: Any) -> Any:
        """Run one node."""
        layer = self._folds.get(node.name) or self._passed.get(node.name)
        # Of an image without a batch a norm's channels are another axis.
        if layer is None or (x := self._input(node, values)).dim() != self.state[layer.weight].dim():
            return super().call(node, values, **changed)
        if node.name in self._passed:
            return x
        gamma, beta, mean, var = (self.state[name].double() for name in layer.norm_names)  # half knows no small epsilon
        scale = gamma / (var + float(self._given[layer.norm]["eps"])).sqrt()
        given = dict(torch.fx.map_arg(self._given[node.name], lambda n: self.value(n, values)))
        weight, bias = given["weight"], given["bias"]
        shift = beta - scale * (mean if bias is None else mean - bias)
        wide = torch.promote_types(weight.dtype, torch.float32)
        given["weight"] = (weight.to(wide) * scale.to(wide).reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        given["bias"] = shift.to(weight.dtype)
        return node.target(**{**given, **changed})  # type: ignore[operator]

    def _input(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any]) -> Tensor:
        found: Tensor = self.value(self._given[node.name]["input"], values)
        return found


def _same(x: Any) -> Any:
    return x


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def held(runs: Sequence[Frontier]) -> int:
    """Return what several runs hold, in bytes."""
    return sum(run.bytes for run in runs)


def moved(run: Frontier, device: torch.device) -> Frontier:
    """Return the run with its tensors on a device."""
    there = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, dict(run.values))
    return replace(run, values=there)
