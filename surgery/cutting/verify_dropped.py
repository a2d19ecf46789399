"""The oracle for blocks: is a program without them what the traced one computes when their branches give nothing?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.core import Executor, Plan, Program, elsewhere, flat_outputs, sample_inputs, state_of, well_conditioned
from surgery.coupling import Leftovers, dead_blocks, find_blocks, left_behind, spread
from surgery.cutting.comparison import relative_error, require
from surgery.errors import CheckFailed


def check_dropped(program: Program, plan: Plan, *, seed: int = 0) -> tuple[str, ...]:
    """Verify a program without blocks against the program as it was traced.

    Branches that are gone give their constants in the traced program, and operators of layers that are gone what they
    read, on distinct, well-conditioned values. Branches that are dead give what they give, on the real weights. Both in
    float64.

    Args:
        program: what `drop` returned.
        plan: whose `dropped` it was.
        seed: of values and inputs.

    Returns:
        What was found, in words.

    Raises:
        CheckFailed: outputs differ by more than 1e-10 of what varies with the input.
    """
    whole = program.dense
    blocks = {block.name: block for block in find_blocks(whole)}
    gone = [blocks[name] for name in plan.dropped]
    branches = {block.branch: plan.dropped[block.name] for block in gone if not block.is_layer}
    layers = {name for block in gone if block.is_layer for name in (*block.nodes, block.sum)}
    exact = left_behind(whole, plan.dropped)
    _require_shifted(program, whole, exact)
    worst = _apart(program, whole, well_conditioned(whole, seed=seed), branches, layers, exact, seed)
    require(worst, torch.float64, f"dropping {len(gone)} blocks, on distinct, well-conditioned values")
    dead = {name: values for name, values in branches.items() if name in _dead(whole, plan)}
    if not dead:
        return ()
    real = {name: t.double() if t.is_floating_point() else t for name, t in state_of(whole).items()}
    zeroed = {name: values for name, values in branches.items() if name not in dead}
    layers -= {name for block in gone if block.branch in dead and not block.is_layer for name in block.nodes}
    worst = _apart(program, whole, real, zeroed, layers, exact, seed)
    require(worst, torch.float64, f"taking out {len(dead)} dead blocks, on the real weights")
    return (f"{len(dead)} dead blocks taken out: relative error {worst:.1e} in float64 on the real weights",)


def _dead(whole: Program, plan: Plan) -> set[str]:
    blocks = [block for block in find_blocks(whole) if block.name in plan.dropped]
    dead = dead_blocks(whole, blocks)
    return {block.branch for block in blocks if block.name in dead}


def _apart(
    program: Program,
    whole: Program,
    state: Mapping[str, Tensor],
    branches: Mapping[str, tuple[float, ...]],
    layers: Collection[str],
    exact: Leftovers,
    seed: int,
) -> float:
    """The relative difference between the two, at other sizes as well.

    In the traced one branches give constants, layers what they read.
    """

    def constant(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        if node.name not in branches:  # what ends a branch may end a layer within it too
            return args[0] if node.name in layers else NotImplemented
        value = torch.zeros_like(node.target(*args, **kwargs))  # type: ignore[operator]
        left = branches[node.name]
        if left:
            value = value + spread(left, traced[node.name].shape).to(value.dtype)
        return value

    traced = {node.name: node.meta.get("val") for node in whole.graph.graph.nodes}
    left = _with_constants(program, state, exact)

    def reference(inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return flat_outputs(Executor(whole.graph, state, constant, dtype=torch.float64).run(*inputs))

    inputs = sample_inputs(whole, seed=seed + 31, dtype=torch.float64)
    worst = 0.0
    for given, wanted in [(inputs, reference(inputs)), *(elsewhere(whole, reference, seed=seed + 32) or ())]:
        with torch.no_grad():
            found = flat_outputs(Executor(program.graph, left, dtype=torch.float64).run(*given))
        if [x.shape for x in wanted] != [x.shape for x in found] or not wanted:
            raise CheckFailed("the model without its blocks returns other outputs; please report it")
        worst = max(worst, relative_error([wanted], [found])[0])
    return worst


def _with_constants(program: Program, state: Mapping[str, Tensor], exact: Leftovers) -> dict[str, Tensor]:
    """The state with the constants that blocks left behind, unrounded."""
    own = {name: t.double() if t.is_floating_point() else t for name, t in state_of(program).items()}
    given = {name: state.get(name, exact.added.get(name, value)) for name, value in own.items()}
    return {name: value + exact.shifts[name] if name in exact.shifts else value for name, value in given.items()}


def _require_shifted(program: Program, whole: Program, exact: Leftovers) -> None:
    """Tensors that have taken a constant up are to hold it, and all others what they held."""
    before, after = state_of(whole), state_of(program)
    for name in after.keys() & before.keys():
        wanted = before[name]
        if name in exact.shifts:
            wanted = (wanted.double() + exact.shifts[name]).to(wanted.dtype)
        if not torch.equal(after[name], wanted):
            raise CheckFailed(f"'{name}' is not what it was, or does not hold the constant that it is to take up")
    for name, value in exact.added.items():
        if name not in after or not torch.equal(after[name], value.to(after[name].dtype)):
            raise CheckFailed(f"'{name}' does not hold the constant that a block left behind")
