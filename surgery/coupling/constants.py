"""The constants per channel that replace dropped branches: added to a bias where that is exact.

A constant that is added to a value can instead be added to the bias, shift or operand of a sum from which the value is
computed, if no intermediate value has other users; or subtracted from the running means of batch norms, if these are
the only users. If there is an activation in between, one sum remains. The user's tensors are not changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.core import arguments_of, hint, is_symbolic

_SUM = "aten.add.Tensor"
_CHANNELS_FIRST = (
    *("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default"),
    *("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"),
    *("aten.batch_norm.default", "aten.group_norm.default"),
)
"""Operators that finally add a bias along axis 1."""
_CHANNELS_LAST = ("aten.linear.default", "aten.layer_norm.default")
_SAME = ("aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default")
_VIEWS = ("aten.view.default", "aten.reshape.default")


@dataclass(frozen=True, slots=True, eq=False)
class BranchConstants:
    """Where the constants are added; values are float64.

    Attributes:
        shifts: existing parameter or buffer → the constant added to it.
        added: new parameter, read by a new sum → its value.
    """

    shifts: Mapping[str, Tensor]
    added: Mapping[str, Tensor]


def channel_axes(shape: Sequence[Any]) -> tuple[int, ...]:
    """Return the possible channel axes of a value: axis 1, and the last one if its size differs.

    Axes of dynamic size are excluded.
    """
    axes = [a for a in (1, len(shape) - 1) if 1 <= a < len(shape) and not is_symbolic(shape[a])]
    return tuple(a for k, a in enumerate(axes) if all(hint(shape[b]) != hint(shape[a]) for b in axes[:k]))


def spread(values: Sequence[float], shape: Sequence[Any]) -> Tensor:
    """Return a constant per channel as a float64 tensor that broadcasts to this traced shape."""
    axis = next(a for a in channel_axes(shape) if hint(shape[a]) == len(values))
    sizes = [len(values) if a == axis else 1 for a in range(len(shape))]
    return torch.tensor(values, dtype=torch.float64).reshape(sizes)


def fold(graph: torch.fx.Graph, added: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> BranchConstants:
    """Remove sums with constants from a graph, in place, if a tensor of the graph can absorb the constant.

    Args:
        graph: each name of `added` is read by one sum, as second operand.
        added: constants by name, in float64.
        tensors: tensors that may be shifted, by name; those read twice, or under two names, are not.
    """
    reads = Counter(str(n.target) for n in graph.nodes if n.op == "get_attr" for _ in n.users)
    names = Counter(id(t) for t in tensors.values())
    single = {name for name, t in tensors.items() if names[id(t)] == 1 and t.is_floating_point()}
    free = {name for name in (*single, *added) if reads[name] == 1}
    shifts: dict[str, Tensor] = {}
    left = dict(added)
    shapes = {name: tuple(t.shape) for name, t in (*tensors.items(), *added.items())}
    for node in [n for n in graph.nodes if _adds(n, added)]:
        stays, attribute = node.args
        name = str(attribute.target)
        found = _homes(node, left[name], free - {name}, shapes)
        if not found:
            continue
        for home, shift in found.items():
            into = left if home in left else shifts
            into[home] = into.get(home, torch.zeros((), dtype=torch.float64)) + shift
        del left[name]
        node.replace_all_uses_with(stays)
        graph.erase_node(node)
        graph.erase_node(attribute)
    return BranchConstants(shifts, left)


def _adds(node: torch.fx.Node, added: Collection[str]) -> bool:
    last = node.args[-1] if node.op == "call_function" and str(node.target) == _SUM else None
    return isinstance(last, torch.fx.Node) and last.op == "get_attr" and last.target in added


Homes = Mapping[str, Tensor]
"""Tensor name → the value added to it, broadcastable to its shape."""


def _homes(
    node: torch.fx.Node, constant: Tensor, free: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> Homes:
    """Return the tensors that can absorb the constant of a sum, if any."""
    home = _behind(node.args[0], node, constant, free, shapes)
    if home:
        return home
    readers = list(node.users)
    if len(readers) == 1 and _is_sum(readers[0]):
        other = next((x for x in readers[0].args if isinstance(x, torch.fx.Node) and x is not node), None)
        same = other is not None and _dim(readers[0]) == constant.dim()
        return _behind(other, readers[0], constant, free, shapes) if same else {}
    return _ahead(node, readers, constant, free)


def _behind(
    node: Any,
    reader: torch.fx.Node,
    constant: Tensor,
    free: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Homes:
    """Search backwards for a tensor that can absorb the constant; `reader` is the value's only user."""
    if not isinstance(node, torch.fx.Node) or set(node.users) != {reader} or _times(node, reader) != 1:
        return {}
    if node.op == "get_attr":
        shift = _as_wide(constant, len(shapes.get(str(node.target), ())))
        return _taken(node, shift, free, shapes)
    if node.op != "call_function" or _dim(node) != constant.dim():
        return {}
    target, raw = str(node.target), arguments_of(node)
    if target in _CHANNELS_FIRST or target in _CHANNELS_LAST:
        axis = constant.dim() - 1 if target in _CHANNELS_LAST else 1
        batched = "conv" not in target or _dim(raw["weight"]) == constant.dim()
        vector = constant.flatten() if batched and constant.numel() == constant.shape[axis] else None
        return _taken(raw.get("bias"), vector, free, shapes)
    if _is_sum(node):
        operands = [x for x in (raw["self"], raw["other"]) if isinstance(x, torch.fx.Node)]
        found = (_behind(x, node, constant, free, shapes) for x in operands if _fits(x, node))
        return next((home for home in found if home), {})
    before = _before(node, target, raw, constant)
    return {} if before is None else _behind(node.all_input_nodes[0], node, before, free, shapes)


