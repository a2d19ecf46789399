"""Determine the input sizes for which a captured graph is valid.

`torch.export` follows one path through the code. If that path depends on a size (padding to a multiple, a branch on the
batch), the graph is correct for sizes that take the same path, and silently wrong for others. An axis is therefore
treated as dynamic only if every guard on sizes along the path holds over a range of sizes around the example's.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from surgery.core import TOLERANCE, first_line, fresh, is_symbolic

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of a model."""

BATCHES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 17, 23, 31, 32, 33, 47, 64)
LARGEST = 16
"""Heights and widths are tested from half the example's to this multiple of it."""
_SIZES = 48
_NAMES = {"max": max, "min": min, "abs": abs, "int": int, "float": float, "__builtins__": {}}


def wrong_at_other_batch(exported: Any, graph: torch.fx.GraphModule, inputs: Inputs, model: nn.Module) -> str:
    """Return a condition on the batch size that the graph requires, or an empty string."""
    sizes = [{0: batch} for batch in BATCHES]
    guard = _broken_guard(exported, model, inputs, lambda shape, change: (change[0], *shape[1:]), sizes)
    return guard or _differs_at_batch_one(graph, model, inputs)


def wrong_at_other_space(exported: Any, model: nn.Module, inputs: Inputs) -> str:
    """Return a condition on height and width that the graph requires, or an empty string."""
    if _spills(exported.graph):
        return "a reshape keeps height and width apart from other axes"
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim() in (4, 5)]
    if not tensors:
        return ""
    smallest = [min(x.shape[axis] for x in tensors) for axis in (-2, -1)]

    def changed(shape: torch.Size, change: Mapping[int, int]) -> tuple[int, ...]:
        return (*shape[:-2], shape[-2] + change[-2], shape[-1] + change[-1]) if len(shape) in (4, 5) else shape

    return _broken_guard(exported, model, inputs, changed, _changes(*smallest))


# Guards. ------------------------------------------------------------------------------------------------------------


def _changes(height: int, width: int) -> Iterator[dict[int, int]]:
    """Return changes of height and width: equal ones, and several random pairs."""
    random = np.random.default_rng(0)
    lines = []
    for size in (height, width):
        low, high = -(size // 2), (LARGEST - 1) * size
        spread = np.unique(np.linspace(low, high, _SIZES, dtype=np.int64)).tolist()
        lines.append(sorted({*spread, *(d for d in range(-4, 5) if low <= d <= high)}))
    yield from ({-2: d, -1: d} for d in lines[0] if d in lines[1] or height == width)
    for _ in range(4):
        pairs = zip(*(random.permutation(line).tolist() for line in lines), strict=False)
        yield from ({-2: h, -1: w} for h, w in pairs)


def _broken_guard(
    exported: Any,
    model: nn.Module,
    inputs: Inputs,
    changed: Callable[[torch.Size, Mapping[int, int]], tuple[int, ...]],
    sizes: Iterable[dict[int, int]],
) -> str:
    codes = getattr(exported, "_guards_code", None)
    if codes is None:
        return "this version of torch does not report the sizes that its graphs hold for"
    bound = dict(inspect.signature(model.forward).bind(*inputs[0], **inputs[1]).arguments)
    guards = [(code, compile(code, "<guard>", "eval")) for code in codes]
    for change in sizes:
        named = pytree.tree_map(
            lambda x, by=change: torch.empty(changed(x.shape, by), device="meta") if _has_axes(x) else x, bound
        )
        for code, guard in guards:
            try:
                holds = bool(eval(guard, dict(_NAMES), {"L": named}))
            except Exception:  # an unknown torch operator: the guard is not shown to hold
                holds = False
            if not holds:
                return str(code).replace("L['", "").replace("'].size()", ".shape")
    return ""


# A batch of one, which torch.export never traces. -------------------------------------------------------------------


def _differs_at_batch_one(graph: torch.fx.GraphModule, model: nn.Module, inputs: Inputs) -> str:
    single = pytree.tree_map(lambda x: x[:1] if _has_axes(x) else x, inputs)
    with torch.no_grad():
        try:
            args, kwargs = fresh(single)
            wanted = _tensors(model(*args, **kwargs))
        except Exception:  # the model itself does not accept a batch of one
            return ""
        try:
            run = torch.fx.Interpreter(graph)  # calling the module would generate its code first
            got = _tensors(run.run(*pytree.tree_leaves(fresh(single)), enable_io_processing=False))
        except Exception as error:  # any exception the graph's operators raise
            return f"the batch is larger than 1 ({first_line(error)})"
    same = len(wanted) == len(got) and all(_close(a, b) for a, b in zip(wanted, got, strict=True))
    return "" if same else "the batch is larger than 1"


def _has_axes(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    a, b, allowed = a.double(), b.double(), TOLERANCE.get(a.dtype, 0.0)
    return torch.allclose(a, b, rtol=0.0, atol=allowed * float(a.abs().nan_to_num(0.0).max()), equal_nan=True)


# Reshapes. ----------------------------------------------------------------------------------------------------------

_MANY, _FEW = 40, 8
_RESHAPES = ("view", "reshape", "expand", "unflatten", "multi_head_attention_forward")
_ATTENTION = ("softmax", "scaled_dot_product_attention", "matmul", "__matmul__", "bmm", "einsum")


class _ReshapeCount(TorchFunctionMode):
    """Counts reshapes while a model runs, and records whether it has attention."""

    def __init__(self) -> None:
        super().__init__()
        self.reshapes, self.attends = 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.reshapes += name in _RESHAPES
        self.attends |= name in _ATTENTION
        return func(*args, **(kwargs or {}))


def slow_to_capture(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether `torch.export` would take minutes with symbolic height and width.

    If pixels become tokens, it must solve for products of sizes at every step, which is slow for many reshapes, and
    with attention already for a few.
    """
    with suppress(Exception), torch.no_grad(), _ReshapeCount() as count:  # the capture will raise the same exception
        args, kwargs = fresh(inputs)
        model(*args, **kwargs)
        return bool(count.reshapes > (_FEW if count.attends else _MANY))
    return True


def _spills(graph: torch.fx.Graph) -> bool:
    """Return whether a reshape mixes height or width into other axes, so that its literal size fits one size only.

    ``x.view(-1, 320)`` after pooling to 20 x 4 x 4 gives different rows for a larger image; with 160 instead of 320,
    rows are split differently. A symbolic axis of a reshape's output must be a product of symbolic axes of its input.
    """
    for node in graph.nodes:
        value, source = node.meta.get("val"), node.args[0] if node.args else None
        if _has_sizes(node) and isinstance(value, Tensor) and isinstance(source, torch.fx.Node):
            before = [s.node.expr for s in source.meta["val"].shape if is_symbolic(s)]
            spans = [before[k : n + 1] for k in range(len(before)) for n in range(k, len(before))]
            whole = {str(reduce(operator.mul, span)) for span in spans}
            sizes: list[Any] = [s for s in value.shape if is_symbolic(s)]
            if any(not _is_whole(s.node.expr, before, whole) for s in sizes):
                return True
    return False


def _has_sizes(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.name in ("size", "shape", "sizes") for a in schema.arguments)


def _is_whole(size: Any, before: Sequence[Any], whole: Container[str]) -> bool:
    """Return whether a symbolic size is a product of whole axes; the batch may include a constant (heads)."""
    number, rest = size.as_coeff_Mul()
    return str(rest) in whole and (number == 1 or rest == before[0])
