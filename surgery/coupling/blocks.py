"""Removable blocks: find them, and build the program without them.

A block is a residual branch (computed from the same value as the operand it is added to, so that the sum without it has
the same shape and source) or a depthwise layer. Blocks are found from the graph, not by names.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture import describe_graph, module_of, source_of
from surgery.core import Block, Program, all_tensors, arguments_of, hint
from surgery.coupling.compact_graph import CompactGraph, hold
from surgery.coupling.constants import BranchConstants, channel_axes, fold, spread
from surgery.coupling.depthwise import depthwise_layers
from surgery.coupling.placeholders import CannotReplace, model_without, shared_path
from surgery.errors import PlanMismatch
from surgery.ops import rules


def find_blocks(program: Program) -> tuple[Block, ...]:
    """Return the residual branches and depthwise layers of a program, in order."""
    if not program.has_graph:
        return ()
    order = {node: k for k, node in enumerate(program.graph.graph.nodes)}
    layers = {layer.sum: layer for layer in depthwise_layers(program)}
    found = [block for node in order if (block := layers.get(node.name) or _block(node, order)) is not None]
    many = Counter(block.module for block in found)
    seen: Counter[str] = Counter()
    out = []
    for block in found:
        seen[block.module] += 1
        number = f"#{seen[block.module]}" if many[block.module] > 1 else ""
        out.append(replace(block, name=f"{block.module}{number}" if block.module else block.sum))
    return tuple(out)


def _block(node: torch.fx.Node, order: Mapping[torch.fx.Node, int]) -> Block | None:
    """Return the block that ends in this sum, if any; of two branches from one value, the one with more operations."""
    operands = _operands(node)
    if operands is None:
        return None
    candidates = []
    for stays, branch in (operands, operands[::-1]):
        nodes, origin = _exclusive(branch, node), _origin(stays, node)
        if nodes and _entries(nodes) == {origin} and not _carries(branch, origin) and _learns(nodes):
            candidates.append((len(nodes), stays, branch, nodes))
    if not candidates:
        return None
    _, stays, branch, nodes = max(candidates, key=lambda c: c[0])
    calls = sorted((n for n in nodes if n.op == "call_function"), key=order.__getitem__)
    tensors = tuple(str(n.target) for n in sorted(nodes, key=order.__getitem__) if n.op == "get_attr")
    names = tuple(n.name for n in calls)
    plain = _origin(stays, node) is stays
    return Block(
        "",
        module_of(node),
        node.name,
        stays.name,
        branch.name,
        names,
        tensors,
        source_of(node),
        plain,
    )


def _operands(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """Return the two operands of an unscaled sum of tensors of equal shape and dtype."""
    if node.op != "call_function" or str(node.target) != "aten.add.Tensor":
        return None
    raw = arguments_of(node)
    a, b = raw["self"], raw["other"]
    if raw.get("alpha", 1) != 1 or not all(isinstance(x, torch.fx.Node) for x in (a, b)) or a is b:
        return None
    kinds = [_kind(x) for x in (a, b, node)]
    return (a, b) if kinds[0] is not None and kinds[0] == kinds[1] == kinds[2] else None


def _kind(node: torch.fx.Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return (*(hint(s) for s in value.shape), value.dtype) if isinstance(value, Tensor) else None


def _exclusive(branch: torch.fx.Node, sink: torch.fx.Node) -> set[torch.fx.Node]:
    """Return nodes used only by the branch: all of their users lead to `sink` through it."""
    if set(branch.users) != {sink}:
        return set()
    inside = {branch}
    waiting = list(branch.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in inside and node.op in ("call_function", "get_attr") and set(node.users) <= inside:
            inside.add(node)
            waiting.extend(node.all_input_nodes)
            waiting.extend(n for m in inside for n in m.all_input_nodes if n not in inside and set(n.users) <= inside)
    return inside


def _entries(nodes: Collection[torch.fx.Node]) -> set[torch.fx.Node]:
    """Return the computed tensors that a branch reads, excluding sizes."""
    outside = {source for node in nodes for source in node.all_input_nodes if source not in nodes}
    return {n for n in outside if n.op != "get_attr" and isinstance(n.meta.get("val"), Tensor)}


def _shortcut(program: Program, block: Block) -> str:
    """Return the path of the module that projects the branch's input on the shortcut; empty for an identity."""
    nodes = {node.name: node for node in program.graph.graph.nodes}
    projects = () if block.plain else _exclusive(nodes[block.stays], nodes[block.sum])
    return shared_path([module_of(node) for node in projects if node.op == "call_function"])


