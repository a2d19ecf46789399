"""Passes from the graph captured by `torch.export` to the graph of the later stages: `PASSES`, in order.

Each pass declares the kind of nodes absent after it; no later pass may reintroduce them. `normalise(..., checked=True)`
verifies this after each pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from surgery.core import UNKNOWN, Executor, Frontier, arguments_of, attribute, is_symbolic, last_own_line, mutates
from surgery.errors import UnsupportedModel
from surgery.ops import rules

aten = torch.ops.aten
_ASSERTIONS = ("_assert", "sym_constrain", "_guards_fn")

Nodes = Callable[[fx.GraphModule], Iterator[fx.Node]]
"""Returns the nodes of one kind in a graph."""


def normalise(exported: Any, graph: fx.GraphModule, *, checked: bool = False) -> fx.GraphModule:
    """Return an exported program as a plain functional graph module, or raise UnsupportedModel.

    `graph`: the program's `module()`, modified in place. `checked`: after each pass, verify what all so far ensure.
    """
    try:
        _apply(graph, checked)
    except NeedsFunctionalization:
        graph = exported.run_decompositions({}).module(check_guards=False)
        _apply(graph, checked, without=functionalize)
    graph.graph.eliminate_dead_code()
    require_deterministic(graph)
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
    """Inline the nodes of each region; UnsupportedModel if one enables autocast, or is a branch or loop on values."""
    while node := next(regions(graph), None):
        body, operands = _region(graph, node)
        inner = attribute(graph, str(body.target)).graph
        made = _inline(node, inner, operands)
        results = [made.get(x, x) for x in inner.output_node().args[0]]
        for user in list(node.users):  # each takes one of the results
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        if not body.users:
            graph.graph.erase_node(body)


def _inline(node: fx.Node, body: fx.Graph, operands: Sequence[Any]) -> dict[fx.Node, Any]:
    """Copy a subgraph before a node; return each of its nodes with its value in the node's graph."""
    made = dict(zip((n for n in body.nodes if n.op == "placeholder"), operands, strict=True))
    with node.graph.inserting_before(node):
        for step in body.nodes:
            if step.op not in ("placeholder", "output"):
                made[step] = node.graph.node_copy(step, made.__getitem__)
    return made


def _region(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[Any]]:
    arguments: list[Any] = list(node.args)
    if node.target is wrap_with_set_grad_enabled:
        return arguments[1], arguments[2:]
    if node.target is not wrap_with_autocast:
        raise UnsupportedModel(
            f"'{node.target}' at {source_of(node) or UNKNOWN} branches or loops on values of tensors; write forward "
            "without it, or shrink a submodule that does not contain it by --submodule"
        )
    device, _, enabled, _, body, *operands = arguments
    if enabled and device == "cpu":
        line = next(filter(None, map(source_of, attribute(graph, str(body.target)).graph.nodes)), "")
        raise UnsupportedModel(
            f"forward enables autocast on the CPU{line and f' around {line}'}; remove it, and cast the model itself"
        )
    return body, operands


def source_of(node: fx.Node) -> str:
    """Return `file:line` of the user's code that made this node: the innermost frame outside torch."""
    return last_own_line(node.meta.get("stack_trace") or "")


# Assertions and sizes. -----------------------------------------------------------------------------------


