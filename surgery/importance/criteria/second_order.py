"""Losses by second-order elimination, scaled by the error of the outputs.

Only output errors are comparable between groups: each group is cut alone, to a few widths and with refitted consumers,
and the error of the outputs is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from surgery.core import Frontier, Group, Masks, Scores, Site, flat_outputs
from surgery.coupling import masked_run
from surgery.importance.elimination import Elimination, eliminations, held_out, measured_counts
from surgery.importance.evidence import Evidence, criterion
from surgery.importance.folding import Folded
from surgery.importance.observed_layers import ObservedLayer, consumers_of
from surgery.importance.outputs import first, squared_errors, variations

SEVERAL_CONSUMERS = 4.0
"""Cutting one group alone underestimates units with several consumers by about this factor."""
WORK_MACS, FEWEST = 8e11, 24
"""Limit on the multiply-adds of all measurements together, and the minimum number of images."""


@criterion("second-order", needs=["images", "graph", "consumers", "costs"])
def second_order(evidence: Evidence) -> Scores:
    """Loss of the outputs when the unit is removed after those before it: scaled losses of `reconstruction`."""
    orders, layers = eliminations(evidence)
    tape = Folded(evidence.program.graph, dict(evidence.state))
    groups = [_CutGroup.of(group, orders[group.name], layers, tape) for group in evidence.coupling.groups]
    variation = _measure(evidence, tape, groups)
    return {cut.group.name: cut.scores(variation) for cut in groups}


@dataclass(slots=True, eq=False)
class _CutGroup:
    """A group that is cut to several widths while the rest of the network stays dense.

    Attributes:
        group: the group.
        order: order in which its units are removed.
        consumers: the layers that are refitted.
        start: position in the graph up to which the dense network's run can be shared.
        errors: number of units removed → squared error of the outputs, summed over images.
    """

    group: Group
    order: Elimination
    consumers: Sequence[tuple[ObservedLayer, Site]]
    start: int
    errors: dict[int, float]

    @classmethod
    def of(cls, group: Group, order: Elimination, layers: Mapping[str, ObservedLayer], tape: Folded) -> _CutGroup:
        consumers = consumers_of(group, layers)
        places = [tape.place[layer.layer.node] for layer, _ in consumers if order.weights]
        errors = dict.fromkeys(measured_counts(group.size), 0.0)
        return cls(group, order, consumers, min(places, default=0), errors)

    def outputs(self, evidence: Evidence, tape: Folded, run: Frontier, batch: Sequence[Tensor], count: int) -> Any:
        """Return the network's outputs with `removed` units removed; `run` has not yet passed `start`."""
        if not self.order.weights:
            labelled = evidence.coupling.labelled
            masks = Masks(labelled, labelled.dead_roots({self.group.name: self.order.units[:count]}))
            masked = masked_run(evidence.program, labelled, masks, evidence.state)
            return masked.run(*batch)
        whole = tape.state
        layers = [layer for layer, _ in self.consumers]
        tape.state = _refitted(whole, layers, self.order.weights[count])
        try:
            return tape.output(run)
        finally:
            tape.state = whole

    def scores(self, variation: float) -> tuple[float, ...]:
        points = {0: 0.0}
        for count, error in self.errors.items():
            points[count] = max(*points.values(), error / variation)
        factor = SEVERAL_CONSUMERS if len(self.consumers) > 1 else 1.0
        return self.order.scores([factor * loss for loss in _through_points(self.order.losses, points)])


def _measure(evidence: Evidence, tape: Folded, groups: Sequence[_CutGroup]) -> float:
    """Measure the errors of all groups; return the variation of the dense outputs on the same images."""
    runs = max(1, sum(len(cut.errors) for cut in groups))
    most = max(FEWEST, int(WORK_MACS / (runs * evidence.macs))) if evidence.macs else None
    batches, dense = first(held_out(evidence.images)[1], most), []
    with torch.no_grad():
        for k, batch in enumerate(batches):
            run = tape.start(batch)
            dense.append(flat_outputs(tape.output(run)))
            for j, cut in enumerate(sorted(groups, key=lambda cut: cut.start)):
                evidence.progress((k + j / len(groups)) / len(batches))
                run = tape.advance(run, cut.start)  # shared by all groups whose consumers follow
                for count in cut.errors:
                    outputs = flat_outputs(cut.outputs(evidence, tape, run, batch, count))
                    cut.errors[count] += float(squared_errors(outputs, dense[-1]).sum())
    evidence.progress(1.0)
    return float(variations(dense).sum())


def _refitted(
    state: Mapping[str, Tensor], layers: Sequence[ObservedLayer], weights: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return the state with these weights replaced."""
    changed = dict(state)
    for observed, refitted in zip(layers, weights, strict=True):
        layer, own = observed.layer, state[observed.layer.weight]
        scale = torch.where(observed.scale.abs() > 1e-8, observed.scale, 1.0).unsqueeze(1)
        changed[layer.weight] = (refitted[:, :-1] / scale).transpose(1, 2).reshape(own.shape).to(own.dtype)
        shift = layer.norm_names[1] if layer.norm else layer.bias
        if shift:
            changed[shift] = (state[shift].double() + refitted[:, -1].flatten()).to(state[shift].dtype)
    return changed


def _through_points(losses: Sequence[float], points: Mapping[int, float]) -> list[float]:
    """Scale losses so that their cumulative sums match measured points; the last scale is kept beyond the last one."""
    scaled, end, factor = list(losses), 0, 1.0
    for before, after in pairwise(sorted(points)):
        between = sum(losses[before:after])
        factor = (points[after] - points[before]) / between if between > 0 else 0.0
        scaled[before:after] = [factor * x for x in losses[before:after]]
        end = after
    return [*scaled[:end], *(factor * x for x in losses[end:])]
