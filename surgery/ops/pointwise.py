"""Element-wise operators: operands are aligned from the right and tied axis by axis unless broadcast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.core import Layers, Value, step
from surgery.ops.examples import between_convs, fork_convs
from surgery.ops.moments import MomentRule, multiplied, summed
from surgery.ops.registry import Call, Lowering, Rule, free, register, to_onnx

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
    axes = {a: call.passed(x, a) for a in range(len(x.shape))}
    if weight.shape[0] > 1:
        axes[1] = call.tie(x, 1, weight, 0)
    return call.out(axes)


def _unary(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    return Rule(
        op=f"aten.{name}",
        family="element-wise",
        couple=_couple,
        example=between_convs(function),
        gate=name.split(".")[0] in _GATES,
        onnx=_ONNX.get(name),
        summary="passes every axis",
    )


def _binary(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return Rule(
        op=f"aten.{name}",
        family="element-wise",
        couple=_couple,
        example=fork_convs(function),
        factors=("self", "other") if name == "mul.Tensor" else (),
        is_sum=name in ("add.Tensor", "sub.Tensor"),
        moments=_MOMENTS.get(name),
        onnx=_ONNX.get(name),
        summary="ties its operands index by index, broadcast axes apart",
    )


def _mixed(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Turn an operator with a boolean result into one with a float result."""
    return lambda x: torch.where(mask(x), x, 0.5 * x)


def _onnx_two(op: str) -> Lowering:
    """Lower to a binary ONNX operator; an operand that is not a tensor is a number."""
    return lambda a, shapes, out: [step(op, *(name if name in shapes else 0.5 for name in ("self", "other")))]


def _onnx_clip(low: str, high: str) -> Lowering:
    return lambda a, shapes, out: [step("Clip", "self", *(_number(a.get(name)) for name in (low, high)))]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


_FREE = ("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias", "lift_fresh_copy")
_ONNX: Mapping[str, Lowering] = {
    **dict.fromkeys((*(f"{name}.default" for name in _FREE), "to.dtype", "to.device"), free),
    "relu.default": to_onnx("Relu", "self"),
    "relu6.default": to_onnx("Clip", "self", 0.0, 6.0),
    "hardtanh.default": _onnx_clip("min_val", "max_val"),
    "clamp.default": _onnx_clip("min", "max"),
    "clamp_min.default": _onnx_clip("min", ""),
    "silu.default": lambda a, shapes, out: [step("Sigmoid", "self"), step("Mul", "self", "%0")],
    "gelu.default": lambda a, shapes, out: [step("Gelu", "self", approximate=a["approximate"])],
    "sigmoid.default": to_onnx("Sigmoid", "self"),
    "hardsigmoid.default": to_onnx("HardSigmoid", "self", alpha=1 / 6, beta=0.5),
    "hardswish.default": to_onnx("HardSwish", "self"),
    "tanh.default": to_onnx("Tanh", "self"),
    "leaky_relu.default": to_onnx("LeakyRelu", "self"),
    "elu.default": to_onnx("Elu", "self"),
    "selu.default": to_onnx("Selu", "self"),
    "mish.default": to_onnx("Mish", "self"),
    "softplus.default": to_onnx("Softplus", "self"),
    "exp.default": to_onnx("Exp", "self"),
    "log.default": to_onnx("Log", "self"),
    "sqrt.default": to_onnx("Sqrt", "self"),
    "abs.default": to_onnx("Abs", "self"),
    "neg.default": to_onnx("Neg", "self"),
    "erf.default": to_onnx("Erf", "self"),
    "pow.Tensor_Scalar": lambda a, shapes, out: [step("Pow", "self", float(a["exponent"]))],
    **{f"{op.lower()}.{kind}": _onnx_two(op) for op in ("Add", "Sub", "Mul", "Div") for kind in ("Scalar", "Tensor")},
}

