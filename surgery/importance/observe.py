"""What a network computes on images, layer by layer: what each reads, and how much the outputs hang on it.

Two criteria come of that by themselves: the magnitude of weights times that of what they read, after Sun et al. 2023,
Wanda (arXiv:2306.11695); and the slope of the outputs as a unit is turned down, after Molchanov et al. 2019
(arXiv:1906.10771), with outputs drawn from the model's own distribution in the place of labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from surgery.core import Coupling, Executor, Group, Program, Site, bind, flat_outputs
from surgery.importance.contractions import CONVOLUTIONS, LINEAR, Contraction, find_contractions
from surgery.importance.folding import Folded
from surgery.importance.least_squares import Moments
from surgery.importance.rows import Window, convolution_rows, drawn, value_rows

Batches = Sequence[Sequence[Tensor]]
WIDEST = 6_000
"""Layers that read more than this are not looked at: second moments take the square of it."""
ROWS, FEWEST_ROWS = 16, 20_000
"""So many rows for each value that a layer reads are enough, but no fewer than these."""


@dataclass(slots=True, eq=False)
class Reader:
    """A layer that reads units, as images show it.

    Attributes:
        layer: which.
        weight: (groups, n + 1, outputs), the norm behind it in it; the shift, last, as 0.
        scale: (groups, outputs), of that norm.
        moments: of what it reads.
        kernel: positions of its kernel: each input channel is so many of the n.
        counts: what an output's error counts.
    """

    layer: Contraction
    weight: Tensor
    scale: Tensor
    moments: Moments
    kernel: int
    counts: float

    @property
    def rms(self) -> Tensor:
        """(groups, n): root mean square of what it reads."""
        return (self.moments.xx.diagonal(dim1=1, dim2=2)[:, :-1] / self.moments.count).sqrt()


# What images show. ---------------------------------------------------------------------------------------------------


def observed(
    program: Program, state: Mapping[str, Tensor], batches: Batches, *, heard: Mapping[str, float], seed: int = 0
) -> dict[str, Reader]:
    """Return weight name → the layer that reads with it; an output's error counts relative to what varies there."""
    tape = Folded(program.graph, state)
    found = [c for c in find_contractions(program.graph, tape.place.keys()) if c.weight]
    looks = [_Look(c, tape, sum(len(b[0]) for b in batches), seed + k) for k, c in enumerate(found)]
    looks = [look for look in looks if look.inputs <= WIDEST]
    keep = frozenset(name for look in looks for name in (look.source.name, look.node.name))
    with torch.no_grad():
        for batch in batches:
            end = tape.advance(tape.start(batch), len(tape.nodes) - 1, keep=keep)
            for look in looks:
                look.take(tape.value(look.source, end.values), end.values[look.node])
    return {look.layer.weight: look.reader(heard.get(look.layer.weight, 1.0)) for look in looks}


class _Look:
    def __init__(self, layer: Contraction, tape: Executor, images: int, seed: int) -> None:
        self.layer, self._images = layer, images
        self.node = tape.nodes[tape.place[layer.node]]
        self._raw = bind(self.node, lambda n: n).raw
        self.source: torch.fx.Node = self._raw["input"]
        self._weight = tape.state[layer.weight]
        self._groups = int(self._raw["groups"]) if self.node.target in CONVOLUTIONS else 1
        self.inputs, self._outputs = self._weight[0].numel(), len(self._weight) // self._groups
        self._scale = torch.ones(len(self._weight), dtype=torch.float64)
        if layer.norm:
            gamma, _, _, var = (tape.state[name].double() for name in layer.norm_names)
            epsilon = float(bind(tape.nodes[tape.place[layer.norm]], lambda n: n).raw["eps"])
            self._scale = gamma / (var + epsilon).sqrt()
        self._generator = torch.Generator().manual_seed(seed)
        self._moments = Moments.none(self._groups, self.inputs, 0) if self.inputs <= WIDEST else None

    def take(self, x: Tensor, y: Tensor) -> None:
        assert self._moments is not None
        linear = self.node.target == LINEAR
        positions = y.shape[1:-1] if linear else y.shape[2:]
        most = ceil(max(FEWEST_ROWS, ROWS * (self.inputs + 1)) / self._images)
        at = drawn(positions, most, self._generator)
        if linear:
            rows = value_rows(x, x.dim() - 1, self._groups, at)
        else:
            rows = convolution_rows(x, Window.of(self._raw, self._weight), self._groups, at)
        self._moments.add(rows, rows.new_zeros(*rows.shape[:2], 0))

    def reader(self, heard: float) -> Reader:
        assert self._moments is not None
        weight = self._weight.double().reshape(self._groups, self._outputs, self.inputs).transpose(1, 2)
        scale = self._scale.reshape(self._groups, self._outputs)
        weight = weight * scale.unsqueeze(1)
        _, varies = self._moments.moments_of(weight)
        counts = heard / float(varies.sum().clamp_min(1e-30))
        weight = torch.cat([weight, torch.zeros_like(weight[:, :1])], 1)
        kernel = self._weight[0, 0].numel() if self._weight.dim() > 2 else 1
        return Reader(self.layer, weight, scale, self._moments, kernel, counts)


