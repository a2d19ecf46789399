"""The registry of operator rules, and the arguments rules receive.

A rule holds everything about one operator. To add an operator, register one rule.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.core import LabelSet, Layers, Mask, Masks, Step, Value, step
from surgery.ops.moments import MomentRule

Shape = tuple[int, ...]
Coupled = Value | tuple[Value, ...]


@dataclass
class Call:
    """One operator call as its `couple` function sees it.

    Tensor arguments are `Value`s, all others are concrete. Labelled axes of tensor arguments that the rule does not
    handle (by `passed`, `tie`, `split`, `freeze` or `move`) are frozen afterwards, so a forgotten axis is never cut.
    """

    key: str
    bound: Mapping[str, Any]  # argument name → `Value` or concrete value
    outputs: Sequence[Shape]
    labels: LabelSet
    many: bool = False  # whether the operator returns several results
    raw: Mapping[str, Any] = field(default_factory=dict)  # argument name → argument in the graph
    _handled: set[tuple[int, int]] = field(default_factory=set)

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def value(self, name: str) -> Value:
        """The tensor argument `name`."""
        found: Value = self.bound[name]
        return found

    def optional(self, name: str) -> Value | None:
        """The tensor argument `name`, or None if it is not given."""
        return self.bound.get(name)

    def tensors(self) -> list[Value]:
        """All tensor arguments in order, including those in lists."""
        return [x for x in pytree.tree_leaves(list(self.bound.values())) if isinstance(x, Value)]

    def passed(self, value: Value, axis: int) -> Layers:
        """Return the labels of an axis, and mark it as handled by the rule."""
        axis %= len(value.shape)
        self._handled.add((id(value), axis))
        return value.axes[axis]

    def axes(self, value: Value, frozen: Iterable[int] = (), why: str = "") -> dict[int, Layers]:
        """Pass all axes of a value but those in `frozen`, which are never cut, with the reason `why`."""
        whole = {axis % len(value.shape) for axis in frozen}
        for axis in sorted(whole):
            self.freeze(value, axis, why)
        return {axis: self.passed(value, axis) for axis in range(len(value.shape)) if axis not in whole}

    def created(self, axis: int, size: int) -> Layers:
        """Return new labels for an output axis along which values are equal, if its size is a literal."""
        sizes = self.raw.get("size", ())
        literal = size > 1 and axis < len(sizes) and isinstance(sizes[axis], int)
        return (self.labels.created(f"{self.key}:{axis}", size),) if literal else ()

    def tie(self, a: Value, axis_a: int, b: Value, axis_b: int) -> Layers:
        """Tie two axes of equal length index by index, and return their labels."""
        left, right = self.passed(a, axis_a), self.passed(b, axis_b)
        return self.tie_layers(left, right, a.shape[axis_a])

    def tie_layers(self, left: Layers, right: Layers, length: int) -> Layers:
        """Like `tie`, for bare layers."""
        if length > 1:
            self.labels.tie(left, right, length)
        return left if len(left) >= len(right) else right

    def freeze(self, value: Value, axis: int, why: str) -> None:
        """Never cut this axis, with the reason `why`."""
        layers = self.passed(value, axis)
        if layers:
            self.labels.freeze(layers, f"{self.labels.where}: {why}")

    def split(self, value: Value, axis: int, sizes: tuple[int, int]) -> tuple[Layers, Layers]:
        """Read an axis as (outer, inner) and return the labels of each part."""
        return self.split_layers(self.passed(value, axis), sizes)

    def split_layers(self, layers: Layers, sizes: tuple[int, int]) -> tuple[Layers, Layers]:
        """Like `split`, for bare layers."""
        if 1 in sizes and not self.labels.is_locked:  # nothing to split; frozen labels keep their reasons
            return ((), layers) if sizes[0] == 1 else (layers, ())
        outer: Layers = ()
        inner: Layers = ()
        for layer in self.labels.canon(layers):
            a, b = self.labels.factor(layer.reshape(sizes))
            outer, inner = outer + a, inner + b
        return outer, inner

    def out(self, axes: Mapping[int, Layers], index: int = 0) -> Value:
        """Return the output with labels on these axes only."""
        shape = self.outputs[index]
        layers: list[Layers] = [()] * len(shape)
        for axis, labels in axes.items():
            if shape[axis] > 1 or self.labels.is_locked:
                layers[axis % len(shape)] = tuple(labels)
        return Value(shape, tuple(layers))

    def outs(self, axes: Mapping[int, Layers]) -> Coupled:
        """Return the output, or each of several, with labels on these axes only."""
        return tuple(self.out(axes, k) for k in range(len(self.outputs))) if self.many else self.out(axes)

    def move(self, value: Value, function: Callable[[Tensor], Any]) -> Coupled:
        """Run a movement operator on the labels of one tensor argument."""
        axes: list[list[Layers]] = [[()] * len(shape) for shape in self.outputs]
        for axis, size in enumerate(value.shape):
            layers = self.passed(value, axis)
            for layer in self.labels.canon(layers) if size > 1 else ():
                view = torch.from_numpy(layer.copy())
                view = view.reshape([-1 if a == axis else 1 for a in range(len(value.shape))]).expand(value.shape)
                moved = function(view)
                for k, result in enumerate(moved if self.many else (moved,)):
                    for a, found in enumerate(self.labels.factor(result.detach().numpy())):
                        axes[k][a] = axes[k][a] + found
        values = tuple(Value(s, tuple(x)) for s, x in zip(self.outputs, axes, strict=True))
        return values if self.many else values[0]

    def freeze_the_rest(self, why: str) -> None:
        """Freeze all axes that the rule did not handle."""
        for value in self.tensors():
            for axis, layers in enumerate(value.axes):
                if layers and (id(value), axis) not in self._handled:
                    self.labels.freeze(layers, f"{self.labels.where}: {why}")


def join(outer: Layers, inner: Layers, sizes: tuple[int, int]) -> Layers:
    """Return the labels of a flat axis of length sizes[0] * sizes[1] from those of its (outer, inner) parts."""
    return tuple(np.repeat(x, sizes[1]) for x in outer) + tuple(np.tile(x, sizes[0]) for x in inner)


@dataclass(frozen=True, slots=True)
class Scaled:
    """A size known only at run time, times numerator over denominator: the compact length of a cut symbolic size."""

    node: Any
    numerator: int
    denominator: int


@dataclass(frozen=True, slots=True)
class Replacement:
    """Another operator that computes on compact tensors what the traced one computed on dense tensors."""

    op: Any
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Rewrite:
    """One operator call as its `rewrite` function sees it, with smaller inputs."""

    bound: Mapping[str, Any]  # argument name → `Value` (dense) or concrete value
    raw: Mapping[str, Any]  # argument name → argument in the graph: nodes for tensors and for run-time sizes
    outputs: tuple[Value, ...]  # dense
    mask: Masks

    def keep(self, name: str, axis: int) -> Mask:
        """Mask of the surviving indices of an axis of the tensor argument `name`."""
        return self.mask(self.bound[name], axis)


def follow_sizes(argument: str) -> Callable[[Rewrite], Mapping[str, Any]]:
    """Rewrite literal sizes of the output (of `unflatten`: of the axes it makes) to those of the survivors."""

    def rewrite(r: Rewrite) -> Mapping[str, Any]:
        dense, compact = r.outputs[0].shape, r.mask.shape(r.outputs[0])
        first = r.bound["dim"] % len(r.bound["self"].shape) if "dim" in r.bound else 0
        sizes = list(r.raw[argument])
        for k, (raw, d, c) in enumerate(zip(r.raw[argument], dense[first:], compact[first:], strict=False)):
            if d != c and not (isinstance(raw, int) and raw == -1):
                sizes[k] = c if isinstance(raw, int) else Scaled(raw, c, d)
        return {argument: sizes}

    return rewrite


@dataclass(frozen=True)
class Dead:
    """One operator call on real tensors, part of whose inputs are treated as removed."""

    op: Any
    bound: Mapping[str, Any]  # argument name → tensor or plain value, dense
    alive: Mapping[tuple[str, int], Tensor]  # (argument name, axis) → mask of the survivors, if indices are removed

    def survivors(self, name: str) -> Tensor:
        """Return the mask of a tensor argument's survivors, broadcastable to it."""
        rank = self.bound[name].dim()
        mask = torch.ones([1] * rank, dtype=torch.bool)
        for (owner, axis), alive in self.alive.items():
            if owner == name:
                mask = mask & alive.reshape([-1 if a == axis else 1 for a in range(rank)])
        return mask

    def zeroed(self, name: str) -> Tensor:
        """Return the tensor argument with its removed slices set to zero."""
        tensor: Tensor = self.bound[name]
        return torch.where(self.survivors(name), tensor, torch.zeros((), dtype=tensor.dtype))

    def run(self, /, **changed: Any) -> Any:
        """Run the operator with some arguments replaced."""
        return self.op(**{**self.bound, **changed})


