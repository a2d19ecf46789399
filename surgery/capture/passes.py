"""Passes from the graph captured by `torch.export` to the graph of the later stages: `PASSES`, in order.

Each pass declares the kinds of nodes that must be absent before it and those absent after it; no later pass may
reintroduce them. `normalise(..., checked=True)` verifies these declarations after each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Pass:
    """One rewrite of a graph, in place.

    Attributes:
        run: the rewrite.
        requires: kinds of nodes that must be absent before.
        ensures: kinds of nodes that are absent afterwards.
    """

    run: Callable[[fx.GraphModule], None]
    requires: tuple[Nodes, ...]
    ensures: tuple[Nodes, ...]


def normalise(exported: Any, graph: fx.GraphModule, *, checked: bool = False) -> fx.GraphModule:
    """Return an exported program as a plain graph module that later stages can label and rewrite.

    Args:
        exported: result of `torch.export`.
        graph: its `module()`; modified in place.
        checked: after each pass, verify the declarations of all passes so far.

    Raises:
        UnsupportedModel: the program cannot be expressed as plain functions from values to values.
    """
    try:
        _apply(PASSES, graph, checked)
    except NeedsFunctionalization:
        graph = exported.run_decompositions({}).module(check_guards=False)
        _apply(PASSES, graph, checked, without=functionalize)
    return _plain_module(graph)


def _apply(
    passes: tuple[Pass, ...], graph: fx.GraphModule, checked: bool, without: Callable[..., None] | None = None
) -> None:
    gone: list[Nodes] = []
    for step in passes:
        if step.run is not without:
            step.run(graph)
        gone += step.ensures
        for kind in gone if checked else ():
            if found := list(kind(graph)):
                raise AssertionError(f"after {step.run.__name__}: {kind.__name__} are left: {found}")


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
    if node.target is wrap_with_set_grad_enabled:
        _, body, *operands = node.args
    elif node.target is wrap_with_autocast:
        device, _, enabled, _, body, *operands = node.args
        if enabled and device == "cpu":
            traces = (_line_of(n) for n in attribute(graph, str(body.target)).graph.nodes)  # type: ignore[union-attr]
            line = next(filter(None, traces), "")
            raise UnsupportedModel(
                f"forward enables autocast on the CPU{line and f' around {line}'}; remove it, and cast the model itself"
            )
    else:
        raise UnsupportedModel(
            f"'{node.target}' at {_line_of(node) or UNKNOWN} branches or loops on values of tensors; write forward "
            "without it, or shrink a submodule that does not contain it by --submodule"
        )
    return body, operands  # type: ignore[return-value]


def _line_of(node: fx.Node) -> str:
    return last_own_line(str(node.meta.get("stack_trace", "")))


# Assertions, sizes, unused nodes. -----------------------------------------------------------------------------------


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


def unused(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return nodes without users."""
    return (n for n in graph.graph.nodes if not n.users and n.op != "placeholder" and not n.is_impure())


def drop_unused(graph: fx.GraphModule) -> None:
    """Erase nodes without users."""
    graph.graph.eliminate_dead_code()


PASSES = (
    Pass(inline_regions, requires=(), ensures=(regions,)),
    Pass(drop_assertions, requires=(regions,), ensures=(assertions,)),
    Pass(functionalize, requires=(regions, assertions), ensures=(writes,)),
    Pass(validate_sizes, requires=(regions,), ensures=(value_dependent_sizes,)),
    Pass(reshape_to_sizes, requires=(writes,), ensures=(reshapes_like_another,)),
    Pass(expand_einsums, requires=(regions,), ensures=(einsums,)),
    Pass(fold_scalars, requires=(writes,), ensures=(scalars_of_constants,)),
    Pass(compute_weights, requires=(writes, scalars_of_constants), ensures=(computed_weights,)),
    Pass(drop_unused, requires=(writes,), ensures=(unused,)),
)


def _plain_module(graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph as an ordinary GraphModule, without the hooks of `ExportedProgram.module()`.

    If all inputs are plain arguments, the graph itself rebuilds the outputs (it can return tuples and dictionaries), so
    that the module can be copied and saved without pytree information.
    """
    info = getattr(graph.graph._codegen, "pytree_info", None)
    output = graph.graph.output_node()
    if info is not None and _flat_inputs(info.in_spec) and _plain_containers(info.out_spec):
        output.args = (pytree.tree_unflatten(list(output.args[0]), info.out_spec),)  # type: ignore[arg-type]
        graph.graph.set_codegen(fx.graph.CodeGen())
    plain = fx.GraphModule(graph, graph.graph, "Program")
    plain.eval()
    return plain


def _flat_inputs(spec: Any) -> bool:
    return all(leaf.is_leaf() for part in spec.children() for leaf in part.children())


def _plain_containers(spec: Any) -> bool:
    """Return whether a graph can rebuild outputs of this structure without pytree information."""
    if spec.is_leaf():
        return True
    return spec.type in (tuple, list, dict) and all(_plain_containers(child) for child in spec.children())
