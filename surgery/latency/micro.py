"""Kernels as small ONNX models, with the memory layouts they have in a network.

Each image that a kernel reads is produced by a small operator in blocks of channels, and its result is consumed by one:
the names of both begin with `CONTEXT`, and their time is excluded. In int8, a kernel is written as by ONNX Runtime's
quantizer. Copied to devices unchanged: Python 3.8 and numpy, so that files are assembled byte by byte, without onnx.
"""

from __future__ import annotations

import struct
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from surgery.core import Kernel, Operand, Step, Widths, resolved, step

CONTEXT = "context_"
KERNEL = "kernel_"
OPSET = 20
IR_VERSION = 9
FP32, INT8 = "fp32", "int8"

IN_8_BITS = frozenset(
    (
        *("Add", "AveragePool", "BatchNormalization", "Concat", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool"),
        *("InstanceNormalization", "LayerNormalization", "MatMul", "MaxPool", "Mul", "Resize", "Sigmoid", "Softmax"),
        *("LeakyRelu", "Reshape", "Transpose"),
    )
)
"""Operators that the quantizer supports."""
WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))  # operators whose second operand is signed
BY_RANGE = frozenset(("Clip", "Relu"))
"""Operators it omits after those, since 8-bit values are clipped to their range anyway."""

_ACTIVATION, _WEIGHT = np.float32(0.02), np.float32(0.01)  # arbitrary scales, on which times do not depend

_FLOAT = 1
_KINDS = {"float32": _FLOAT, "uint8": 2, "int8": 3, "int32": 6, "int64": 7}


