"""From a torch module to an ONNX graph in memory, by torch's own exporters and without output on the terminal.

Inputs, outputs and dynamic axes are named, and exporter metadata about the machine (stack traces, file paths, class
names) is removed. If a model cannot be exported, the error names the user's source line.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset18 as op, rewriter
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention as attention_of_four_axes
from torch.onnx._internal.exporter._ir_passes import _all_values, rename_axis
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils import _pytree as pytree

from exporters.signature import Axes, Tensors, axis_name
from surgery.core import Callee, first_line, last_own_line, lean, scratch_folder, user_line
from surgery.errors import UnsupportedModel


def convert(
    call: Callee, tensors: Tensors, *, axes: Axes, outputs: Sequence[str], opset: int, dynamo: bool
) -> ir.Model:
    """Return the ONNX graph of a model, named and cleaned; `call` may be changed, so pass a copy.

    A dynamic axis that torch finds to be fixed is an error. Without `dynamo`, the TorchScript tracer follows the
    example's path through the code. Raises UnsupportedModel, with the user's source line if known.
    """
    try:
        if dynamo:
            # Trying to make one split of every two slices takes a quarter of the time of torchvision's swin_t.
            rules = tuple(rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit")
            # Building torch's registry of ONNX functions takes most of the export of a small network: build it once.
            registry = mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_registry))
            with lean(), registry, mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", rules):
                graph = _by_torch_export(call, tensors, axes, opset)
        else:
            with mock.patch.object(torch._C, "_jit_onnx_log", lambda *_: None, create=True):  # prints failed graphs
                graph = _by_torchscript(call, tensors, axes, outputs, opset)
    except Exception as error:  # torch's exporters pass on any exception of the model
        raise UnsupportedModel(_refusal(call.module, error, dynamo=dynamo)) from error
    return _tidy(graph, list(tensors), outputs, axes)


def _registry(*opset: int, **named: int) -> ONNXRegistry:
    """Return torch's translations to ONNX; the exporter may add to the copy."""
    built = _built_registry(*opset, **named)
    registry = ONNXRegistry()
    registry._opset_version = built._opset_version
    registry.functions = {target: list(translations) for target, translations in built.functions.items()}
    return registry


_built_registry = cache(ONNXRegistry.from_torchlib)


def _by_torch_export(call: Callee, tensors: Tensors, axes: Axes, opset: int) -> ir.Model:
    args, kwargs = _arguments(call, tensors)
    shapes = _dynamic_shapes(call, tensors, axes) if any(axes.values()) else None
    table = {_SDPA: _attention} if opset < _OWN_ATTENTION_SINCE else {}
    how: dict[str, Any] = {"opset_version": opset, "custom_translation_table": table, "dynamic_shapes": shapes}
    export: Any = partial(torch.onnx.export, args=args, kwargs=kwargs, dynamo=True, verbose=False, **how)
    try:
        program = export(call.module)
    except Exception as error:
        if not any("Cannot view a tensor" in str(link) for link in _chain(error)):
            raise
        program = export(_reshaping(call.module, args, kwargs, shapes))
    graph: ir.Model = program.model
    return graph


def _dynamic_shapes(call: Callee, tensors: Tensors, axes: Axes) -> dict[str, Any]:
    """Return `axes` in the form that `torch.export` asks for: the call's own nesting, by parameter of `forward`."""
    chosen = (dict.fromkeys(axes.get(name, ()), torch.export.Dim.DYNAMIC) or None for name in tensors)
    leaves = [next(chosen) if isinstance(leaf, torch.Tensor) else None for leaf in call.leaves]
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    return dict(inspect.signature(call.module.forward).bind(*args, **kwargs).arguments)


_SDPA = torch.ops.aten.scaled_dot_product_attention.default


