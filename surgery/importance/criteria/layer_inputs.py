"""Criteria from the inputs of a unit's consumers on images: `activation`, `reconstruction` and `second-order`.

Source: block optimal brain surgeon after Hassibi and Stork 1993 and Frantar and Alistarh 2022 (arXiv:2208.11580), with
units as blocks and all consumers at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from surgery.core import Executor, Frontier, Group, Masks, Scores, Site, flat_outputs
from surgery.coupling import masked_run
from surgery.importance.block_ablation import first, squared_errors, variations
from surgery.importance.contractions import Contraction, Layer, drawn, find_contractions
from surgery.importance.criteria.weights import over_mean
from surgery.importance.least_squares import Moments
from surgery.importance.scoring import Batches, Evidence, criterion

WIDEST = 6_000  # layers with more inputs are omitted, since memory grows quadratically
ROWS, FEWEST_ROWS = 16, 20_000  # rows collected per input of a layer, and the minimum number of rows
RIDGE = 1e-3
STEPS = 96  # units of a group are removed one by one, or in at most this many steps
MEASURED_SHARES = (0.25, 0.5, 0.75)  # fractions of each group at which refitted weights are kept to measure the outputs
HELD_OUT_EVERY = 4  # every fourth batch is held out, since weights fitted to few images overfit
SEVERAL_CONSUMERS = 4.0  # cutting one group alone underestimates units with several consumers by about this factor
WORK_MACS, FEWEST = 8e11, 24
"""Limit on the multiply-adds of all measurements together, and the minimum number of images."""


@criterion("activation", needs=["images", "graph", "consumers"])
def activation(evidence: Evidence) -> Scores:
    """Sum of the magnitudes of the weights that consume the unit times those of their inputs, over the group's mean.

    Source: after Sun et al. 2023, Wanda (arXiv:2306.11695).
    """
    layers, out = _observed_on(evidence), dict(evidence.by_signal())
    for group in evidence.coupling.groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        consumers = _consumers_of(group, layers)
        for layer, site in consumers:
            rms = (layer.moments.xx.diagonal(dim1=1, dim2=2)[:, :-1] / layer.moments.count).sqrt()  # (groups, n)
            each = (layer.weight[:, :-1].abs().sum(-1) * rms).sum(0).reshape(-1, layer.taps).sum(1)
            total += torch.tensor([float(each[list(owned)].sum()) for owned in site.index], dtype=torch.float64)
        out[group.name] = tuple(over_mean(total if consumers else out[group.name]).tolist())
    return out


@criterion("reconstruction", needs=["images", "graph", "consumers"])
def reconstruction(evidence: Evidence) -> Scores:
    """Loss of the unit's consumers, after their other weights are refitted, when units are removed one by one."""
    return {order.group.name: order.scores(order.losses) for order in _eliminations(evidence)}


@criterion("second-order", needs=["images", "graph", "consumers", "costs"])
def second_order(evidence: Evidence) -> Scores:
    """Loss of the outputs when units are removed one by one: scaled losses of `reconstruction`."""
    orders = _eliminations(evidence)
    errors = _measured(evidence, orders)
    return {order.group.name: order.scores(_through(order, errors[order.group.name])) for order in orders}


class _ObservedLayer(Layer):
    """A layer and the moments of its inputs on images; `weight` includes its norm's `scale`, the last row being 0."""

    def __init__(self, found: Contraction, tape: Executor, seed: int) -> None:
        super().__init__(found, tape)
        self.scale = self.affine()[0].reshape(self.groups, self.outputs)
        self._linear = self.kernels() * self.scale.unsqueeze(1)
        self.weight = torch.cat([self._linear, torch.zeros_like(self._linear[:, :1])], 1)
        self.moments = Moments.none(self.groups, self.inputs, 0)
        self.taps = prod(tape.state[found.weight].shape[2:])
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor, y: Tensor, images: int) -> None:
        """Add a batch of the layer's inputs and outputs; `images` are all images to come."""
        most = ceil(max(FEWEST_ROWS, ROWS * (self.inputs + 1)) / images)
        rows = self.rows(x, drawn(y.movedim(self.channel_axis(y), -1).shape[1:-1], most, self._generator))
        self.moments.add(rows, rows.new_zeros(*rows.shape[:2], 0))

    def error_weight(self, evidence: Evidence) -> float:
        """Return the factor for squared errors of its outputs: output relevance over their variance."""
        consumers = (consumer for found in evidence.signal.consumers.values() for consumer in found)
        relevance = {consumer.name: consumer.relevance for consumer in consumers}.get(self.found.weight, 1.0)
        _, variance = self.moments.moments_of(self._linear)
        return relevance / float(variance.sum().clamp_min(1e-30))


Layers = Mapping[str, _ObservedLayer]
"""Layers by the name of their weight."""


def _consumers_of(group: Group, layers: Layers) -> list[tuple[_ObservedLayer, Site]]:
    """Return the observed layers that consume a group's units, each with the site of its weight."""
    return [(layers[site.tensor], site) for site in group.sites if site.axis == 1 and site.tensor in layers]


