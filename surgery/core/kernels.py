"""What a runtime spends its time in: operators by shape, and tables of how long each takes at which widths.

A *kernel* is one costly operator and what runtimes fuse with it, written as ONNX operators, with its widths (channels,
heads, features) left open. A *latency table* holds measured milliseconds of kernels at chosen widths, on one device.
Nothing here needs torch, or a Python newer than 3.8: the file is copied to devices unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Tuple, Union

Size = Union[int, str]
"""A length that is fixed, or the letter of one that may change."""

Widths = Tuple[int, ...]
"""The lengths that a kernel's letters stand for, in the order of the letters."""


@dataclass(frozen=True)
class Step:
    """One ONNX operator.

    Attributes:
        op: its type, such as ``Conv``.
        inputs: names of operands (with ``:T``: the last two axes exchanged), ``%k`` for what step k gives, numbers and
            tuples of whole numbers for constants, None for what is left out.
        attributes: by name, in order of the names.
    """

    op: str
    inputs: tuple[Any, ...]
    attributes: tuple[tuple[str, Any], ...] = ()


def step(op: str, *inputs: Any, **attributes: Any) -> Step:
    """Return a step; attributes that are None are left out."""
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in attributes.items() if v is not None}
    return Step(op, inputs, tuple(sorted(given.items())))


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads: a weight, or a value that flows in.

    Attributes:
        name: unique within the kernel.
        shape: of whole numbers and letters.
        kind: `weight`, `value`, or `image`: a value (N, C, ..) that comes from an operator which may hold its channels
            in blocks.
    """

    name: str
    shape: tuple[Size, ...]
    kind: str


@dataclass(frozen=True)
class Kernel:
    """Steps that follow each other, and what they read; the last step's result is what comes out.

    Attributes:
        steps: in order.
        operands: in order of first use.
        shape: of the result.
        image: whether the result goes to operators that may hold its channels in blocks.
    """

    steps: tuple[Step, ...]
    operands: tuple[Operand, ...]
    shape: tuple[Size, ...]
    image: bool

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of all widths, in order of first use."""
        sizes = [size for operand in self.operands for size in operand.shape] + list(self.shape)
        return tuple(dict.fromkeys(size for size in sizes if isinstance(size, str)))

    @property
    def key(self) -> str:
        """The kernel as text: equal for equal kernels."""
        steps = [[s.op, list(s.inputs), dict(s.attributes)] for s in self.steps]
        operands = [[o.name, list(o.shape), o.kind] for o in self.operands]
        return json.dumps([steps, operands, list(self.shape), self.image], separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_key(cls, key: str) -> Kernel:
        """Return the kernel that bears this key; raises ValueError where the text is none."""
        try:
            steps, operands, shape, image = json.loads(key)
            return cls(
                tuple(Step(op, _tuples(inputs), tuple(sorted(_tuples(a).items()))) for op, inputs, a in steps),
                tuple(Operand(name, tuple(sizes), kind) for name, sizes, kind in operands),
                tuple(shape),
                bool(image),
            )
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a kernel: {key:.80}") from error

    @property
    def title(self) -> str:
        """What it is, for readers: ``Conv 3x3 /2 on 56x56 + Relu``."""
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


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def resolved(shape: Iterable[Size], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a shape with its letters' lengths put in."""
    return tuple(sizes[s] if isinstance(s, str) else s for s in shape)


@dataclass(frozen=True)
class Placed:
    """A kernel in a network, and where its widths come from.

    Attributes:
        kernel: with letters.
        slots: for each letter, which of the network's axes it is.
        nodes: names of the traced operations it represents.
    """

    kernel: Kernel
    slots: tuple[int, ...]
    nodes: Sequence[str]
