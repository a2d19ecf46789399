"""From a torch module to an ONNX graph in memory, by torch's own exporters and without output on the terminal.

Inputs, outputs and dynamic axes are named, and exporter metadata about the machine (stack traces, file paths, class
names) is removed. If a model cannot be exported, the error names the user's source line.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention as attention_of_four_axes
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules
from torch.onnx._internal.exporter import _registration
from torch.onnx._internal.exporter._dynamic_shapes import convert_str_to_export_dim

from exporters.signature import Axes, Call, axis_name
from surgery.core import UNKNOWN, instead, last_own_line, lean, where_raised
from surgery.errors import UnsupportedModel

_REASON_LENGTH = 300
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def convert(
    model: torch.nn.Module, call: Call, *, axes: Axes, outputs: Sequence[str], opset: int, dynamo: bool
) -> ir.Model:
    """Return the ONNX graph of `model`, named and cleaned.

    Args:
        model: in eval mode, on the CPU; may be changed by the exporter, so pass a copy.
        call: example inputs, with a batch above 1 if the batch is dynamic.
        axes: dynamic axes by input name; an axis that torch then finds to be fixed is an error.
        outputs: output names, in the order in which the model returns its tensors.
        opset: ONNX operator set to write.
        dynamo: by `torch.export`; else by the TorchScript tracer, which follows the example's path through the code.

    Raises:
        UnsupportedModel: the model cannot be exported; the message names the user's source line if known.
    """
    try:
        if dynamo:
            with lean(), _functions_once():
                graph = _by_torch_export(model, call, axes, opset)
        else:
            with _quiet_descriptors():
                graph = _by_torchscript(model, call, axes, outputs, opset)
    except Exception as error:  # torch's exporters pass on any exception of the model
        raise UnsupportedModel(_refusal(model, error, dynamo=dynamo)) from error
    return _tidy(graph, list(call.tensors), outputs, axes)


@contextlib.contextmanager
def _quiet_descriptors() -> Iterator[None]:
    """Keep the TorchScript tracer from printing whole graphs when it fails: it does so below Python's own streams."""
    kept = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
    try:
        with open(os.devnull, "wb") as nowhere:
            for descriptor, _ in kept:
                os.dup2(nowhere.fileno(), descriptor)
        yield
    finally:
        for descriptor, original in kept:
            os.dup2(original, descriptor)
            os.close(original)


@contextlib.contextmanager
def _functions_once() -> Iterator[None]:
    """Let torch read its ONNX functions once and not for every export, a tenth of the time of one."""
    registries, filled = _registration.ONNXRegistry, getattr(_registration.ONNXRegistry, "from_torchlib", None)

    def copied(*given: Any, **named: Any) -> Any:
        # Functions for torchvision's operators are left out of a registry while it is not imported.
        key = (*given, *named.items(), "torchvision" in sys.modules)
        if key not in _FILLED:
            _FILLED[key] = filled(*given, **named)  # type: ignore[misc]
        registry = copy.copy(_FILLED[key])
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    with instead(registries, "from_torchlib", staticmethod(copied)):
        yield


_FILLED: dict[Any, Any] = {}


def _by_torch_export(model: torch.nn.Module, call: Call, axes: Axes, opset: int) -> ir.Model:
    args, kwargs = _arguments(call)
    shapes = call.dynamic_shapes(axes) if any(axes.values()) else None

    def export(subject: Any) -> Any:
        return torch.onnx.export(
            subject,
            args,
            kwargs=kwargs,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=opset,
            custom_translation_table=dict(_translations(opset)),
            dynamic_shapes=shapes,
        )

    try:
        program = export(model)
    except Exception as error:
        if not any(_NO_VIEW in str(link) for link in _chain(error)):
            raise
        program = export(_reshaping(model, args, kwargs, shapes))
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    graph: ir.Model = program.model
    _simplify(graph)
    return graph


_NO_VIEW = "Cannot view a tensor"


def _reshaping(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, shapes: Any
) -> torch.export.ExportedProgram:
    """Capture with reshapes instead of views, and a uniform memory layout of attention results.

    Whether a view is possible depends on strides, and torch's decompositions lay attention out unlike its kernel.
    """
    dynamic, _ = convert_str_to_export_dim(shapes)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        elif node.target is aten.scaled_dot_product_attention.default:
            with program.graph.inserting_after(node):
                layout = {"memory_format": torch.contiguous_format}
                copy = program.graph.call_function(aten.clone.default, (node,), layout)
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    program.graph_module.recompile()
    return program