def assertions(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return run-time checks of sizes and values."""
    unread = (n for n in graph.graph.nodes if n.op in ("call_function", "call_module") and not n.users)
    return (n for n in unread if any(mark in str(n.target) for mark in _ASSERTIONS))


def drop_assertions(graph: fx.GraphModule) -> None:
    """Erase run-time checks: the valid sizes are known from the graph's guards."""
    for node in reversed(list(assertions(graph))):
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def value_dependent_sizes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return operators whose output size depends on values, such as a selection by a mask."""
    for node in graph.graph.nodes:
        values = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
        sizes: list[Any] = [size for x in values for size in x.shape if is_symbolic(size)]
        if any(size.node.hint is None for size in sizes):
            yield node


def validate_sizes(graph: fx.GraphModule) -> None:
    """Raise UnsupportedModel if a size depends on values."""
    if node := next(value_dependent_sizes(graph), None):
        where = source_of(node) or UNKNOWN
        raise UnsupportedModel(
            f"'{node.target}' at {where} returns a tensor whose size depends on values (a selection by a mask), which "
            "leaves no size to plan with; shrink a submodule without it by --submodule, or try --tracer torch-pruning"
        )


def require_deterministic(graph: fx.GraphModule) -> None:
    """Raise UnsupportedModel if an operator draws random numbers."""
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            given = arguments_of(node)
            if any(not given[name] for name in ("train", "training", "dropout_p") if name in given):
                continue
            raise UnsupportedModel(
                f"'{node.target}' at {source_of(node) or UNKNOWN} draws random numbers in evaluation mode too, so that "
                "a cut cannot be verified; draw them only if self.training is set, or shrink a submodule without them "
                "by --submodule"
            )


# In-place operators. -------------------------------------------------------------------------------------------------

_SCATTERS: Mapping[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


class NeedsFunctionalization(Exception):
    """A modified value is read through another view, or an operator exists only in place."""


def writes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return operators that write to a value of the graph, except state written back to a buffer."""
    return (node for node in graph.graph.nodes if mutates(node) and node.args[0].op == "call_function")


def functionalize(graph: fx.GraphModule) -> None:
    """Replace in-place operators by out-of-place ones; a write to a slice becomes a scatter into its base.

    Raises NeedsFunctionalization for a read through any other older view of the same memory: torch's functionalization
    takes about as long as another capture. The graph is then unusable.
    """
    state = _Memory(_alias_families(graph))
    for node in list(graph.graph.nodes):
        state.visit(node)


@dataclass
class _Memory:
    """Aliases and current contents of values, updated node by node."""

    aliases: Mapping[fx.Node, list[fx.Node]]  # value → all values that may share its memory
    whole: dict[fx.Node, fx.Node] = field(default_factory=dict)  # slice or element → the value it was taken from
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)  # result of an in-place operator → what it wrote to
    current: dict[fx.Node, fx.Node] = field(default_factory=dict)  # modified value → what computes its current contents
    stale: set[fx.Node] = field(default_factory=set)  # values whose memory was written to through another view
    visited: set[fx.Node] = field(default_factory=set)

    def visit(self, node: fx.Node) -> None:
        """Redirect a node's arguments to their current contents, and record its writes."""
        first = node.args[0] if node.args else None
        target = self.written.get(first, first) if isinstance(first, fx.Node) else None
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), self._now)
        if target is not None and node.target in _SCATTERS:
            self.whole[node] = target
        if mutates(node):
            if target is None:
                raise NeedsFunctionalization
            self._write(node, target)
            self.written[node] = target
        self.visited.add(node)

    def _now(self, argument: fx.Node) -> fx.Node:
        value = self.written.get(argument, argument)
        if value in self.stale:
            raise NeedsFunctionalization
        return self.current.get(value, value)

    def _write(self, node: fx.Node, target: fx.Node) -> None:
        chain, plain = [target], _plain_overload(node.target)
        while chain[-1] in self.whole:
            chain.append(self.whole[chain[-1]])
        if chain[-1].op != "call_function" or plain is None:
            raise NeedsFunctionalization
        self.stale.update(n for n in self.aliases[target] if n in self.visited and n not in chain)
        node.target = plain
        changed = self.current[target] = _in_dtype(node, target.meta["val"].dtype)
        for view, whole in pairwise(chain):
            with node.graph.inserting_after(changed):
                arguments = (self._now(whole), changed, *view.args[1:])
                changed = node.graph.call_function(_SCATTERS[view.target], arguments, dict(view.kwargs))
            changed.meta = {**node.meta, "val": whole.meta.get("val")}
            self.current[whole] = changed


def _in_dtype(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The result of an out-of-place operator, cast to the dtype of the tensor that its in-place form writes to."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    if all(x.dtype == dtype for x in values if isinstance(x, Tensor)):
        return node
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta = dict(node.meta)
    return cast


def _plain_overload(op: Any) -> Any:
    """The out-of-place form of an in-place operator, or None."""
    name = op.name().removeprefix("aten::").split(".")[0]
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, op._overloadname, None)


