"""Turn a module into a `Program`: the only room that calls `torch.export`.

The batch axis is traced as dynamic (inputs of batch 1 are repeated to 2, because 1 would be baked in), height and width
where the model permits. The captured graph is cleaned of run-time assertions and of in-place operators, so that every
later stage sees plain functions from values to values.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from surgery.capture import guards
from surgery.capture.cleaning import clean
from surgery.capture.unlifting import unlift
from surgery.core import (
    ONE_AT_A_TIME,
    TOLERANCE,
    UNKNOWN,
    InputSpec,
    Node,
    Program,
    ReshapeCount,
    attribute,
    buffers_kept,
    first_line,
    fresh,
    hint,
    is_symbolic,
    last_own_line,
    lean,
    sizes_spill,
    traceable,
    where_raised,
)
from surgery.errors import InvalidInput, UnsupportedModel

_ABOUT_INPUTS = re.compile("shape|size|dimension|channel|expected|dtype|type|argument|mat1", re.IGNORECASE)


Args = tuple[Any, ...]


def trace(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Program:
    """Capture `model` in eval mode as a graph of ATen operators.

    Args:
        model: any module that `torch.export` can capture; left as it was, mode included.
        example_inputs: one tensor or a tuple of positional inputs, such as (1, 3, 224, 224) of float32.
        example_kwargs: keyword inputs.

    Returns:
        The program. Batch is dynamic, or `notes` says why not.

    Raises:
        InvalidInput: a weight is not finite, or the inputs are not tensors the model accepts.
        UnsupportedModel: the model cannot be captured; names the user's own source line.
    """
    require_module(model)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = _in_forward_order(model, example_kwargs or {})
    require_finite(model)
    with evaluating(model), buffers_kept(model), quiet():
        captured, notes = _export(traceable(model), args, kwargs)
        cleaned = clean(captured.exported, captured.graph)
    args, kwargs = captured.inputs
    graph = cleaned.graph
    names = _input_names(graph)
    inputs = _describe_inputs(graph, names)
    notes = (*notes, *_fixed_axes(inputs), *_computed_weights(cleaned.materialised))
    return Program(
        graph=graph,
        nodes=describe_graph(graph.graph),
        inputs=inputs,
        example_args=args,
        example_kwargs=kwargs,
        fingerprint=_fingerprint(graph),
        notes=notes,
        model=model,
        materialised=cleaned.materialised,
    )


# -- inputs ----------------------------------------------------------------------------------------------------------


def require_module(model: Any) -> None:
    """Raise where what was given for a model is none, or one without Python code or without values."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"not a torch.nn.Module but of type {type(model).__name__}: pass the module itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel("the model is a TorchScript module; pass the Python module that it was made from")
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise InvalidInput(f"parameter '{name}' has no size yet; run the model once on an example first")
        if parameter.is_meta:
            raise InvalidInput(f"parameter '{name}' is on the meta device and has no values; load weights first")


def require_finite(model: nn.Module) -> None:
    """Raise InvalidInput where a weight is not a number or infinite."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"weight '{name}' holds NaN or infinite values; load a sound checkpoint")


def _in_forward_order(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword inputs as `torch.export` orders them: like forward's parameters."""
    order = [*inspect.signature(model.forward).parameters, *kwargs]
    return dict(sorted(kwargs.items(), key=lambda item: order.index(item[0])))


