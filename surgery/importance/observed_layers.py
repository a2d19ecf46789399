"""Second moments of the inputs of a network's layers on images.

Layers with more than `WIDEST` inputs are omitted, since memory grows quadratically.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from surgery.core import Executor, Group, Site, arguments_of
from surgery.importance.contractions import CONVOLUTIONS, LINEAR, Contraction, find_contractions
from surgery.importance.evidence import Evidence
from surgery.importance.folding import Folded
from surgery.importance.least_squares import Moments
from surgery.importance.rows import Window, convolution_rows, drawn, value_rows

Batches = Sequence[Sequence[Tensor]]
WIDEST = 6_000
ROWS, FEWEST_ROWS = 16, 20_000
"""Rows collected per input of a layer, and the minimum number of rows."""


@dataclass(frozen=True, slots=True, eq=False)
class ObservedLayer:
    """A layer and the moments of its inputs on images.

    Attributes:
        layer: the layer.
        weight: (groups, n + 1, outputs), including the scale of the following batch norm; the last row, for the shift,
        is 0.
        scale: (groups, outputs), scale of that batch norm.
        moments: moments of its inputs.
        kernel: kernel positions; n is the number of input channels times this.
        error_weight: factor for squared errors of its outputs: output relevance over their variance.
    """

    layer: Contraction
    weight: Tensor
    scale: Tensor
    moments: Moments
    kernel: int
    error_weight: float

    @property
    def rms(self) -> Tensor:
        """(groups, n): root mean square of its inputs."""
        return (self.moments.xx.diagonal(dim1=1, dim2=2)[:, :-1] / self.moments.count).sqrt()


def consumers_of(group: Group, layers: Mapping[str, ObservedLayer]) -> list[tuple[ObservedLayer, Site]]:
    """Return the observed layers that consume a group's units, each with the site of its weight."""
    return [(layers[site.tensor], site) for site in group.sites if site.axis == 1 and site.tensor in layers]


def observed_on(evidence: Evidence, batches: Batches) -> dict[str, ObservedLayer]:
    """Return weight name → the layer with its moments on images."""
    consumers = (consumer for found in evidence.signal.consumers.values() for consumer in found)
    relevance = {consumer.name: consumer.relevance for consumer in consumers}
    tape = Folded(evidence.program.graph, evidence.state)
    found = [c for c in find_contractions(evidence.program.graph, tape.place.keys()) if c.weight]
    images = sum(len(batch[0]) for batch in batches)
    observers = [
        _Observer(layer, tape, images, evidence.seed + k)
        for k, layer in enumerate(found)
        if evidence.state[layer.weight][0].numel() <= WIDEST
    ]
    keep = frozenset(name for observer in observers for name in (observer.source.name, observer.node.name))
    with torch.no_grad():
        for batch in batches:
            end = tape.advance(tape.start(batch), len(tape.nodes) - 1, keep=keep)
            for observer in observers:
                observer.add(tape.value(observer.source, end.values), end.values[observer.node])
    return {o.layer.weight: o.result(relevance.get(o.layer.weight, 1.0)) for o in observers}


class _Observer:
    """Accumulates the input moments of one layer."""

    def __init__(self, layer: Contraction, tape: Executor, images: int, seed: int) -> None:
        self.layer, self._images = layer, images
        self.node = tape.nodes[tape.place[layer.node]]
        self._raw = arguments_of(self.node)
        self.source: torch.fx.Node = self._raw["input"]
        self._weight = tape.state[layer.weight]
        self._groups = int(self._raw["groups"]) if self.node.target in CONVOLUTIONS else 1
        self._inputs, self._outputs = self._weight[0].numel(), len(self._weight) // self._groups
        self._scale = torch.ones(len(self._weight), dtype=torch.float64)
        if layer.norm:
            gamma, _, _, var = (tape.state[name].double() for name in layer.norm_names)
            epsilon = float(arguments_of(tape.nodes[tape.place[layer.norm]])["eps"])
            self._scale = gamma / (var + epsilon).sqrt()
        self._generator = torch.Generator().manual_seed(seed)
        self._moments = Moments.none(self._groups, self._inputs, 0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch of the layer's inputs and outputs."""
        linear = self.node.target == LINEAR
        positions = y.shape[1:-1] if linear else y.shape[2:]
        most = ceil(max(FEWEST_ROWS, ROWS * (self._inputs + 1)) / self._images)
        at = drawn(positions, most, self._generator)
        if linear:
            rows = value_rows(x, x.dim() - 1, self._groups, at)
        else:
            rows = convolution_rows(x, Window.of(self._raw, self._weight), self._groups, at)
        self._moments.add(rows, rows.new_zeros(*rows.shape[:2], 0))

    def result(self, relevance: float) -> ObservedLayer:
        weight = self._weight.double().reshape(self._groups, self._outputs, self._inputs).transpose(1, 2)
        scale = self._scale.reshape(self._groups, self._outputs)
        weight = weight * scale.unsqueeze(1)
        _, variance = self._moments.moments_of(weight)
        error_weight = relevance / float(variance.sum().clamp_min(1e-30))
        weight = torch.cat([weight, torch.zeros_like(weight[:, :1])], 1)
        kernel = self._weight[0, 0].numel() if self._weight.dim() > 2 else 1
        return ObservedLayer(self.layer, weight, scale, self._moments, kernel, error_weight)