_CLIPPED = ("relu", "relu6", "hardtanh", "hardswish", "clamp", "clamp_min", "clamp_max")
_GATES = (*_CLIPPED, "threshold", "softshrink", "hardshrink")

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu.default": F.relu,
    "relu6.default": F.relu6,
    "hardtanh.default": F.hardtanh,
    "silu.default": F.silu,
    "gelu.default": F.gelu,
    "sigmoid.default": torch.sigmoid,
    "hardsigmoid.default": F.hardsigmoid,
    "hardswish.default": F.hardswish,
    "tanh.default": torch.tanh,
    "leaky_relu.default": F.leaky_relu,
    "elu.default": F.elu,
    "celu.default": F.celu,
    "selu.default": F.selu,
    "mish.default": F.mish,
    "softplus.default": F.softplus,
    "log_sigmoid.default": F.logsigmoid,
    "exp.default": torch.exp,
    "log.default": lambda x: torch.log(x.abs() + 1),
    "log1p.default": lambda x: torch.log1p(x.abs()),
    "sqrt.default": lambda x: torch.sqrt(x.abs() + 1),
    "rsqrt.default": lambda x: torch.rsqrt(x.abs() + 1),
    "square.default": torch.square,
    "reciprocal.default": lambda x: torch.reciprocal(x.abs() + 1),
    "abs.default": torch.abs,
    "neg.default": torch.neg,
    "sin.default": torch.sin,
    "cos.default": torch.cos,
    "erf.default": torch.erf,
    "sign.default": lambda x: x + torch.sign(x),
    "floor.default": lambda x: x + torch.floor(x),
    "round.default": lambda x: x + torch.round(x),
    "pow.Tensor_Scalar": lambda x: torch.pow(x, 2),
    "clamp.default": lambda x: torch.clamp(x, -1, 1),
    "clamp_min.default": lambda x: torch.clamp_min(x, 0),
    "clamp_max.default": lambda x: torch.clamp_max(x, 1),
    "threshold.default": lambda x: F.threshold(x, 0.1, 0.0),
    "softshrink.default": F.softshrink,
    "hardshrink.default": F.hardshrink,
    "add.Scalar": lambda x: aten.add.Scalar(x, 1.0),
    "sub.Scalar": lambda x: aten.sub.Scalar(x, 1.0),
    "mul.Scalar": lambda x: aten.mul.Scalar(x, 2.0),
    "div.Scalar": lambda x: aten.div.Scalar(x, 2.0),
    "rsub.Scalar": lambda x: aten.rsub.Scalar(x, 1.0),
    "gt.Scalar": _mixed(lambda x: x > 0),
    "ge.Scalar": _mixed(lambda x: x >= 0),
    "lt.Scalar": _mixed(lambda x: x < 0),
    "le.Scalar": _mixed(lambda x: x <= 0),
    "eq.Scalar": _mixed(lambda x: x == 0),
    "ne.Scalar": _mixed(lambda x: x != 0),
    "bitwise_not.default": _mixed(lambda x: ~(x > 0)),
    "logical_not.default": _mixed(lambda x: torch.logical_not(x > 0)),
    "where.ScalarOther": lambda x: torch.where(x > 0, x, 0.5),
    "where.ScalarSelf": lambda x: torch.where(x > 0, 0.5, x),
    "masked_fill.Scalar": lambda x: x.masked_fill(x > 0, 0.5),
    "dropout.default": nn.Dropout(0.3),
    "feature_dropout.default": nn.Dropout2d(0.3),
    "alpha_dropout.default": nn.AlphaDropout(0.3),
    "clone.default": torch.clone,
    "contiguous.default": lambda x: aten.contiguous.default(x.transpose(2, 3)),
    "detach.default": torch.detach,
    "alias.default": aten.alias.default,
    "lift_fresh_copy.default": aten.lift_fresh_copy.default,
    "to.dtype": lambda x: x.to(torch.float64).to(x.dtype),
    "to.dtype_layout": lambda x: aten.to.dtype_layout(x, dtype=x.dtype, layout=torch.strided),
    "to.device": lambda x: aten.to.device(x, "cpu", x.dtype),
    "_to_copy.default": lambda x: aten._to_copy.default(x),
    "zeros_like.default": lambda x: x + torch.zeros_like(x),
    "ones_like.default": lambda x: x + torch.ones_like(x),
    "full_like.default": lambda x: x + torch.full_like(x, 2.0),
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add.Tensor": torch.add,
    "sub.Tensor": torch.sub,
    "mul.Tensor": lambda a, b: a * b.mean((2, 3), keepdim=True),
    "div.Tensor": lambda a, b: a / (b.abs() + 1),
    "pow.Tensor_Tensor": lambda a, b: torch.pow(a.abs() + 1, b),
    "rsub.Tensor": lambda a, b: aten.rsub.Tensor(a, b),
    "maximum.default": torch.maximum,
    "minimum.default": torch.minimum,
    "max.other": lambda a, b: aten.max.other(a, b),
    "min.other": lambda a, b: aten.min.other(a, b),
    "clamp.Tensor": lambda a, b: torch.clamp(a, min=b),
    "lerp.Tensor": lambda a, b: torch.lerp(a, b, torch.sigmoid(a)),
    "where.self": lambda a, b: torch.where(a > b, a, b),
    "gt.Tensor": lambda a, b: torch.where(a > b, a, 2 * b),
    "lt.Tensor": lambda a, b: torch.where(a < b, a, 2 * b),
    "ge.Tensor": lambda a, b: torch.where(a >= b, a, 2 * b),
    "le.Tensor": lambda a, b: torch.where(a <= b, a, 2 * b),
    "eq.Tensor": lambda a, b: torch.where(a == b, a, 2 * b),
    "ne.Tensor": lambda a, b: torch.where(a != b, a, 2 * b),
    "logical_and.default": lambda a, b: torch.where(torch.logical_and(a > 0, b > 0), a, b),
    "logical_or.default": lambda a, b: torch.where(torch.logical_or(a > 0, b > 0), a, b),
    "logical_xor.default": lambda a, b: torch.where(torch.logical_xor(a > 0, b > 0), a, b),
    "__and__.Tensor": lambda a, b: torch.where((a > 0) & (b > 0), a, b),
    "__or__.Tensor": lambda a, b: torch.where((a > 0) | (b > 0), a, b),
    "bitwise_and.Tensor": lambda a, b: torch.where(torch.bitwise_and(a > 0, b > 0), a, b),
    "bitwise_or.Tensor": lambda a, b: torch.where(torch.bitwise_or(a > 0, b > 0), a, b),
    "masked_fill.Tensor": lambda a, b: a.masked_fill(b > 0, torch.tensor(0.5, dtype=a.dtype)),
    "addcmul.default": lambda a, b: torch.addcmul(a, a, b),
    "lerp.Scalar": lambda a, b: torch.lerp(a, b, 0.3),
    "atan2.default": torch.atan2,
    "expand_as.default": lambda a, b: b * a.mean((2, 3), keepdim=True).expand_as(b),
    "type_as.default": lambda a, b: a.type_as(b),
}


