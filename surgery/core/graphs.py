"""Parameters, shapes and call arguments of traced graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
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


def with_values(arguments: Mapping[str, Any], lookup: Callable[[torch.fx.Node], Any]) -> dict[str, Any]:
    """Return arguments with values instead of nodes."""
    return {name: torch.fx.map_arg(argument, lookup) for name, argument in arguments.items()}


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


def all_tensors(program: Program) -> dict[str, Tensor]:
    """Return all parameters and buffers of the model and constants of the graph; tied ones under each name.

    Materialised weights replace the parameters they are computed from.
    """
    model: nn.Module = program.model
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
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
