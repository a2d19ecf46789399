"""Verify that a program without blocks computes the same as the traced one with these blocks' branches overridden."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.core import (
    Executor,
    Plan,
    Program,
    elsewhere,
    flat_outputs,
    sample_inputs,
    state_of,
    well_conditioned,
)
from surgery.coupling import (
    BranchConstants,
    branch_constants,
    dead_blocks,
    find_blocks,
    spread,
)
from surgery.cutting.comparison import relative_error, require
from surgery.errors import CheckFailed


def check_dropped(program: Program, plan: Plan, *, seed: int = 0) -> tuple[str, ...]:
    """Verify a program without blocks against the program as it was traced.

    In the traced program, dropped branches are replaced by their constants, and dropped layers by their inputs, on
    distinct, well-conditioned values. Dead branches are compared unchanged on the real weights. Both run in float64.

    Args:
        program: result of `drop`.
        plan: plan with these `dropped` blocks.
        seed: seed of values and inputs.

    Returns:
        Notes on the comparisons.

    Raises:
        CheckFailed: outputs differ by more than 1e-10 of what varies with the input.
    """
    whole = program.dense
    gone = [block for block in find_blocks(whole) if block.name in plan.dropped]
    dropped = _Dropped(
        program,
        {block.branch: plan.dropped[block.name] for block in gone if not block.is_layer},
        {name for block in gone if block.is_layer for name in (*block.nodes, block.sum)},
        branch_constants(whole, plan.dropped),
    )
    _require_shifted(dropped)
    worst = _apart(dropped, well_conditioned(whole, seed=seed), seed)
    require(worst, torch.float64, f"dropping {len(gone)} blocks, on distinct, well-conditioned values")
    names = dead_blocks(whole, gone)
    dead = [block for block in gone if block.name in names and not block.is_layer]
    if not dead:
        return ()
    inside = {name for block in dead for name in block.nodes}
    branches = {block.branch for block in dead}
    left = replace(
        dropped,
        branches={name: values for name, values in dropped.branches.items() if name not in branches},
        layers=dropped.layers - inside,
    )
    real = {name: t.double() if t.is_floating_point() else t for name, t in state_of(whole).items()}
    worst = _apart(left, real, seed)
    require(worst, torch.float64, f"taking out {len(dead)} dead blocks, on the real weights")
    return (f"{len(dead)} dead blocks taken out: relative error {worst:.1e} in float64 on the real weights",)


@dataclass(frozen=True, slots=True, eq=False)
class _Dropped:
    """A program without some of its blocks, and the overrides of the traced program.

    Attributes:
        program: without the blocks.
        branches: last node of a branch → its constant per channel; empty for zero.
        layers: nodes of layers, which return their input.
        constants: where the constants were added.
    """

    program: Program
    branches: Mapping[str, tuple[float, ...]]
    layers: Set[str]
    constants: BranchConstants

    def override(self, node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        """Return the value of a node of the traced program without the blocks."""
        if node.name not in self.branches:  # the last node of a branch may also be that of a layer within it
            return args[0] if node.name in self.layers else NotImplemented
        value = torch.zeros_like(node.target(*args, **kwargs))  # type: ignore[operator]
        constant = self.branches[node.name]
        return value + spread(constant, node.meta["val"].shape).to(value.dtype) if constant else value

    def state(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the dense tensors with the constants of dropped blocks added in float64."""
        shifts, added = self.constants.shifts, self.constants.added
        own = {name: t.double() if t.is_floating_point() else t for name, t in state_of(self.program).items()}
        given = {name: dense.get(name, added.get(name, value)) for name, value in own.items()}
        return {name: value + shifts[name] if name in shifts else value for name, value in given.items()}


def _apart(dropped: _Dropped, state: Mapping[str, Tensor], seed: int) -> float:
    """Return the relative difference between the traced program and the one without blocks, also at other sizes."""
    whole = dropped.program.dense
    reference = Executor(whole.graph, state, dropped.override, torch.float64)
    shifted = Executor(dropped.program.graph, dropped.state(state), dtype=torch.float64)

    def outputs(inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return flat_outputs(reference.run(*inputs))

    inputs = sample_inputs(whole, seed=seed + 31, dtype=torch.float64)
    worst = 0.0
    for given, wanted in [(inputs, outputs(inputs)), *(elsewhere(whole, outputs, seed=seed + 32) or ())]:
        with torch.no_grad():
            found = flat_outputs(shifted.run(*given))
        if [x.shape for x in wanted] != [x.shape for x in found] or not wanted:
            raise CheckFailed("the model without its blocks returns other outputs; please report it")
        worst = max(worst, relative_error([wanted], [found])[0])
    return worst


def _require_shifted(dropped: _Dropped) -> None:
    """Raise unless tensors that absorb a constant contain it, and all others are unchanged."""
    shifts, added = dropped.constants.shifts, dropped.constants.added
    before, after = state_of(dropped.program.dense), state_of(dropped.program)
    for name in after.keys() & before.keys():
        wanted = before[name]
        if name in shifts:
            wanted = (wanted.double() + shifts[name]).to(wanted.dtype)
        if not torch.equal(after[name], wanted):
            raise CheckFailed(f"'{name}' is not what it was, or does not hold the constant that it is to take up")
    for name, value in added.items():
        if name not in after or not torch.equal(after[name], value.to(after[name].dtype)):
            raise CheckFailed(f"'{name}' does not hold the constant that a block left behind")