_MOMENTS: Mapping[str, MomentRule] = {
    "add.Tensor": lambda a: summed(a["self"], a["other"], a.get("alpha", 1)),
    "sub.Tensor": lambda a: summed(a["self"], a["other"], -a.get("alpha", 1)),
    "mul.Tensor": lambda a: multiplied(a["self"], a["other"]),
}


def _couple_glu(call: Call) -> Value:
    """The first half of an axis times a gate from the second half: the halves are tied."""
    x = call.value("self")
    dim = call["dim"] % len(x.shape)
    axes = {a: call.passed(x, a) for a in range(len(x.shape))}
    half = x.shape[dim] // 2
    if half == 1:
        call.freeze(x, dim, "one channel and its gate stay together")
    axes[dim] = call.tie_layers(
        tuple(layer[:half] for layer in axes[dim]), tuple(layer[half:] for layer in axes[dim]), half
    )
    return call.out(axes)


register(*(_unary(name, function) for name, function in _UNARY.items()))
register(*(_binary(name, function) for name, function in _BINARY.items()))
register(
    Rule(
        op="aten.prelu.default",
        family="element-wise",
        couple=_couple_prelu,
        example=between_convs(nn.PReLU(8)),
        summary="ties its slopes to the channels",
    ),
    Rule(
        op="aten.glu.default",
        family="element-wise",
        couple=_couple_glu,
        example=between_convs(lambda x: F.glu(x, 1), after=4),
        summary="ties the two halves of the axis that it gates",
    ),
)