def read_by(group: Group, readers: Mapping[str, Reader]) -> list[tuple[Reader, Site]]:
    """Return the layers that read a group's units, each with the site that tells where."""
    return [(readers[site.tensor], site) for site in group.sites if site.axis == 1 and site.tensor in readers]


# Magnitudes. ---------------------------------------------------------------------------------------------------------


def by_activation(group: Group, readers: Mapping[str, Reader]) -> tuple[float, ...]:
    """Return the sum of the magnitudes of what reads each unit, times that of what is read; over the group's mean."""
    total, found = torch.zeros(group.size, dtype=torch.float64), read_by(group, readers)
    for reader, site in found:
        each = (reader.weight[:, :-1].abs().sum(-1) * reader.rms).sum(0).reshape(-1, reader.kernel).sum(1)
        total += torch.tensor([float(each[list(owned)].sum()) for owned in site.index], dtype=torch.float64)
    return share(total.tolist()) if found else ()


def share(values: Sequence[float]) -> tuple[float, ...]:
    """Return values over their mean, so that groups compare."""
    mean = sum(values) / len(values)
    return tuple(v / mean if mean > 0 else v for v in values)


# The slope of the outputs. -------------------------------------------------------------------------------------------


def taylor(
    program: Program, coupling: Coupling, state: Mapping[str, Tensor], batches: Batches, seed: int
) -> dict[str, tuple[float, ...]]:
    """Return the mean squared slope of drawn outputs' log-likelihood as a unit is turned down."""
    touched = {site.tensor for group in coupling.groups for site in group.sites}
    learnt = {
        name: t.detach().clone().requires_grad_(name in touched and "running_" not in name)
        for name, t in state.items()
        if t.is_floating_point()
    }
    tape = Executor(program.graph, {**state, **learnt})
    wanted = {name: t for name, t in learnt.items() if t.requires_grad}
    sums = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in coupling.groups}
    generator, images = torch.Generator().manual_seed(seed), 0
    for batch in batches:
        for k in range(0, len(batch[0]), 4):  # the fewer at a time, the less their slopes cancel
            part = [x[k : k + 4] if len(x) == len(batch[0]) else x for x in batch] if len(batch[0]) > 4 else batch
            images += len(part[0])
            score = drawn_score(flat_outputs(tape.output(tape.start(part))), generator)
            slopes = torch.autograd.grad(score, list(wanted.values()), allow_unused=True)
            by_name = {name: g for name, g in zip(wanted, slopes, strict=True) if g is not None}
            for group in coupling.groups:
                sums[group.name] += _turned_down(group, learnt, by_name).square()
    return {name: tuple((total / (2 * images)).tolist()) for name, total in sums.items()}


def _turned_down(group: Group, weights: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> Tensor:
    """(units,): the slope along each unit's weights in the layers that read it, else in those that make it."""
    read = [s for s in group.sites if s.axis == 1 and s.tensor in slopes and weights[s.tensor].dim() > 1]
    made = [s for s in group.sites if s.axis == 0 and s.tensor in slopes and weights[s.tensor].dim() > 1]
    total = torch.zeros(group.size, dtype=torch.float64)
    for site in read or made[:1]:
        weight = weights[site.tensor].detach()
        others = [a for a in range(weight.dim()) if a != site.axis]
        along = (weight * slopes[site.tensor]).double().sum(others)
        total += torch.stack([along[list(owned)].sum() for owned in site.index])
    return total


def drawn_score(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Return the log-likelihood of outputs drawn from the model's own distribution, summed over the batch.

    (N, classes) are logits; others are the means of normal distributions of their own spread.
    """
    total = outputs[0].new_zeros(())
    for out in outputs:
        if out.dim() == 2 and out.shape[1] > 1:
            logs = out.log_softmax(1)
            chosen = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            total = total + logs.gather(1, chosen).sum()
        else:
            spread = float(out.detach().std(correction=0)) or 1.0
            noise = torch.randn(out.shape, generator=generator, dtype=out.dtype)
            total = total + (out * noise).sum() / (spread * max(1, out[0].numel()) ** 0.5)
    return total
