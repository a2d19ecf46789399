"""Blocks that can go as a whole: which there are, which are dead already, and the program without them.

A block is a branch that comes from the same value as the operand that it is added to, so that the sum without it has
the same shape and still the same source; or a depthwise layer. Nothing is told by names: blocks are found in the
program.
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

from surgery.depthwise import depthwise_layers
from surgery.errors import PlanMismatch
from surgery.graph import CompactGraph, hold
from surgery.ir import Block, Program
from surgery.leftovers import Leftovers, fold, spread
from surgery.ops.registry import rules
from surgery.sizes import hint, is_symbolic
from surgery.stand_ins import model_without, shared_path
from surgery.trace import describe_graph, module_of, source_of
from surgery.wiring import all_tensors, bind

Known = Mapping[str, Tensor]
"""What values are whatever the input, by node name."""


def find_blocks(program: Program) -> tuple[Block, ...]:
    """Return the residual branches and depthwise layers of a program, in order."""
    if program.graph is None:
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
    """The block that a sum adds up, if it is one: of two branches from one value the one with more operations."""
    operands = _operands(node)
    if operands is None:
        return None
    candidates = []
    for stays, branch in (operands, operands[::-1]):
        nodes = _exclusive(branch, node)
        if nodes and _entries(nodes) == {_origin(stays, node)} and _learns(nodes):
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
    """The two operands of a plain sum of tensors of one shape."""
    if node.op != "call_function" or str(node.target) != "aten.add.Tensor":
        return None
    raw = bind(node, lambda n: n).raw
    a, b = raw["self"], raw["other"]
    if raw.get("alpha", 1) != 1 or not all(isinstance(x, torch.fx.Node) for x in (a, b)) or a is b:
        return None
    shapes = [_shape(x) for x in (a, b, node)]
    return (a, b) if shapes[0] is not None and shapes[0] == shapes[1] == shapes[2] else None


def _shape(node: torch.fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(hint(s) for s in value.shape) if isinstance(value, Tensor) else None


def _exclusive(branch: torch.fx.Node, sink: torch.fx.Node) -> set[torch.fx.Node]:
    """What only the branch needs: the nodes all of whose readers lead to `sink` through it."""
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
    """The computed tensors that a branch starts from; sizes do not count."""
    outside = {source for node in nodes for source in node.all_input_nodes if source not in nodes}
    return {n for n in outside if n.op != "get_attr" and isinstance(n.meta.get("val"), Tensor)}


def _shortcut(program: Program, block: Block) -> str:
    """The path of the module that projects what the branch starts from; empty where it stays as it is."""
    nodes = {node.name: node for node in program.graph.graph.nodes}
    projects = () if block.plain else _exclusive(nodes[block.stays], nodes[block.sum])
    return shared_path([module_of(node) for node in projects if node.op == "call_function"])


def _origin(stays: torch.fx.Node, sink: torch.fx.Node) -> torch.fx.Node:
    """Where the operand that stays comes from: itself, or what a branch of its own (a projection) starts from."""
    entries = _entries(_exclusive(stays, sink))
    return entries.pop() if len(entries) == 1 else stays


def _learns(nodes: Collection[torch.fx.Node]) -> bool:
    """Whether a branch holds a layer: something that contracts with a weight."""
    table = rules()
    return any(
        (rule := table.get(str(n.target))) is not None
        and rule.masked
        and any(a.op == "get_attr" for a in n.all_input_nodes)
        for n in nodes
    )


# What is dead already. -----------------------------------------------------------------------------------------------


def dead_blocks(program: Program, blocks: Sequence[Block]) -> dict[str, tuple[float, ...]]:
    """Return the blocks whose branch gives a constant per channel, whatever the input, and that constant.

    Nothing flows through an operator whose weight is all zero, nor through a product with zeros; what follows is worked
    out by the operators themselves, in float64.

    Returns:
        Block name → the constant of each channel (axis 1, or the last); empty where it is zero.
    """
    known = _known(program) if blocks else {}
    values = {node.name: node.meta.get("val") for node in program.graph.graph.nodes} if blocks else {}
    stretches = {name for name, v in values.items() if isinstance(v, Tensor) and v.dim() and is_symbolic(v.shape[-1])}
    dead: dict[str, tuple[float, ...]] = {}
    for block in blocks:
        value = known.get(block.branch)  # without a layer something would flow again where nothing did
        if value is None:
            continue
        if not bool(value.any()):
            dead[block.name] = ()
        elif (row := _per_channel(value, free_last=block.branch in stretches)) is not None:
            dead[block.name] = tuple(row.tolist())
    return dead


def _per_channel(value: Tensor, *, free_last: bool) -> Tensor | None:
    """What a value is at each index of axis 1, or of the last where that has one size, if nothing else counts."""
    if value.dim() < 2:
        return None
    last = value.dim() - 1
    for axis in (1,) if free_last or value.shape[1] == value.shape[last] else (1, last):
        corner = value[tuple(slice(None) if a == axis else slice(0, 1) for a in range(value.dim()))]
        if torch.equal(value, corner.expand_as(value)):
            return corner.flatten()
    return None


def _known(program: Program) -> Known:
    """Values that are the same for every input, by node name."""
    tensors = {name: t.detach().cpu() for name, t in all_tensors(program).items()}
    known: dict[str, Any] = {}
    for node in program.graph.graph.nodes:
        if node.op == "get_attr":
            value = tensors[str(node.target)]
            known[node.name] = value.double() if value.is_floating_point() else value
        elif node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            arguments = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            if arguments and (_stops(node, known) or all(n.name in known for n in arguments)):
                result = _result(node, known)
                if result is not None:
                    known[node.name] = result
    return known


def _stops(node: torch.fx.Node, known: Known) -> bool:
    """Whether nothing of its unknown operands gets through: its weight, or the factor, is all zero."""
    raw = bind(node, lambda n: n).raw
    rule = rules().get(str(node.target))
    names = rule.factors if rule is not None else ()
    factors = [known.get(raw[name].name) for name in names if isinstance(raw.get(name), torch.fx.Node)]
    return any(value is not None and not bool(value.any()) for value in factors)


def _result(node: torch.fx.Node, known: Known) -> Tensor | None:
    """Run an operator on what is known, and on zeros where nothing gets through."""

    def value(n: torch.fx.Node) -> Any:
        meta = n.meta.get("val")
        if isinstance(meta, Tensor):
            shape = tuple(hint(s) for s in meta.shape)
            return known[n.name] if n.name in known else torch.zeros(shape, dtype=torch.float64)
        return hint(meta)

    try:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # an operator that takes no float64, or sizes that it works out itself
        return None
    return result if isinstance(result, Tensor) else None


# Without them. -------------------------------------------------------------------------------------------------------


def drop(program: Program, constants: Mapping[str, Sequence[float]], blocks: Sequence[Block] | None = None) -> Program:
    """Return the program without some of its blocks.

    Args:
        program: as it was traced; left unchanged.
        constants: name of each block that goes → what it leaves behind, per channel; empty for nothing.
        blocks: what `find_blocks` returned, where it is at hand.

    Raises:
        PlanMismatch: the program has no block of that name, or one of other channels.
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
    model = model_without(program, gone, paths, held, added, {id(tensors[name]): t for name, t in shifted.items()})
    held.eval()  # as programs are; how the model is trained is the model's to know
    if model is None and program.model.training:
        model = CompactGraph(root, copy.deepcopy(graph), type(program.model).__name__).train()
    return replace(
        program,
        graph=held,
        nodes=describe_graph(graph),
        model=held if model is None else model,
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
        values, shape = constants[block.name], _shape(nodes[block.sum]) or ()
        numbers = all(isinstance(x, (int, float)) and isfinite(x) for x in values)
        if values and (block.is_layer or not numbers or len(values) not in {*shape[1:2], *shape[-1:]}):
            raise PlanMismatch(
                f"block '{block.name}' leaves {len(values)} constants, not one number per channel: the plan was "
                "edited, or made for another architecture; make a new plan"
            )


def left_behind(program: Program, constants: Mapping[str, Sequence[float]]) -> Leftovers:
    """Return where `drop` puts the constants of blocks; arguments and errors are the same."""
    return _without(program, _named_blocks(program, constants), constants)[1]


def _without(
    program: Program, gone: Sequence[Block], constants: Mapping[str, Sequence[float]]
) -> tuple[torch.fx.Graph, Leftovers]:
    """Copy the graph: each sum becomes what stays, plus what a branch leaves and no bias takes up."""
    skipped = {name for block in gone for name in block.nodes}
    sums = {block.sum: block for block in gone}
    graph = torch.fx.Graph()
    graph.set_codegen(copy.deepcopy(program.graph.graph._codegen))
    new: dict[torch.fx.Node, torch.fx.Node] = {}
    tensors = all_tensors(program)
    added: dict[str, Tensor] = {}
    for node in program.graph.graph.nodes:
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], lambda n: new[n])).meta = dict(node.meta)
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


def _name_of(block: Block, tensors: Collection[str]) -> str:
    """What the constant of a block is called: as `Shifted` calls it in the place of the block's module."""
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
    """A copy of a parameter or buffer with a constant added to it, rounded once."""
    value = (tensor.detach().double() + by.to(tensor.device)).to(tensor.dtype)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _lost(program: Program, graph: torch.fx.Graph) -> set[str]:
    """Tensors that the program read, and what is left of it does not."""
    read = {str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"}
    return read - {str(n.target) for n in graph.nodes if n.op == "get_attr"}


def blocks_within(blocks: Sequence[Block], kept: Collection[str]) -> Iterator[Block]:
    """Yield the blocks none of whose tensors is to be kept."""
    for block in blocks:
        if not set(block.tensors) & set(kept):
            yield block