def _by_torchscript(model: torch.nn.Module, call: Call, axes: Axes, outputs: Sequence[str], opset: int) -> ir.Model:
    args, kwargs = _arguments(call)
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / "model.onnx"
        torch.onnx.export(
            model,
            args,
            file,
            kwargs=kwargs,
            dynamo=False,
            verbose=False,
            opset_version=opset,
            input_names=list(call.tensors),
            output_names=list(outputs),
            dynamic_axes={
                name: {axis: axis_name(name, axis, tensor.ndim) for axis in axes[name]}
                for name, tensor in call.tensors.items()
                if axes.get(name)
            },
        )
        graph: ir.Model = ir.from_proto(onnx.load(file))
        return graph


def _arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    # A tensor passed as two inputs would become one input of the program, so each gets its own storage.
    args, kwargs = call.arguments({name: tensor.detach().clone() for name, tensor in call.tensors.items()})
    if args and isinstance(args[-1], dict) and not kwargs:
        args = (*args, {})  # a dictionary in last place would be taken for the keyword inputs
    return args, kwargs or None


def _tidy(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], axes: Axes) -> ir.Model:
    """Name inputs, outputs and axes, and remove unused values and exporter metadata."""
    found = [str(value.name) for value in model.graph.inputs]
    if len(found) < len(inputs):  # the TorchScript tracer, which was given the names, drops inputs that nothing uses
        inputs = [name for name in inputs if name in found]
    if len(found) != len(inputs) or len(model.graph.outputs) != len(outputs):
        raise UnsupportedModel(
            f"torch's exporter made the inputs {found} and {len(model.graph.outputs)} outputs of a model that has "
            f"{', '.join(inputs)} and {len(outputs)}; return every tensor once, and nothing but tensors"
        )
    _name_axes(model, dict(zip(inputs, model.graph.inputs, strict=True)), axes)
    for value, name in (*zip(model.graph.inputs, inputs, strict=True), *zip(model.graph.outputs, outputs, strict=True)):
        value.name = name
    _keep_zeros_in_maxima(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.NameFixPass()(model)  # an inner value may have had the name that an output has now
    _clear_notes(model)
    return model


def _name_axes(model: ir.Model, inputs: Mapping[str, ir.Value], axes: Axes) -> None:
    """Replace torch's symbols (`s77`) by names, in every shape of the graph, expressions included."""
    names: dict[str, str] = {}
    for name, value in inputs.items():
        shape = list(value.shape or ())
        for axis in axes.get(name, ()):
            dim = shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                names.setdefault(dim.value, axis_name(name, axis, len(shape)))
    if not names:
        return
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in [part for part in _parts(model) if isinstance(part, ir.Value) and part.shape is not None]:
        value.shape = ir.Shape(
            symbol.sub(lambda match: names[match[1]], str(dim.value))
            if isinstance(dim, ir.SymbolicDim) and dim.value
            else dim
            for dim in value.shape or ()
        )


def _clear_notes(model: ir.Model) -> None:
    model.doc_string = None
    model.metadata_props.clear()
    for part in _parts(model):
        part.metadata_props.clear()
        part.doc_string = None
        if isinstance(part, ir.Value) and part.const_value is not None:
            part.const_value.metadata_props.clear()


def _parts(model: ir.Model) -> Iterator[ir.Graph | ir.Function | ir.Node | ir.Value]:
    graphs: list[ir.Graph | ir.Function] = [*model.graphs(), *model.functions.values()]
    for graph in graphs:
        yield graph
        yield from graph.inputs
        for node in graph:
            yield node
            yield from node.outputs
    for graph in model.graphs():
        yield from graph.initializers.values()


# Attention. ---------------------------------------------------------------------------------------------------------

_OWN_ATTENTION_SINCE = 23
"""From this operator set on, torch translates to ONNX's own Attention."""


def _translations(opset: int) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """ATen operator → translation, for `torch.onnx.export`: attention over any number of leading axes, not just two."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention} if opset < _OWN_ATTENTION_SINCE else {}


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Softmax of the scaled product of (..., L, E) and (..., S, E) plus the mask, times (..., S, V)."""
    if len(query.shape) == 4 or is_causal or enable_gqa:
        return attention_of_four_axes(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    axes = list(range(len(key.shape)))
    factor = op.CastLike(op.Constant(value_float=1.0 / math.sqrt(query.shape[-1]) if scale is None else scale), query)
    scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]]))
    if attn_mask is not None and attn_mask.dtype == 9:  # onnx.TensorProto.BOOL
        never = op.CastLike(op.Constant(value_float=-math.inf), query)
        scores = op.Where(attn_mask, scores, never)
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


