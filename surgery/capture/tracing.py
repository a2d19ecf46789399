"""Turn a module into a `Program`: the only place that calls `torch.export`.

The batch axis is traced as dynamic (inputs of batch 1 are repeated to 2, because 1 would be specialised), height and
width if the model permits. The captured graph then goes through `passes.PASSES`, so that later stages see a functional
graph.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from surgery.capture.constants import sources_of_weights
from surgery.capture.dynamic_sizes import LARGEST, Inputs, slow_to_capture, wrong_at_other_batch, wrong_at_other_space
from surgery.capture.passes import normalise
from surgery.core import (
    UNKNOWN,
    InputSpec,
    Program,
    attribute,
    buffers_kept,
    first_line,
    fresh,
    is_symbolic,
    last_own_line,
    lean,
    quiet,
    shapes_of,
    traceable,
    where_raised,
)
from surgery.errors import InvalidInput, UnsupportedModel

_ABOUT_INPUTS = re.compile("shape|size|dimension|channel|expected|dtype|type|argument|mat1", re.IGNORECASE)


Args = tuple[Any, ...]


def trace(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Program:
    """Capture `model` in eval mode as a graph of ATen operators.

    Args:
        model: any module that `torch.export` can capture; unchanged, including its mode.
        example_inputs: one tensor or a tuple of positional inputs, such as (1, 3, 224, 224) of float32.
        example_kwargs: keyword inputs.

    Returns:
        The program. The batch is dynamic unless `notes` explains why not.

    Raises:
        InvalidInput: a weight is not finite, or the model does not accept the inputs.
        UnsupportedModel: the model cannot be captured; the message names the user's source line.
    """
    require_module(model)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = _in_forward_order(model, example_kwargs or {})
    require_finite(model)
    with evaluating(model), buffers_kept(model), quiet():
        (exported, captured, (args, kwargs)), notes = _capture(traceable(model), args, kwargs)
        graph = normalise(exported, captured)
    inputs = _input_specs(graph)
    computed = sources_of_weights(graph.graph)
    weights = (f"'{name}' holds the weight that forward computed from {', '.join(s)}" for name, s in computed.items())
    return Program(
        graph=graph,
        inputs=inputs,
        example_args=args,
        example_kwargs=kwargs,
        fingerprint=_fingerprint(graph),
        notes=(*notes, *_notes_on_space(inputs), *weights),
        model=model,
        materialised=computed,
    )


# Inputs. ------------------------------------------------------------------------------------------------------------


def require_module(model: Any) -> None:
    """Raise InvalidInput unless the model is a Python module whose parameters have values."""
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
    """Raise InvalidInput if a weight is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InvalidInput(f"weight '{name}' holds NaN or infinite values; load an intact checkpoint")


