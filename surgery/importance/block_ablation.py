"""Block ablation: the error of the outputs on calibration images when blocks are removed.

Blocks that compensate for each other look redundant individually. They are therefore removed one at a time, each time
the one that adds least to the error given those already removed. Optionally, a scale and a shift per channel of the
stream after the block are fitted first, by least squares, to model a light recovery. Plans do so if units are also
scored with refitted consumers; the order is not better for it (benchmarks/studies/blocks.py).

Source: after Wang and Wu 2022, PRACTISE (arXiv:2202.07861), whose recoverability is the outputs' error after training
inserted layers; here such a layer is a scale and a shift with a closed-form fit, and blocks are removed in turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import log1p
from typing import Any

import torch
from torch import Tensor

from surgery.core import Block, Program, all_tensors, flat_outputs, hint, state_of
from surgery.importance.folding import Folded
from surgery.importance.least_squares import Moments
from surgery.importance.outputs import Batches, first, squared_errors, variations

MOST_ERROR = 1.0
"""Blocks are removed in turn until the error of the outputs is as large as their variance."""
NEAR = 1.2
"""A block is removed immediately if no other can be better by more than this factor."""
WORK_MACS, FEWEST = 1.5e12, 8
"""Limit on the multiply-adds of all runs together, and the minimum number of images."""
_LEAST = 1e-30

Fit = tuple[Tensor, Tensor, int]
"""The scale, the shift, and the axis of the channels."""


def block_losses(
    program: Program, blocks: Sequence[Block], batches: Batches, *, macs: int = 0, compensated: bool = False
) -> dict[str, float]:
    """Return the loss of each block, in addition to the blocks that are removed before it.

    The loss is the increase of ``log(1 + error)``. Near zero it agrees with ``-log(1 - error)`` as in `signal.loss_of`,
    but it is also defined for errors above 1.

    Args:
        program: the traced program, with the weights of `program.model`.
        blocks: blocks of the program.
        batches: batches of its inputs.
        macs: MACs of one image, which limit the number of images; 0: no limit.
        compensated: do not count what a scale and a shift per channel restore; for models that will be recovered.
    """
    if not blocks:
        return {}
    most = max(FEWEST, int(WORK_MACS / (4 * len(blocks) * macs))) if macs else None
    ablation = BlockAblation(program, blocks, first(batches, most), compensated=compensated)
    losses: dict[str, float] = {}
    before, least = 0.0, 0.0
    for name, error in ablation.in_turn():
        least = max(least, log1p(error) - log1p(before), 1e-6)
        losses[name], before = least, error
    rest = {name: max(least, log1p(ablation.alone[name])) for name in ablation.alone.keys() - losses.keys()}
    found = {**losses, **rest}
    return {block.name: float(f"{found[block.name]:.6g}") for block in blocks}


class BlockAblation:
    """Runs a network without some of its blocks; errors are squared errors of the outputs over their variance.

    Attributes:
        alone: block name → error with only that block removed.

    Args:
        program: the traced program, with the weights of `program.model`.
        blocks: blocks of the program.
        batches: batches of its inputs.
        compensated: fit a scale and a shift per channel of the stream.
    """

    def __init__(
        self, program: Program, blocks: Sequence[Block], batches: Batches, *, compensated: bool = False
    ) -> None:
        self._graph, self._state, self._batches = program.graph, state_of(program), batches
        self._blocks = {block.name: block for block in blocks}
        self._fits: Mapping[str, Fit] = _fits(program, self._state, blocks, batches) if compensated else {}
        whole = self._without(())
        with torch.no_grad():
            self._dense = [flat_outputs(whole.output(whole.start(batch))) for batch in batches]
        self._variations = variations(self._dense)
        self.alone = self._alone(whole)

    def error(self, removed: Collection[str]) -> float:
        """Return the error without these blocks, the mean over outputs."""
        tape = self._without(removed)
        with torch.no_grad():
            outputs = (flat_outputs(tape.output(tape.start(batch))) for batch in self._batches)
            errors = [squared_errors(found, dense) for found, dense in zip(outputs, self._dense, strict=True)]
        return self._mean(errors)

    def _mean(self, errors: Sequence[Tensor]) -> float:
        return float((sum(errors) / self._variations).mean()) if len(self._variations) else 0.0

    def _alone(self, whole: Folded) -> dict[str, float]:
        """Compute the error without each single block; runs are shared up to the start of the block."""
        starts = {name: min(whole.place[node] for node in (*b.nodes, b.sum)) for name, b in self._blocks.items()}
        tapes = {name: self._without((name,)) for name in sorted(starts, key=starts.__getitem__)}
        errors: dict[str, list[Tensor]] = {name: [] for name in tapes}
        with torch.no_grad():
            for batch, dense in zip(self._batches, self._dense, strict=True):
                run = whole.start(batch)
                for name, tape in tapes.items():
                    run = whole.advance(run, starts[name])
                    errors[name].append(squared_errors(flat_outputs(tape.output(run)), dense))
        return {name: self._mean(errors[name]) for name in self._blocks}

    def _without(self, removed: Collection[str]) -> _Ablated:
        return _Ablated(self._graph, self._state, [self._blocks[name] for name in removed], self._fits)

    def in_turn(self, most: float = MOST_ERROR) -> Iterator[tuple[str, float]]:
        """Yield blocks in order of removal, each with the error without it and all previous ones.

        A block's contribution to the error rarely decreases as others are removed, so only blocks with the lowest last
        known contribution are measured again (lazy greedy, Minoux 1978).
        """
        adds, so_far = dict(self.alone), 0.0
        removed: list[str] = []
        while adds and so_far < most:
            measured: set[str] = set() if removed else set(adds)
            while (name := min(adds, key=adds.__getitem__)) not in measured:
                adds[name] = self.error([*removed, name]) - so_far
                measured.add(name)
                if adds[name] <= NEAR * min(adds.values()):
                    break
            so_far += adds.pop(name)
            removed.append(name)
            yield name, so_far


class _Ablated(Folded):
    """The network without some blocks: their branches are skipped, and their sums return the other operand."""

    def __init__(
        self, graph: torch.fx.GraphModule, state: Mapping[str, Tensor], gone: Sequence[Block], fits: Mapping[str, Fit]
    ) -> None:
        super().__init__(graph, state)
        self._fits = fits
        self._sums = {block.sum: block for block in gone}
        self._skipped = {name for block in gone if not block.is_layer for name in block.nodes}
        self._through = {name for block in gone if block.is_layer for name in block.nodes}

    def call(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], **changed: Any) -> Any:
        """Run one node."""
        if node.name in self._skipped:
            return None
        if node.name in self._through:
            return self.value(node.all_input_nodes[0], values)
        block = self._sums.get(node.name)
        if block is None:
            return super().call(node, values, **changed)
        stays = node.all_input_nodes[0] if block.is_layer else self.nodes[self.place[block.stays]]
        kept: Tensor = self.value(stays, values)
        return _scaled(kept, self._fits[block.name]) if block.name in self._fits else kept


def _scaled(x: Tensor, fit: Fit) -> Tensor:
    scale, shift, axis = fit
    shape = [len(scale) if a == axis else 1 for a in range(x.dim())]
    return x * scale.reshape(shape).to(x.dtype) + shift.reshape(shape).to(x.dtype)


def _fits(program: Program, state: Mapping[str, Tensor], blocks: Sequence[Block], batches: Batches) -> dict[str, Fit]:
    """Fit, for each block, the scale and shift that best map the stream without it to the stream with it."""
    tape = _Observing(program, state, blocks)
    with torch.no_grad():
        for batch in batches:
            tape.output(tape.start(batch))
    return {name: (*_scale_and_shift(found), tape.axes[name]) for name, found in tape.moments.items()}


class _Observing(Folded):
    """The dense network; collects for each block the moments of the stream without it, with the stream as target."""

    def __init__(self, program: Program, state: Mapping[str, Tensor], blocks: Sequence[Block]) -> None:
        super().__init__(program.graph, state)
        self._sums = {block.sum: block for block in blocks}
        self._first = {(*block.nodes, block.sum)[0]: block.name for block in blocks if block.is_layer}
        self._entered: dict[str, Tensor] = {}
        totals = {block.name: self.nodes[self.place[block.sum]] for block in blocks}
        self.axes = {block.name: _channel_axis(program, block, totals[block.name]) for block in blocks}
        channels = {name: hint(totals[name].meta["val"].shape[axis]) for name, axis in self.axes.items()}
        self.moments = {name: Moments.none(count, 1, 1) for name, count in channels.items()}

    def call(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], **changed: Any) -> Any:
        """Run one node."""
        if node.name in self._first:
            self._entered[self._first[node.name]] = self.value(node.all_input_nodes[0], values)
        total = super().call(node, values, **changed)
        block = self._sums.get(node.name)
        if block is not None:
            stays = self.nodes[self.place[block.stays]]
            kept = self._entered.pop(block.name) if block.is_layer else self.value(stays, values)
            rows = (x.movedim(self.axes[block.name], -1).flatten(0, -2).unsqueeze(2) for x in (kept, total))
            self.moments[block.name].add(*rows)
        return total


def _channel_axis(program: Program, block: Block, total: torch.fx.Node) -> int:
    """Return the channel axis, as long as a bias or scale of the branch: the first after the batch, or the last."""
    tensors = all_tensors(program)
    lengths = {tensors[name].numel() for name in block.tensors if tensors[name].dim() == 1}
    shape = [hint(size) for size in total.meta["val"].shape]
    last = len(shape) - 1
    tokens = shape[last] in lengths and (last < 3 or shape[1] not in lengths)
    return last if tokens else min(1, last)


def _scale_and_shift(found: Moments) -> tuple[Tensor, Tensor]:
    """Return the least-squares scale and shift per channel, (C,) each."""
    squares, x = found.xx[:, 0, 0] / found.count, found.xx[:, 0, 1] / found.count
    both, y = found.xy[:, 0, 0] / found.count, found.xy[:, 1, 0] / found.count
    variance = squares - x * x
    varies = variance > 1e-9 * squares
    scale = torch.where(varies, (both - x * y) / variance.clamp_min(_LEAST), torch.ones_like(x))
    return scale, y - scale * x