def _observed_on(evidence: Evidence) -> Layers:
    """Return the layers of the network with the moments of their inputs on the images to fit on."""
    tape, batches = Executor(evidence.program.graph, evidence.state), _held_out(evidence.images)[0]
    found = [c for c in find_contractions(evidence.program.graph, tape.place.keys()) if c.weight]
    narrow = [(k, c) for k, c in enumerate(found) if evidence.state[c.weight][0].numel() <= WIDEST]
    layers = {c.weight: _ObservedLayer(c, tape, evidence.seed + k) for k, c in narrow}
    keep = frozenset(name for layer in layers.values() for name in (layer.input.name, layer.node.name))
    images = sum(len(batch[0]) for batch in batches)
    with torch.no_grad():
        for batch in batches:
            end = tape.advance(tape.start(batch), len(tape.nodes) - 1, keep=keep)
            for layer in layers.values():
                layer.add(tape.value(layer.input, end.values), end.values[layer.node], images)
    return layers


def _held_out(batches: Batches) -> tuple[Batches, Batches]:
    """Return the batches to fit on and to measure on; identical if there are too few."""
    aside = [batch for k, batch in enumerate(batches) if k % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
    fitted = [batch for k, batch in enumerate(batches) if k % HELD_OUT_EVERY < HELD_OUT_EVERY - 1]
    return (fitted, aside) if aside else (batches, batches)


@dataclass(frozen=True, slots=True)
class _Elimination:
    """The order in which a group's units are removed, and the loss of each."""

    group: Group
    layers: Sequence[_ObservedLayer]  # that consume the group
    units: Sequence[int]  # all units in order; the last is never removed
    losses: Sequence[float]  # of each unit after those before it, in that order
    weights: Mapping[int, tuple[Tensor, ...]]  # number of removed units → refitted weights of each layer

    def scores(self, losses: Sequence[float]) -> tuple[float, ...]:
        """Return the losses by unit, made non-decreasing along the order."""
        out, least = [0.0] * len(self.units), 0.0
        for unit, value in zip(self.units, losses, strict=True):
            out[unit] = least = max(least, value)
        return tuple(out)


def _eliminations(evidence: Evidence) -> list[_Elimination]:
    """Return the elimination of each group; groups that no observed layer consumes are ranked by `signal`."""
    layers, by_signal, out = _observed_on(evidence), evidence.by_signal(), []
    weights = {name: layer.error_weight(evidence) for name, layer in layers.items()}
    for group in evidence.coupling.groups:
        found = _consumers_of(group, layers)
        if found:
            consumers = [_Consumer(layer, site.index, weights[layer.found.weight]) for layer, site in found]
            out.append(_eliminated(group, [layer for layer, _ in found], consumers))
            continue
        scores = by_signal[group.name]
        units, whole = sorted(range(group.size), key=scores.__getitem__), sum(scores) or 1.0
        out.append(_Elimination(group, (), units, [scores[unit] / whole for unit in units], {}))
    return out


def _measured_counts(size: int) -> list[int]:
    """Return the numbers of removed units, for a group of this size, at which refitted weights are kept."""
    return sorted({min(size - 1, max(1, round(share * size))) for share in MEASURED_SHARES} - {0})


def _eliminated(group: Group, layers: Sequence[_ObservedLayer], consumers: Sequence[_Consumer]) -> _Elimination:
    counts = iter(_measured_counts(group.size))
    count = next(counts, 0)
    units: list[int] = []
    losses: list[float] = []
    weights: dict[int, tuple[Tensor, ...]] = {}
    step = max(1, group.size // STEPS)
    while len(units) < group.size - 1:
        each = torch.stack([consumer.losses() for consumer in consumers]).sum(0)
        each[units] = float("inf")
        most = min(step, group.size - 1 - len(units), count - len(units) if count else step)
        removed = each.argsort(stable=True)[:most].tolist()
        units += removed
        losses += [float(each[unit]) for unit in removed]
        for consumer in consumers:
            consumer.remove(removed)
        if len(units) == count:
            weights[count] = tuple(consumer.weight.clone() for consumer in consumers)
            count = next(counts, 0)
    units += sorted(set(range(group.size)) - set(units))
    losses.append(2 * losses[-1] if losses else 1.0)
    return _Elimination(group, layers, units, losses, weights)


class _Consumer:
    """A consumer of a group while units are removed: the inverse of its second moments, and its refitted weights."""

    def __init__(self, layer: _ObservedLayer, owned: Sequence[Sequence[int]], error_weight: float) -> None:
        matrix = layer.moments.xx / layer.moments.count
        scale = matrix.diagonal(dim1=1, dim2=2)[:, :-1]
        scale += RIDGE * scale + 1e-6 * scale.mean(-1, keepdim=True) + 1e-12
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        self.weight, self._error_weight = layer.weight.clone(), error_weight
        longest = max(map(len, owned)) * layer.taps
        self._index = torch.zeros(len(owned), longest, dtype=torch.long)
        self._mask = torch.zeros(len(owned), longest, dtype=torch.bool)
        for unit, positions in enumerate(owned):
            at = [p * layer.taps + j for p in positions for j in range(layer.taps)]
            self._index[unit, : len(at)] = torch.tensor(at)
            self._mask[unit, : len(at)] = True

    def losses(self) -> Tensor:
        """Return (units,): the loss of each unit if it is removed next."""
        total = torch.zeros(len(self._index), dtype=torch.float64)
        if self._index.shape[1] == 1:  # blocks of one
            at = self._index[:, 0]
            for inverse, weight in zip(self._inverse, self.weight, strict=True):
                total += weight[at].square().sum(1) / inverse.diagonal()[at]
            return total * self._error_weight
        both = self._mask[:, :, None] & self._mask[:, None, :]
        eye = torch.eye(self._index.shape[1], dtype=torch.float64)
        for inverse, weight in zip(self._inverse, self.weight, strict=True):
            block = torch.where(both, inverse[self._index[:, :, None], self._index[:, None, :]], eye)
            own = weight[self._index] * self._mask.unsqueeze(-1)
            total += (own * torch.linalg.solve(block, own)).sum((1, 2))
        return total * self._error_weight

    def remove(self, units: Sequence[int]) -> None:
        at = torch.cat([self._index[u][self._mask[u]] for u in units])
        for inverse, weight in zip(self._inverse, self.weight, strict=True):
            columns = inverse[:, at]
            block = columns[at]
            weight -= columns @ torch.linalg.solve(block, weight[at])
            inverse -= columns @ torch.linalg.solve(block, columns.T)
            weight[at] = 0.0
            inverse[at], inverse[:, at] = 0.0, 0.0
            inverse[at, at] = 1.0


def _measured(evidence: Evidence, orders: Sequence[_Elimination]) -> dict[str, dict[int, float]]:
    """Cut each group alone; return, by group and number of removed units, the outputs' error over their variation."""
    tape = Executor(evidence.program.graph, evidence.state)
    errors = {order.group.name: dict.fromkeys(_measured_counts(order.group.size), 0.0) for order in orders}
    runs = max(1, sum(map(len, errors.values())))
    most = max(FEWEST, int(WORK_MACS / (runs * evidence.macs))) if evidence.macs else None
    batches, dense = first(_held_out(evidence.images)[1], most), []
    starts = [min((tape.place[x.found.node] for x in order.layers if order.weights), default=0) for order in orders]
    with torch.no_grad():
        for k, batch in enumerate(batches):
            run = tape.start(batch)
            dense.append(flat_outputs(tape.output(run)))
            for j, at in enumerate(sorted(range(len(orders)), key=starts.__getitem__)):
                evidence.progress((k + j / len(orders)) / len(batches))
                run = tape.advance(run, starts[at])  # shared by all groups whose consumers follow
                found = errors[orders[at].group.name]
                for count in found:
                    outputs = _outputs(evidence, tape, orders[at], run, batch, count)
                    found[count] += float(squared_errors(flat_outputs(outputs), dense[-1]).sum())
    evidence.progress(1.0)
    variation = float(variations(dense).sum())
    return {name: {count: error / variation for count, error in found.items()} for name, found in errors.items()}


def _outputs(
    evidence: Evidence, tape: Executor, order: _Elimination, run: Frontier, batch: Sequence[Tensor], count: int
) -> Any:
    """Return the network's outputs with `count` units removed; `run` has not yet passed the refitted layers."""
    if order.weights:
        return tape.on(_refitted(tape.state, order.layers, order.weights[count])).output(run)
    labelled = evidence.coupling.labelled
    masks = Masks(labelled, labelled.dead_roots({order.group.name: order.units[:count]}))
    return masked_run(evidence.program, labelled, masks, evidence.state).run(*batch)


def _through(order: _Elimination, errors: Mapping[int, float]) -> list[float]:
    """Scale losses so that their cumulative sums match the measured errors, the last scale beyond the last one."""
    points = {0: 0.0}
    for count, error in errors.items():
        points[count] = max(*points.values(), error)
    losses, end, scale = order.losses, 0, 1.0
    scaled: list[float] = []
    for before, end in pairwise(sorted(points)):
        between = sum(losses[before:end])
        scale = (points[end] - points[before]) / between if between > 0 else 0.0
        scaled += [scale * x for x in losses[before:end]]
    scaled += [scale * x for x in losses[end:]]
    factor = SEVERAL_CONSUMERS if len(order.layers) > 1 else 1.0
    return [factor * loss for loss in scaled]


def _refitted(
    state: Mapping[str, Tensor], layers: Sequence[_ObservedLayer], weights: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the state with these weights replaced."""
    changed = dict(state)
    for observed, refitted in zip(layers, weights, strict=True):
        layer, own = observed.found, state[observed.found.weight]
        scale = torch.where(observed.scale.abs() > 1e-8, observed.scale, 1.0).unsqueeze(1)
        changed[layer.weight] = (refitted[:, :-1] / scale).transpose(1, 2).reshape(own.shape).to(own.dtype)
        shift = layer.norm_names[1] if layer.norm else layer.bias
        if shift:
            changed[shift] = (state[shift].double() + refitted[:, -1].flatten()).to(state[shift].dtype)
    return changed
