"""Find the groups whose removal is not equivalent to zeroing, by one run.

A convolution or a linear layer loses the weights that read a removed unit, so the unit's value is irrelevant. For an
operator without weights (a matrix product of two activations, a sum) it is not: after a function with a nonzero value
at zero (`elu(x) + 1`, `exp`, a comparison), a zeroed unit would still contribute, and removing it changes the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.capture import source_of
from surgery.core import (
    TOLERANCE,
    Executor,
    LabelledGraph,
    Masks,
    Program,
    Value,
    sample_inputs,
    well_conditioned,
)
from surgery.coupling.masking import masking
from surgery.ops import rules


def not_zeros(program: Program, labelled: LabelledGraph, *, seed: int = 0) -> dict[str, str]:
    """Return the groups whose removal is not equivalent to zeroing, with the operator at which it differs.

    Half the units of every group are treated as removed, with zero weights, shifts and statistics. Each weightless
    contraction is then computed with and without its dead slices; the operand of a sum must be zero there.
    """
    candidates = _weightless(program, labelled)
    if not candidates:
        return {}
    masks = Masks(labelled, labelled.dead_roots(_half(labelled, seed)))
    mask, table = masking(program, labelled, masks), rules()
    found: dict[str, str] = {}

    def compare(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        value = labelled.values[node.name]
        if isinstance(value, Value) and (rule := table.get(str(node.target))) is not None and rule.gate:
            out: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
            return torch.where(_alive(value, masks) | (out != 0), out, args[0])  # zero here, but not for all inputs
        masked = mask(node, args, kwargs)
        if node.name not in candidates or not isinstance(masked, Tensor) or not isinstance(value, Value):
            return masked
        whole: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        alive = _alive(value, masks)
        agree = _agree(masked[alive.expand_as(masked)].double(), whole[alive.expand_as(whole)].double())
        if not agree or _holds(node, args[0], labelled, masks):
            where = source_of(node)
            said = f"{node.target}" + (f" at {where}" if where else "") + " goes over the survivors"
            found.update({name: said for name in _contracted(node.name, labelled) if name not in found})
        return torch.where(alive, masked, whole)  # the values of removed units are those computed from zeros

    state = _zeroed(well_conditioned(program, seed=seed), labelled, masks)
    inputs = sample_inputs(program, seed=seed + 100, dtype=torch.float64)
    with torch.no_grad():
        Executor(program.graph, state, compare, torch.float64).run(*inputs)
    return found


def _holds(node: torch.fx.Node, x: Any, labelled: LabelledGraph, masks: Masks) -> bool:
    """Return whether the operand of a sum or norm has nonzero values in dead slices of the reduced axes."""
    value = _tensors(labelled.calls[node.name].values())
    if len(value) != 1 or not isinstance(x, Tensor):
        return False
    kept = _labels(_tensors([labelled.values[node.name]]), labelled)
    own = [_labels([replace(value[0], axes=(layers,))], labelled) for layers in value[0].axes]
    for axis, labels in enumerate(own):
        if labels and labels.isdisjoint(kept):
            part = x
            for a, layers in enumerate(value[0].axes):
                if layers:
                    mask = masks(value[0], a)
                    part = part.index_select(a, torch.from_numpy(np.flatnonzero(~mask if a == axis else mask)))
            if part.numel() and bool((part != 0).any()):
                return True
    return False


def _weightless(program: Program, labelled: LabelledGraph) -> set[str]:
    """Return contractions of labelled axes without a parameter among their operands."""
    table = rules()
    out = set()
    for node in program.graph.graph.nodes:
        rule = table.get(str(node.target))
        if node.op != "call_function" or rule is None or not rule.masked or rule.reference is not None:
            continue
        cuttable = any(any(v.axes) for v in _tensors(labelled.calls[node.name].values()))
        if cuttable and all(source.op != "get_attr" for source in node.all_input_nodes):
            out.add(node.name)
    return out


def _half(labelled: LabelledGraph, seed: int) -> dict[str, tuple[int, ...]]:
    generator = np.random.default_rng(seed)
    return {
        name: tuple(sorted(generator.permutation(len(roots))[: len(roots) // 2].tolist()))
        for name, roots in labelled.roots.items()
    }


def _zeroed(state: dict[str, Tensor], labelled: LabelledGraph, masks: Masks) -> dict[str, Tensor]:
    """Return parameters and statistics with the removed units' slices set to zero, except variances."""
    out = dict(state)
    for name, value in labelled.params.items():
        if name in out and out[name].is_floating_point() and not name.endswith("running_var"):
            out[name] = out[name] * _alive(value, masks)
    return out


def _alive(value: Value, masks: Masks) -> Tensor:
    """Return a mask of the surviving elements, broadcastable to the value."""
    alive = torch.ones([1] * len(value.shape), dtype=torch.bool)
    for axis, layers in enumerate(value.axes):
        if layers:
            mask = torch.from_numpy(masks(value, axis))
            alive = alive & mask.reshape([-1 if a == axis else 1 for a in range(len(value.shape))])
    return alive


def _agree(a: Tensor, b: Tensor) -> bool:
    scale = a.abs().max().clamp_min(1e-30) if a.numel() else 1.0
    return not a.numel() or bool((a - b).abs().max() <= TOLERANCE[torch.float64] * scale)


def _contracted(name: str, labelled: LabelledGraph) -> list[str]:
    """Return groups on axes of a call's operands, preferably those not in its result."""
    read = _labels(_tensors(labelled.calls[name].values()), labelled)
    gone = read - _labels(_tensors([labelled.values[name]]), labelled)
    return _holding(gone, labelled) or _holding(read, labelled)


def _holding(labels: set[int], labelled: LabelledGraph) -> list[str]:
    return [group for group, roots in labelled.roots.items() if not labels.isdisjoint(roots)]


def _labels(values: list[Value], labelled: LabelledGraph) -> set[int]:
    return {label for v in values for layers in v.axes for x in labelled.labels.canon(layers) for label in x.tolist()}


def _tensors(values: Iterable[Any]) -> list[Value]:
    items = (x for v in values for x in (v if isinstance(v, (tuple, list)) else (v,)))
    return [x for x in items if isinstance(x, Value)]