def _alias_families(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Group values that may share memory, because an operator may return a view of its argument."""
    family: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        family[node] = [node]
        schema = getattr(node.target, "_schema", None)
        views = schema is None or any(r.alias_info is not None for r in schema.returns) or "dropout" in str(node.target)
        if node.op == "call_function" and views:
            for source in node.all_input_nodes[:1] if mutates(node) else node.all_input_nodes:
                merged = list(dict.fromkeys(family[source] + family[node]))
                for member in merged:
                    family[member] = merged
    return family


def replace_copies(graph: fx.GraphModule) -> None:
    """Replace copies over a whole tensor, which have no derivative, by what they copy, in its shape and dtype."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.copy.default):
        target, source = node.all_input_nodes[0], node.all_input_nodes[-1]
        before, after = target.meta["val"], source.meta["val"]
        with graph.graph.inserting_before(node):
            if after.shape != before.shape:
                source = graph.graph.call_function(aten.expand_as.default, (source, target))
                source.meta = {**node.meta, "val": before.to(after.dtype)}
            if after.dtype != before.dtype:
                source = graph.graph.call_function(aten._to_copy.default, (source,), {"dtype": before.dtype})
                source.meta = {**node.meta, "val": before}
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)


# Composite operators. ------------------------------------------------------------------------------------------------

_COMPOSITES = (aten.einsum.default, aten.reshape_as.default, aten.view_as.default)
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # would be unrolled


