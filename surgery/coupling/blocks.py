"""Find removable blocks, from the graph and not by names, and those that are dead.

A block is a residual branch (computed from the same value as the operand it is added to) or a depthwise layer that
keeps its shape: it ties its outputs to its inputs channel by channel, so removing it changes no shape, whatever is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from surgery.capture import module_of, source_of
from surgery.core import (
    TOLERANCE,
    Block,
    Executor,
    Program,
    all_tensors,
    arguments_of,
    elsewhere,
    hint,
    interpret,
    is_symbolic,
    sample_inputs,
    shapes_of,
    state_of,
)
from surgery.ops import rules

_NORM = "aten.batch_norm.default"
_CONVOLUTIONS = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")


def find_blocks(program: Program) -> tuple[Block, ...]:
    """Return the residual branches and depthwise layers of a program, in order."""
    if not program.has_graph:
        return ()
    order = {node: k for k, node in enumerate(program.graph.graph.nodes)}
    layers = {layer[-1]: layer for node in order if _is_depthwise(node) for layer in [_with_followers(node)]}
    ends = [_layer(layers[node]) if node in layers else _branch(node, order) for node in order]
    found = [block for block in ends if block is not None]
    many, seen, out = Counter(block.module for block in found), Counter[str](), []
    for block in found:
        seen[block.module] += 1
        number = f"#{seen[block.module]}" if many[block.module] > 1 else ""
        out.append(replace(block, name=f"{block.module}{number}" if block.module else block.sum))
    return tuple(out)


def shared_path(paths: Iterable[str]) -> str:
    """Return the path of the innermost module that contains, or is, all these modules."""
    together = takewhile(lambda names: len(set(names)) == 1, zip(*(path.split(".") for path in paths), strict=False))
    return ".".join(names[0] for names in together)


def _kind(node: torch.fx.Node) -> tuple[Any, ...] | None:
    """Return shape and dtype of a tensor, else None."""
    value = node.meta.get("val")
    return (*(hint(s) for s in value.shape), value.dtype) if isinstance(value, Tensor) else None


# Residual branches. --------------------------------------------------------------------------------------------------


def _branch(node: torch.fx.Node, order: Mapping[torch.fx.Node, int]) -> Block | None:
    """Return the block that ends in this sum, if any; of two branches from one value, the one with more operations."""
    operands = _operands(node)
    candidates = []
    for stays, branch in (operands, operands[::-1]) if operands is not None else ():
        nodes, origin = exclusive(branch, node), _origin(stays, node)
        if nodes and _entries(nodes) == {origin} and not _carries(branch, origin) and _learns(nodes):
            candidates.append((len(nodes), stays, branch, nodes))
    if not candidates:
        return None
    _, stays, branch, nodes = max(candidates, key=lambda c: c[0])
    inside = sorted(nodes, key=order.__getitem__)
    calls = tuple(n.name for n in inside if n.op == "call_function")
    tensors, plain = tuple(str(n.target) for n in inside if n.op == "get_attr"), _origin(stays, node) is stays
    return Block("", module_of(node), node.name, stays.name, branch.name, calls, tensors, source_of(node), plain)


def _operands(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """Return the two operands of an unscaled sum of tensors of equal shape and dtype."""
    if node.op != "call_function" or str(node.target) != "aten.add.Tensor":
        return None
    raw = arguments_of(node)
    a, b = raw["self"], raw["other"]
    if raw.get("alpha", 1) != 1 or not all(isinstance(x, torch.fx.Node) for x in (a, b)) or a is b:
        return None
    return (a, b) if _kind(a) is not None and _kind(a) == _kind(b) == _kind(node) else None


def exclusive(branch: torch.fx.Node, sink: torch.fx.Node) -> set[torch.fx.Node]:
    """Return nodes used only by the branch: all of their users lead to `sink` through it."""
    if set(branch.users) != {sink}:
        return set()
    inside = {branch}
    waiting = list(branch.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in inside and node.op in ("call_function", "get_attr") and set(node.users) <= inside:
            inside.add(node)
            waiting.extend(n for m in inside for n in m.all_input_nodes if n not in inside)
    return inside


def _entries(nodes: Collection[torch.fx.Node]) -> set[torch.fx.Node]:
    """Return the computed tensors that a branch reads, excluding sizes."""
    outside = {source for node in nodes for source in node.all_input_nodes if source not in nodes}
    return {n for n in outside if n.op != "get_attr" and isinstance(n.meta.get("val"), Tensor)}


def _origin(stays: torch.fx.Node, sink: torch.fx.Node) -> torch.fx.Node:
    """Return the source of the remaining operand: itself, or the input of its own branch (a projection)."""
    entries = _entries(exclusive(stays, sink))
    return entries.pop() if len(entries) == 1 else stays


def _carries(node: torch.fx.Node, origin: torch.fx.Node) -> bool:
    """Return whether a value is its source plus something: the residual stream, not a branch."""
    return node is origin or any(_carries(x, origin) for x in _operands(node) or ())


def _learns(nodes: Collection[torch.fx.Node]) -> bool:
    """Return whether a branch contains a contraction with a weight."""
    weighted = {str(n.target) for n in nodes if any(a.op == "get_attr" for a in n.all_input_nodes)}
    return any(rule.masked for name, rule in rules().items() if name in weighted)


# Depthwise layers. ---------------------------------------------------------------------------------------------------


def _is_depthwise(node: torch.fx.Node) -> bool:
    """Return whether a node is a depthwise convolution with its own weight that keeps its shape."""
    if node.op != "call_function" or str(node.target) not in _CONVOLUTIONS:
        return False
    raw = arguments_of(node)
    weight, image = (raw[name].meta.get("val") for name in ("weight", "input"))
    if not isinstance(weight, Tensor) or not isinstance(image, Tensor) or raw["weight"].op != "get_attr":
        return False
    depthwise = weight.shape[1] == 1 and raw.get("groups", 1) == weight.shape[0] > 1 and image.dim() == weight.dim()
    return depthwise and node.args[:1] == (raw["input"],) and _kind(raw["input"]) == _kind(node)


def _with_followers(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the layer with the norm and the activations after it, each the only user of its predecessor."""
    layer, table = [node], rules()
    while len(layer[-1].users) == 1:
        reader = next(iter(layer[-1].users))
        rule = table.get(str(reader.target))
        computed = [n for n in reader.all_input_nodes if n.op != "get_attr"]
        unary = rule is not None and rule.family == "element-wise" and len(reader.all_input_nodes) == 1
        if not (unary or str(reader.target) == _NORM) or len(computed) != 1:
            break
        if reader.args[:1] != (computed[0],) or _kind(reader) != _kind(node):
            break
        layer.append(reader)
    return layer


