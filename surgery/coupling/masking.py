"""The masked dense model: run the dense program with units treated as removed, and find where zeros would not do.

A layer loses the weights that read a removed unit. For an operator without weights (a matrix product of two
activations, a sum) the unit's value matters: after a function with a nonzero value at zero (`exp`, a comparison), a
zeroed unit would still contribute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from surgery.capture import evaluating, source_of
from surgery.core import (
    ONE_AT_A_TIME,
    TOLERANCE,
    Callee,
    Compute,
    Executor,
    LabelledGraph,
    Masks,
    Program,
    Value,
    flat_outputs,
    sample_inputs,
    well_conditioned,
)
from surgery.ops import Dead, rules


def values_in(value: Any) -> list[Value]:
    """Return the labelled tensors of a value: itself, or those of a tuple or list."""
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Value)]


class InDouble(TorchFunctionMode):
    """Within the block, a model's code computes in float64 even if it names another floating dtype, or none."""

    def __enter__(self) -> InDouble:
        ONE_AT_A_TIME.acquire()  # the default dtype is process-wide
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._before)
        ONE_AT_A_TIME.release()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call with float64 instead of any floating dtype."""

        def double(x: Any) -> Any:
            return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x

        if not any(isinstance(x, Tensor) for x in pytree.tree_leaves((args, kwargs or {}))):  # as `Executor` makes them
            torch.set_default_dtype(self._before)
            try:
                made = func(*args, **(kwargs or {}))
            finally:
                torch.set_default_dtype(torch.float64)
            return made.double() if isinstance(made, Tensor) and made.is_floating_point() else made
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        return func(*map(double, args), **{name: double(x) for name, x in (kwargs or {}).items()})


def called(callee: Callee, state: Mapping[str, Tensor] | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of a model's class in eval mode, in float64 on `state`, or on its own weights if None.

    Tensors that are not in `state` keep their values. Whatever forward raises is raised.
    """
    module: torch.nn.Module = callee.module
    own = {name: x.detach().cpu() for name, x in (*module.named_parameters(), *module.named_buffers())}
    if state is not None:
        own = {n: state.get(n, x.double() if x.is_floating_point() else x) for n, x in own.items()}
    own |= {name: own[name].clone() for name, _ in module.named_buffers()}  # forward may write to them
    args, kwargs = callee.arguments(inputs)
    with torch.no_grad(), evaluating(module), nullcontext() if state is None else InDouble():
        return flat_outputs(torch.func.functional_call(module, own, args, kwargs))


