"""Turn a module into a `Program`: the only place that calls `torch.export`.

The batch axis is traced as dynamic (inputs of batch 1 are repeated to 2, because 1 would be specialised), height and
width if the model permits. The captured graph then goes through `passes.PASSES`.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from surgery.capture.passes import finish, normalise, sources_of_weights
from surgery.core import (
    TOLERANCE,
    UNKNOWN,
    CaptureLimits,
    InputSpec,
    Program,
    attribute,
    buffers_kept,
    first_line,
    fresh,
    is_symbolic,
    lean,
    quiet,
    require_finite,
    shapes_of,
    traceable,
    where_raised,
)
from surgery.errors import InvalidInput, UnsupportedModel

SPACE_CPU_S, SPACE_BYTES = 60.0, 2 * 2**30
"""Limits of a capture with symbolic height and width; without them, most captures take seconds."""
_ABOUT_INPUTS = re.compile("shape|size|dimension|channel|expected|dtype|type|argument|mat1", re.IGNORECASE)


Args = tuple[Any, ...]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of a model."""


def trace(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None, *, fixed_size: bool = False
) -> Program:
    """Capture `model` in eval mode as a graph of ATen operators.

    Args:
        model: any module that `torch.export` can capture; unchanged, including its mode.
        example_inputs: one tensor or a tuple of positional inputs, such as (1, 3, 224, 224) of float32.
        example_kwargs: keyword inputs.
        fixed_size: do not try to keep height and width dynamic.

    Returns:
        The program. The batch is dynamic unless `notes` explains why not.

    Raises:
        InvalidInput: a weight is not finite, or the model does not accept the inputs.
        UnsupportedModel: the model cannot be captured; the message names the user's source line.
    """
    require_module(model)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    given = example_kwargs or {}
    order = [*inspect.signature(model.forward).parameters, *given]  # as `torch.export` sorts keyword inputs
    kwargs = dict(sorted(given.items(), key=lambda item: order.index(item[0])))
    require_finite(model.state_dict(keep_vars=True), type(model).__name__)
    with evaluating(model), buffers_kept(model), quiet():
        (exported, captured, (args, kwargs)), notes = _capture(traceable(model), args, kwargs, fixed_size=fixed_size)
        graph = normalise(exported, captured)
        fingerprint = _fingerprint(graph)
        finish(graph)
    inputs = _input_specs(graph)
    computed = sources_of_weights(graph.graph)
    weights = (f"'{name}' holds the weight that forward computed from {', '.join(s)}" for name, s in computed.items())
    notes = (*notes, *_notes_on_space(inputs, fixed_size), *weights)
    return Program(graph, inputs, args, kwargs, fingerprint, notes, model, materialised=computed)


def require_module(model: Any) -> None:
    """Raise InvalidInput unless the model is a Python module whose parameters have values."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"not a torch.nn.Module but of type {type(model).__name__}: pass the module itself")
    if torch.get_default_device().type == "meta":
        raise InvalidInput("torch's default device is meta, where tensors have no values: set_default_device('cpu')")
    for path, module in model.named_modules():
        if kind := _foreign_kind(module):
            where = f"submodule '{path}'" if path else "the model"
            raise UnsupportedModel(f"{where} is {kind}")
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise InvalidInput(f"parameter '{name}' has no size yet; run the model once on an example first")
        if parameter.is_meta:
            raise InvalidInput(f"parameter '{name}' is on the meta device and has no values; load weights first")


_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_PREPARED = (
    *("torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat", "torch.ao.quantization.observer"),
    "torch.ao.quantization.fake_quantize",
)


def _foreign_kind(module: nn.Module) -> str:
    """Return what a module is that cannot be pruned, and what to pass instead; "" for ordinary modules."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module; pass the Python module that it was made from"
    origins = [kind.__module__ for kind in type(module).__mro__]
    float_model = "pass the float model, and ask for an int8 file with --precision int8"
    if any(origin.startswith(_QUANTISED) for origin in origins):
        return f"quantized: its weights are packed integers, which cannot be sliced; {float_model}"
    if any(origin.startswith(_PREPARED) for origin in origins):
        return f"prepared for quantization, by observers or fake quantization; {float_model}"
    return ""