def _origin(stays: torch.fx.Node, sink: torch.fx.Node) -> torch.fx.Node:
    """Return the source of the remaining operand: itself, or the input of its own branch (a projection)."""
    entries = _entries(_exclusive(stays, sink))
    return entries.pop() if len(entries) == 1 else stays


def _carries(node: torch.fx.Node, origin: torch.fx.Node) -> bool:
    """Return whether a value is its source plus something: the residual stream, not a branch."""
    if node is origin:
        return True
    operands = _operands(node)
    return operands is not None and any(_carries(x, origin) for x in operands)


def _learns(nodes: Collection[torch.fx.Node]) -> bool:
    """Return whether a branch contains a contraction with a weight."""
    table = rules()
    return any(
        (rule := table.get(str(n.target))) is not None
        and rule.masked
        and any(a.op == "get_attr" for a in n.all_input_nodes)
        for n in nodes
    )


# Programs without blocks. -------------------------------------------------------------------------------------------


def drop(program: Program, constants: Mapping[str, Sequence[float]], blocks: Sequence[Block] | None = None) -> Program:
    """Return the program without some of its blocks.

    Args:
        program: the program as traced; unchanged.
        constants: name of each dropped block → the constant per channel that replaces it, empty if none.
        blocks: result of `find_blocks`, if available.

    Raises:
        PlanMismatch: the program has no block of that name, or its number of channels differs.
    """
    if not constants:
        return program
    gone = _named_blocks(program, constants, blocks)
    _require_constants(program, gone, constants)
    graph, left = _without(program, gone, constants)
    lost = _lost(program, graph)
    tensors = {name: t for name, t in all_tensors(program).items() if name not in lost}
    shifted = {name: _shifted(tensors[name], by) for name, by in left.shifts.items()}
    kinds = {str(n.target): n.meta["val"].dtype for n in graph.nodes if n.op == "get_attr" and n.target in left.added}
    device = next((p.device for p in program.model.parameters()), None)
    added = {name: nn.Parameter(value.to(device, kinds[name])) for name, value in left.added.items()}
    root = hold(nn.Module(), {**tensors, **shifted, **added}, program.model)
    held = CompactGraph(root, graph, type(program.model).__name__)
    paths = {block.name: _shortcut(program, block) for block in gone}
    replaced, why = {id(tensors[name]): t for name, t in shifted.items()}, ""
    try:
        model: nn.Module = model_without(program, gone, paths, held, added, replaced)
    except CannotReplace as error:
        training = program.model.training
        model = CompactGraph(root, copy.deepcopy(graph), type(program.model).__name__).train() if training else held
        why = str(error)
    held.eval()  # programs are in eval mode; the model keeps its own mode
    return replace(
        program,
        graph=held,
        nodes=describe_graph(graph),
        model=model,
        why_graph=why,
        materialised={name: sources for name, sources in program.materialised.items() if name in tensors},
        notes=program.notes,
        whole=program,
    )


def _named_blocks(program: Program, names: Collection[str], blocks: Sequence[Block] | None = None) -> list[Block]:
    known = {block.name: block for block in (find_blocks(program) if blocks is None else blocks)}
    strange = [name for name in names if name not in known]
    if strange:
        raise PlanMismatch(
            f"no block '{strange[0]}' in this model: the plan was made for another architecture; make a new plan"
        )
    return [known[name] for name in names]


def _require_constants(program: Program, gone: Sequence[Block], constants: Mapping[str, Sequence[float]]) -> None:
    nodes = {node.name: node for node in program.graph.graph.nodes}
    for block in gone:
        values, shape = constants[block.name], nodes[block.sum].meta["val"].shape
        numbers = all(isinstance(x, (int, float)) and isfinite(x) for x in values)
        fits = len(values) in {hint(shape[a]) for a in channel_axes(shape)}
        if values and (block.is_layer or not numbers or not fits):
            raise PlanMismatch(
                f"block '{block.name}' leaves {len(values)} constants, not one number per channel: the plan was "
                "edited, or made for another architecture; make a new plan"
            )


