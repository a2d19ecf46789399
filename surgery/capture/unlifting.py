"""An exported program as a graph that reads parameters by their own names, in time linear in their number.

`ExportedProgram.module()` does the same and more, and looks at every module for every parameter, which is felt in
networks of hundreds of blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def unlift(exported: Any) -> torch.fx.GraphModule:
    """Return a graph module whose `get_attr` nodes hold the parameters, buffers and constants of the program.

    Inputs and outputs are structured by the graph itself where they are tensors, tuples, lists and dictionaries of
    tensors; what changes state or takes nested inputs is left to torch.
    """
    signature = exported.graph_signature
    flat = flat_inputs(exported.call_spec.in_spec) and plain_containers(exported.call_spec.out_spec)
    stateless = all(spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs)
    known = all(spec.kind in (*_HELD, InputKind.USER_INPUT) for spec in signature.input_specs)
    if not (flat and stateless and known and exported.dialect == "TRAINING"):
        graph: torch.fx.GraphModule = exported.module(check_guards=False)
        return graph
    module = torch.fx.GraphModule(nn.Module(), torch.fx.Graph(), "Program")
    _hold(module, exported)
    module.graph = _reading(module, exported)
    return module


def flat_inputs(spec: Any) -> bool:
    """Whether every input is a plain argument."""
    return all(leaf.is_leaf() for part in spec.children() for leaf in part.children())


def plain_containers(spec: Any) -> bool:
    """Whether a graph can rebuild outputs of this structure by itself."""
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(plain_containers(child) for child in spec.children())


def _hold(module: nn.Module, exported: Any) -> None:
    """Give the module the program's tensors, under their own names."""
    transient = set(exported.graph_signature.non_persistent_buffers)
    for spec in exported.graph_signature.input_specs:
        if spec.kind in _HELD:
            owner, _, leaf = spec.target.rpartition(".")
            place = _submodule(module, owner)
            value = exported.state_dict.get(spec.target)
            value = exported.constants[spec.target] if value is None else value
            if isinstance(value, nn.Parameter):
                place.register_parameter(leaf, value)
            elif isinstance(value, Tensor):
                place.register_buffer(leaf, value, persistent=spec.target not in transient)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            child = nn.Module()
            module.add_module(name, child)
        module = child
    return module


def _reading(module: torch.fx.GraphModule, exported: Any) -> torch.fx.Graph:
    """A copy of the program's graph that looks tensors up instead of taking them as inputs."""
    graph = torch.fx.Graph()
    inputs = iter(exported.graph_signature.input_specs)
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in exported.graph.nodes:
        spec = next(inputs) if node.op == "placeholder" else None
        if spec is not None and spec.kind in _HELD:
            copies[node] = graph.create_node("get_attr", spec.target, name=node.name)
            copies[node].meta = dict(node.meta)
        elif node.op == "output":
            results = [copies[x] if isinstance(x, torch.fx.Node) else x for x in node.args[0]]
            copies[node] = graph.output(pytree.tree_unflatten(results, exported.call_spec.out_spec))
            copies[node].meta = dict(node.meta)
        else:
            if node.op == "get_attr":  # a graph within the graph
                setattr(module, str(node.target), getattr(exported.graph_module, str(node.target)))
            copies[node] = graph.node_copy(node, lambda x: copies[x])
            copies[node].meta = dict(node.meta)
    return graph