def model_bytes(kernel: Kernel, widths: Widths, precision: str = FP32) -> bytes:
    """Return the ONNX model of a kernel at these widths, with constant weights, in `fp32` or `int8`."""
    sizes = dict(zip(kernel.letters, widths))
    shapes = {o.name: resolved(o.shape, sizes) for o in kernel.operands}
    graph = (_Quantised if precision == INT8 else _Graph)(shapes)
    for operand in kernel.operands:
        if operand.kind != "weight":
            graph.feed(operand)
    made, first, result = list(resolved(kernel.shape, sizes)), kernel.steps[0], ""
    if first.op == "Concat":  # as long as its pieces
        axis = dict(first.attributes)["axis"]
        made[axis] = sum(shapes[piece][axis] for piece in first.inputs)
    for k, s in enumerate(kernel.steps if precision == FP32 else _prepared(kernel.steps)):
        result = f"s{k}"
        attributes = dict(s.attributes)
        if s.op in ("Conv", "ConvTranspose"):
            # Weights are (O, I / groups, ..), and (I, O / groups, ..) where the convolution is transposed.
            channels = shapes.get(s.inputs[0], ()) if s.op == "Conv" else made
            attributes["group"] = max(1, channels[1] // shapes[s.inputs[1]][1]) if len(channels) > 1 else 1
        graph.add(s.op, [graph.name_of(x) for x in s.inputs], result, f"{KERNEL}{result}", attributes)
    if kernel.image and len(made) == 4:
        result = graph.context(result, made[1], f"{CONTEXT}out")
    return graph.model(result, made)


def chain_bytes(length: int) -> bytes:
    """Return a model with a chain of trivial operators."""
    graph = _Graph({})
    graph.inputs.append(_value_info("x", (1, 8)))
    for k in range(length):
        graph.add("Tanh" if k % 2 else "Sigmoid", [f"s{k - 1}" if k else "x"], f"s{k}", f"n{k}", {})
    return graph.model(f"s{length - 1}", (1, 8))


def _prepared(steps: Sequence[Step]) -> List[Step]:
    """Return operators as after the quantizer's preprocessing: decomposed, or folded."""
    done: List[Step] = []
    at: Dict[Any, Any] = {}

    def put(op: str, *inputs: Any, **attributes: Any) -> str:
        done.append(step(op, *inputs, **attributes))
        return f"%{len(done) - 1}"

    for k, s in enumerate(steps):
        inputs = [at.get(x, x) for x in s.inputs]
        x, last = inputs[0], done[-1] if done else step("")
        if s.op == "HardSwish":
            at[f"%{k}"] = put("Mul", x, put("HardSigmoid", x, alpha=1 / 6, beta=0.5))
        elif s.op == "Mish":
            at[f"%{k}"] = put("Mul", x, put("Tanh", put("Softplus", x)))
        elif s.op == "Mul" and last.op == "Conv" and isinstance(inputs[1], (int, float)):
            at[f"%{k}"] = x
        else:
            at[f"%{k}"] = put(s.op, *inputs, **dict(s.attributes))
    return done


class _Graph:
    """Builder of an ONNX graph."""

    def __init__(self, shapes: Mapping[str, Tuple[int, ...]]) -> None:
        self.inputs: List[bytes] = []
        self._nodes: List[bytes] = []
        self._weights: Dict[str, Any] = {}
        self._shapes = shapes
        self._named: Dict[str, str] = {}
        self._constants = 0

    def add(self, op: str, inputs: Sequence[str], output: str, name: str, attributes: Mapping[str, Any]) -> None:
        """Append one operator."""
        given: List[_Field] = [(1, x) for x in inputs]
        fields: List[_Field] = [(5, _attribute(k, v)) for k, v in sorted(attributes.items())]
        self._nodes.append(_message(*given, (2, output), (3, name), (4, op), *fields))

    def feed(self, operand: Operand) -> None:
        """Add an input; images pass through a blocked operator."""
        name, shape = operand.name, self._shapes[operand.name]
        image = operand.kind == "image" and len(shape) == 4
        given = f"{CONTEXT}{name}_in" if image else name
        self.inputs.append(_value_info(given, shape))
        self._named[name] = self.context(given, shape[1], f"{CONTEXT}{name}") if image else name

    def context(self, value: str, channels: int, name: str) -> str:
        """Append a blocked operator that reads `value`: a pooling, into which nothing is fused."""
        self._weights[f"{name}_weight"] = np.full((channels, 1, 1, 1), 0.5, np.float32)
        shaped = {"group": channels, "kernel_shape": (1, 1)}
        self.add("Conv", [value, f"{name}_weight"], f"{name}_conv", f"{name}_conv", shaped)
        self.add("MaxPool", [f"{name}_conv"], name, name, {"kernel_shape": (1, 1)})
        return name

    def name_of(self, reference: Any) -> str:
        """Return the name of an input of a step; constants and weights are created on first use."""
        if reference is None:
            return ""
        if not isinstance(reference, str):
            whole = isinstance(reference, (list, tuple)) and all(isinstance(x, int) for x in reference)
            self._constants += 1
            name = f"c{self._constants}"
            self._weights[name] = np.asarray(reference, np.int64 if whole else np.float32)
            return name
        if reference.startswith("%"):
            return f"s{reference[1:]}"
        name, _, turned = reference.partition(":")
        key = reference.replace(":", "_")
        if key not in self._named:
            shape = self._shapes[name]
            shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
            self._named[key] = key
            self._weights[key] = np.full(shape, 0.01, np.float32)
        return self._named[key]

    def model(self, result: str, shape: Sequence[int]) -> bytes:
        """Return the model with output `result`."""
        graph = _message(
            *((1, node) for node in self._nodes),
            (2, "kernel"),
            *((5, _tensor(name, values)) for name, values in self._weights.items()),
            *((11, given) for given in self.inputs),
            (12, _value_info(result, shape)),
        )
        return _message((1, IR_VERSION), (7, graph), (8, _message((1, ""), (2, OPSET))))


class _Quantised(_Graph):
    """Builder of the same graph in QDQ format, as written by ONNX Runtime's quantizer.

    `QuantizeLinear` and `DequantizeLinear` that the runtime cannot fuse are part of the kernel, or of the context.
    """

    def __init__(self, shapes: Mapping[str, Tuple[int, ...]]) -> None:
        super().__init__(shapes)
        self._bits: Dict[str, str] = {}  # value → name of its 8-bit tensor
        self._read: Dict[str, str] = {}  # name of an 8-bit tensor → its dequantized value

    def add(self, op: str, inputs: Sequence[str], output: str, name: str, attributes: Mapping[str, Any]) -> None:
        """Append one operator, in 8 bits if the quantizer supports it."""
        part = CONTEXT if name.startswith(CONTEXT) else KERNEL
        if op in BY_RANGE and inputs[0] in self._bits:
            self._bits[output] = self._bits[inputs[0]]
        elif op in IN_8_BITS and not (op == "ConvTranspose" and attributes["group"] > 1):
            axis = 0 if op == "Conv" or attributes.get("transB") else 1  # of the channels
            given = [self._operand(op, k, x, part, axis) for k, x in enumerate(inputs)]
            super().add(op, given, output, name, attributes)
            self._quantise(output, part)
        else:
            given = [self._reading(x, part) if x in self._bits else x for x in inputs]
            super().add(op, given, output, name, attributes)

    def feed(self, operand: Operand) -> None:
        """Add an input in 8 bits, as left by the previous operator."""
        super().feed(operand)
        self._quantise(self._named[operand.name], CONTEXT)

    def model(self, result: str, shape: Sequence[int]) -> bytes:
        """Return the model with output `result`: 8-bit inside, float outside."""
        self._quantise(result, KERNEL)
        self._read.pop(self._bits[result], None)
        return super().model(self._reading(result, f"{CONTEXT}out_"), shape)

    def _operand(self, op: str, place: int, value: str, part: str, axis: int) -> str:
        """Return the name of the dequantized value, weight or bias that an 8-bit operator reads."""
        weight = self._weights.get(value)
        if not value or (weight is not None and weight.dtype != np.float32) or (op == "Resize" and place):
            return value
        if weight is None:
            self._quantise(value, part)
            return self._reading(value, part)
        if place == 2 and op in ("Conv", "ConvTranspose", "Gemm"):
            return self._constant(value, np.int32, 0, part)
        if op not in WEIGHTED:
            return self._constant(value, np.uint8, None, part)
        return self._constant(value, np.int8, axis if op != "MatMul" or weight.ndim == 2 else None, part)

    def _quantise(self, value: str, part: str) -> None:
        """Append `QuantizeLinear` for a value, once."""
        if value not in self._bits:
            self._bits[value] = value
            self._weights[f"{value}_scale"] = np.asarray(_ACTIVATION, np.float32)
            self._weights[f"{value}_zero"] = np.asarray(128, np.uint8)
            names = [value, f"{value}_scale", f"{value}_zero"]
            super().add("QuantizeLinear", names, f"{value}_bits", f"{part}{value}_quantise", {})

    def _reading(self, value: str, part: str, axis: Optional[int] = None) -> str:
        """Append `DequantizeLinear` for an 8-bit tensor, once; returns the name of its result."""
        bits = self._bits[value]
        if bits not in self._read:
            self._read[bits] = f"{bits}_{part}read"
            names = [f"{bits}_bits", f"{bits}_scale", f"{bits}_zero"]
            attributes = {} if axis is None else {"axis": axis}
            super().add("DequantizeLinear", names, self._read[bits], f"{part}{bits}_dequantise", attributes)
        return self._read[bits]

    def _constant(self, name: str, kind: Any, axis: Optional[int], part: str) -> str:
        """Put a weight in 8 bits, or a bias in 32, with a scale for each channel along an axis; returns its reading."""
        values = self._weights.pop(name)
        channels = () if axis is None else (values.shape[axis],)
        self._bits[name] = name
        self._weights[f"{name}_bits"] = np.ones(values.shape, kind)
        scale = _ACTIVATION * _WEIGHT if kind is np.int32 else _WEIGHT  # of a bias: that of the products it is added to
        self._weights[f"{name}_scale"] = np.full(channels, scale, np.float32)
        self._weights[f"{name}_zero"] = np.zeros(channels, kind)
        return self._reading(name, part, axis)


# Protocol buffers, as far as ONNX's messages need them. --------------------------------------------------------------

_Field = Tuple[int, Union[int, float, str, bytes]]


def _message(*fields: _Field) -> bytes:
    """Return an encoded message of (field number, value)."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        elif isinstance(value, float):
            out += _varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            content = value.encode() if isinstance(value, str) else value
            out += _varint(number << 3 | 2) + _varint(len(content)) + content
    return bytes(out)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _value_info(name: str, shape: Sequence[int]) -> bytes:
    dims = _message(*((1, _message((1, size))) for size in shape))
    return _message((1, name), (2, _message((1, _message((1, _FLOAT), (2, dims))))))


def _tensor(name: str, values: Any) -> bytes:
    dims: List[_Field] = [(1, size) for size in values.shape]
    return _message(*dims, (2, _KINDS[values.dtype.name]), (8, name), (9, values.tobytes()))


def _attribute(name: str, value: Any) -> bytes:
    number, kind = {float: (2, 1), int: (3, 2), str: (4, 3)}.get(type(value), (8, 7))
    values = value if number == 8 else (value,)
    return _message((1, name), *((number, x) for x in values), (20, kind))
