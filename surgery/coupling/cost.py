"""Analytic costs of a plan without cutting: the operators' formulas at the surviving sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log

import numpy as np

from surgery.core import CostFn, Coupling, LabelledGraph, Layers, Mask, Plan, Program, Scores, Value
from surgery.coupling.masking import batch_size, values_in
from surgery.ops import Shape, rules


class Sizes:
    """Surviving lengths of many axes at once; axes with equal labels are counted once.

    Attributes:
        axes: the labels of each slot's axis, as roots.
    """

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
    """Return functions that compute the cost of a pruned network.

    Returns:
        `macs`: multiply-adds per sample by fvcore's formulas (one multiply-add = 1 MAC; norms and resizing as fvcore
        counts them); `params`: number of parameters, shared ones once. Each maps removed units per group name to an
        int.
    """
    labelled = coupling.labelled
    return {"macs": _macs(program, labelled), "params": _params(program, labelled)}


def _macs(program: Program, labelled: LabelledGraph) -> CostFn:
    table, sizes, batch = rules(), Sizes(labelled), batch_size(program)
    terms: list[tuple[Callable[[Mapping[str, Shape], Shape], int], dict[str, list[int]], list[int]]] = []
    for node in program.graph.graph.nodes:
        rule = table.get(str(node.target))
        if rule is not None and rule.macs is not None:
            tensors = {k: sizes.track(v) for k, v in labelled.calls[node.name].items() if isinstance(v, Value)}
            terms.append((rule.macs, tensors, sizes.track(values_in(labelled.values[node.name])[0])))

    def macs(dead: Mapping[str, Sequence[int]]) -> int:
        lengths = sizes.lengths(labelled.dead_roots(dead))
        total = sum(
            formula({k: _shape(s, lengths) for k, s in tensors.items()}, _shape(out, lengths))
            for formula, tensors, out in terms
        )
        return total // batch

    return macs


def _params(program: Program, labelled: LabelledGraph) -> CostFn:
    sizes, tracked = Sizes(labelled), dict[int, list[int]]()
    for name, parameter in program.model.named_parameters(remove_duplicate=False):
        if name in labelled.params:
            tracked.setdefault(id(parameter), sizes.track(labelled.params[name]))
    fixed: int = sum(p.numel() for p in program.model.parameters() if id(p) not in tracked)

    def params(dead: Mapping[str, Sequence[int]]) -> int:
        lengths = sizes.lengths(labelled.dead_roots(dead))
        return fixed + sum(int(np.prod(_shape(s, lengths), dtype=np.int64)) for s in tracked.values())

    return params


FLUSHES_MIB = (4, 12, 24)
"""Amounts that are measured; larger ones make little difference."""
KEPT = 0.6
"""Fraction of the weights, halfway between the dense network and usual plans."""


def flush_mib(program: Program, precision: str = "fp32") -> int:
    """Return how much cache, in MiB, a network overwrites between two runs of the same kernel.

    Weights pass through the caches once per run (one byte each in `int8`); up to 1 MiB of weights stays cached.
    """
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
    """Return parameters, MACs and units of a plan as (dense, kept).

    `dense` and `before` are groups and cost functions of the whole program, `left` and `after` those of the program
    without the dropped blocks.
    """
    units = sum(group.size for group in dense.groups)
    kept = sum(group.size for group in left.groups) - sum(len(dead) for dead in plan.dead.values())
    costs = {kind: (cost({}), after[kind](plan.dead)) for kind, cost in before.items()}
    return {**costs, "channels": (units, kept)}
