"""Traced graphs: their parameters, shapes and call arguments, and running them on tensors or substitutes for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.core.ir import Program


def is_symbolic(size: Any) -> bool:
    """Return whether a traced size may vary between calls."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def hint(size: Any) -> int:
    """Return the example's value of a size that may be symbolic."""
    return int(size.node.hint if is_symbolic(size) else size)


def arguments_of(node: torch.fx.Node) -> dict[str, Any]:
    """Return a call's arguments by name, with the schema's defaults filled in; tensors are graph nodes."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(k): a for k, a in enumerate(node.args)} | dict(node.kwargs)
    known = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    known |= dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: known[a.name] for a in schema.arguments if a.name in known}


def mutates(node: torch.fx.Node) -> bool:
    """Return whether a call may modify its arguments."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def attribute(module: Any, path: str) -> Any:
    """Follow a dotted path."""
    return operator.attrgetter(path)(module)


def shapes_of(value: Any) -> Any:
    """Return a tensor's shape, a list of shapes, or a plain number; symbolic sizes at the example's value."""
    if isinstance(value, Tensor):
        return tuple(hint(s) for s in value.shape)
    if isinstance(value, (tuple, list)):
        return [shapes_of(v) for v in value]
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return hint(value)
    return value


def flat_outputs(result: Any) -> list[Tensor]:
    """Floating tensors among a model's outputs, in order."""
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; tied ones under each name."""
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def all_tensors(program: Program) -> dict[str, Tensor]:
    """Return all parameters, buffers and constants of the graph by name; not those of materialised weights."""
    tensors = tensors_of(program.model)
    for node in program.graph.graph.nodes if program.has_graph else ():
        if node.op == "get_attr" and node.target not in tensors:
            tensors[node.target] = attribute(program.graph, node.target)
    replaced = {name for sources in program.materialised.values() for name in sources}
    return {name: tensor for name, tensor in tensors.items() if name not in replaced}


def state_of(program: Program) -> dict[str, Tensor]:
    """Return parameters and buffers that the graph reads, by name (tied ones under each name), on the CPU."""
    tensors = all_tensors(program)
    read = {id(tensors[str(n.target)]) for n in program.graph.graph.nodes if n.op == "get_attr"}
    return {name: tensor.detach().cpu() for name, tensor in sorted(tensors.items()) if id(tensor) in read}


Compute = Callable[[torch.fx.Node, Any, Any], Any]
"""(node, args, kwargs) → the value of a call, or NotImplemented to run the operator itself."""

_CPU = torch.device("cpu")


def interpret(
    graph: torch.fx.Graph,
    *,
    placeholder: Callable[[torch.fx.Node], Any],
    parameter: Callable[[str], Any],
    call: Callable[[torch.fx.Node, Mapping[str, Any]], Any],
) -> dict[str, Any]:
    """Return a value for each node, by its name; `call` receives the values of all preceding nodes."""
    values: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node.name] = placeholder(node)
        elif node.op == "get_attr":
            values[node.name] = parameter(str(node.target))
        elif node.op == "call_function":
            values[node.name] = call(node, values)
    return values


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """A run suspended before the node at `position`; `values` are those read by the remaining nodes."""

    position: int
    values: Mapping[torch.fx.Node, Any]

    @property
    def bytes(self) -> int:
        """Memory of its tensors; views are counted as copies."""
        tensors = [x for x in pytree.tree_leaves(list(self.values.values())) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in tensors)


class Executor:
    """Run a graph on tensors, completely or in segments, freeing values after their last use.

    `state` is looked up when read; other tensors are taken from the graph. The hook `compute` may compute calls instead
    of the operator. `dtype` and `device` replace those in the arguments of calls and of created tensors; None: as
    traced.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        state: Mapping[str, Tensor],
        compute: Compute | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = _CPU,
    ) -> None:
        self.graph, self.state = graph, state
        self._compute, self._dtype, self._device = compute, dtype, device
        self.nodes: list[torch.fx.Node] = list(graph.graph.nodes)

    def on(self, state: Mapping[str, Tensor]) -> Executor:
        """Return the same executor with other parameters."""
        return Executor(self.graph, state, self._compute, self._dtype, self._device)

    @cached_property
    def place(self) -> Mapping[str, int]:
        """Node name → position."""
        return {node.name: k for k, node in enumerate(self.nodes)}

    @cached_property
    def _last(self) -> Mapping[torch.fx.Node, int]:
        return {node: max((self.place[user.name] for user in node.users), default=-1) for node in self.nodes}

    @cached_property
    def _writers(self) -> list[torch.fx.Node]:
        return [node for node in self.nodes if mutates(node)]

    @cached_property
    def _written(self) -> set[torch.fx.Node]:
        return {source for node in self._writers for source in node.all_input_nodes if source.op == "get_attr"}

    def run(self, *inputs: Any) -> Any:
        """Run the whole graph on flat inputs and return what the traced program returns."""
        return self.graph.graph.process_outputs(self.output(self.start(inputs)))

    def start(self, inputs: Sequence[Any]) -> Frontier:
        """Return a run suspended before its first node; inputs are in the order of the placeholders."""
        places = [node for node in self.nodes if node.op == "placeholder"]
        return self._own(Frontier(0, dict(zip(places, inputs, strict=True))))

    def _own(self, run: Frontier) -> Frontier:
        """Copy the run's values if the program writes to any, so that it can be resumed again."""
        if not self._writers:
            return run
        own = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, dict(run.values))
        return replace(run, values=own)

    def advance(self, run: Frontier, to: int, *, keep: frozenset[str] = frozenset()) -> Frontier:
        """Run up to but excluding the node at `to`; values of the nodes in `keep` are not freed."""
        values = dict(run.values)
        for k in range(run.position, to):
            node = self.nodes[k]
            if node.op == "call_function":
                values[node] = self.call(node, values)
            elif node in self._written:
                values[node] = self.value(node, values)
            for source in (node, *node.all_input_nodes):
                if self._last[source] <= k and source.name not in keep:
                    values.pop(source, None)
        return Frontier(to, values)

    def only(self, run: Frontier, wanted: str) -> Any:
        """Return one value, running only what it needs; raises KeyError if a required value has been freed."""
        end = self.place[wanted]
        values, needed = dict(run.values), {self.nodes[end]}
        ahead = self.nodes[run.position : end + 1]
        for node in reversed(ahead):
            if node in needed and node not in values:
                needed.update(node.all_input_nodes)
        for node in ahead:
            if node in needed and node not in values and node.op == "call_function":
                values[node] = self.call(node, values)
        return values[self.nodes[end]]

    def output(self, run: Frontier) -> Any:
        """Run to the end and return what the graph returns."""
        end = self.advance(self._own(run), len(self.nodes) - 1)
        return torch.fx.map_arg(self.nodes[-1].args[0], lambda n: self.value(n, end.values))

    def value(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any]) -> Any:
        """Return the value of a node; parameters are looked up."""
        if node.op != "get_attr" or node in values:
            return values[node]
        name = str(node.target)
        found = self.state[name] if name in self.state else attribute(self.graph, name)
        return found.clone() if node in self._written else found

    def call(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], **changed: Any) -> Any:
        """Run one operator; `changed` replaces keyword arguments."""
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.value(n, values))
        made = not any(isinstance(x, Tensor) for x in pytree.tree_leaves((args, kwargs)))
        # Constants are made in their own type and converted then, so that they have the same values as in the model.
        dtype = None if made else self._dtype
        args = tuple(self._literal(x, dtype) for x in args)
        kwargs = {name: self._literal(x, dtype) for name, x in kwargs.items()} | changed
        result = NotImplemented if self._compute is None else self._compute(node, args, kwargs)
        if result is NotImplemented:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        floating = isinstance(result, Tensor) and result.is_floating_point()
        return result.to(self._dtype) if made and floating and self._dtype is not None else result

    def _literal(self, x: Any, dtype: torch.dtype | None) -> Any:
        if isinstance(x, torch.device):
            return x if self._device is None else self._device
        return dtype if isinstance(x, torch.dtype) and x.is_floating_point and dtype is not None else x
