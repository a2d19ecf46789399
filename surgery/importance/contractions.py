"""Layers that can be refitted, and their inputs as rows.

A contraction is a convolution or a linear layer, together with the following batch norm if that is its only user, or a
separate norm, of each channel with itself. If the result is added to a value that depends neither on it nor on a later
contraction, the target is the sum, so that the fit also compensates for errors of the other operand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from surgery.core import Executor, arguments_of

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    getattr(getattr(aten, f"conv{d}d"), overload) for d in (1, 2, 3) for overload in ("default", "padding")
)
LINEAR = aten.linear.default
NORM = aten.batch_norm.default
SUMS = (aten.add.Tensor, aten.add_.Tensor)


@dataclass(frozen=True, slots=True)
class Contraction:
    """One layer, by the names of its operations and parameters; empty for what it does not have."""

    node: str  # its operation
    weight: str  # empty for a separate norm
    bias: str
    norm: str  # operation of the following batch norm, or its own
    norm_names: tuple[str, ...]  # scale, shift, running mean and running variance of that norm
    aim: str  # the target operation: the sum, the norm, or its own
    other: str = ""  # other operand of the sum, if that is the target


def find_contractions(graph: torch.fx.GraphModule, known: Collection[str]) -> list[Contraction]:
    """Return the layers of a graph that can be fitted, in its order, to targets among the `known` operations."""
    nodes = list(graph.graph.nodes)
    reads = Counter(str(node.target) for node in nodes if node.op == "get_attr" for _ in node.users)
    drafts: dict[torch.fx.Node, tuple[Contraction, torch.fx.Node]] = {}
    behind: set[torch.fx.Node] = set()
    for node in nodes:
        if node.op == "call_function" and node.name in known and node not in behind:
            found = _draft(node, reads, known)
            if found is not None:
                drafts[node] = found
                behind.add(found[1])
    places = {node: k for k, node in enumerate(nodes)}

    def waits(value: torch.fx.Node, since: int) -> bool:
        """Return whether a value depends on a layer that is fitted at `since` or later."""
        pending, seen = [value], set[torch.fx.Node]()
        while pending:
            node = pending.pop()
            if node in seen or places[node] < since:
                continue
            if node in drafts:
                return True
            seen.add(node)
            pending.extend(node.all_input_nodes)
        return False

    out = []
    for node, (draft, end) in drafts.items():
        total = _only_user(end)
        if total is not None and total.target in SUMS and total.name in known and total.kwargs.get("alpha", 1) == 1:
            operands = [x for x in total.args[:2] if isinstance(x, torch.fx.Node) and x.op != "get_attr"]
            others = [x for x in operands if x is not end]
            if len(operands) == 2 and len(others) == 1 and not waits(others[0], places[node]):
                draft = replace(draft, aim=total.name, other=others[0].name)
        out.append(draft)
    return out


def _draft(
    node: torch.fx.Node, reads: Mapping[str, int], known: Collection[str]
) -> tuple[Contraction, torch.fx.Node] | None:
    """Return the layer that starts at a node, and its last operation."""

    def own(value: object) -> str:
        """Return a parameter's name if it has no other user."""
        read = isinstance(value, torch.fx.Node) and value.op == "get_attr" and reads[str(value.target)] == 1
        return str(value.target) if isinstance(value, torch.fx.Node) and read else ""

    def norm_names(norm: torch.fx.Node) -> tuple[str, ...]:
        """Return names of scale, shift, mean and variance; empty unless only this norm, in eval mode, reads them."""
        raw = arguments_of(norm)
        names = tuple(own(raw.get(name)) for name in ("weight", "bias", "running_mean", "running_var"))
        return names if all(names) and not raw.get("training") else ()

    if node.target == NORM and (names := norm_names(node)):
        return Contraction(node.name, "", "", node.name, names, node.name), node
    if node.target not in CONVOLUTIONS and node.target != LINEAR:
        return None
    raw = arguments_of(node)
    weight, bias = own(raw.get("weight")), own(raw.get("bias"))
    if not weight or (raw.get("bias") is not None and not bias) or not isinstance(raw.get("input"), torch.fx.Node):
        return None
    norm = _only_user(node)
    follows = norm is not None and norm.target == NORM and norm.args[0] is node and norm.name in known
    if norm is not None and follows and (names := norm_names(norm)):
        return Contraction(node.name, weight, bias, norm.name, names, norm.name), norm
    return Contraction(node.name, weight, bias, "", (), node.name), node


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


