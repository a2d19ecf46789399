"""From a torch module to an ONNX graph in memory, by torch's own exporters and without a word on the terminal.

Inputs, outputs and dynamic axes get their names, and everything the exporter noted about the machine it ran on is taken
out (stack traces, file paths, class names). What cannot be exported is refused with the user's own source line.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import re
import sys
import sysconfig
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnx_ir.passes import common as passes
from torch.onnx._internal.exporter import _registration
from torch.onnx._internal.exporter._dynamic_shapes import convert_str_to_export_dim

from exporters.attention import translations
from exporters.optimise import keep_zeros_in_maxima, optimise
from exporters.signature import Axes, Call, axis_name
from surgery.core import ONE_AT_A_TIME, instead, lean
from surgery.errors import UnsupportedModel

_REASON_LENGTH = 300
_LINE = re.compile(r'File "([^"]+\.py)", line (\d+)|(/[^\s"()]+\.py)[:(](\d+)')
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PACKAGES = tuple(
    str(Path(str(m)).parent) for m in (torch.__file__, onnx.__file__, ir.__file__, onnxscript.__file__, __file__)
)
_STDLIB = sysconfig.get_paths()["stdlib"]


def capture(
    model: torch.nn.Module, call: Call, *, axes: Axes, outputs: Sequence[str], opset: int, dynamo: bool
) -> ir.Model:
    """Return the ONNX graph of `model`, named and cleaned.

    Args:
        model: in eval mode, on the CPU; may be changed by the exporter, so pass a copy.
        call: example inputs, at a batch above 1 where the batch is dynamic.
        axes: dynamic axes by input name; an axis that torch then finds to be fixed is an error.
        outputs: output names, in the order in which the model returns its tensors.
        opset: ONNX operator set to write.
        dynamo: by `torch.export`; else by the TorchScript tracer, which follows the example's way through the code.

    Raises:
        UnsupportedModel: with the user's source line, where there is one.
    """
    try:
        if dynamo:
            with lean(), _functions_once():
                graph = _by_torch_export(model, call, axes, opset)
        else:
            with _quiet_descriptors():
                graph = _by_torchscript(model, call, axes, outputs, opset)
    except Exception as error:  # torch's exporters pass on whatever any line of the model raises
        raise UnsupportedModel(_refusal(model, error, dynamo=dynamo)) from error
    return _tidy(graph, list(call.tensors), outputs, axes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, log records and prints of the block off the terminal (for the whole process, while it runs)."""
    with (
        ONE_AT_A_TIME,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


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


def source_line(error: BaseException) -> str | None:
    """Return the user's ``file:line`` that led to `error`: the deepest frame outside torch and its exporters."""
    chain = list(_chain(error))
    for link in reversed(chain):
        frames = [f for f in traceback.extract_tb(link.__traceback__) if not _is_library(f.filename)]
        if frames:
            return f"{frames[-1].filename}:{frames[-1].lineno}"
    # No frame: the graph was captured, and one of its nodes failed. The node remembers, else the message may.
    texts = [text for link in chain for text in (*_node_traces(link), str(link))]
    for text in texts:
        found = [(a or c, b or d) for a, b, c, d in _LINE.findall(text) if not _is_library(a or c)]
        if found:
            return ":".join(found[-1])
    return None


def reason(error: BaseException) -> str:
    """Return the first sentence of the innermost explicit cause of `error`, as one short line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."


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
            custom_translation_table=dict(translations(opset)),
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
    optimise(graph)
    return graph


_NO_VIEW = "Cannot view a tensor"


def _reshaping(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, shapes: Any
) -> torch.export.ExportedProgram:
    """Capture with reshapes for views, and the results of attention laid out in one way.

    Whether a view is possible hangs on strides, and torch's decompositions lay attention out otherwise than its kernel.
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
    """Return ``(args, kwargs)`` for torch.onnx.export."""
    # A tensor given for two inputs would become one input of the program: each gets storage of its own.
    args, kwargs = call.arguments({name: tensor.detach().clone() for name, tensor in call.tensors.items()})
    if args and isinstance(args[-1], dict) and not kwargs:
        args = (*args, {})  # a dictionary in last place would be taken for the keyword inputs
    return args, kwargs or None


def _tidy(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], axes: Axes) -> ir.Model:
    """Name inputs, outputs and axes, drop what nothing uses, and clear every note the exporter left."""
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
    keep_zeros_in_maxima(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.NameFixPass()(model)  # an inner value may have had the name that an output has now
    passes.ClearMetadataAndDocStringPass()(model)
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
    for value in _values(model):
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            symbol.sub(lambda match: names[match[1]], str(dim.value))
            if isinstance(dim, ir.SymbolicDim) and dim.value
            else dim
            for dim in value.shape
        )


def _clear_notes(model: ir.Model) -> None:
    model.doc_string = None
    model.metadata_props.clear()
    holders: list[ir.Graph | ir.Function | ir.Value] = [*model.graphs(), *model.functions.values(), *_values(model)]
    for holder in holders:
        holder.metadata_props.clear()
        holder.doc_string = None
    for graph in model.graphs():
        for initializer in graph.initializers.values():
            if initializer.const_value is not None:
                initializer.const_value.metadata_props.clear()


def _values(model: ir.Model) -> Iterator[ir.Value]:
    graphs: list[ir.Graph | ir.Function] = [*model.graphs(), *model.functions.values()]
    for graph in graphs:
        yield from graph.inputs
        for node in graph:
            yield from node.outputs
    for graph in model.graphs():
        yield from graph.initializers.values()


def _refusal(model: torch.nn.Module, error: BaseException, *, dynamo: bool) -> str:
    where = source_line(error)
    place = f" at {where}" if where else ""
    captured = any(type(link).__name__ == "ConversionError" for link in _chain(error))
    step = (
        "rewrite that code with operators that ONNX has"
        if captured or not dynamo
        else "rewrite that code without control flow on data, or keep only the example's path with dynamo=False"
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


def _is_library(filename: str) -> bool:
    if filename.startswith("<") or filename.startswith(_PACKAGES):
        return True
    return filename.startswith(_STDLIB) and "site-packages" not in filename
