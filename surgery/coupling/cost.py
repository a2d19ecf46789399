"""Analytic costs of a plan without cutting: the operators' formulas at the surviving sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, prod
from typing import Any

import numpy as np

from surgery.core import CostFn, Coupling, LabelledGraph, Layers, Mask, Plan, Program, Scores, Value
from surgery.coupling.masking import batch_size, values_in
from surgery.ops import Macs, Shape, rules


class Sizes:
    """Surviving lengths of many axes at once; axes with equal labels share a slot. `axes`: the roots of each slot."""

    def __init__(self, labelled: LabelledGraph) -> None:
        self._labelled = labelled
        self._slots: dict[tuple[bytes, ...], int] = {}
        self._known: dict[int, tuple[Value, list[int]]] = {}
        self.axes: list[Layers] = []

    def track(self, value: Value) -> list[int]:
        """For each axis of `value`, its slot, or its negated fixed length less one."""
        if id(value) not in self._known:
            slots = []
            for size, axis in zip(value.shape, value.axes, strict=True):
                layers = self._labelled.labels.canon(axis)
                key = tuple(layer.tobytes() for layer in layers)
                if layers and key not in self._slots:
                    self._slots[key] = len(self.axes)
                    self.axes.append(layers)
                slots.append(self._slots[key] if layers else -1 - size)
            self._known[id(value)] = (value, slots)
        return self._known[id(value)][1]

    def lengths(self, dead: Mask) -> list[int]:
        """Surviving length per slot."""
        alive = ~dead
        return [int(np.logical_and.reduce([alive[layer] for layer in layers]).sum()) for layers in self.axes]


def _shape(slots: Sequence[int], lengths: Sequence[int]) -> Shape:
    return tuple(lengths[s] if s >= 0 else -1 - s for s in slots)


def cost_functions(program: Program, coupling: Coupling) -> Mapping[str, CostFn]:
    """Return functions of the removed units per group name that compute the cost of a pruned network.

    `macs`: multiply-adds per sample by fvcore's formulas; `params`: number of parameters, shared ones once.
    """
    labelled, table, model = coupling.labelled, rules(), program.model
    macs = [
        (rule.macs, labelled.calls[node.name], values_in(labelled.values[node.name])[0])
        for node in program.graph.graph.nodes
        if (rule := table.get(str(node.target))) is not None and rule.macs is not None
    ]
    named = model.named_parameters(remove_duplicate=False)
    values = {id(p): labelled.params[name] for name, p in named if name in labelled.params}
    params: list[Term] = [(lambda shapes, out: prod(out), {}, value) for value in values.values()]
    fixed = sum(p.numel() for p in model.parameters() if id(p) not in values)
    return {"macs": _summed(labelled, macs, batch=batch_size(program)), "params": _summed(labelled, params, fixed)}


Term = tuple[Macs, Mapping[str, Any], Value]
"""A formula, the arguments whose shapes it takes, and the result."""


def _summed(labelled: LabelledGraph, terms: Sequence[Term], fixed: int = 0, batch: int = 1) -> CostFn:
    sizes = Sizes(labelled)
    tracked = [
        (formula, {k: sizes.track(v) for k, v in arguments.items() if isinstance(v, Value)}, sizes.track(out))
        for formula, arguments, out in terms
    ]

    def cost(dead: Mapping[str, Sequence[int]]) -> int:
        lengths = sizes.lengths(labelled.dead_roots(dead))
        total = sum(
            formula({k: _shape(s, lengths) for k, s in tensors.items()}, _shape(out, lengths))
            for formula, tensors, out in tracked
        )
        return (fixed + total) // batch

    return cost


FLUSHES_MIB = (4, 12, 24)  # amounts that are measured; larger ones make little difference
KEPT = 0.6  # fraction of the weights, halfway between the dense network and usual plans


def flush_mib(program: Program, precision: str = "fp32") -> int:
    """Return how many MiB of cache a network's weights overwrite between two runs of the same kernel."""
    weights = program.dense.model.parameters()
    held: float = sum(p.numel() * (1 if precision == "int8" else p.element_size()) for p in weights) / 2**20
    return min(FLUSHES_MIB, key=lambda size: abs(log(size / (KEPT * held)))) if held > 1 else 0


def priced(scores: Scores, coupling: Coupling, cost: CostFn) -> Scores:
    """Return importance per saved cost, in millionths of the dense cost, averaged over half of the unit's group."""
    dense, out = cost({}), {}
    for group in coupling.groups:
        half = max(1, group.size // 2) if group.size > 1 else 0
        saved = (dense - cost({group.name: tuple(range(half))})) / half if half else 0.0
        price = 1e6 * saved / dense if dense else 0.0
        out[group.name] = tuple(score / max(price, 1e-9) for score in scores[group.name])
    return out


def kept_costs(
    dense: Coupling, before: Mapping[str, CostFn], left: Coupling, after: Mapping[str, CostFn], plan: Plan
) -> dict[str, tuple[int, int]]:
    """Return parameters, MACs and units as (dense, kept); `left` and `after` are without the plan's dropped blocks."""
    units = sum(group.size for group in dense.groups)
    kept = sum(group.size for group in left.groups) - sum(len(dead) for dead in plan.dead.values())
    costs = {kind: (cost({}), after[kind](plan.dead)) for kind, cost in before.items()}
    return {**costs, "channels": (units, kept)}