class Layer:
    """A contraction in an executor's graph: parameters by group (of a norm, by channel), and inputs as rows."""

    def __init__(self, found: Contraction, executor: Executor) -> None:
        self.found, self.state = found, executor.state
        self.node = executor.nodes[executor.place[found.node]]
        self._raw = arguments_of(self.node)
        self.input: torch.fx.Node = self._raw["input"]
        self.own = self.state[found.weight] if found.weight else None
        if self.own is None:
            self.groups, self.inputs, self.outputs = len(self.state[found.norm_names[0]]), 1, 1
        else:
            self.groups = int(self._raw["groups"]) if self.node.target in CONVOLUTIONS else 1
            self.inputs, self.outputs = self.own[0].numel(), len(self.own) // self.groups
        norm = executor.nodes[executor.place[found.norm]] if found.norm else None
        self.epsilon = float(arguments_of(norm)["eps"]) if norm is not None else 0.0

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and offset per channel of the norm after the contraction."""
        if not self.found.norm:
            width = self.groups * self.outputs
            return torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        gamma, beta, mean, var = (self.state[name].double() for name in self.found.norm_names)
        scale = gamma / (var + self.epsilon).sqrt()
        return scale, beta - scale * mean

    def kernels(self) -> Tensor:
        """Return the weight by group: (groups, n, outputs), float64; ones for a separate norm."""
        if self.own is None:
            return torch.ones(self.groups, 1, 1, dtype=torch.float64)
        return self.own.double().reshape(self.groups, self.outputs, self.inputs).transpose(1, 2)

    def channel_axis(self, value: Tensor) -> int:
        """Return the axis of the channels of its input or output."""
        return value.dim() - 1 if self.node.target == LINEAR else 1

    def rows(self, x: Tensor, at: tuple[Tensor, ...] | None) -> Tensor:
        """Return (rows, groups, n): its inputs at the drawn positions."""
        if self.own is not None and self.node.target in CONVOLUTIONS:
            return convolution_rows(x, self.own.shape[2:], self._raw, self.groups, at)
        return value_rows(x, self.channel_axis(x), self.groups, at)


def drawn(positions: Sequence[int], most: int, generator: torch.Generator) -> tuple[Tensor, ...] | None:
    """Draw at most this many random positions, as one index per axis; None for all."""
    total = prod(positions)
    if total <= most:
        return None
    flat = torch.randperm(total, generator=generator)[:most].sort().values
    return torch.unravel_index(flat, tuple(positions))


def convolution_rows(
    x: Tensor, kernel: Sequence[int], raw: Mapping[str, Any], groups: int, at: tuple[Tensor, ...] | None
) -> Tensor:
    """Return (rows, groups, C / groups * prod(kernel)): what a convolution with arguments `raw` reads."""

    def each(value: Any) -> tuple[int, ...]:
        numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        return numbers * len(kernel) if len(numbers) == 1 else numbers

    stride, dilation, padding = each(raw["stride"]), each(raw["dilation"]), raw["padding"]
    if isinstance(padding, str):
        whole = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        ends = [(w // 2, w - w // 2) for w in whole]
    else:
        ends = [(p, p) for p in each(padding)]
    if at is None:
        axes = zip(x.shape[2:], kernel, stride, dilation, ends, strict=True)
        counts = tuple((size + sum(pair) - d * (k - 1) - 1) // s + 1 for size, k, s, d, pair in axes)
        at = torch.unravel_index(torch.arange(prod(counts)), counts)
    flat, inside = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
    for axis, (place, k, s, d, (low, _)) in enumerate(zip(at, kernel, stride, dilation, ends, strict=True), 1):
        size, shape = x.shape[1 + axis], [len(place), *[k if a == axis else 1 for a in range(1, 1 + len(kernel))]]
        taps = ((place * s - low)[:, None] + d * torch.arange(k)).reshape(shape)
        flat, inside = flat * size + taps.clamp(0, size - 1), inside & (taps >= 0) & (taps < size)
    seen = x.flatten(2).index_select(2, flat.flatten())  # only what is read: no padded copy of the image
    seen = seen if bool(inside.all()) else seen * inside.flatten()
    seen = seen.reshape(len(x), groups, -1, len(at[0]), prod(kernel)).permute(0, 3, 1, 2, 4)
    return seen.reshape(len(x) * len(at[0]), groups, -1)


def value_rows(y: Tensor, axis: int, groups: int, at: tuple[Tensor, ...] | None) -> Tensor:
    """Return (rows, groups, channels of a group) at the drawn positions; the channels are on `axis`."""
    index: tuple[Any, ...] = (slice(None), *(at or ()))
    return y.movedim(axis, -1)[index].reshape(-1, groups, y.shape[axis] // groups)
