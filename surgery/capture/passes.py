"""Passes from the graph captured by `torch.export` to the graph of the later stages: `PASSES`, in order.

Each pass declares the kind of nodes absent after it; no later pass may reintroduce them. `normalise(..., checked=True)`
verifies this after each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from surgery.capture.constants import compute_weights, computed_weights, fold_scalars, scalars_of_constants
from surgery.capture.einsum import einsums, expand_einsums
from surgery.capture.functional import NeedsFunctionalization, functionalize, writes
from surgery.core import UNKNOWN, attribute, hint, is_symbolic, last_own_line
from surgery.errors import UnsupportedModel

aten = torch.ops.aten
_ASSERTIONS = ("_assert", "sym_constrain", "_guards_fn")

Nodes = Callable[[fx.GraphModule], Iterator[fx.Node]]
"""Returns the nodes of one kind in a graph."""


def normalise(exported: Any, graph: fx.GraphModule, *, checked: bool = False) -> fx.GraphModule:
    """Return an exported program as a plain graph module that later stages can label and rewrite.

    Args:
        exported: result of `torch.export`.
        graph: its `module()`; modified in place.
        checked: after each pass, verify what all passes so far ensure.

    Raises:
        UnsupportedModel: the program cannot be expressed as plain functions from values to values.
    """
    try:
        _apply(graph, checked)
    except NeedsFunctionalization:
        graph = exported.run_decompositions({}).module(check_guards=False)
        _apply(graph, checked, without=functionalize)
    graph.graph.eliminate_dead_code()
    return _plain_module(graph)


def _apply(graph: fx.GraphModule, checked: bool, without: Callable[..., None] | None = None) -> None:
    absent: list[Nodes] = []
    for run, kind in PASSES:
        if run is not without:
            run(graph)
        absent.append(kind)
        for each in absent if checked else ():
            if found := list(each(graph)):
                raise AssertionError(f"after {run.__name__}: {each.__name__} are left: {found}")


# Regions: code inside `torch.autocast(enabled=False)` or `torch.no_grad()`. --------------------------------------


def regions(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return calls of subgraphs."""
    return (node for node in graph.graph.nodes if isinstance(node.target, HigherOrderOperator))


def inline_regions(graph: fx.GraphModule) -> None:
    """Inline the nodes of each region.

    Raises:
        UnsupportedModel: forward enables autocast, so that the graph does not determine an operator's precision; or it
        has a conditional or a loop over tensor values.
    """
    while node := next(regions(graph), None):
        body, operands = _region(graph, node)
        inner = attribute(graph, str(body.target)).graph
        made = dict(zip((n for n in inner.nodes if n.op == "placeholder"), operands, strict=True))
        with graph.graph.inserting_before(node):
            for step in inner.nodes:
                if step.op not in ("placeholder", "output"):
                    made[step] = graph.graph.node_copy(step, made.__getitem__)
        results = [made.get(x, x) for x in inner.output_node().args[0]]
        for user in list(node.users):  # each takes one of the results
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        if not body.users:
            graph.graph.erase_node(body)


def _region(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[Any]]:
    arguments: list[Any] = list(node.args)
    if node.target is wrap_with_set_grad_enabled:
        return arguments[1], arguments[2:]
    if node.target is not wrap_with_autocast:
        raise UnsupportedModel(
            f"'{node.target}' at {_line_of(node) or UNKNOWN} branches or loops on values of tensors; write forward "
            "without it, or shrink a submodule that does not contain it by --submodule"
        )
    device, _, enabled, _, body, *operands = arguments
    if enabled and device == "cpu":
        line = next(filter(None, map(_line_of, attribute(graph, str(body.target)).graph.nodes)), "")
        raise UnsupportedModel(
            f"forward enables autocast on the CPU{line and f' around {line}'}; remove it, and cast the model itself"
        )
    return body, operands


def _line_of(node: fx.Node) -> str:
    return last_own_line(str(node.meta.get("stack_trace", "")))


# Assertions and sizes. -----------------------------------------------------------------------------------


def assertions(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return run-time checks of sizes and values."""
    for node in graph.graph.nodes:
        called = node.op in ("call_function", "call_module") and not node.users
        if called and any(mark in str(node.target) for mark in _ASSERTIONS):
            yield node


def drop_assertions(graph: fx.GraphModule) -> None:
    """Erase run-time checks: the valid sizes are known from the graph's guards."""
    for node in reversed(list(assertions(graph))):
        graph.graph.erase_node(node)


def value_dependent_sizes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return operators whose output size depends on values, such as a selection by a mask."""
    for node in graph.graph.nodes:
        values = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]
        sizes: list[Any] = [size for x in values for size in x.shape if is_symbolic(size)]
        if any(size.node.hint is None for size in sizes):
            yield node


def validate_sizes(graph: fx.GraphModule) -> None:
    """Raise UnsupportedModel if a size depends on values."""
    if node := next(value_dependent_sizes(graph), None):
        where = _line_of(node) or UNKNOWN
        raise UnsupportedModel(
            f"'{node.target}' at {where} returns a tensor whose size depends on values (a selection by a mask), which "
            "leaves no size to plan with; shrink a submodule without it by --submodule, or try --tracer torch-pruning"
        )


def reshapes_like_another(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return reshapes to the sizes of another value."""
    return (n for n in graph.graph.nodes if n.target in (aten.reshape_as.default, aten.view_as.default))


def reshape_to_sizes(graph: fx.GraphModule) -> None:
    """`x.reshape_as(y)` becomes a reshape to y's dense sizes, which do not change when y's channels are pruned."""
    for node in list(reshapes_like_another(graph)):
        x, other = node.args
        sizes: list[Any] = list(other.meta["val"].shape)  # type: ignore[union-attr]
        with graph.graph.inserting_before(node):
            for axis, size in enumerate(sizes):
                if is_symbolic(size):
                    sizes[axis] = graph.graph.call_function(aten.sym_size.int, (other, axis))
                    sizes[axis].meta["val"] = size
                else:
                    sizes[axis] = hint(size)
        node.target, node.args = aten.reshape.default, (x, sizes)


PASSES: tuple[tuple[Callable[[fx.GraphModule], None], Nodes], ...] = (
    (inline_regions, regions),
    (drop_assertions, assertions),
    (functionalize, writes),
    (validate_sizes, value_dependent_sizes),
    (reshape_to_sizes, reshapes_like_another),
    (expand_einsums, einsums),
    (fold_scalars, scalars_of_constants),
    (compute_weights, computed_weights),
)
"""Each rewrites a graph in place, and the kind of nodes absent afterwards."""


def _plain_module(graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph as an ordinary GraphModule, without the hooks of `ExportedProgram.module()`.

    If all inputs are plain arguments, the graph itself rebuilds the outputs (it can return tuples and dictionaries), so
    that the module can be copied and saved without pytree information.
    """
    info: Any = getattr(graph.graph._codegen, "pytree_info", None)
    flat = info is not None and all(leaf.is_leaf() for part in info.in_spec.children() for leaf in part.children())
    if flat and _plain_containers(info.out_spec):
        output = graph.graph.output_node()
        output.args = (pytree.tree_unflatten(list(output.args[0]), info.out_spec),)  # type: ignore[arg-type]
        graph.graph.set_codegen(fx.graph.CodeGen())
    plain = fx.GraphModule(graph, graph.graph, "Program")
    plain.eval()
    return plain


def _plain_containers(spec: Any) -> bool:
    """Return whether a graph can rebuild outputs of this structure without pytree information."""
    return spec.is_leaf() or (spec.type in (tuple, list, dict) and all(map(_plain_containers, spec.children())))
