"""The masked dense model: run the dense program with units treated as removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from surgery.core import ONE_AT_A_TIME, Compute, Executor, LabelledGraph, Masks, Program, Value
from surgery.ops import Dead, rules


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
        if func in _CASTS:
            func = Tensor.double
        return func(*map(_double, args), **{name: _double(x) for name, x in (kwargs or {}).items()})


_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


def _double(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def masked_run(
    program: Program,
    labelled: LabelledGraph,
    masks: Masks,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    batch: int | None = None,
) -> Executor:
    """Return an executor of the dense program that treats units as removed.

    Only `masking` is applied: the output of a batch norm or an activation on dead channels must be irrelevant.
    `dtype`: replaces floating dtype arguments of calls. `batch`: batch size of the inputs, if not as traced.
    """
    return Executor(program.graph, state, masking(program, labelled, masks, batch), dtype)


def masking(program: Program, labelled: LabelledGraph, masks: Masks, batch: int | None = None) -> Compute:
    """Return a hook that zeroes dead slices of contracted axes, and excludes them from averages."""
    table = rules()
    traced = program.inputs[0].shape[0] if program.inputs and program.inputs[0].shape else 1

    def override(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        rule = table.get(str(node.target))
        if rule is None or not (rule.masked or rule.reference):
            return NotImplemented
        alive = _alive(labelled.calls[node.name], masks)
        if not alive:
            return NotImplemented
        names = (a.name for a in node.target._schema.arguments)  # type: ignore[union-attr]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        bound = {k: given.get(k, v) for k, v in labelled.calls[node.name].items()}
        if batch is not None:
            folded = {key: bound[key[0]].shape[key[1]] != len(mask) for key, mask in alive.items()}
            alive = {key: _at_batch(mask, traced, batch) if folded[key] else mask for key, mask in alive.items()}
        dead = Dead(node.target, bound, alive)
        if rule.reference is not None:
            return rule.reference(dead)
        changed = {name: dead.zeroed(name) for name in rule.masked}
        return dead.run(**changed)

    return override


def _at_batch(mask: Tensor, traced: int, batch: int) -> Tensor:
    """Return the mask at another batch size, for an axis into which a batch of `traced` is folded."""
    each = len(mask) // traced
    for outer in (1, *range(each, 1, -1)):
        if len(mask) == each * traced and each % outer == 0:
            folded = mask.reshape(outer, traced, each // outer)
            if bool((folded == folded[:, :1]).all()):  # identical for all samples, so it extends to more
                return folded[:, :1].expand(outer, batch, each // outer).reshape(-1)
    return mask


def _alive(bound: Mapping[str, Any], masks: Masks) -> dict[tuple[str, int], Tensor]:
    alive: dict[tuple[str, int], Tensor] = {}
    for name, value in bound.items():
        if isinstance(value, Value):
            for axis, layers in enumerate(value.axes):
                if layers:
                    mask = masks(value, axis)
                    if not mask.all():
                        alive[name, axis] = torch.from_numpy(mask)
    return alive
