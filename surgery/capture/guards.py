"""For which sizes a captured graph stands: every branch that the user's code took on a size is a guard.

`torch.export` follows one path through the code. Where that path depends on a size (padding to a multiple, a branch on
the batch), the graph is right for the sizes that take the same path, and silently wrong for the others. So an axis is
called dynamic only if the guards hold over a range of sizes around the example's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

BATCHES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 17, 23, 31, 32, 33, 47, 64)
LARGEST = 16
"""Heights and widths are examined from half the example's to so many times it."""
_SIZES = 48
_NAMES = {"max": max, "min": min, "abs": abs, "int": int, "float": float, "__builtins__": {}}


@dataclass(frozen=True, slots=True)
class _Sized:
    """Stands for a tensor in a guard."""

    shape: tuple[int, ...]

    def size(self) -> tuple[int, ...]:
        return self.shape


def broken_by_batch(exported: Any, model: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """Return a guard that some batch size breaks, or an empty string."""
    sizes = [{0: batch} for batch in BATCHES]
    return _broken(exported, model, inputs, lambda shape, change: (change[0], *shape[1:]), sizes)


def broken_by_space(exported: Any, model: nn.Module, inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """Return a guard that some height and width from half to 16 times the example's breaks, or an empty string."""
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() in (4, 5)]
    if not tensors:
        return ""
    smallest = [min(x.shape[axis] for x in tensors) for axis in (-2, -1)]

    def changed(shape: tuple[int, ...], change: Mapping[int, int]) -> tuple[int, ...]:
        return (*shape[:-2], shape[-2] + change[-2], shape[-1] + change[-1]) if len(shape) in (4, 5) else shape

    return _broken(exported, model, inputs, changed, [{-2: h, -1: w} for h, w in _changes(*smallest)])


def _changes(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Changes of height and width: alike, and in several random pairings."""
    random = np.random.default_rng(0)
    lines = []
    for size in (height, width):
        low, high = -(size // 2), (LARGEST - 1) * size
        spread = np.unique(np.linspace(low, high, _SIZES, dtype=np.int64)).tolist()
        lines.append(sorted({*spread, *(d for d in range(-4, 5) if low <= d <= high)}))
    yield from ((d, d) for d in lines[0] if d in lines[1] or height == width)
    for _ in range(4):
        first, second = random.permutation(lines[0]), random.permutation(lines[1])
        yield from ((int(h), int(w)) for h, w in zip(first, second, strict=False))


def _broken(
    exported: Any,
    model: nn.Module,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    changed: Callable[[tuple[int, ...], Mapping[int, int]], tuple[int, ...]],
    sizes: list[dict[int, int]],
) -> str:
    codes = getattr(exported, "_guards_code", None)
    if codes is None:
        return "this version of torch does not tell which sizes its graphs hold for"
    bound = inspect.signature(model.forward).bind(*inputs[0], **inputs[1]).arguments
    compiled = [(code, compile(code, "<guard>", "eval")) for code in codes]

    def stand_in(x: Any, change: Mapping[int, int]) -> Any:
        return _Sized(changed(tuple(x.shape), change)) if isinstance(x, Tensor) and x.dim() else x

    for change in sizes:
        named = pytree.tree_map(lambda x, change=change: stand_in(x, change), dict(bound))
        for code, guard in compiled:
            try:
                holds = bool(eval(guard, dict(_NAMES), {"L": named}))
            except Exception:  # an operator of torch's that is not known here: not shown to hold
                holds = False
            if not holds:
                return _readable(code)
    return ""


def _readable(code: str) -> str:
    return code.replace("L['", "").replace("'].size()", ".shape")