# Simplification. ----------------------------------------------------------------------------------------------------

_ROUNDS = 2
_RULES = """
    sub_0 div_by_1 mul_by_1 add_0 dropout_zero dropout_inference two_reshapes_matmul_reshape
    one_reshape_matmul_reshape cast_constant_of_shape cast_constant_of_shape_without_value collapse_slice
    collapse_slice2 materialize_reshape_shape min_min max_max min_max max_min successive_clip_relu
    successive_relu_clip successive_relu successive_clip cast_cast no_op_cast no_op_expand flatten_to_reshape
    reshape_reshape no_op_transpose transpose_transpose unsqueeze_unsqueeze squeeze_reshape_1d
    no_op_dynamic_scatter_nd no_op_static_scatter_nd normalize_pad_format_conv fuse_pad_into_conv
    fuse_batchnorm_into_conv fuse_batchnorm_into_conv_transpose fuse_batchnorm_into_gemm
    remove_optional_bias_from_conv remove_optional_bias_from_conv_transpose remove_optional_bias_from_gemm
"""
"""Names of onnxscript's common rewrite rules, in the order in which they are tried."""


def _simplify(model: ir.Model) -> None:
    """Fold constants, fold batch norms into convolutions, and remove unused nodes, in place.

    torch's own `optimize=True` does the same, and also tries to turn pairs of slices into splits by looking at every
    pair of nodes: more than a quarter of the time that exporting torchvision's swin_t takes.
    """
    passes.InlinePass()(model)
    rewrite = RewritePass([getattr(rules, f"{name}_rule") for name in _RULES.split()])
    for _ in range(_ROUNDS):
        folded = fold_constants_ir(model).modified
        changed = rewrite(model).modified
        passes.RemoveUnusedNodesPass()(model)
        passes.RemoveUnusedOpsetsPass()(model)
        if not (folded or changed):
            break
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _keep_zeros_in_maxima(model: ir.Model) -> None:
    """Make the axes of paddings before max-poolings explicit.

    ONNX Runtime makes one MaxPool of a Pad with zeros and a MaxPool, whose own padding is below any number: where all
    of a window is negative the result differs (seen in 1.31). It leaves a Pad that names its axes alone.
    """
    for graph in model.graphs():
        for node in [n for n in graph if n.op_type == "Pad" and len(n.inputs) < _PAD_INPUTS]:
            maxima = [user for user, _ in node.outputs[0].uses() if user.op_type == "MaxPool"]
            if not maxima:
                continue
            rank = 2 + len(maxima[0].attributes["kernel_shape"].as_ints())
            axes = ir.tensor(list(range(rank)), name=f"{node.outputs[0].name}_axes")
            value = ir.Value(name=axes.name, const_value=axes, shape=ir.Shape([rank]), type=ir.TensorType(axes.dtype))
            graph.register_initializer(value)
            node.resize_inputs(_PAD_INPUTS)
            node.replace_input_with(_PAD_INPUTS - 1, value)


_PAD_INPUTS = 4
"""Data, pads, value, axes."""


# Errors. ------------------------------------------------------------------------------------------------------------


def source_line(error: BaseException) -> str | None:
    """Return the user's ``file:line`` that led to `error`, from stack frames or graph nodes, or None."""
    if (found := where_raised(error)) != UNKNOWN:
        return found
    traces = (trace for link in _chain(error) for trace in _node_traces(link))
    return next(filter(None, map(last_own_line, traces)), None)


def reason(error: BaseException) -> str:
    """Return the first sentence of the innermost explicit cause of `error`, as one short line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."


def _refusal(model: torch.nn.Module, error: BaseException, *, dynamo: bool) -> str:
    where = source_line(error)
    place = f" at {where}" if where else ""
    captured = any(type(link).__name__ == "ConversionError" for link in _chain(error))
    step = (
        "rewrite that code with operators that ONNX has"
        if captured or not dynamo
        else "rewrite that code without control flow on data, or export only the example's path by "
        "ExportSettings(dynamo=False)"
    )
    return f"{type(model).__name__} cannot be exported to ONNX{place}: {reason(error).rstrip('.')}; {step}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and not any(link is s for s in seen):
        seen.append(link)
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _node_traces(error: BaseException) -> Iterator[str]:
    """Yield the recorded source lines of graph nodes that the exporter was working on when it failed."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("node")
        if isinstance(node, torch.fx.Node) and node.stack_trace:
            yield node.stack_trace
        elif isinstance(node, torch.Node):  # of a TorchScript graph
            yield str(node.sourceRange()).split("\n", maxsplit=1)[0]  # innermost first