def _layer(layer: Sequence[torch.fx.Node]) -> Block:
    own = (n for node in layer for n in node.all_input_nodes if n.op == "get_attr" and set(n.users) <= set(layer))
    tensors, inside = tuple(dict.fromkeys(str(n.target) for n in own)), tuple(n.name for n in layer[:-1])
    path, stays = shared_path(map(module_of, layer)), layer[0].all_input_nodes[0].name
    return Block("", path, layer[-1].name, stays, "", inside, tensors, source_of(layer[0]), True)


# Dead blocks. --------------------------------------------------------------------------------------------------------


def dead_blocks(program: Program, blocks: Sequence[Block]) -> dict[str, tuple[float, ...]]:
    """Return the blocks whose branch is a constant per channel for every input of every size, and that constant.

    An operator with an all-zero weight does not depend on its input; the values that follow are computed in float64.
    Constants are listed by channel (axis 1, or the last), and empty if zero.
    """
    if not blocks or not program.has_graph:
        return {}
    known = _known(program)
    traced = {node.name: node.meta.get("val") for node in program.graph.graph.nodes}
    dead: dict[str, tuple[float, ...]] = {}
    for block in blocks:
        value = known.get(block.branch)  # empty for layers: dropping one would make it an identity
        if value is not None and (row := _per_channel(value, traced[block.branch].shape)) is not None:
            dead[block.name] = tuple(row.tolist()) if bool(row.any()) else ()
    if not dead:
        return {}
    branches = {block.name: block.branch for block in blocks if block.name in dead}
    run = Executor(program.graph, in_float64(state_of(program)), dtype=torch.float64)

    def holds(other_batch: bool, by: int) -> set[str] | None:
        """Return the blocks whose constant is the same at another size, unlike a sum over pixels."""
        with suppress(Exception), torch.no_grad():  # any exception an operator raises at a size it does not accept
            start = run.start(sample_inputs(program, seed=77, dtype=torch.float64, by=by, other_batch=other_batch))
            seen = {name: run.only(start, branches[name]) for name in dead}
            return {name for name, value in seen.items() if _equals(value, dead[name], traced[branches[name]].shape)}
        return None

    found = elsewhere(program, holds)
    return {name: row for name, row in dead.items() if all(names is not None and name in names for names in found)}


