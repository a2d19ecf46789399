"""Which residual blocks the rest of the network can make up for, seen on calibration images.

For each block the dense network runs without its branch. What a light recovery could give back is given back first: a
scale and a shift per channel of the stream behind the block, fitted by least squares. What is then still missing from
the network's outputs is what the block is worth.

Source: after Wang and Wu 2022, PRACTISE (arXiv:2202.07861), whose recoverability is the outputs' error after training
inserted layers; here the layer is a scale and a shift, and the fit is closed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.ir import Block, Program
from surgery.numerics import Run, flat_outputs, state_of
from surgery.sizes import hint
from surgery.wiring import all_tensors

Batches = Sequence[Sequence[Tensor]]
_LEAST = 1e-30


@dataclass(slots=True)
class _Moments:
    """Per channel, over all images and positions: count, and sums of x, y, x², xy; (C,), float64."""

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def none(cls, channels: int) -> _Moments:
        return cls(0, *(torch.zeros(channels, dtype=torch.float64) for _ in range(4)))

    def add(self, x: Tensor, y: Tensor, axis: int) -> None:
        x, y = (t.movedim(axis, 0).flatten(1).double() for t in (x, y))
        self.count += x.shape[1]
        self.x += x.sum(1)
        self.y += y.sum(1)
        self.xx += (x * x).sum(1)
        self.xy += (x * y).sum(1)

    def fit(self) -> tuple[Tensor, Tensor]:
        """The scale and the shift that bring x nearest to y."""
        x, y = self.x / self.count, self.y / self.count
        variance = self.xx / self.count - x * x
        varies = variance > 1e-12 * (self.xx / self.count).clamp_min(_LEAST)
        scale = torch.where(varies, (self.xy / self.count - x * y) / variance.clamp_min(_LEAST), torch.ones_like(x))
        return scale, y - scale * x


Fit = tuple[Tensor, Tensor]


def missing(
    program: Program, blocks: Sequence[Block], batches: Batches, *, compensated: bool = True
) -> dict[str, float]:
    """Return for each block how much of the outputs is missing without it: squared error over their variance.

    Args:
        program: traced; its weights are those of `program.model`.
        blocks: of that program.
        batches: of its inputs.
        compensated: first give back what a scale and a shift per channel of the stream can.
    """
    nodes = {node.name: node for node in program.graph.graph.nodes}
    at = {nodes[block.sum]: _Place(block, _channels(program, block, nodes[block.sum])) for block in blocks}
    state = state_of(program)
    errors: dict[str, list[float]] = {}
    spreads: list[_Spread] = []
    with torch.no_grad():
        fits = _fits(program, state, at, batches) if compensated else {}
        for batch in batches:
            run = _Without(program.graph, state, at, fits)
            outputs = flat_outputs(run.run(*batch, enable_io_processing=False))
            spreads = spreads or [_Spread() for _ in outputs]
            for spread, output in zip(spreads, outputs, strict=True):
                spread.add(output)
            for name, others in run.found.items():
                so_far = errors.get(name, [0.0] * len(outputs))
                errors[name] = [e + _apart(a, b) for e, a, b in zip(so_far, outputs, others, strict=True)]
    variances = [spread.variance for spread in spreads]
    return {
        name: sum(e / v for e, v in zip(wrong, variances, strict=True)) / max(1, len(wrong))
        for name, wrong in errors.items()
    }


def practised_worth(program: Program, blocks: Sequence[Block], batches: Batches, *, price: float) -> dict[str, float]:
    """Return what is lost with each residual block: the logarithm of one plus what is missing, times the price.

    Near zero that is `-log(1 - missing)`, the currency of `spend.worth_of`; it goes on growing where more is missing
    than there is.
    """
    found = missing(program, blocks, batches) if blocks else {}
    return {name: float(f"{price * math.log1p(value):.6g}") for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """A block, and the axis of the channels of the stream that it adds to."""

    block: Block
    axis: int


def _channels(program: Program, block: Block, total: torch.fx.Node) -> int:
    """The axis that is as long as a bias or scale of the branch: the first after the batch, or the last."""
    tensors = all_tensors(program)
    lengths = {tensors[name].numel() for name in block.tensors if tensors[name].dim() == 1}
    shape = [hint(size) for size in total.meta["val"].shape]
    last = len(shape) - 1
    tokens = shape[last] in lengths and (last < 3 or shape[1] not in lengths)
    return last if tokens else min(1, last)


class _Without(Run):
    """A run that at each block's sum also goes on without the block; outputs are in `found`, by block."""

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        state: Mapping[str, Tensor],
        at: Mapping[torch.fx.Node, _Place],
        fits: Mapping[str, Fit],
    ) -> None:
        super().__init__(graph, state)
        self._at, self._fits = at, fits
        self.found: dict[str, list[Tensor]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one call; where it is a block's sum, the rest of the network as well."""
        place = self._at.get(n)
        if place is not None:
            stays = next(self.env[x] for x in n.all_input_nodes if x.name == place.block.stays)
            self.found[place.block.name] = self._rest(n, _compensated(stays, place, self._fits))
        return super().run_node(n)

    def _rest(self, at: torch.fx.Node, value: Tensor) -> list[Tensor]:
        """What the network returns where a node gives another value; only what comes behind it is run."""
        known: dict[torch.fx.Node, Any] = {}
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            known[node] = self.env.get(node)
            if node is at:
                break
        rest = Run(self.module, self.state)  # type: ignore[arg-type]
        return flat_outputs(rest.run(initial_env={**known, at: value}, enable_io_processing=False))


def _compensated(stays: Tensor, place: _Place, fits: Mapping[str, Fit]) -> Tensor:
    if place.block.name not in fits:
        return stays
    scale, shift = fits[place.block.name]
    shape = [len(scale) if a == place.axis else 1 for a in range(stays.dim())]
    return stays * scale.reshape(shape).to(stays.dtype) + shift.reshape(shape).to(stays.dtype)


def _fits(
    program: Program, state: Mapping[str, Tensor], at: Mapping[torch.fx.Node, _Place], batches: Batches
) -> dict[str, Fit]:
    """For each block what brings the stream without it nearest to the stream with it."""
    moments = {place.block.name: _Moments.none(hint(node.meta["val"].shape[place.axis])) for node, place in at.items()}

    def look(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        place = at.get(node)
        if place is None:
            return NotImplemented
        total = node.target(*args, **kwargs)  # type: ignore[operator]
        names = [x.name for x in node.all_input_nodes]
        moments[place.block.name].add(args[names.index(place.block.stays)], total, place.axis)
        return total

    for batch in batches:
        Run(program.graph, state, look).run(*batch, enable_io_processing=False)
    return {name: found.fit() for name, found in moments.items()}


class _Spread:
    """How much an output varies over all samples."""

    def __init__(self) -> None:
        self._count, self._squares, self._sum = 0, 0.0, torch.zeros((), dtype=torch.float64)

    def add(self, output: Tensor) -> None:
        samples = output.double().reshape(len(output) if output.dim() else 1, -1)
        self._count += len(samples)
        self._squares += float(samples.square().sum())
        self._sum = self._sum + samples.sum(0)

    @property
    def variance(self) -> float:
        """Sum of squared deviations from the mean; of squares where there is a single sample, or none varies."""
        deviations = self._squares - float(self._sum.square().sum()) / max(1, self._count)
        return max(_LEAST, deviations if deviations > 1e-9 * self._squares else self._squares)


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())
