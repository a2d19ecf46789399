"""Dead blocks: their branch is a constant per channel for every input of every size."""

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
"""Node name → its value if independent of the input, else None."""


def dead_blocks(program: Program, blocks: Sequence[Block]) -> dict[str, tuple[float, ...]]:
    """Return the blocks whose branch is a constant per channel for every input, and that constant.

    An operator with an all-zero weight, or a product with zeros, does not depend on its input; the values that follow
    are computed by running the operators in float64.

    Returns:
        Block name → the constant of each channel (axis 1, or the last); empty if zero.
    """
    if not blocks or not program.has_graph:
        return {}
    known = _known(program)
    values = {node.name: node.meta.get("val") for node in program.graph.graph.nodes}
    dead: dict[str, tuple[float, ...]] = {}
    for block in blocks:
        value = known.get(block.branch)  # empty for layers: dropping one would make it an identity
        if value is not None and (row := _per_channel(value, values[block.branch].shape)) is not None:
            dead[block.name] = tuple(row.tolist()) if bool(row.any()) else ()
    branches = {block.name: block.branch for block in blocks}
    return _also_elsewhere(program, dead, branches) if dead else dead


def _per_channel(value: Tensor, shape: Sequence[Any]) -> Tensor | None:
    """Return a value per channel if it does not vary along other axes; `shape` is as traced."""
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
    """Keep the blocks whose constant is the same at another batch, height and width (unlike a sum over pixels)."""
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
    """Return values that are the same for every input, by node name."""
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
    """Return whether an all-zero weight or factor makes the result independent of the unknown operands."""
    arguments, rule = arguments_of(node), rules().get(str(node.target))
    factors = [arguments.get(name) for name in rule.factors] if rule is not None else []
    values = [known[factor.name] for factor in factors if isinstance(factor, torch.fx.Node)]
    return any(value is not None and not bool(value.any()) for value in values)


def _result(node: torch.fx.Node, known: Known) -> Tensor | None:
    """Run an operator on the known operands, with zeros for irrelevant ones; None if it does not run."""

    def value(n: torch.fx.Node) -> Any:
        if (constant := known[n.name]) is not None:
            return constant
        shape = shapes_of(n.meta.get("val"))
        return torch.zeros(shape, dtype=torch.float64) if isinstance(shape, tuple) else shape

    try:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError):  # an operator that does not support float64, or computes sizes itself
        return None
    return result if isinstance(result, Tensor) else None