def _at_batch_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat inputs of batch 1; inputs that do not share a first axis are left alone."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not tensors:
        raise InvalidInput(
            "example inputs hold no tensor; pass a tensor or a tuple of tensors such as (1, 3, 224, 224)"
        )
    if any(t.numel() == 0 for t in tensors):
        raise InvalidInput("an example input is empty; pass at least one sample, such as (1, 3, 224, 224)")
    single = all(t.dim() > 0 and t.shape[0] == 1 for t in tensors)

    def twice(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach()
        return torch.cat([x, x.flip(-1) if x.is_floating_point() else x]) if single else x

    doubled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(twice, (args, kwargs))
    return doubled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode for the time of the block.

    Flags are set directly, so that no code of the user's runs; a graph is asked, since its operators hold flags too.
    """
    modes = [(m, m.training) for m in model.modules()]
    graphs = [m for m, training in modes if training and isinstance(m, torch.fx.GraphModule)]
    try:
        for graph in graphs:
            with suppress(NotImplementedError):  # what `ExportedProgram.module()` returns knows no modes
                graph.eval()
        for m, _ in modes:
            m.training = False
        yield
    finally:
        for graph in graphs:
            with suppress(NotImplementedError):
                graph.train()
        for m, mode in modes:
            m.training = mode


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of `torch.export` (whole graphs); its exceptions are not touched."""
    nowhere = io.StringIO()
    with ONE_AT_A_TIME, warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        try:
            logging.disable(logging.CRITICAL)
            yield
        finally:
            logging.disable(before)


# -- capture ---------------------------------------------------------------------------------------------------------


def _axes(batch: Any, space: Any) -> Any:
    """Which axes of a tensor of rank r are dynamic."""

    def of(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return None
        axes = {0: batch} if batch is not None else {}
        if space is not None and x.dim() in (4, 5):
            axes.update({x.dim() - 2: space, x.dim() - 1: space})
        return axes or None

    return of


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """What `torch.export` returned, the graph that reads its parameters by name, and the inputs used."""

    exported: Any
    graph: torch.fx.GraphModule
    inputs: tuple[Args, dict[str, Any]]


def _export(model: nn.Module, args: Args, kwargs: dict[str, Any]) -> tuple[_Captured, tuple[str, ...]]:
    """Capture with dynamic batch, height and width where that holds; else with dynamic batch; else with none.

    Also returns what to say.
    """
    twice = _at_batch_two(args, kwargs)
    if not _slow_with_free_sizes(model, twice):
        with suppress(Exception):  # torch.export raises whatever the user's forward or its own passes raise
            captured = _attempt(model, twice, Dim.DYNAMIC, Dim.AUTO)
            exported = captured.exported
            spills = sizes_spill(exported.graph) or guards.broken_by_space(exported, model, twice)
            if not (spills or _broken_by_batch(captured, model, twice)):
                return captured, ()
    try:
        captured = _attempt(model, twice, Dim.DYNAMIC, None)
    except Exception as error:  # likewise
        return _export_fixed(model, args, kwargs, f"{where_raised(error)}: {first_line(error)}")
    if guard := _broken_by_batch(captured, model, twice):
        return _export_fixed(model, args, kwargs, f"forward takes another path unless {guard}")
    return captured, ()


def _slow_with_free_sizes(model: nn.Module, inputs: tuple[Args, dict[str, Any]]) -> bool:
    with suppress(Exception), torch.no_grad(), ReshapeCount() as count:  # what it raises, the capture raises too
        given = fresh(inputs)
        model(*given[0], **given[1])
        return bool(count.slow)
    return True


def _broken_by_batch(captured: _Captured, model: nn.Module, inputs: Any) -> str:
    return guards.broken_by_batch(captured.exported, model, inputs) or _differs_at_one(captured, model)


def _differs_at_one(captured: _Captured, model: nn.Module) -> str:
    """A batch of one is never traced: what the graph makes of it has to be what the model makes of it."""
    single = pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) and x.dim() else x, captured.inputs)
    with torch.no_grad():
        try:
            given = fresh(single)
            wanted = [x for x in pytree.tree_leaves(model(*given[0], **given[1])) if isinstance(x, Tensor)]
        except Exception:  # the model itself takes no batch of one
            return ""
        try:
            run = torch.fx.Interpreter(captured.graph)  # the graph's own code would have to be written first
            outputs = run.run(*pytree.tree_leaves(fresh(single)), enable_io_processing=False)
            got = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
        except Exception as error:  # whatever the graph's operators raise
            return f"the batch is larger than 1 ({first_line(error)})"
    same = len(wanted) == len(got) and all(_close(a, b) for a, b in zip(wanted, got, strict=True))
    return "" if same else "the batch is larger than 1"


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    a, b, allowed = a.double(), b.double(), TOLERANCE.get(a.dtype, 0.0)
    return torch.allclose(a, b, rtol=0.0, atol=allowed * float(a.abs().nan_to_num(0.0).max()), equal_nan=True)


def _attempt(model: nn.Module, inputs: tuple[Args, dict[str, Any]], batch: Any, space: Any) -> _Captured:
    shapes = pytree.tree_map(_axes(batch, space), inputs) if batch is not None else None
    # A copy each time: torch.export takes one tensor given twice for one input, and marks tensors as dynamic.
    positional, named = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, inputs)
    with torch.no_grad(), lean():
        exported = torch.export.export(model, positional, named, dynamic_shapes=_by_name(model, shapes), strict=False)
        return _Captured(exported, unlift(exported), (positional, named))


