"""Element-wise operators: operands are aligned from the right and tied axis by axis unless broadcast."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.core import Layers, Value, step
from surgery.ops.examples import between_convs, fork_convs
from surgery.ops.moments import MomentRule, multiplied, summed
from surgery.ops.registry import Call, Example, Lowering, Rule, free, register, to_onnx

aten = torch.ops.aten


def _couple(call: Call) -> Value:
    shape = call.outputs[0]
    axes: dict[int, Layers] = {}
    for back in range(1, len(shape) + 1):
        operands = [v for v in call.tensors() if len(v.shape) >= back]
        wide = [v for v in operands if v.shape[-back] > 1]
        for value in operands:
            call.passed(value, -back)
        layers: Layers = wide[0].axes[-back] if wide else ()
        for other in wide[1:]:
            layers = call.tie_layers(layers, other.axes[-back], shape[-back])
        axes[len(shape) - back] = layers
    return call.out(axes)


def _couple_prelu(call: Call) -> Value:
    """Input (N, C, ..), weight (C,) or (1,)."""
    x, weight = call.value("self"), call.value("weight")
    axes = call.axes(x)
    if weight.shape[0] > 1:
        axes[1] = call.tie(x, 1, weight, 0)
    return call.out(axes)


def _couple_glu(call: Call) -> Value:
    """The first half of an axis times a gate from the second half: the halves are tied."""
    x = call.value("self")
    dim = call["dim"] % len(x.shape)
    half = x.shape[dim] // 2
    if half == 1:
        call.freeze(x, dim, "one channel and its gate stay together")
    axes = call.axes(x)
    first, second = (tuple(layer[part] for layer in axes[dim]) for part in (slice(half), slice(half, None)))
    return call.out({**axes, dim: call.tie_layers(first, second, half)})


def _onnx_two(op: str) -> Lowering:
    """Lower to a binary ONNX operator; an operand that is not a tensor is a number."""
    return lambda a, shapes, out: [step(op, *(name if name in shapes else 0.5 for name in ("self", "other")))]


def _onnx_clip(low: str, high: str) -> Lowering:
    return lambda a, shapes, out: [step("Clip", "self", *(_number(a.get(name)) for name in (low, high)))]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


_FREE = ("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias", "lift_fresh_copy")
_SAME = "Relu Sigmoid HardSwish Tanh Elu Selu Mish Softplus Exp Log Sqrt Abs Neg Erf"
_ONNX: Mapping[str, Lowering] = {
    **dict.fromkeys((*(f"{name}.default" for name in _FREE), "to.dtype", "to.device"), free),
    **{f"{op.lower()}.default": to_onnx(op, "self") for op in _SAME.split()},
    "relu6.default": to_onnx("Clip", "self", 0.0, 6.0),
    "hardtanh.default": _onnx_clip("min_val", "max_val"),
    "clamp.default": _onnx_clip("min", "max"),
    "clamp_min.default": _onnx_clip("min", ""),
    "silu.default": lambda a, shapes, out: [step("Sigmoid", "self"), step("Mul", "self", "%0")],
    "gelu.default": lambda a, shapes, out: [step("Gelu", "self", approximate=a["approximate"])],
    "hardsigmoid.default": to_onnx("HardSigmoid", "self", alpha=1 / 6, beta=0.5),
    "leaky_relu.default": to_onnx("LeakyRelu", "self"),
    "pow.Tensor_Scalar": lambda a, shapes, out: [step("Pow", "self", float(a["exponent"]))],
    **{f"{op.lower()}.{kind}": _onnx_two(op) for op in ("Add", "Sub", "Mul", "Div") for kind in ("Scalar", "Tensor")},
}

_CLIPPED = ("relu", "relu6", "hardtanh", "hardswish", "clamp", "clamp_min", "clamp_max")
_GATES = (*_CLIPPED, "threshold", "softshrink", "hardshrink")

_MOMENTS: Mapping[str, MomentRule] = {
    "add.Tensor": lambda a: summed(a["self"], a["other"], a.get("alpha", 1)),
    "sub.Tensor": lambda a: summed(a["self"], a["other"], -a.get("alpha", 1)),
    "mul.Tensor": lambda a: multiplied(a["self"], a["other"]),
}

One = Callable[[Tensor], Tensor]
Two = Callable[[Tensor, Tensor], Tensor]

_UNARY: dict[str, One] = {
    "log_sigmoid.default": F.logsigmoid,
    "pow.Tensor_Scalar": lambda x: torch.pow(x, 2),
    "clamp.default": lambda x: torch.clamp(x, -1, 1),
    "clamp_min.default": lambda x: torch.clamp_min(x, 0),
    "clamp_max.default": lambda x: torch.clamp_max(x, 1),
    "threshold.default": lambda x: F.threshold(x, 0.1, 0.0),
    "bitwise_not.default": lambda x: torch.where(~(x > 0), x, 0.5 * x),
    "logical_not.default": lambda x: torch.where(torch.logical_not(x > 0), x, 0.5 * x),
    "where.ScalarOther": lambda x: torch.where(x > 0, x, 0.5),
    "where.ScalarSelf": lambda x: torch.where(x > 0, 0.5, x),
    "masked_fill.Scalar": lambda x: x.masked_fill(x > 0, 0.5),
    "dropout.default": nn.Dropout(0.3),
    "feature_dropout.default": nn.Dropout2d(0.3),
    "alpha_dropout.default": nn.AlphaDropout(0.3),
    "contiguous.default": lambda x: aten.contiguous.default(x.transpose(2, 3)),
    "to.dtype": lambda x: x.to(torch.float64).to(x.dtype),
    "to.dtype_layout": lambda x: aten.to.dtype_layout(x, dtype=x.dtype, layout=torch.strided),
    "to.device": lambda x: aten.to.device(x, "cpu", x.dtype),
    "full_like.default": lambda x: x + torch.full_like(x, 2.0),
}

_BINARY: dict[str, Two] = {
    "mul.Tensor": lambda a, b: a * b.mean((2, 3), keepdim=True),
    "div.Tensor": lambda a, b: a / (b.abs() + 1),
    "pow.Tensor_Tensor": lambda a, b: torch.pow(a.abs() + 1, b),
    "clamp.Tensor": lambda a, b: torch.clamp(a, min=b),
    "lerp.Tensor": lambda a, b: torch.lerp(a, b, torch.sigmoid(a)),
    "lerp.Scalar": lambda a, b: torch.lerp(a, b, 0.3),
    "where.self": lambda a, b: torch.where(a > b, a, b),
    "masked_fill.Tensor": lambda a, b: a.masked_fill(b > 0, torch.tensor(0.5, dtype=a.dtype)),
    "addcmul.default": lambda a, b: torch.addcmul(a, a, b),
    "expand_as.default": lambda a, b: b * a.mean((2, 3), keepdim=True).expand_as(b),
}

# Operators alike: their names, and a function of inputs that runs one.
_ALIKE_UNARY: tuple[tuple[str, Callable[[Any], One]], ...] = (
    ("relu relu6 hardtanh silu gelu sigmoid hardsigmoid hardswish tanh leaky_relu elu celu selu mish", lambda op: op),
    ("softplus exp square abs neg sin cos erf softshrink hardshrink", lambda op: op),
    ("clone detach alias lift_fresh_copy _to_copy", lambda op: op),
    ("sinh cosh tan asinh atan erfc exp2 expm1 i0 nan_to_num rrelu", lambda op: op),
    ("log log1p log2 log10 sqrt rsqrt reciprocal acosh lgamma digamma", lambda op: lambda x: op(x.abs() + 1)),
    ("acos asin atanh erfinv", lambda op: lambda x: op(x.sigmoid())),
    ("sign floor ceil trunc frac round zeros_like ones_like isnan signbit", lambda op: lambda x: x + op(x)),
    ("pow.Scalar", lambda op: lambda x: op(2.0, x)),
    ("fill.Scalar", lambda op: lambda x: x + op(x, 0.5)),
    ("fill.Tensor", lambda op: lambda x: x + op(x, torch.tensor(0.5))),
    ("fmod.Scalar remainder.Scalar", lambda op: lambda x: op(x, 2.0)),
    ("add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar", lambda op: lambda x: op(x, 2.0)),
    (
        "gt.Scalar ge.Scalar lt.Scalar le.Scalar eq.Scalar ne.Scalar",
        lambda op: lambda x: torch.where(op(x, 0), x, 0.5 * x),
    ),
)
_ALIKE_BINARY: tuple[tuple[str, Callable[[Any], Two]], ...] = (
    ("add.Tensor sub.Tensor rsub.Tensor maximum minimum max.other min.other atan2 type_as", lambda op: op),
    ("fmax fmin hypot copysign.Tensor logaddexp2", lambda op: op),
    ("fmod.Tensor remainder.Tensor floor_divide", lambda op: lambda a, b: a + op(a, b.abs() + 1)),
    ("xlogy.Tensor igamma igammac heaviside", lambda op: lambda a, b: b + op(a.sigmoid(), b.sigmoid())),
    (
        "gt.Tensor lt.Tensor ge.Tensor le.Tensor eq.Tensor ne.Tensor",
        lambda op: lambda a, b: torch.where(op(a, b), a, 2 * b),
    ),
    (
        "logical_and logical_or logical_xor __and__.Tensor __or__.Tensor bitwise_and.Tensor bitwise_or.Tensor "
        "bitwise_xor.Tensor",
        lambda op: lambda a, b: torch.where(op(a > 0, b > 0), a, b),
    ),
)


def _named(alike: tuple[tuple[str, Callable[[Any], Any]], ...]) -> dict[str, Any]:
    full = {name if "." in name else f"{name}.default": of for names, of in alike for name in names.split()}
    return {name: of(operator.attrgetter(name)(aten)) for name, of in full.items()}


def _rule(name: str, example: Example, summary: str) -> Rule:
    return Rule(
        f"aten.{name}",
        "element-wise",
        _couple,
        example,
        factors=("self", "other") if name == "mul.Tensor" else (),
        is_sum=name in ("add.Tensor", "sub.Tensor"),
        moments=_MOMENTS.get(name),
        gate=name.split(".")[0] in _GATES,
        onnx=_ONNX.get(name),
        summary=summary,
    )


for _name, _one in {**_UNARY, **_named(_ALIKE_UNARY)}.items():
    register(_rule(_name, between_convs(_one), "passes every axis"))
for _name, _two in {**_BINARY, **_named(_ALIKE_BINARY)}.items():
    register(_rule(_name, fork_convs(_two), "ties its operands index by index, broadcast axes apart"))
register(
    Rule(
        "aten.prelu.default",
        "element-wise",
        _couple_prelu,
        between_convs(nn.PReLU(8)),
        summary="ties its slopes to the channels",
    ),
    Rule(
        "aten.glu.default",
        "element-wise",
        _couple_glu,
        between_convs(lambda x: F.glu(x, 1), after=4),
        summary="ties the two halves of the axis that it gates",
    ),
)
