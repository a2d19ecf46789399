"""Kernels: costly operators by shape, the entries of latency tables. Copied to devices: no torch, Python 3.8.

A *kernel* is one costly operator and the operators that runtimes fuse with it, as ONNX operators with variable widths
(channels, heads, features). A *latency table* holds measured milliseconds of kernels at chosen widths, on one device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Tuple, Union

Size = Union[int, str]
"""A fixed length, or the letter of a variable one."""

Widths = Tuple[int, ...]
"""The values of a kernel's letters, in the order of the letters."""


@dataclass(frozen=True)
class Step:
    """One ONNX operator.

    `inputs` are names of operands (``:T`` transposes the last two axes), ``%k`` for the result of step k, numbers and
    tuples of integers for constants, None for omitted inputs.
    """

    op: str
    inputs: tuple[Any, ...]
    attributes: tuple[tuple[str, Any], ...] = ()  # sorted by name


def step(op: str, *inputs: Any, **attributes: Any) -> Step:
    """Return a step, omitting attributes that are None."""
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in attributes.items() if v is not None}
    return Step(op, inputs, tuple(sorted(given.items())))


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads: a weight or an activation."""

    name: str  # unique within the kernel
    shape: tuple[Size, ...]
    kind: str  # `weight`, `value`, or `image`: (N, C, ..) from an operator that may use a blocked channel layout


@dataclass(frozen=True)
class Kernel:
    """A sequence of steps and their operands; the result is that of the last step."""

    steps: tuple[Step, ...]
    operands: tuple[Operand, ...]  # in order of first use
    shape: tuple[Size, ...]  # of the result
    image: bool  # whether the result is read by operators that may use a blocked channel layout

    @property
    def letters(self) -> tuple[str, ...]:
        """Letters of all variable widths, in order of first use."""
        sizes = [size for operand in self.operands for size in operand.shape] + list(self.shape)
        return tuple(dict.fromkeys(size for size in sizes if isinstance(size, str)))

    @property
    def key(self) -> str:
        """Canonical text of the kernel; equal for equal kernels."""
        steps = [[s.op, list(s.inputs), dict(s.attributes)] for s in self.steps]
        operands = [[o.name, list(o.shape), o.kind] for o in self.operands]
        return json.dumps([steps, operands, list(self.shape), self.image], separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_key(cls, key: str) -> Kernel:
        """Return the kernel of this key; raises ValueError if the text is not a kernel."""
        try:
            steps, operands, shape, image = json.loads(key)
            kernel = cls(
                tuple(Step(op, as_tuples(inputs), tuple(sorted(as_tuples(a).items()))) for op, inputs, a in steps),
                tuple(Operand(name, tuple(sizes), kind) for name, sizes, kind in operands),
                tuple(shape),
                bool(image),
            )
            shapes = (*(operand.shape for operand in kernel.operands), kernel.shape)
            sizes_fit = all(type(x) is str or (type(x) is int and x >= 0) for shape in shapes for x in shape)
            if not sizes_fit or not kernel.title:  # the title reads the rest
                raise ValueError(key)
            return kernel
        except (TypeError, AttributeError, ValueError, LookupError, RecursionError) as error:
            raise ValueError(f"not a kernel: {key:.80}") from error

    @property
    def title(self) -> str:
        """Readable description: ``Conv 3x3 /2 on 56x56 + Relu``."""
        first = self.steps[0]
        attributes = dict(first.attributes)
        words = [first.op]
        if "kernel_shape" in attributes:
            words.append("x".join(map(str, attributes["kernel_shape"])))
        if any(stride > 1 for stride in attributes.get("strides", ())):
            words.append(f"/{max(attributes['strides'])}")
        source = next((o for o in self.operands if o.kind != "weight"), None)
        if source is not None and len(source.shape) > 2:
            rest = source.shape[2:] if source.kind == "image" else source.shape[1:]
            words.append("on " + "x".join(map(str, rest)))
        return " ".join(words) + "".join(f" + {s.op}" for s in self.steps[1:])


def as_tuples(value: Any) -> Any:
    """Return parsed JSON with tuples instead of lists."""
    if isinstance(value, list):
        return tuple(as_tuples(v) for v in value)
    return {k: as_tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def resolved(shape: Iterable[Size], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a shape with its letters substituted."""
    return tuple(sizes[s] if isinstance(s, str) else s for s in shape)


@dataclass(frozen=True)
class Placed:
    """A kernel in a network, and the axes that determine its widths."""

    kernel: Kernel
    slots: tuple[int, ...]  # for each of the kernel's letters, the network's axis
    nodes: Sequence[str]  # names of the traced operations it covers
