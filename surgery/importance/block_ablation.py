"""Which blocks the rest of the network can make up for, seen on calibration images.

The network runs without a block; what is then missing from its outputs is what the block is worth. Blocks that
make up for each other look superfluous one by one; so they are taken away in turn, each time the one without which
least is missing given those that are gone. What a light recovery could give back may be given back first: a scale and
a shift per channel of the stream behind the block, fitted by least squares. Plans do so where units are judged
likewise, with their readers fitted anew; the order is no better for it (benchmarks/studies/blocks.py).

Source: after Wang and Wu 2022, PRACTISE (arXiv:2202.07861), whose recoverability is the outputs' error after training
inserted layers; here such a layer is a scale and a shift, its fit is closed, and the blocks are taken in turn.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log1p
from typing import Any

import torch
from torch import Tensor

from surgery.core import Block, Program, all_tensors, flat_outputs, hint, state_of
from surgery.importance.folding import Folded

Batches = Sequence[Sequence[Tensor]]
LOST = 1.0
"""Blocks are taken in turn until as much of the outputs is missing as there is."""
NEAR = 1.2
"""A block is taken at once if no other can be better than it by more than this factor."""
WORK_MACS = 1.5e12
"""What all runs together may take; large networks run on fewer images,"""
FEWEST = 8
"""but on so many."""
_LEAST = 1e-30


def practised_worth(
    program: Program, blocks: Sequence[Block], batches: Batches, *, macs: int = 0, compensated: bool = False
) -> dict[str, float]:
    """Return what is lost with each block, the worth of those that go before it not counted in.

    That is by how much the logarithm of one plus what is missing grows. Near zero it is ``-log(1 - missing)``, the
    currency of `signal.loss_of`; it goes on where more is missing than there is.

    Args:
        program: traced; its weights are those of `program.model`.
        blocks: of that program.
        batches: of its inputs.
        macs: of one image through the network, by which the images are limited; 0 for all of them.
        compensated: what a scale and a shift per channel give back is not lost: for models that will be recovered.
    """
    if not blocks:
        return {}
    most = max(FEWEST, int(WORK_MACS / (4 * len(blocks) * macs))) if macs else None
    trial = Trial(program, blocks, first(batches, most), compensated=compensated)
    worth: dict[str, float] = {}
    before, least = 0.0, 0.0
    for name, missing in trial.in_turn():
        least = max(least, log1p(missing) - log1p(before), 1e-6)
        worth[name], before = least, missing
    rest = {name: max(least, log1p(trial.alone[name])) for name in trial.alone.keys() - worth.keys()}
    found = {**worth, **rest}
    return {block.name: float(f"{found[block.name]:.6g}") for block in blocks}


def first(batches: Batches, most: int | None) -> Batches:
    """Return the first batches, all or as many as hold at most so many images, at least one: sizes may be fixed."""
    ends = accumulate(len(batch[0]) for batch in batches)
    return [
        batch for k, (batch, end) in enumerate(zip(batches, ends, strict=True)) if not k or most is None or end <= most
    ]


class Trial:
    """A network that runs without some of its blocks, and how much of its outputs is then missing.

    Attributes:
        alone: block name → what is missing where only it is gone.

    Args:
        program: traced; its weights are those of `program.model`.
        blocks: of that program.
        batches: of its inputs.
        compensated: give back what a scale and a shift per channel of the stream can.
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
        self._variances = [_variance(outputs) for outputs in zip(*self._dense, strict=True)]
        self.alone = self._alone(whole)

    def missing(self, gone: Collection[str]) -> float:
        """Return how much is missing without these blocks: squared error over variance, the mean over outputs."""
        tape, wrong = self._without(gone), self._nothing()
        with torch.no_grad():
            for batch, dense in zip(self._batches, self._dense, strict=True):
                wrong = _more(wrong, dense, flat_outputs(tape.output(tape.start(batch))))
        return self._share(wrong)

    def _alone(self, whole: Folded) -> dict[str, float]:
        """What is missing without each block: up to where that begins, a batch runs once for all of them."""
        starts = {name: min(whole.place[node] for node in (*b.nodes, b.sum)) for name, b in self._blocks.items()}
        tapes = {name: self._without((name,)) for name in sorted(starts, key=starts.__getitem__)}
        wrong = dict.fromkeys(tapes, self._nothing())
        with torch.no_grad():
            for batch, dense in zip(self._batches, self._dense, strict=True):
                run = whole.start(batch)
                for name, tape in tapes.items():
                    run = whole.advance(run, starts[name])
                    wrong[name] = _more(wrong[name], dense, flat_outputs(tape.output(run)))
        return {name: self._share(wrong[name]) for name in self._blocks}

    def _without(self, gone: Collection[str]) -> _Without:
        return _Without(self._graph, self._state, [self._blocks[name] for name in gone], self._fits)

    def _nothing(self) -> list[float]:
        return [0.0 for _ in self._variances]

    def _share(self, wrong: Sequence[float]) -> float:
        return sum(e / v for e, v in zip(wrong, self._variances, strict=True)) / max(1, len(wrong))

    def in_turn(self, most: float = LOST) -> Iterator[tuple[str, float]]:
        """Yield block by block, the least missed first, and what is missing without it and all before it.

        What a block adds to what is missing hardly falls as others go; so only blocks whose last figure is the lowest
        are tried again (lazy greedy, Minoux 1978).
        """
        adds, so_far = dict(self.alone), 0.0
        gone: list[str] = []
        while adds and so_far < most:
            tried: set[str] = set() if gone else set(adds)
            while (name := min(adds, key=adds.__getitem__)) not in tried:
                adds[name] = self.missing([*gone, name]) - so_far
                tried.add(name)
                if adds[name] <= NEAR * min(adds.values()):
                    break
            so_far += adds.pop(name)
            gone.append(name)
            yield name, so_far