def _reshaping(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, shapes: Any
) -> torch.export.ExportedProgram:
    """Capture with reshapes for views, as torch's decompositions change strides, and attention contiguous."""
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        elif node.target is _SDPA:
            with program.graph.inserting_after(node):
                layout = {"memory_format": torch.contiguous_format}
                copy = program.graph.call_function(aten.clone.default, (node,), layout)
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    program.graph_module.recompile()
    return program


def _by_torchscript(call: Callee, tensors: Tensors, axes: Axes, outputs: Sequence[str], opset: int) -> ir.Model:
    args, kwargs = _arguments(call, tensors)
    free = {n: {axis: axis_name(n, axis, t.ndim) for axis in axes[n]} for n, t in tensors.items() if axes.get(n)}
    named: dict[str, Any] = {"input_names": list(tensors), "output_names": list(outputs), "dynamic_axes": free}
    how: dict[str, Any] = {"kwargs": kwargs, "dynamo": False, "verbose": False, "opset_version": opset}
    with scratch_folder() as room:
        file = room / "model.onnx"
        torch.onnx.export(call.module, args, file, **how, **named)
        graph: ir.Model = ir.from_proto(onnx.load(file))
        return graph


def _arguments(call: Callee, tensors: Tensors) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    # Callee copies the tensors: one that is passed as two inputs would become one input of the program.
    args, kwargs = call.arguments(list(tensors.values()))
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
    names: dict[str | ir.SymbolicDim, str] = {}
    for name, value in inputs.items():
        shape = list(value.shape or ())
        for axis in axes.get(name, ()):
            dim = shape[axis]
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                names.setdefault(dim.value, axis_name(name, axis, len(shape)))
    rename_axis(model, names)


def _clear_notes(model: ir.Model) -> None:
    model.doc_string = None
    model.metadata_props.clear()
    passes.ClearMetadataAndDocStringPass()(model)
    for value in _all_values(model):
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.metadata_props.clear()


_OWN_ATTENTION_SINCE = 23  # from this operator set on, torch translates to ONNX's own Attention


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
    """Attention of (..., L, E) to (..., S, E) and (..., S, V), with any number of leading axes, not just two."""
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


def _keep_zeros_in_maxima(model: ir.Model) -> None:
    """Make axes of paddings before max-poolings explicit; ONNX Runtime (1.31) merges others, as if padded by -inf."""
    for graph in model.graphs():
        for node in [n for n in graph if n.op_type == "Pad" and len(n.inputs) < 4]:  # data, pads, value, axes
            maxima = [user for user, _ in node.outputs[0].uses() if user.op_type == "MaxPool"]
            if not maxima:
                continue
            rank = 2 + len(maxima[0].attributes["kernel_shape"].as_ints())
            axes = ir.tensor(list(range(rank)), name=f"{node.outputs[0].name}_axes")
            value = ir.Value(name=axes.name, const_value=axes, shape=ir.Shape([rank]), type=ir.TensorType(axes.dtype))
            graph.register_initializer(value)
            node.resize_inputs(4)
            node.replace_input_with(3, value)


def place_of(error: BaseException) -> str:
    """Return ` at file:line` of the user's code that led to `error`, from stack frames or graph nodes, or ''."""
    traces = (trace for link in _chain(error) for trace in _node_traces(link))
    lines = (line for trace in traces if (line := last_own_line(trace)))
    return user_line(error) or next((f" at {line}" for line in lines), "")


def reason(error: BaseException) -> str:
    """Return the first line of the innermost explicit cause of `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _refusal(model: torch.nn.Module, error: BaseException, *, dynamo: bool) -> str:
    captured = any(type(link).__name__ == "ConversionError" for link in _chain(error))
    step = (
        "rewrite that code with operators that ONNX has"
        if captured or not dynamo
        else "rewrite that code without control flow on data, or export only the example's path by "
        "ExportSettings(dynamo=False)"
    )
    return f"{type(model).__name__} cannot be exported to ONNX{place_of(error)}: {reason(error)}; {step}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
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