def branch_constants(program: Program, constants: Mapping[str, Sequence[float]]) -> BranchConstants:
    """Return where `drop` adds the constants of dropped blocks; arguments and errors are the same."""
    return _without(program, _named_blocks(program, constants), constants)[1]


def _without(
    program: Program, gone: Sequence[Block], constants: Mapping[str, Sequence[float]]
) -> tuple[torch.fx.Graph, BranchConstants]:
    """Copy the graph; each sum becomes the remaining operand, plus the branch's constant unless a bias absorbs it."""
    skipped = {name for block in gone for name in block.nodes}
    sums = {block.sum: block for block in gone}
    graph = torch.fx.Graph()
    graph.set_codegen(copy.deepcopy(program.graph.graph._codegen))
    new: dict[torch.fx.Node, torch.fx.Node] = {}
    tensors = all_tensors(program)
    added: dict[str, Tensor] = {}
    for node in program.graph.graph.nodes:
        if node.op == "output":
            _return(graph, node, new)
        elif node.name in skipped:
            continue
        elif node.name in sums:
            block = sums[node.name]
            new[node] = stays = next(copy for old, copy in new.items() if old.name == block.stays)
            if constants[block.name]:
                name = _name_of(block, tensors)
                added[name] = spread(constants[block.name], node.meta["val"].shape)
                new[node] = _plus(graph, node, stays, name, added[name])
        else:
            new[node] = graph.node_copy(node, lambda n: new[n])
            new[node].meta = dict(node.meta)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    own = {name: tensor for name, tensor in tensors.items() if name not in program.materialised}
    return graph, fold(graph, added, own)


def _return(graph: torch.fx.Graph, output: torch.fx.Node, new: Mapping[torch.fx.Node, torch.fx.Node]) -> None:
    """Restore the outputs; distinct output tensors must not become aliases of each other or of the input."""
    returned: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in output.all_input_nodes:
        value = returned[node] = new[node]
        shared = value in [returned[other] for other in returned if other is not node]
        if isinstance(node.meta.get("val"), Tensor) and (shared or value.op != node.op):
            returned[node] = graph.call_function(torch.ops.aten.clone.default, (value,))
            returned[node].meta = dict(node.meta)
    graph.output(torch.fx.map_arg(output.args[0], lambda n: returned[n])).meta = dict(output.meta)


def _name_of(block: Block, tensors: Collection[str]) -> str:
    """Return the name of a block's constant: that of `Placeholder` if it replaces the block's module."""
    name = f"{block.module}.constant"
    plain = block.plain and block.name == block.module and name not in tensors
    return name if plain else f"{block.name.replace('.', '_').replace('#', '_')}_left"


def _plus(graph: torch.fx.Graph, node: torch.fx.Node, stays: torch.fx.Node, name: str, value: Tensor) -> torch.fx.Node:
    attribute = graph.create_node("get_attr", name, name=name.replace(".", "_"))
    attribute.meta["val"] = value.to(node.meta["val"].dtype)
    total = graph.create_node("call_function", node.target, (stays, attribute), name=node.name)
    total.meta = dict(node.meta)
    return total


def _shifted(tensor: Tensor, by: Tensor) -> Tensor:
    """Return a copy of a parameter or buffer with a constant added in float64."""
    value = (tensor.detach().double() + by.to(tensor.device)).to(tensor.dtype)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _lost(program: Program, graph: torch.fx.Graph) -> set[str]:
    """Return tensors that the whole program reads, but the remaining one does not."""
    read = {str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"}
    return read - {str(n.target) for n in graph.nodes if n.op == "get_attr"}


def blocks_within(blocks: Sequence[Block], kept: Collection[str]) -> Iterator[Block]:
    """Yield the blocks that contain no tensor to be kept."""
    for block in blocks:
        if not set(block.tensors) & set(kept):
            yield block