def _equals(value: Tensor, constant: Sequence[float], shape: Sequence[Any]) -> bool:
    wanted = spread(constant, shape) if constant else torch.zeros(()).double()
    return bool(((value - wanted).abs() <= TOLERANCE[torch.float64] * float(wanted.abs().max())).all())


def in_float64(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return floating tensors in float64, others unchanged."""
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def channel_axes(shape: Sequence[Any]) -> tuple[int, ...]:
    """Return the possible channel axes of a value: axis 1, and the last one if its size differs, unless dynamic."""
    axes = [a for a in (1, len(shape) - 1) if 1 <= a < len(shape) and not is_symbolic(shape[a])]
    return tuple(a for k, a in enumerate(axes) if all(hint(shape[b]) != hint(shape[a]) for b in axes[:k]))


def spread(values: Sequence[float], shape: Sequence[Any]) -> Tensor:
    """Return a constant per channel as a float64 tensor that broadcasts to this traced shape."""
    axis = next(a for a in channel_axes(shape) if hint(shape[a]) == len(values))
    return torch.tensor(values, dtype=torch.float64).reshape([-1 if a == axis else 1 for a in range(len(shape))])


def _per_channel(value: Tensor, shape: Sequence[Any]) -> Tensor | None:
    """Return a value per channel if it does not vary along other axes; `shape` is as traced."""
    if not bool(value.any()):
        return value.new_zeros(1)
    for axis in channel_axes(shape):
        corner = value[tuple(slice(None) if a == axis else slice(0, 1) for a in range(value.dim()))]
        if torch.equal(value, corner.expand_as(value)):
            return corner.flatten()
    return None


def _known(program: Program) -> dict[str, Tensor | None]:
    """Return each value by node name if it is the same for every input, else None."""
    tensors, table = in_float64({name: t.detach().cpu() for name, t in all_tensors(program).items()}), rules()

    def call(node: torch.fx.Node, known: Mapping[str, Tensor | None]) -> Tensor | None:
        read = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if not read or not isinstance(node.meta.get("val"), Tensor):
            return None
        arguments, rule = arguments_of(node), table.get(str(node.target))
        factors = [arguments.get(name) for name in rule.factors] if rule is not None else []
        values = [known[factor.name] for factor in factors if isinstance(factor, torch.fx.Node)]
        stops = any(value is not None and not bool(value.any()) for value in values)  # the other operands do not count
        if not stops and any(known[n.name] is None for n in read):
            return None

        def value_of(n: torch.fx.Node) -> Any:
            shape = shapes_of(n.meta.get("val"))
            if (constant := known[n.name]) is not None:
                return constant
            return torch.zeros(shape, dtype=torch.float64) if isinstance(shape, tuple) else shape

        try:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError):  # an operator without float64, or that computes sizes itself
            return None
        return result if isinstance(result, Tensor) else None

    return interpret(program.graph.graph, placeholder=lambda node: None, parameter=tensors.__getitem__, call=call)
