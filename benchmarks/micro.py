"""Kernels as small ONNX models, each in the layout that it meets in a network.

Runtimes hold images in blocks of channels between the operators that can work on them, and pay for every change of
layout. So that a kernel is timed as it runs in its network, each image that it reads comes out of a small blocked
operator, and what it makes goes into one: both bear names that begin with `CONTEXT`, and do not count.

Goes to devices as it stands: Python 3.8 and numpy. That is why the files are put together here, byte by byte, and not
by the onnx package.
"""

from __future__ import annotations

import struct
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from surgery.kernels import Kernel, Operand, Widths, resolved

CONTEXT = "context_"
OPSET = 20
IR_VERSION = 9

_FLOAT, _INT64 = 1, 7
_ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_TEXT, _ATTRIBUTE_INTS = 1, 2, 3, 7


def model_bytes(kernel: Kernel, widths: Widths) -> bytes:
    """Return the ONNX model of a kernel at these widths, with constant weights."""
    sizes = dict(zip(kernel.letters, widths))
    shapes = {o.name: resolved(o.shape, sizes) for o in kernel.operands}
    graph = _Graph(kernel.operands, shapes)
    for operand in kernel.operands:
        if operand.kind != "weight":
            graph.feed(operand)
    made, result = _made(kernel, sizes, shapes), ""
    for k, s in enumerate(kernel.steps):
        result = f"s{k}"
        attributes = dict(s.attributes)
        if s.op in ("Conv", "ConvTranspose"):
            attributes["group"] = _groups(s.op, shapes.get(s.inputs[0], ()), shapes[s.inputs[1]], made)
        graph.add(s.op, [graph.name_of(x) for x in s.inputs], result, f"kernel_{result}", attributes)
    if kernel.image and len(made) == 4:
        result = graph.context(result, made[1], f"{CONTEXT}out")
    return graph.model(result, made)


def chain_bytes(length: int) -> bytes:
    """Return a model of so many operators in a row that do next to nothing."""
    graph = _Graph((), {})
    graph.inputs.append(_value_info("x", (1, 8)))
    for k in range(length):
        graph.add("Tanh" if k % 2 else "Sigmoid", [f"s{k - 1}" if k else "x"], f"s{k}", f"n{k}", {})
    return graph.model(f"s{length - 1}", (1, 8))


def _made(kernel: Kernel, sizes: Mapping[str, int], shapes: Mapping[str, Tuple[int, ...]]) -> Tuple[int, ...]:
    """The result's shape; what is joined is as long as its pieces, whatever the widths say."""
    shape = list(resolved(kernel.shape, sizes))
    first = kernel.steps[0]
    if first.op == "Concat":
        axis = dict(first.attributes)["axis"]
        shape[axis] = sum(shapes[piece][axis] for piece in first.inputs)
    return tuple(shape)


def _groups(op: str, x: Sequence[int], weight: Sequence[int], made: Sequence[int]) -> int:
    """Weights are (O, I / groups, ..), and (I, O / groups, ..) where the convolution is transposed."""
    channels = x if op == "Conv" else made
    return max(1, channels[1] // weight[1]) if len(channels) > 1 else 1


class _Graph:
    """An ONNX graph while it is being put together."""

    def __init__(self, operands: Sequence[Operand], shapes: Mapping[str, Tuple[int, ...]]) -> None:
        self.inputs: List[bytes] = []
        self._nodes: List[bytes] = []
        self._weights: List[bytes] = []
        self._shapes = shapes
        self._named: Dict[str, str] = {}
        self._constants = 0

    def add(self, op: str, inputs: Sequence[str], output: str, name: str, attributes: Mapping[str, Any]) -> None:
        """Append one operator."""
        parts = [_text(1, x) for x in inputs] + [_text(2, output), _text(3, name), _text(4, op)]
        self._nodes.append(b"".join(parts + [_message(5, _attribute(k, v)) for k, v in sorted(attributes.items())]))

    def feed(self, operand: Operand) -> None:
        """Make a value an input, behind a blocked operator where it is an image."""
        name, shape = operand.name, self._shapes[operand.name]
        image = operand.kind == "image" and len(shape) == 4
        given = f"{CONTEXT}{name}_in" if image else name
        self.inputs.append(_value_info(given, shape))
        self._named[name] = self.context(given, shape[1], f"{CONTEXT}{name}") if image else name

    def context(self, value: str, channels: int, name: str) -> str:
        """Append a blocked operator that reads `value`; nothing is fused into a pooling."""
        self._weights.append(_tensor(f"{name}_weight", np.full((channels, 1, 1, 1), 0.5, np.float32)))
        shaped = {"group": channels, "kernel_shape": (1, 1)}
        self.add("Conv", [value, f"{name}_weight"], f"{name}_conv", f"{name}_conv", shaped)
        self.add("MaxPool", [f"{name}_conv"], name, name, {"kernel_shape": (1, 1)})
        return name

    def name_of(self, reference: Any) -> str:
        """Return the name of an input of a step; constants and weights are made on first use."""
        if reference is None:
            return ""
        if not isinstance(reference, str):
            whole = isinstance(reference, (list, tuple)) and all(isinstance(x, int) for x in reference)
            self._constants += 1
            name = f"c{self._constants}"
            self._weights.append(_tensor(name, np.asarray(reference, np.int64 if whole else np.float32)))
            return name
        if reference.startswith("%"):
            return f"s{reference[1:]}"
        name, _, turned = reference.partition(":")
        key = reference.replace(":", "_")
        if key not in self._named:
            shape = self._shapes[name]
            shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
            self._named[key] = key
            self._weights.append(_tensor(key, np.full(shape, 0.01, np.float32)))
        return self._named[key]

    def model(self, result: str, shape: Sequence[int]) -> bytes:
        """Return the model that gives `result`."""
        graph = b"".join(
            [_message(1, node) for node in self._nodes]
            + [_text(2, "kernel")]
            + [_message(5, weight) for weight in self._weights]
            + [_message(11, given) for given in self.inputs]
            + [_message(12, _value_info(result, shape))]
        )
        return _number(1, IR_VERSION) + _message(7, graph) + _message(8, _text(1, "") + _number(2, OPSET))


# Protocol buffers, as far as ONNX's messages need them. --------------------------------------------------------------


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _value_info(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_message(1, _number(1, size)) for size in shape)
    tensor = _number(1, _FLOAT) + _message(2, dims)
    return _text(1, name) + _message(2, _message(1, tensor))


def _tensor(name: str, values: Any) -> bytes:
    dims = b"".join(_number(1, size) for size in values.shape)
    kind = _INT64 if values.dtype == np.int64 else _FLOAT
    return dims + _number(2, kind) + _text(8, name) + _message(9, values.tobytes())


def _attribute(name: str, value: Any) -> bytes:
    if isinstance(value, float):
        return _text(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, _ATTRIBUTE_FLOAT)
    if isinstance(value, int):
        return _text(1, name) + _number(3, value) + _number(20, _ATTRIBUTE_INT)
    if isinstance(value, str):
        return _text(1, name) + _text(4, value) + _number(20, _ATTRIBUTE_TEXT)
    return _text(1, name) + b"".join(_number(8, x) for x in value) + _number(20, _ATTRIBUTE_INTS)