def _export_fixed(model: nn.Module, args: Args, kwargs: dict[str, Any], why: str) -> tuple[_Captured, tuple[str, ...]]:
    """Capture at the example's own sizes; `why` the batch cannot be dynamic."""
    try:
        captured = _attempt(model, (args, kwargs), None, None)
    except Exception as error:  # torch.export raises whatever the user's forward or its own passes raise
        refuse_wrong_inputs(model, args, kwargs)
        raise UnsupportedModel(
            f"torch.export cannot capture this model, at {where_raised(error)}: {first_line(error)}; rewrite that line "
            "without control flow on tensor values, or try --tracer torch-pruning, or --part for a submodule that can "
            "be captured"
        ) from error
    why = why.removeprefix(f"{UNKNOWN}: ")
    return captured, (f"batch is fixed at the example's: a dynamic one could not be traced ({why})",)


def _by_name(model: nn.Module, shapes: Any) -> Any:
    """Dynamic axes by the names of forward's parameters, those of `*args` and `**kwargs` in one entry each."""
    if shapes is None:
        return None
    return dict(inspect.signature(model.forward).bind(*shapes[0], **shapes[1]).arguments)


def refuse_wrong_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Where the model does not even run on the inputs, that is what to say."""
    try:
        with torch.no_grad():
            given = fresh((args, kwargs))
            model(*given[0], **given[1])
    except Exception as error:  # whatever the user's forward raises
        if not _ABOUT_INPUTS.search(str(error)):
            return
        shapes = [tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        raise InvalidInput(
            f"the model does not run on inputs of shape {shapes}: {where_raised(error)}: {first_line(error)}; "
            "give the shape it expects with --input-shape"
        ) from error


# -- describing ------------------------------------------------------------------------------------------------------


def _input_names(graph: torch.fx.GraphModule) -> list[str]:
    return [n.name for n in graph.graph.nodes if n.op == "placeholder"]


def _describe_inputs(graph: torch.fx.GraphModule, names: list[str]) -> tuple[InputSpec, ...]:
    specs = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            dynamic = tuple(a for a, s in enumerate(value.shape) if is_symbolic(s))
            shape = tuple(hint(s) for s in value.shape)
            specs.append(InputSpec(str(node.target), shape, str(value.dtype).removeprefix("torch."), dynamic))
    return tuple(specs)


def _fixed_axes(inputs: tuple[InputSpec, ...]) -> tuple[str, ...]:
    notes = []
    for spec in inputs:
        free = [a for a in (2, 3) if len(spec.shape) == 4 and a in spec.dynamic]
        if free:
            low, high = (" x ".join(str(size(spec.shape[a])) for a in free) for size in (_half, _largest))
            notes.append(f"input '{spec.name}': axes {free} may be {low} to {high}; other sizes were not examined")
        fixed = [a for a in (2, 3) if len(spec.shape) == 4 and a not in spec.dynamic]
        if fixed:
            size = " x ".join(str(spec.shape[a]) for a in fixed)
            notes.append(
                f"input '{spec.name}': the size of axes {fixed} is fixed at {size}, in the ONNX files too: the model "
                "bakes it in, or other sizes could not be examined"
            )
    return tuple(notes)


def _half(size: int) -> int:
    return size - size // 2


def _largest(size: int) -> int:
    return guards.LARGEST * size


def _computed_weights(materialised: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(
        f"'{name}' holds the weight that forward computed from {', '.join(sources)}"
        for name, sources in materialised.items()
    )


def source_of(node: torch.fx.Node) -> str:
    """`file:line` of the user's code that made this node; the innermost frame outside torch."""
    return last_own_line(node.meta.get("stack_trace") or "")


def module_of(node: torch.fx.Node) -> str:
    """Dotted path of the innermost module whose forward made this node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    return paths[-1] if paths else ""


def describe_graph(graph: torch.fx.Graph) -> tuple[Node, ...]:
    """Return what a graph computes, in order, as readable nodes."""
    return tuple(_describe(n) for n in graph.nodes if n.op == "call_function")


def _describe(node: torch.fx.Node) -> Node:
    value = node.meta.get("val")
    shape = tuple(hint(s) for s in value.shape) if isinstance(value, Tensor) else ()
    return Node(node.name, str(node.target), shape, source_of(node), module_of(node))


def _fingerprint(graph: torch.fx.GraphModule) -> str:
    digest = hashlib.sha256()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = attribute(graph, node.target)
            digest.update(f"{node.target} {tuple(getattr(value, 'shape', ()))}\n".encode())
        elif node.op == "call_function":
            literals = [str(a) for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, (int, float))]
            digest.update(f"{node.target} {' '.join(literals)}\n".encode())
    return digest.hexdigest()