Fit = tuple[Tensor, Tensor, int]
"""The scale, the shift, and the axis of the channels."""


class _Without(Folded):
    """The network without some blocks: branches are not run, sums are what stays, brought nearest to what they were."""

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        state: Mapping[str, Tensor],
        gone: Sequence[Block],
        fits: Mapping[str, Fit],
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
    """For each block what brings the stream without it nearest to the stream with it, in the dense network."""
    tape = _Looking(program, state, blocks)
    with torch.no_grad():
        for batch in batches:
            tape.output(tape.start(batch))
    return {name: (*found.fit(), found.axis) for name, found in tape.moments.items()}


class _Looking(Folded):
    """The dense network; each block's moments are gathered as it is run."""

    def __init__(self, program: Program, state: Mapping[str, Tensor], blocks: Sequence[Block]) -> None:
        super().__init__(program.graph, state)
        self._sums = {block.sum: block for block in blocks}
        self._first = {(*block.nodes, block.sum)[0]: block.name for block in blocks if block.is_layer}
        self._entered: dict[str, Tensor] = {}
        totals = {block.name: (block, self.nodes[self.place[block.sum]]) for block in blocks}
        self.moments = {
            name: _Moments.none(total, _channels(program, block, total)) for name, (block, total) in totals.items()
        }

    def call(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], **changed: Any) -> Any:
        """Run one node."""
        if node.name in self._first:
            self._entered[self._first[node.name]] = self.value(node.all_input_nodes[0], values)
        total = super().call(node, values, **changed)
        block = self._sums.get(node.name)
        if block is not None:
            stays = self.nodes[self.place[block.stays]]
            kept = self._entered.pop(block.name) if block.is_layer else self.value(stays, values)
            self.moments[block.name].add(kept, total)
        return total


def _channels(program: Program, block: Block, total: torch.fx.Node) -> int:
    """The axis that is as long as a bias or scale of the branch: the first after the batch, or the last."""
    tensors = all_tensors(program)
    lengths = {tensors[name].numel() for name in block.tensors if tensors[name].dim() == 1}
    shape = [hint(size) for size in total.meta["val"].shape]
    last = len(shape) - 1
    tokens = shape[last] in lengths and (last < 3 or shape[1] not in lengths)
    return last if tokens else min(1, last)


@dataclass(slots=True)
class _Moments:
    """Per channel, over all images and positions: count, and sums of x, y, x², xy; (C,), float64."""

    axis: int
    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def none(cls, node: torch.fx.Node, axis: int) -> _Moments:
        channels = hint(node.meta["val"].shape[axis])
        return cls(axis, 0, *(torch.zeros(channels, dtype=torch.float64) for _ in range(4)))

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = (t.movedim(self.axis, 0).flatten(1).double() for t in (x, y))
        self.count += x.shape[1]
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.xx += (x * x).sum(1)
        self.xy += (x * y).sum(1)

    def fit(self) -> tuple[Tensor, Tensor]:
        """The scale and the shift that bring x nearest to y."""
        x, y = self.x / self.count, self.y / self.count
        squares = self.xx / self.count
        variance = squares - x * x
        varies = variance > 1e-9 * squares
        scale = torch.where(varies, (self.xy / self.count - x * y) / variance.clamp_min(_LEAST), torch.ones_like(x))
        return scale, y - scale * x


def _variance(outputs: Sequence[Tensor]) -> float:
    """Sum of squared deviations from the mean over samples; of squares where there is one, or none varies."""
    rows = torch.cat([x.double().reshape(len(x) if x.dim() else 1, -1) for x in outputs])
    squares, deviations = float(rows.square().sum()), float((rows - rows.mean(0)).square().sum())
    return max(_LEAST, deviations if deviations > 1e-9 * squares else squares)


def _more(wrong: Sequence[float], dense: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    """Squared errors with those of another batch, output by output."""
    apart = (float((a.double() - b.double()).square().sum()) for a, b in zip(dense, others, strict=True))
    return [e + more for e, more in zip(wrong, apart, strict=True)]