def _in_forward_order(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Sort keyword inputs in the order of forward's parameters, as `torch.export` does."""
    order = [*inspect.signature(model.forward).parameters, *kwargs]
    return dict(sorted(kwargs.items(), key=lambda item: order.index(item[0])))


def _at_batch_two(args: Args, kwargs: dict[str, Any]) -> Inputs:
    """Repeat inputs of batch 1; inputs with different first axes stay unchanged."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not tensors:
        raise InvalidInput("example inputs hold no tensor; pass one, or a tuple of some, such as (1, 3, 224, 224)")
    if any(t.numel() == 0 for t in tensors):
        raise InvalidInput("an example input is empty; pass at least one sample, such as (1, 3, 224, 224)")
    single = all(t.dim() > 0 and t.shape[0] == 1 for t in tensors)

    def twice(x: Any) -> Any:
        x = x.detach() if isinstance(x, Tensor) else x
        return torch.cat([x, x.flip(-1) if x.is_floating_point() else x]) if single and isinstance(x, Tensor) else x

    doubled: Inputs = pytree.tree_map(twice, (args, kwargs))
    return doubled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode within the block.

    Flags are set directly, without running user code; `eval()` of a graph also sets its operators' flags.
    """
    modes = [(m, m.training) for m in model.modules()]
    graphs = [m for m, training in modes if training and isinstance(m, torch.fx.GraphModule)]

    def set_operators(training: bool) -> None:
        for graph in graphs:
            with suppress(NotImplementedError):  # `ExportedProgram.module()` does not support train and eval
                graph.train(training)

    try:
        set_operators(False)
        for m, _ in modes:
            m.training = False
        yield
    finally:
        set_operators(True)
        for m, mode in modes:
            m.training = mode


# Capture. -----------------------------------------------------------------------------------------------------------


class _Capture(NamedTuple):
    """Result of `torch.export`, the same program as a module, and its inputs."""

    exported: Any
    graph: torch.fx.GraphModule
    inputs: Inputs


def _capture(model: nn.Module, args: Args, kwargs: dict[str, Any]) -> tuple[_Capture, tuple[str, ...]]:
    """Capture with dynamic batch, height and width if valid; else with dynamic batch; else without dynamic axes.

    Returns:
        The capture, and notes for the user.
    """
    twice = _at_batch_two(args, kwargs)
    if not slow_to_capture(model, twice):
        with suppress(Exception):  # torch.export raises whatever the user's forward or its own passes raise
            found = _export(model, twice, Dim.DYNAMIC, Dim.AUTO)
            if not wrong_at_other_space(found.exported, model, twice) and not wrong_at_other_batch(*found, model):
                return found, ()
    try:
        found = _export(model, twice, Dim.DYNAMIC, None)
    except Exception as error:  # likewise
        reason = f"{where_raised(error)}: {first_line(error)}".removeprefix(f"{UNKNOWN}: ")
    else:
        if not (condition := wrong_at_other_batch(*found, model)):
            return found, ()
        reason = f"forward takes another path unless {condition}"
    note = f"batch is fixed at the example's: a dynamic one could not be traced ({reason})"
    return _export_fixed(model, args, kwargs), (note,)


def _export(model: nn.Module, inputs: Inputs, batch: Any, space: Any) -> _Capture:
    """Capture with these kinds of axis 0 and, for images and volumes, of height and width; None: static."""

    def axes(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return None
        found = {0: batch}
        if space is not None and x.dim() in (4, 5):
            found |= {x.dim() - 2: space, x.dim() - 1: space}
        return found

    shapes = None
    if batch is not None:  # by forward's parameter names, with one entry each for `*args` and `**kwargs`
        by_position, by_name = pytree.tree_map(axes, inputs)
        shapes = dict(inspect.signature(model.forward).bind(*by_position, **by_name).arguments)
    # Copies, because torch.export treats a tensor passed twice as one input, and marks tensors as dynamic.
    args, kwargs = fresh(inputs)
    with torch.no_grad(), lean():
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        return _Capture(exported, exported.module(check_guards=False), (args, kwargs))


def _export_fixed(model: nn.Module, args: Args, kwargs: dict[str, Any]) -> _Capture:
    try:
        return _export(model, (args, kwargs), None, None)
    except Exception as error:  # torch.export raises whatever the user's forward or its own passes raise
        validate_inputs(model, args, kwargs)
        raise UnsupportedModel(
            f"torch.export cannot capture this model, at {where_raised(error)}: {first_line(error)}; rewrite that line "
            "without control flow on tensor values, or try --tracer torch-pruning, or --submodule for a submodule that "
            "can be captured"
        ) from error


def validate_inputs(model: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
    """Raise InvalidInput if the model itself does not run on inputs of this shape or type."""
    try:
        with torch.no_grad():
            given = fresh((args, kwargs))
            model(*given[0], **given[1])
    except Exception as error:  # any exception the user's forward raises
        if not _ABOUT_INPUTS.search(str(error)):
            return
        shapes = [tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        raise InvalidInput(
            f"the model does not run on inputs of shape {shapes}: {where_raised(error)}: {first_line(error)}; "
            "give the shape it expects with --input-shape"
        ) from error


# Description. -------------------------------------------------------------------------------------------------------


def _input_specs(graph: torch.fx.GraphModule) -> tuple[InputSpec, ...]:
    specs = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            dynamic = tuple(a for a, s in enumerate(value.shape) if is_symbolic(s))
            dtype = str(value.dtype).removeprefix("torch.")
            specs.append(InputSpec(str(node.target), shapes_of(value), dtype, dynamic))
    return tuple(specs)


def _notes_on_space(inputs: tuple[InputSpec, ...]) -> Iterator[str]:
    for spec in inputs:
        free, fixed = ([a for a in (2, 3) if (a in spec.dynamic) is yes] for yes in (True, False))
        if len(spec.shape) == 4 and free:
            low = " x ".join(str(-(-spec.shape[a] // 2)) for a in free)
            high = " x ".join(str(LARGEST * spec.shape[a]) for a in free)
            yield f"input '{spec.name}': axes {free} may be {low} to {high}; other sizes were not examined"
        if len(spec.shape) == 4 and fixed:
            size = " x ".join(str(spec.shape[a]) for a in fixed)
            yield (
                f"input '{spec.name}': the size of axes {fixed} is fixed at {size}, in the ONNX files too: the model "
                "bakes it in, or other sizes could not be examined"
            )


def source_of(node: torch.fx.Node) -> str:
    """Return `file:line` of the user's code that made this node: the innermost frame outside torch."""
    return last_own_line(node.meta.get("stack_trace") or "")


def module_of(node: torch.fx.Node) -> str:
    """Return the dotted path of the innermost module whose forward made this node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    return paths[-1] if paths else ""


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