def composites(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return Einstein sums, and reshapes to the sizes of another value, which do not change when that is pruned."""
    return (node for node in graph.graph.nodes if node.target in _COMPOSITES)


def decompose(graph: fx.GraphModule) -> None:
    """Replace composites by the matrix products and movements that torch computes them with."""
    _decompose(graph, composites(graph))


def finish(graph: fx.GraphModule) -> None:
    """Make operators without a rule prunable, and the graph trainable; what a plan's fingerprint does not depend on.

    Operators are replaced by those that torch computes them with, if all of these have rules: aliases, norms, products
    with a vector, writes of one value by a mask. Others keep the name the user wrote.
    """
    _decompose(graph, graph.graph.nodes)
    replace_copies(graph)
    graph.graph.eliminate_dead_code()


def _decompose(graph: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    for node in list(nodes):
        if (body := _decomposition(node)) is None:
            continue
        made = _inline(node, body, node.all_input_nodes)
        origin = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        for step in made.keys() - set(body.find_nodes(op="placeholder")):
            made[step].meta = {**origin, "val": step.meta.get("val")}
            if step.target in (aten.view.default, aten._unsafe_view.default):  # strides may differ in another call
                made[step].target = aten.reshape.default
        result: Any = fx.map_arg(body.output_node().args[0], made.__getitem__)
        for user in list(node.users) if not isinstance(result, fx.Node) else ():  # each takes one of the results
            user.replace_all_uses_with(result[user.args[1]])
            graph.graph.erase_node(user)
        if isinstance(result, fx.Node):
            node.replace_all_uses_with(result)
        graph.graph.erase_node(node)


def _decomposition(node: fx.Node) -> fx.Graph | None:
    """The operators that torch computes a node with, if it is a composite and each of them has a rule."""
    operands, op = node.all_input_nodes, node.target
    if not isinstance(op, OpOverload) or op._schema.name.removeprefix("aten::") in _RECURRENT:
        return None
    if _is_known(node) and not _is_special(node):
        return None
    places = {x: k for k, x in enumerate(operands)}

    def run(*values: Tensor) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[places[n]])
        return op(*args, **kwargs)

    try:
        body = make_fx(run, _decompositions())(*(x.meta["val"] for x in operands))
        functionalize(body)
        replace_copies(body)
    except Exception:  # whatever an operator or its decomposition raises on symbolic sizes
        return None
    for step in body.graph.find_nodes(op="call_function", target=aten.t.default):
        if step.meta["val"].dim() == 1:  # the vector itself, which torch's ONNX exporter fails on
            step.replace_all_uses_with(step.args[0])
    body.graph.eliminate_dead_code()
    return body.graph if all(map(_is_known, body.graph.nodes)) else None


def _is_known(node: fx.Node) -> bool:
    """Whether labels pass a node: it has a rule, computes a size, or reads no tensor."""
    if not isinstance(node.target, OpOverload):
        return node.op != "get_attr"
    reads = any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes)
    return not reads or node.target is aten.sym_size.int or str(node.target) in rules()


def _is_special(node: fx.Node) -> bool:
    """Whether the rule of an operator is not for this call: a product with a vector, a write by mask."""
    if node.target in (aten.matmul.default, aten.linear.default):
        return any(n.meta["val"].dim() == 1 for n in node.all_input_nodes[:2])
    if node.target is not aten.index_put.default:
        return False
    given: Any = fx.map_arg(arguments_of(node), lambda n: n.meta["val"])
    x, (mask, *others), value = given["self"], given["indices"], given["values"]
    return bool(not others and mask.dtype == torch.bool and value.dim() <= x.dim() - mask.dim())


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Torch's decompositions of operators without a rule, and those of special cases of operators with one."""
    return {op: function for op, function in decomposition_table.items() if str(op) not in rules()} | {
        aten.mv.default: lambda a, v: torch.mm(a, v.unsqueeze(1)).squeeze(1),
        aten.dot.default: lambda a, b: torch.mm(a.unsqueeze(0), b.unsqueeze(1)).squeeze(0).squeeze(0),
        aten.index_put.default: lambda x, masks, value: torch.where(_aligned(x, *masks), value, x),
    }


def _aligned(x: Tensor, mask: Tensor) -> Tensor:
    """A mask of the first axes of a tensor, with one axis for each of the others."""
    return mask[(..., *[None] * (x.dim() - mask.dim()))]


# Constants: computed weights become parameters, computed numbers become literals. ------------------------------------

_SCALARS = (aten.item.default, aten._local_scalar_dense.default)
_PER_SLICE = {"movement", "element-wise", "creation", "look-up"}
"""Families of operators that commute with slicing a weight."""
_MIXING = {"norm", "reduction", "attention"}
"""Families of operators whose result at one index depends on other indices (attention: softmax)."""

SOURCES = "computed_from"
"""Key in the meta of a node that reads a computed weight: names of the tensors it was computed from."""

Constants = Mapping[fx.Node, tuple[str, ...]]
"""Nodes that depend only on parameters and literals → the names of those parameters."""


def constants_of(graph: fx.GraphModule) -> Constants:
    """Return the nodes that depend on no input, in order."""
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found[node] = (str(node.target),)
        elif node.op == "call_function" and node.all_input_nodes and all(n in found for n in node.all_input_nodes):
            found[node] = tuple(s for n in node.all_input_nodes for s in found[n])
    return found


def scalars_of_constants(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return numbers read from constant tensors, such as the strides of a detector's levels."""
    constants = constants_of(graph)
    return (n for n in constants if n.target in _SCALARS and not _learned(graph, constants[n]))


def fold_scalars(graph: fx.GraphModule) -> None:
    """Replace numbers read from constant tensors by literals."""
    numbers = {node: _evaluated(graph, node) for node in scalars_of_constants(graph)}
    for user in [user for node in numbers for user in node.users]:
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: numbers.get(n, n))
    for node in numbers:
        graph.graph.erase_node(node)


def computed_weights(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return weights computed from parameters by norms or reductions (weight norm, weight standardisation)."""
    constants = constants_of(graph)
    found = (w for node in graph.graph.nodes for w in _computed_weights_of(node, constants))
    return (weight for weight in dict.fromkeys(found) if _learned(graph, constants[weight]))


def compute_weights(graph: fx.GraphModule) -> None:
    """Replace computed weights by parameters with their values; those that can be sliced as they are stay."""
    constants = constants_of(graph)
    named: dict[str, tuple[str, ...]] = {}
    values = {weight: _evaluated(graph, weight).detach().clone() for weight in computed_weights(graph)}
    for weight, data in values.items():
        read = [attribute(graph, str(n.target)) for n in _ancestors(weight) if n.op == "get_attr"]
        value = nn.Parameter(data, requires_grad=any(getattr(x, "requires_grad", False) for x in read))
        origin = tuple(dict.fromkeys(constants[weight]))
        same = (n for n, o in named.items() if o == origin and torch.equal(attribute(graph, n), value))
        # A module that is called twice computes its weight twice.
        name = next(same, None) or _free_name(graph, _learned(graph, origin), named)
        if name not in named:
            owner, _, leaf = name.rpartition(".")
            vars(graph.get_submodule(owner)).pop(leaf, None)
            graph.get_submodule(owner).register_parameter(leaf, value)
        with graph.graph.inserting_before(weight):
            held = graph.graph.get_attr(name)
        held.meta = {"val": weight.meta.get("val"), SOURCES: origin}
        weight.replace_all_uses_with(held)
        named[name] = origin
    graph.graph.eliminate_dead_code()


def sources_of_weights(graph: fx.Graph) -> dict[str, tuple[str, ...]]:
    """Return computed weight → the tensors it was computed from, without those still read elsewhere."""
    reads = [node for node in graph.nodes if node.op == "get_attr"]
    read = {str(node.target) for node in reads}
    return {
        str(node.target): tuple(source for source in node.meta[SOURCES] if source not in read)
        for node in reads
        if SOURCES in node.meta
    }


def _computed_weights_of(node: fx.Node, constants: Container[fx.Node]) -> Iterator[fx.Node]:
    """Tensor operands of a call whose slices do not depend on slices of their sources alone.

    The weight of a layer may be computed in any way; other tensors count if computed through a norm, reduction or
    softmax and no contraction (such as a projected query).
    """
    if node.op != "call_function" or node in constants:
        return
    rule = rules().get(str(node.target))
    own = arguments_of(node)["weight"] if rule is not None and "weight" in rule.contracts else None
    for weight in node.all_input_nodes:
        if weight.op != "call_function" or weight not in constants:
            continue
        families = {_family(n) for n in _ancestors(weight) if n.op == "call_function"}
        mixed = bool(families & _MIXING) and families <= _PER_SLICE | _MIXING and weight.meta["val"].numel() > 1
        if not families <= _PER_SLICE if weight is own else mixed:
            yield weight


def _family(node: fx.Node) -> str:
    if node.target is operator.getitem:  # one of several results
        return "movement"
    rule = rules().get(str(node.target))
    return rule.family if rule else ""


def _learned(graph: fx.GraphModule, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if isinstance(attribute(graph, name), nn.Parameter)]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        if (seen := todo.pop()) not in found:
            found.add(seen)
            todo += seen.all_input_nodes
    return found


def _evaluated(graph: fx.GraphModule, wanted: fx.Node) -> Any:
    with torch.no_grad():
        return Executor(graph, {}, device=None).only(Frontier(0, {}), wanted.name)


def _free_name(graph: fx.GraphModule, sources: list[str], taken: Container[str]) -> str:
    """Return `conv.weight` of a parametrisation, else `conv.weight_computed`, numbered if taken."""
    owner, _, leaf = sources[0].partition(".parametrizations.")
    largest = max(sources, key=lambda s: attribute(graph, s).numel())
    name = f"{owner}.{leaf.partition('.')[0]}" if leaf else f"{largest}_computed"
    numbered = (name if k == 1 else f"{name}_{k}" for k in count(1))
    return next(candidate for candidate in numbered if candidate not in taken)


PASSES: tuple[tuple[Callable[[fx.GraphModule], None], Nodes], ...] = (
    (inline_regions, regions),
    (drop_assertions, assertions),
    (functionalize, writes),
    (validate_sizes, value_dependent_sizes),
    (decompose, composites),
    (fold_scalars, scalars_of_constants),
    (compute_weights, computed_weights),
)
"""Each rewrites a graph in place, and the kind of nodes absent afterwards."""


def _plain_module(graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph as an ordinary GraphModule, without the hooks of `ExportedProgram.module()`.

    If all inputs are plain arguments, the graph itself rebuilds the outputs, so that it can be copied and saved.
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
