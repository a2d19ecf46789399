"""Blocks that are dead already: their branch is a constant per channel, whatever the input and its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.core import (
    TOLERANCE,
    Block,
    Executor,
    Program,
    all_tensors,
    arguments_of,
    elsewhere,
    interpret,
    shapes_of,
    state_of,
)
from surgery.coupling.constants import channel_axes, spread
from surgery.ops import rules

Known = Mapping[str, Tensor | None]
"""Node name → its value whatever the input is; None where it depends on the input."""


def dead_blocks(program: Program, blocks: Sequence[Block]) -> dict[str, tuple[float, ...]]:
    """Return the blocks whose branch is a constant per channel, whatever the input, and that constant.

    Nothing flows through an operator whose weight is all zero, nor through a product with zeros; what follows is
    computed by the operators themselves, in float64.

    Returns:
        Block name → the constant of each channel (axis 1, or the last); empty where it is zero.
    """
    if not blocks or not program.has_graph:
        return {}
    known = _known(program)
    values = {node.name: node.meta.get("val") for node in program.graph.graph.nodes}
    dead: dict[str, tuple[float, ...]] = {}
    for block in blocks:
        value = known.get(block.branch)  # empty for layers: dropping one would pass its input on
        if value is not None and (row := _per_channel(value, values[block.branch].shape)) is not None:
            dead[block.name] = tuple(row.tolist()) if bool(row.any()) else ()
    branches = {block.name: block.branch for block in blocks}
    return _also_elsewhere(program, dead, branches) if dead else dead


def _per_channel(value: Tensor, shape: Sequence[Any]) -> Tensor | None:
    """A value per channel, if it does not vary along other axes; `shape` is the traced one."""
    if not bool(value.any()):
        return value.new_zeros(1)
    for axis in channel_axes(shape):
        corner = value[tuple(slice(None) if a == axis else slice(0, 1) for a in range(value.dim()))]
        if torch.equal(value, corner.expand_as(value)):
            return corner.flatten()
    return None


def _also_elsewhere(
    program: Program, dead: Mapping[str, tuple[float, ...]], branches: Mapping[str, str]
) -> dict[str, tuple[float, ...]]:
    """Those with the same constant at another batch, height and width, unlike a sum over pixels."""
    names = {branches[name] for name in dead}
    state = {name: t.double() if t.is_floating_point() else t for name, t in state_of(program).items()}

    def values(inputs: list[Tensor]) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def record(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
            if node.name not in names:
                return NotImplemented
            seen[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
            return seen[node.name]

        with torch.no_grad():
            Executor(program.graph, state, record, torch.float64).run(*inputs)
        return seen

    found = elsewhere(program, values, seed=77)
    traced = {node.name: node.meta.get("val") for node in program.graph.graph.nodes}

    def holds(name: str) -> bool:
        branch = branches[name]
        wanted = spread(dead[name], traced[branch].shape) if dead[name] else torch.zeros((), dtype=torch.float64)
        allowed = TOLERANCE[torch.float64] * float(wanted.abs().max())
        return found is not None and all(bool(((x[branch] - wanted).abs() <= allowed).all()) for _, x in found)

    return {name: row for name, row in dead.items() if holds(name)}


def _known(program: Program) -> Known:
    """Values that are the same for every input, by node name."""
    tensors = {name: t.detach().cpu() for name, t in all_tensors(program).items()}

    def call(node: torch.fx.Node, known: Known) -> Tensor | None:
        arguments = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if not arguments or not isinstance(node.meta.get("val"), Tensor):
            return None
        constant = all(known[n.name] is not None for n in arguments)
        return _result(node, known) if constant or _stops(node, known) else None

    return interpret(
        program.graph.graph,
        placeholder=lambda node: None,
        parameter=lambda name: tensors[name].double() if tensors[name].is_floating_point() else tensors[name],
        call=call,
    )


def _stops(node: torch.fx.Node, known: Known) -> bool:
    """Whether nothing of its unknown operands gets through: its weight, or the factor, is all zero."""
    arguments, rule = arguments_of(node), rules().get(str(node.target))
    factors = [arguments.get(name) for name in rule.factors] if rule is not None else []
    values = [known[factor.name] for factor in factors if isinstance(factor, torch.fx.Node)]
    return any(value is not None and not bool(value.any()) for value in values)


def _result(node: torch.fx.Node, known: Known) -> Tensor | None:
    """Run an operator on what is known, and on zeros where nothing gets through; None where it does not run so."""

    def value(n: torch.fx.Node) -> Any:
        if (constant := known[n.name]) is not None:
            return constant
        shape = shapes_of(n.meta.get("val"))
        return torch.zeros(shape, dtype=torch.float64) if isinstance(shape, tuple) else shape

    try:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):  # an operator that takes no float64, or computes sizes itself
        return None
    return result if isinstance(result, Tensor) else None
