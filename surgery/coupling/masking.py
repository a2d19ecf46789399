"""The masked meaning of the dense model: what it computes when removed units count as removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from surgery.core import ONE_AT_A_TIME, Compute, Executor, LabelledGraph, Masks, Program, Value
from surgery.ops import Dead, rules


class InDouble(TorchFunctionMode):
    """Within the block a model's own code computes in float64 wherever it names another floating dtype, or none."""

    def __enter__(self) -> InDouble:
        ONE_AT_A_TIME.acquire()  # the default dtype is every thread's
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._before)
        ONE_AT_A_TIME.release()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call with float64 instead of every floating dtype."""
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
    """An executor of the dense program in which removed units count as removed.

    Nothing but `masking` is touched: whatever a batch norm or an activation emits on dead channels must not matter.
    `dtype`: what calls that name a floating dtype use in its place. `batch`: of the inputs, where not the trace's.
    """
    return Executor(program.graph, state, masking(program, labelled, masks, batch), dtype)


def masking(program: Program, labelled: LabelledGraph, masks: Masks, batch: int | None = None) -> Compute:
    """Return a hook: operators that contract an axis see its dead slices as zero, those that average skip them."""
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
    """The mask of an axis into which a batch of `traced` is folded, at another batch."""
    each = len(mask) // traced
    for outer in (1, *range(each, 1, -1)):
        if len(mask) == each * traced and each % outer == 0:
            folded = mask.reshape(outer, traced, each // outer)
            if bool((folded == folded[:, :1]).all()):  # the same for all samples: and so for more
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