def masked_run(
    program: Program,
    labelled: LabelledGraph,
    masks: Masks,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Executor:
    """Return an executor of the dense program that treats units as removed, by zeroing only what contractions read."""
    return Executor(program.graph, state, _masking(program, labelled, masks), dtype)


def batch_size(program: Program) -> int:
    """Return the batch size of the example inputs."""
    first = program.inputs[0].shape if program.inputs else ()
    return first[0] if first else 1


def _masking(program: Program, labelled: LabelledGraph, masks: Masks) -> Compute:
    """Return a hook that zeroes dead slices of contracted axes, and excludes them from averages."""
    table, traced = rules(), batch_size(program)

    def override(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        rule = table.get(str(node.target))
        if rule is None or not (rule.masked or rule.reference):
            return NotImplemented
        alive: dict[tuple[str, int], Tensor] = {}
        for name, value in labelled.calls[node.name].items():
            for axis, layers in enumerate(value.axes if isinstance(value, Value) else ()):
                if layers and not (mask := masks(value, axis)).all():
                    alive[name, axis] = torch.from_numpy(mask)
        if not alive:
            return NotImplemented
        names = (a.name for a in node.target._schema.arguments)  # type: ignore[union-attr]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        bound = {k: given.get(k, v) for k, v in labelled.calls[node.name].items()}
        alive = {key: _at_length(mask, traced, bound[key[0]].shape[key[1]]) for key, mask in alive.items()}
        dead = Dead(node.target, bound, alive)
        if rule.reference is not None:
            return rule.reference(dead)
        return dead.run(**{name: dead.zeroed(name) for name in rule.masked})

    return override


def _at_length(mask: Tensor, traced: int, length: int) -> Tensor:
    """Return the mask of an axis that another batch size has made longer or shorter, because it contains the batch."""
    each = len(mask) // traced
    folds = length != len(mask) == each * traced
    for outer in [k for k in (1, *range(each, 1, -1)) if each % k == 0] if folds else ():
        folded = mask.reshape(outer, traced, -1)
        if bool((folded == folded[:, :1]).all()):  # the same for all samples
            return folded[:, :1].expand(-1, length // each, -1).reshape(-1)
    return mask


# Groups whose removal is not equivalent to zeroing. ------------------------------------------------------------------


def not_zeros(program: Program, labelled: LabelledGraph) -> dict[str, str]:
    """Return the groups whose removal is not equivalent to zeroing, with the operator at which it differs.

    Half the units of every group are treated as removed, with zero weights, shifts and statistics. Each weightless
    contraction is then computed with and without its dead slices; the operand of a sum must be zero there.
    """
    candidates, table = _weightless(program, labelled), rules()
    if not candidates:
        return {}
    generator = np.random.default_rng(0)
    drawn = {n: generator.permutation(len(r))[: len(r) // 2].tolist() for n, r in labelled.roots.items()}
    masks = Masks(labelled, labelled.dead_roots(drawn))
    mask = _masking(program, labelled, masks)
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
        a, b = (x[alive.expand_as(x)].double() for x in (masked, whole))
        agree = not a.numel() or bool((a - b).abs().max() <= TOLERANCE[torch.float64] * a.abs().max().clamp_min(1e-30))
        if not agree or _holds(node, args[0], labelled, masks):
            where = source_of(node)
            said = f"{node.target}" + (f" at {where}" if where else "") + " goes over the survivors"
            read, made = (_labels(x, labelled) for x in (labelled.calls[node.name].values(), [value]))
            for labels in (read - made, read):  # preferably groups that are not in the result
                if names := [name for name, roots in labelled.roots.items() if not labels.isdisjoint(roots)]:
                    found.update({name: said for name in names if name not in found})
                    break
        return torch.where(alive, masked, whole)  # the values of removed units are those computed from zeros

    state = well_conditioned(program)
    for name, value in labelled.params.items():
        if name in state and state[name].is_floating_point() and not name.endswith("running_var"):
            state[name] = state[name] * _alive(value, masks)
    with torch.no_grad():
        inputs = sample_inputs(program, seed=100, dtype=torch.float64)
        Executor(program.graph, state, compare, torch.float64).run(*inputs)
    return found


def _holds(node: torch.fx.Node, x: Any, labelled: LabelledGraph, masks: Masks) -> bool:
    """Return whether the operand of a sum or norm has nonzero values in dead slices of the reduced axes."""
    operands = [v for value in labelled.calls[node.name].values() for v in values_in(value)]
    if len(operands) != 1 or not isinstance(x, Tensor):
        return False
    value, kept = operands[0], _labels([labelled.values[node.name]], labelled)
    alive = {a: masks(value, a) for a, layers in enumerate(value.axes) if layers}
    for axis in alive:
        own = {label for layer in labelled.labels.canon(value.axes[axis]) for label in layer.tolist()}
        if own and own.isdisjoint(kept):
            part = x
            for a, mask in alive.items():
                part = part.index_select(a, torch.from_numpy(np.flatnonzero(~mask if a == axis else mask)))
            if part.numel() and bool((part != 0).any()):
                return True
    return False


def _weightless(program: Program, labelled: LabelledGraph) -> set[str]:
    """Return contractions of labelled axes without a parameter among their operands."""
    table, out = rules(), set()
    for node in program.graph.graph.nodes:
        rule = table.get(str(node.target))
        if rule is None or not rule.masked or rule.reference is not None:
            continue
        operands = (v for value in labelled.calls[node.name].values() for v in values_in(value))
        if any(any(v.axes) for v in operands) and all(source.op != "get_attr" for source in node.all_input_nodes):
            out.add(node.name)
    return out


def _alive(value: Value, masks: Masks) -> Tensor:
    """Return a mask of the surviving elements, broadcastable to the value."""
    alive = torch.ones([1] * len(value.shape), dtype=torch.bool)
    for axis, layers in enumerate(value.axes):
        if layers:
            mask = torch.from_numpy(masks(value, axis))
            alive = alive & mask.reshape([-1 if a == axis else 1 for a in range(len(value.shape))])
    return alive


def _labels(values: Iterable[Any], labelled: LabelledGraph) -> set[int]:
    layers = (x for value in values for v in values_in(value) for axis in v.axes for x in labelled.labels.canon(axis))
    return {label for layer in layers for label in layer.tolist()}
