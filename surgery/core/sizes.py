"""Sizes that may differ from call to call: what the tracer leaves symbolic, and where a reshape lets them run over."""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MANY, _FEW = 40, 8
_RESHAPES = ("view", "reshape", "expand", "unflatten", "multi_head_attention_forward")
_ATTENTION = ("softmax", "scaled_dot_product_attention", "matmul", "__matmul__", "bmm", "einsum")


def is_symbolic(size: Any) -> bool:
    """Whether a traced size may differ from call to call."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def hint(size: Any) -> int:
    """The example's value of a size that may be symbolic."""
    return int(size.node.hint if is_symbolic(size) else size)


class ReshapeCount(TorchFunctionMode):
    """Counts, while a model runs, what makes `torch.export` take minutes over symbolic height and width.

    Where pixels become tokens, it has products of sizes to solve for at every step: many reshapes are slow, and a few
    are where there is attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reshapes, self.attends = 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the name of each call."""
        name = getattr(func, "__name__", "")
        self.reshapes += name in _RESHAPES
        self.attends |= name in _ATTENTION
        return func(*args, **(kwargs or {}))

    @property
    def slow(self) -> bool:
        """Whether free height and width are not to be tried."""
        return self.reshapes > (_FEW if self.attends else _MANY)


def _has_sizes(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.name in ("size", "shape", "sizes") for a in schema.arguments)


def sizes_spill(graph: torch.fx.Graph) -> bool:
    """Whether a reshape lets height or width run over into other axes, so that a literal size holds at one size only.

    ``x.view(-1, 320)`` after pooling to 20 x 4 x 4 gives other rows for a larger image; once 320 has become 160, the
    rows are cut elsewhere. A symbolic axis of a reshape's output must be a product of symbolic axes of its input.
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


def _is_whole(size: Any, before: Sequence[Any], whole: Container[str]) -> bool:
    """Whether a symbolic size is made of whole axes; the batch may also take up heads or groups, a plain number."""
    number, rest = size.as_coeff_Mul()
    return str(rest) in whole and (number == 1 or rest == before[0])