Macs = Callable[[Mapping[str, Shape], Shape], int]
"""Input shapes by name, output shape → multiply-adds."""

Lowering = Callable[[Mapping[str, Any], Mapping[str, Any], Any], Sequence[Step] | None]
"""Arguments, shapes by name, output shape → ONNX operators; sizes are numbers, or text if variable."""

Example = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Rule:
    """Everything about one operator."""

    op: str  # its ATen name, such as ``aten.conv2d.default``
    family: str  # kind of operator, for the table of operators
    couple: Callable[[Call], Coupled]  # labels of the inputs → labels of the outputs; ties and freezes labels
    example: Example  # a small network around the operator, and its inputs; tests cut and verify it
    rewrite: Callable[[Rewrite], Mapping[str, Any] | Replacement] | None = None  # new arguments for smaller inputs
    masked: tuple[str, ...] = ()  # arguments whose removed slices are treated as zero (contracted axes)
    reference: Callable[[Dead], Any] | None = None  # what it computes without inputs, if not as with zeros
    macs: Macs | None = None  # by fvcore's formula; None: not counted
    onnx: Lowering | None = None  # operators for latency tables, none if it costs nothing; None: not timed
    factors: tuple[str, ...] = ()  # arguments that make the result zero if they are all zero
    contracts: Mapping[str, int] = field(default_factory=dict)  # argument name of a weight → its contracted axis
    is_sum: bool = False  # whether each operand contributes a share to the result, as in a sum or concatenation
    moments: MomentRule | None = None  # None: by the operator's family
    gate: bool = False  # whether it maps many inputs to zero, like ReLU
    summary: str = ""  # for the table of operators


_RULES: dict[str, Rule] = {}


def register(*rules: Rule) -> None:
    """Add rules; raises if an operator is registered twice."""
    for rule in rules:
        if rule.op in _RULES:
            raise ValueError(f"{rule.op} is registered twice: change the rule in surgery/ops/, do not add another")
        _RULES[rule.op] = rule


def rules() -> Mapping[str, Rule]:
    """Return all rules by operator name; imports the families on first use."""
    _import_families()
    return MappingProxyType(_RULES)


@cache
def _import_families() -> None:
    package = importlib.import_module("surgery.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"surgery.ops.{module.name}")


def free(arguments: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
    """Lower an operator without cost: a view, or a no-op in eval mode."""
    return ()


def to_onnx(op: str, *inputs: Any, **attributes: Any) -> Lowering:
    """Lower an operator to one ONNX operator with fixed inputs and attributes."""
    return lambda a, shapes, out: [step(op, *inputs, **attributes)]


def one_per_axis(value: Any, axes: int) -> list[int]:
    """Return an argument such as a kernel size as a list, one number per spatial axis."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return numbers * axes if len(numbers) == 1 else numbers
