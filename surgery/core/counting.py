"""MACs and parameters of a module, as fvcore counts them: the figures in reports and budgets.

fvcore's table of operator handles is used unchanged, so that running fvcore gives the same numbers for a model without
attention. Handles are added only for multiply-adds that fvcore ignores (scaled-dot-product attention, batched matrix
products with an addend, convolutions with named padding, ...) and for the names of the same operators in exported
graphs; window pooling, activations and additions count zero, as in fvcore. One multiply-add is one MAC.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isqrt, prod
from types import MappingProxyType
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import (
    batchnorm_flop_jit,
    conv_flop_count,
    elementwise_flop_counter,
    get_shape,
    matmul_flop_jit,
    norm_flop_counter,
)
from torch import Tensor, fx, nn

from surgery.core.callee import Callee
from surgery.errors import InvalidInput, UnsupportedModel

Handle = Callable[[Sequence[Any], Sequence[Any]], Any]
"""Inputs and outputs of one traced operator (`torch._C.Value`) → its MACs."""


def count_macs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, batch: int | None = None
) -> int:
    """Return the multiply-adds of one forward pass.

    Args:
        module: a module or graph module; left unchanged. It is counted in eval mode, without gradients.
        args: positional arguments of `forward`.
        kwargs: keyword arguments of `forward`.
        batch: number of samples in the inputs; the result is then per sample, rounded down.

    Raises:
        InvalidInput: the arguments contain no tensor, or `batch` is below 1.
        UnsupportedModel: the module cannot be copied or run on these arguments.
    """
    if batch is not None and batch < 1:
        raise InvalidInput(f"batch={batch}: the number of samples in the inputs must be at least 1")
    return sum(count_by_operator(module, args, kwargs).values()) // (batch or 1)


def count_by_operator(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return the multiply-adds of one forward pass per operator (fvcore's names, `conv` for all convolutions).

    Args:
        module: see `count_macs`.
        args: see `count_macs`.
        kwargs: see `count_macs`.

    Raises:
        InvalidInput: no tensor among the arguments.
        UnsupportedModel: the module cannot be copied or run on these arguments.
    """
    callee = Callee(module, args, kwargs)
    if not callee.tensors:
        raise InvalidInput("MACs are counted by running the module: its example inputs hold no tensor")
    try:
        analysis = _analysis(_Counted(_private_copy(module), args, kwargs), callee.tensors)
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
            _avoid_untraceable(submodule)
    return private


def _avoid_untraceable(module: fx.GraphModule) -> None:
    """Replace operators on which torch's tracer fails (it records them with too few arguments) by equivalents."""
    swapped = [node for node in module.graph.nodes if node.target in _TRACEABLE]
    for node in swapped:
        node.target = _TRACEABLE[node.target]
    if swapped:
        module.recompile()


_TRACEABLE = MappingProxyType(
    {
        torch.ops.aten.fill.Scalar: torch.ops.aten.full_like.default,
        torch.ops.aten.fill.Tensor: torch.ops.aten.copy.default,
        torch.ops.aten.zero.default: torch.ops.aten.zeros_like.default,
    }
)


def _analysis(module: nn.Module, tensors: tuple[Tensor, ...]) -> Any:
    analysis = FlopCountAnalysis(module, tensors).set_op_handle(**EXTRA_HANDLES)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


@contextmanager
def _attention_spelled_out() -> Iterator[None]:
    """Keep torch's attention modules off the fused inference path, which hides their products in one operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# --- handles: shapes of inputs and outputs → MACs ----------------------------------------------------------------


def _shape(value: Any) -> list[int]:
    return list(get_shape(value))


def _numel(value: Any) -> int:
    return prod(_shape(value))


def _scaled_dot_product_attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """(.., L, E) x (.., S, E) → (.., L, S); (.., L, S) x (.., S, Ev) → (.., L, Ev)."""
    rows = prod(_shape(outputs[0])[:-1])  # batch, heads and L, after broadcasting
    keys, width = _shape(inputs[1])[-2:]
    return rows * keys * (width + _shape(inputs[2])[-1])


def _convolution_mode(inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """A convolution whose padding is given by name ('same', 'valid')."""
    return conv_flop_count(_shape(inputs[0]), _shape(inputs[1]), _shape(outputs[0]))


def _per_output(position: int) -> Handle:
    """Count, per output element, the length of the last axis of the input at `position`."""

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return _numel(outputs[0]) * _shape(inputs[position])[-1]

    return handle


def _addbmm(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """(B, N, K) x (B, K, M), summed over B."""
    return _numel(inputs[1]) * _shape(inputs[2])[-1]


def _tensordot(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """(F, K) x (K, G) → (F, G), each letter for several axes: the product of the input sizes is F * K * K * G."""
    result = _numel(outputs[0])
    return result * isqrt(_numel(inputs[0]) * _numel(inputs[1]) // result) if result else 0


def _bilinear(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """(.., I) and (.., J) with weight (O, I, J): first to (.., O, J), then to (.., O)."""
    out, _, second = _shape(inputs[2])
    return _numel(inputs[0]) * out * second + _numel(outputs[0]) * second


def _matmul(inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """Extend fvcore's handle to a vector as second factor."""
    if len(_shape(inputs[1])) == 1:
        return _numel(inputs[0])
    return matmul_flop_jit(inputs, outputs)


def _norm(affine_position: int) -> Handle:
    """Extend fvcore's handle, by the same formula, to inputs of fewer than 2 or more than 5 axes."""
    fvcore = norm_flop_counter(affine_position)

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        if 2 <= len(_shape(inputs[0])) <= 5:
            return fvcore(inputs, outputs)
        return _numel(inputs[0]) * (4 if get_shape(inputs[affine_position]) is None else 5)

    return handle


def _batch_norm_eval(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Count batch norm in eval mode by fvcore's formula: scale and shift."""
    return _numel(inputs[0]) * (1 if get_shape(inputs[1]) is None else 2)


EXTRA_HANDLES: Mapping[str, Handle] = MappingProxyType(
    {
        "aten::scaled_dot_product_attention": _scaled_dot_product_attention,
        "aten::_scaled_dot_product_attention_math": _scaled_dot_product_attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu": _scaled_dot_product_attention,
        "aten::_convolution_mode": _convolution_mode,
        "aten::matmul": _matmul,
        "aten::baddbmm": _per_output(1),
        "aten::addbmm": _addbmm,
        "aten::mv": _per_output(0),
        "aten::addmv": _per_output(1),
        "aten::dot": _per_output(0),
        "aten::vdot": _per_output(0),
        "aten::inner": _per_output(0),
        "aten::tensordot": _tensordot,
        "aten::bilinear": _bilinear,
        "aten::layer_norm": _norm(2),
        "aten::native_layer_norm": _norm(2),
        "aten::native_group_norm": _norm(1),
        "aten::native_batch_norm": batchnorm_flop_jit,
        "aten::_native_batch_norm_legit_no_training": _batch_norm_eval,
        "aten::_adaptive_avg_pool2d": elementwise_flop_counter(1, 0),
    }
)
"""Operator name → handle, in addition to fvcore's table (or where its handle raises)."""
