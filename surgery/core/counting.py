"""MACs and parameters of a module, as fvcore counts them: the figures in reports and budgets.

Handles are added for multiply-adds that fvcore ignores (scaled-dot-product attention, ...) and for the names of the
same operators in exported graphs. Window pooling, activations and additions count zero. One multiply-add is one MAC.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isqrt, prod
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import batchnorm_flop_jit, conv_flop_count, get_shape, matmul_flop_jit
from torch import Tensor, fx, nn

from surgery.core.callee import Callee
from surgery.errors import InvalidInput, UnsupportedModel


def count_macs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, batch: int = 1
) -> int:
    """Return the multiply-adds of one forward pass in eval mode, divided by `batch` and rounded down.

    Raises InvalidInput if the arguments contain no tensor, UnsupportedModel if the module does not run on them.
    """
    return sum(count_by_operator(module, args, kwargs).values()) // batch


def count_by_operator(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return what `count_macs` counts per operator, by fvcore's names (`conv` for all convolutions)."""
    callee = Callee(module, args, kwargs)
    if not callee.tensors:
        raise InvalidInput("MACs are counted by running the module: its example inputs hold no tensor")
    try:
        analysis = FlopCountAnalysis(_Counted(_private_copy(module), args, kwargs), callee.tensors)
        analysis.set_op_handle(**_HANDLES).tracer_warnings("none")
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        with torch.no_grad(), _attention_spelled_out():
            counts = analysis.by_operator()
    except Exception as error:  # any exception the user's forward raises
        raise UnsupportedModel(
            f"cannot count the MACs of {type(module).__name__}: running it under fvcore failed "
            f"({type(error).__name__}: {error}); check that it runs on its example inputs in eval mode"
        ) from error
    return {name: int(count) for name, count in counts.items()}


def count_params(module: nn.Module) -> int:
    """Return the number of parameters; shared parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters())


class _Counted(Callee):
    """Wrapper for fvcore's tracer, which requires at least one output tensor."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return super().forward(*inputs) or inputs


def _private_copy(module: nn.Module) -> nn.Module:
    """Copy all but the parameters: fvcore adds hooks to submodules and does not remove them when a forward fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own classes, when a graph module is copied
        private = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    with suppress(NotImplementedError):  # exported programs reject it; other graphs flip flags
        private.eval()
    for submodule in private.modules():
        submodule.training = False
        if isinstance(submodule, fx.GraphModule):
            for node in submodule.graph.nodes:
                node.target = _TRACEABLE.get(node.target, node.target)
            submodule.recompile()
    return private


_TRACEABLE: Mapping[Any, Any] = {
    torch.ops.aten.fill.Scalar: torch.ops.aten.full_like.default,
    torch.ops.aten.fill.Tensor: torch.ops.aten.copy.default,
    torch.ops.aten.zero.default: torch.ops.aten.zeros_like.default,
}
"""Operators on which torch's tracer fails (it records them with too few arguments) → equivalents."""


@contextmanager
def _attention_spelled_out() -> Iterator[None]:
    """Keep torch's attention modules off the fused inference path, which hides their products in one operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# Handles: inputs and outputs of one traced operator (`torch._C.Value`) → its MACs. ----------------------------------

Handle = Callable[[Sequence[Any], Sequence[Any]], Any]


def _of_shapes(formula: Callable[..., int]) -> Handle:
    """Count by the shapes of the output and of each input (None: not a tensor)."""
    return lambda inputs, outputs: formula(get_shape(outputs[0]), *map(get_shape, inputs))


def _attention(out: list[int], query: list[int], key: list[int], value: list[int], *_: Any) -> int:
    """(.., L, E) x (.., S, E) → (.., L, S); (.., L, S) x (.., S, Ev) → (.., L, Ev)."""
    return prod(out[:-1]) * key[-2] * (key[-1] + value[-1])  # leading axes after broadcasting


def _matmul(inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """Extend fvcore's handle to a vector as second factor."""
    vector = len(get_shape(inputs[1])) == 1
    return prod(get_shape(inputs[0])) if vector else matmul_flop_jit(inputs, outputs)


def _norm(affine: int, plain: int = 4) -> Handle:
    """Fvcore's formula, for inputs of any rank: the scale is input number `affine`; `plain`: without one."""
    return _of_shapes(lambda out, *inputs: prod(inputs[0]) * (plain + (inputs[affine] is not None)))


_FIRST = _of_shapes(lambda out, a, *_: prod(out) * a[-1])
_SECOND = _of_shapes(lambda out, added, a, *_: prod(out) * a[-1])
_HANDLES: Mapping[str, Handle] = {
    "aten::scaled_dot_product_attention": _of_shapes(_attention),
    "aten::_scaled_dot_product_attention_math": _of_shapes(_attention),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _of_shapes(_attention),
    "aten::_convolution_mode": _of_shapes(lambda out, x, weight, *_: conv_flop_count(x, weight, out)),
    "aten::matmul": _matmul,
    "aten::baddbmm": _SECOND,
    "aten::addbmm": _of_shapes(lambda out, added, a, b, *_: prod(a) * b[-1]),
    "aten::addmv": _SECOND,
    **dict.fromkeys(("aten::mv", "aten::dot", "aten::vdot", "aten::inner"), _FIRST),
    # (F, K) x (K, G) → (F, G), each letter for several axes: the product of the input sizes is F * K * K * G.
    "aten::tensordot": _of_shapes(
        lambda out, a, b, *_: prod(out) * isqrt(prod(a) * prod(b) // prod(out)) if prod(out) else 0
    ),
    # (.., I) and (.., J) with weight (O, I, J): first to (.., O, J), then to (.., O).
    "aten::bilinear": _of_shapes(lambda out, a, b, weight, *_: prod(a) * weight[0] * weight[2] + prod(out) * weight[2]),
    "aten::layer_norm": _norm(2),
    "aten::native_layer_norm": _norm(2),
    "aten::native_group_norm": _norm(1),
    "aten::native_batch_norm": batchnorm_flop_jit,
    "aten::_native_batch_norm_legit_no_training": _norm(1, plain=1),
    "aten::_adaptive_avg_pool2d": _of_shapes(lambda out, x, *_: prod(x)),
}
"""In addition to fvcore's table, or where its handle raises."""