def _at_batch_two(args: Args, kwargs: dict[str, Any]) -> Inputs:
    """Repeat inputs of batch 1; inputs with different first axes stay unchanged."""
    tensors = _tensors((args, kwargs))
    if not tensors:
        raise InvalidInput("example inputs hold no tensor; pass one or several, as in (torch.randn(1, 3, 224, 224),)")
    if any(t.numel() == 0 for t in tensors):
        raise InvalidInput("an example input is empty; pass at least one sample, as in torch.randn(1, 3, 224, 224)")
    single = all(t.dim() > 0 and t.shape[0] == 1 for t in tensors)

    def twice(x: Any) -> Any:
        x = x.detach() if isinstance(x, Tensor) else x
        return torch.cat([x, x.flip(-1) if x.is_floating_point() else x]) if single and isinstance(x, Tensor) else x

    doubled: Inputs = pytree.tree_map(twice, (args, kwargs))
    return doubled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule, and the operators of graphs, in eval mode within the block, without running user code."""
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


class _Capture(NamedTuple):
    """Result of `torch.export`, the same program as a module, and its inputs."""

    exported: Any
    graph: torch.fx.GraphModule
    inputs: Inputs


def _capture(
    model: nn.Module, args: Args, kwargs: dict[str, Any], *, fixed_size: bool = False
) -> tuple[_Capture, tuple[str, ...]]:
    """Capture with dynamic batch, height and width if valid, else dynamic batch, else neither; also return notes."""
    twice = _at_batch_two(args, kwargs)
    if not (fixed_size or slow_to_capture(model, twice)):
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
    try:
        return _export(model, (args, kwargs), None, None), (note,)
    except Exception as error:  # likewise
        validate_inputs(model, args, kwargs)
        why = first_line(error)
        if "data-dependent" in str(error):  # in torch's words, with names such as u0 that the user has not seen
            why = "which path the code takes, or the size of a tensor, depends on the values of a tensor"
        raise UnsupportedModel(
            f"torch.export cannot capture this model, at {where_raised(error)}: {why}; rewrite that line without "
            "control flow on tensor values, or try --tracer torch-pruning, or --submodule for a submodule that can be "
            "captured"
        ) from error


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
    with torch.no_grad(), lean(None if space is None else CaptureLimits(SPACE_CPU_S, SPACE_BYTES)):
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        return _Capture(exported, exported.module(check_guards=False), (args, kwargs))


def validate_inputs(model: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
    """Raise InvalidInput if the model itself does not run on inputs of this shape or type."""
    try:
        with torch.no_grad():
            given = fresh((args, kwargs))
            model(*given[0], **given[1])
    except Exception as error:  # any exception the user's forward raises
        if not _ABOUT_INPUTS.search(str(error)):
            return
        shapes = [tuple(x.shape) for x in _tensors((args, kwargs))]
        raise InvalidInput(
            f"the model does not run on inputs of shape {shapes}: {where_raised(error)}: {first_line(error)}; "
            "give inputs of the shape it expects (--input-shape)"
        ) from error


# Sizes for which a captured graph is valid. --------------------------------------------------------------------------
#
# `torch.export` follows one path through the code. If that depends on a size (padding to a multiple, a branch on the
# batch), the graph is silently wrong for sizes that take another. An axis is therefore dynamic only if every guard on
# sizes along the path holds over a range of sizes around the example's.

BATCHES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 17, 23, 31, 32, 33, 47, 64)
LARGEST = 16  # heights and widths are tested from half the example's to this multiple of it
_SIZES = 48
_NAMES = {"max": max, "min": min, "abs": abs, "int": int, "float": float, "__builtins__": {}}


def wrong_at_other_batch(exported: Any, graph: torch.fx.GraphModule, inputs: Inputs, model: nn.Module) -> str:
    """Return a condition on the batch size that the graph requires, or an empty string."""
    sizes = [{0: batch} for batch in BATCHES]
    guard = _broken_guard(exported, model, inputs, lambda shape, change: (change[0], *shape[1:]), sizes)
    return guard or _differs_at_batch_one(graph, model, inputs)


def wrong_at_other_space(exported: Any, model: nn.Module, inputs: Inputs) -> str:
    """Return a condition on height and width that the graph requires, or an empty string."""
    if _spills(exported.graph):
        return "a reshape keeps height and width apart from other axes"
    tensors = [x for x in _tensors(inputs) if x.dim() in (4, 5)]
    if not tensors:
        return ""
    smallest = [min(x.shape[axis] for x in tensors) for axis in (-2, -1)]

    def changed(shape: torch.Size, change: Mapping[int, int]) -> tuple[int, ...]:
        return (*shape[:-2], shape[-2] + change[-2], shape[-1] + change[-1]) if len(shape) in (4, 5) else shape

    return _broken_guard(exported, model, inputs, changed, _changes(*smallest))


# Guards. ------------------------------------------------------------------------------------------------------------


def _changes(height: int, width: int) -> Iterator[dict[int, int]]:
    """Return changes of height and width: equal ones, and several random pairs."""
    random = np.random.default_rng(0)
    lines = []
    for size in (height, width):
        low, high = -(size // 2), (LARGEST - 1) * size
        spread = np.unique(np.linspace(low, high, _SIZES, dtype=np.int64)).tolist()
        lines.append(sorted({*spread, *(d for d in range(-4, 5) if low <= d <= high)}))
    yield from ({-2: d, -1: d} for d in lines[0] if d in lines[1] or height == width)
    for _ in range(4):
        pairs = zip(*(random.permutation(line).tolist() for line in lines), strict=False)
        yield from ({-2: h, -1: w} for h, w in pairs)


def _broken_guard(
    exported: Any,
    model: nn.Module,
    inputs: Inputs,
    changed: Callable[[torch.Size, Mapping[int, int]], tuple[int, ...]],
    sizes: Iterable[dict[int, int]],
) -> str:
    codes = getattr(exported, "_guards_code", None)
    if codes is None:
        return "this version of torch does not report the sizes that its graphs hold for"
    bound = dict(inspect.signature(model.forward).bind(*inputs[0], **inputs[1]).arguments)
    guards = [(code, compile(code, "<guard>", "eval")) for code in codes]
    for change in sizes:
        named = pytree.tree_map(
            lambda x, by=change: torch.empty(changed(x.shape, by), device="meta") if _has_axes(x) else x, bound
        )
        for code, guard in guards:
            try:
                holds = bool(eval(guard, dict(_NAMES), {"L": named}))
            except Exception:  # an unknown torch operator: the guard is not shown to hold
                holds = False
            if not holds:
                return str(code).replace("L['", "").replace("'].size()", ".shape")
    return ""


# A batch of one, which torch.export never traces. -------------------------------------------------------------------


def _differs_at_batch_one(graph: torch.fx.GraphModule, model: nn.Module, inputs: Inputs) -> str:
    single = pytree.tree_map(lambda x: x[:1] if _has_axes(x) else x, inputs)
    with torch.no_grad():
        try:
            args, kwargs = fresh(single)
            wanted = _tensors(model(*args, **kwargs))
        except Exception:  # the model itself does not accept a batch of one
            return ""
        try:
            run = torch.fx.Interpreter(graph)  # calling the module would generate its code first
            got = _tensors(run.run(*pytree.tree_leaves(fresh(single)), enable_io_processing=False))
        except Exception as error:  # any exception the graph's operators raise
            return f"the batch is larger than 1 ({first_line(error)})"
    same = len(wanted) == len(got) and all(_close(a, b) for a, b in zip(wanted, got, strict=True))
    return "" if same else "the batch is larger than 1"


def _has_axes(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    a, b, allowed = a.double(), b.double(), TOLERANCE.get(a.dtype, 0.0)
    return torch.allclose(a, b, rtol=0.0, atol=allowed * float(a.abs().nan_to_num(0.0).max()), equal_nan=True)


# Reshapes. ----------------------------------------------------------------------------------------------------------

_MANY, _FEW = 40, 8
_RESHAPES = ("view", "reshape", "expand", "unflatten", "multi_head_attention_forward")
_ATTENTION = ("softmax", "scaled_dot_product_attention", "matmul", "__matmul__", "bmm", "einsum")


class _ReshapeCount(TorchFunctionMode):
    """Counts reshapes while a model runs, and records whether it has attention."""

    def __init__(self) -> None:
        super().__init__()
        self.reshapes, self.attends = 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.reshapes += name in _RESHAPES
        self.attends |= name in _ATTENTION
        return func(*args, **(kwargs or {}))


def slow_to_capture(model: nn.Module, inputs: Inputs) -> bool:
    """Return whether capture with symbolic height and width would take minutes, as where pixels become tokens."""
    with suppress(Exception), torch.no_grad(), _ReshapeCount() as count:  # the capture will raise the same exception
        args, kwargs = fresh(inputs)
        model(*args, **kwargs)
        return bool(count.reshapes > (_FEW if count.attends else _MANY))
    return True


def _spills(graph: torch.fx.Graph) -> bool:
    """Return whether a reshape mixes height or width into other axes, so that its literal size fits one size only.

    ``x.view(-1, 320)`` after pooling to 20 x 4 x 4 gives different rows for a larger image; with 160 instead of 320,
    rows are split differently. A symbolic axis of a reshape's output must be a product of symbolic axes of its input.
    """
    for node in graph.nodes:
        value, source = node.meta.get("val"), node.args[0] if node.args else None
        schema = getattr(node.target, "_schema", None)
        sized = schema is not None and any(a.name in ("size", "shape", "sizes") for a in schema.arguments)
        if sized and isinstance(value, Tensor) and isinstance(source, torch.fx.Node):
            before = [s.node.expr for s in source.meta["val"].shape if is_symbolic(s)]
            spans = [before[k : n + 1] for k in range(len(before)) for n in range(k, len(before))]
            whole = {str(reduce(operator.mul, span)) for span in spans}
            sizes: list[Any] = [s for s in value.shape if is_symbolic(s)]
            if any(not _is_whole(s.node.expr, before, whole) for s in sizes):
                return True
    return False


def _is_whole(size: Any, before: Sequence[Any], whole: Container[str]) -> bool:
    """Return whether a symbolic size is a product of whole axes; the batch may include a constant (heads)."""
    number, rest = size.as_coeff_Mul()
    return str(rest) in whole and (number == 1 or rest == before[0])


def _input_specs(graph: torch.fx.GraphModule) -> tuple[InputSpec, ...]:
    specs = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            dynamic = tuple(a for a, s in enumerate(value.shape) if is_symbolic(s))
            dtype = str(value.dtype).removeprefix("torch.")
            specs.append(InputSpec(str(node.target), shapes_of(value), dtype, dynamic))
    return tuple(specs)


def _notes_on_space(inputs: tuple[InputSpec, ...], asked: bool) -> Iterator[str]:
    why = "as asked for" if asked else "the model depends on this size, or other sizes could not be checked"
    for spec in inputs:
        free, fixed = ([a for a in (2, 3) if (a in spec.dynamic) is yes] for yes in (True, False))
        if len(spec.shape) == 4 and free:
            low = " x ".join(str(-(-spec.shape[a] // 2)) for a in free)
            high = " x ".join(str(LARGEST * spec.shape[a]) for a in free)
            yield f"input '{spec.name}': axes {free} may be {low} to {high}; other sizes were not examined"
        if len(spec.shape) == 4 and fixed:
            size = " x ".join(str(spec.shape[a]) for a in fixed)
            yield f"input '{spec.name}': the size of axes {fixed} is fixed at {size}, in the ONNX files too: {why}"


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