def _before(node: torch.fx.Node, target: str, raw: Mapping[str, Any], constant: Tensor) -> Tensor | None:
    """Return the constant to add before a movement operator instead of after it; None for other operators."""
    if target in _SAME or (target == "aten.dropout.default" and raw.get("p") == 0.0):
        return constant
    if target == "aten.transpose.int":
        return constant.transpose(raw["dim0"], raw["dim1"])
    if target == "aten.permute.default":
        dims = [d % constant.dim() for d in raw["dims"]]
        return constant.permute([dims.index(d) for d in range(len(dims))])
    if target in _VIEWS and constant.numel() == constant.shape[-1]:
        source = raw["self"].meta["val"]
        kept = source.dim() > 0 and hint(source.shape[-1]) == constant.numel()
        return constant.reshape([1] * (source.dim() - 1) + [-1]) if kept else None
    return None


def _ahead(node: torch.fx.Node, readers: Sequence[torch.fx.Node], constant: Tensor, free: Collection[str]) -> Homes:
    """Return the running means of batch norms, if these are the only users of the sum."""
    homes: dict[str, Tensor] = {}
    for reader in readers:
        raw = arguments_of(reader) if reader.op == "call_function" else {}
        mean = raw.get("running_mean")
        known = str(reader.target) == "aten.batch_norm.default" and raw.get("input") is node
        if not known or not isinstance(mean, torch.fx.Node) or mean.target not in free:
            return {}
        homes[str(mean.target)] = -constant.flatten()
    return homes if constant.numel() == constant.shape[1] else {}


def _taken(tensor: Any, shift: Tensor | None, free: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> Homes:
    """Return the tensor if it is unused so far and the constant fits it."""
    if shift is None or not isinstance(tensor, torch.fx.Node) or tensor.op != "get_attr" or tensor.target not in free:
        return {}
    name = str(tensor.target)
    shape = shapes[name]
    fits = shift.dim() <= len(shape) and all(
        a in (1, b) for a, b in zip(reversed(shift.shape), reversed(shape), strict=False)
    )
    return {name: shift} if fits else {}


def _as_wide(constant: Tensor, rank: int) -> Tensor | None:
    """Reshape the constant to the rank of a broadcast tensor; None if it varies along missing axes."""
    more = max(0, constant.dim() - rank)
    return constant.reshape(constant.shape[more:]) if constant.shape[:more].numel() == 1 else None


def _times(node: torch.fx.Node, reader: torch.fx.Node) -> int:
    """Count how often a node reads a value, which may be added to itself."""
    given = pytree.tree_leaves((reader.args, dict(reader.kwargs)))
    return sum(x is node for x in given)


def _is_sum(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) == _SUM and arguments_of(node).get("alpha", 1) == 1


def _fits(operand: torch.fx.Node, total: torch.fx.Node) -> bool:
    """Return whether a value added to an operand of a sum is added to the whole sum (no broadcasting)."""
    return operand.op == "get_attr" or _dim(operand) == _dim(total)


def _dim(node: torch.fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1
