"""Make an exported graph plain: no assertions, no in-place operators, no sizes by example, no weights in the making."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from surgery.capture import einsum
from surgery.capture.unlifting import flat_inputs, plain_containers
from surgery.core import UNKNOWN, Executor, Frontier, attribute, hint, is_symbolic, last_own_line, mutates
from surgery.errors import UnsupportedModel
from surgery.ops import rules

aten = torch.ops.aten
_ASSERTIONS = ("_assert", "sym_constrain", "_guards_fn")
_LIKE_ANOTHER = (aten.reshape_as.default, aten.view_as.default)
_CONTRACTIONS = {f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)} | {"linear"}
_SCALARS = (aten.item.default, aten._local_scalar_dense.default)
_SLICE_ALIKE = {"movement", "element-wise", "creation", "look-up"}
"""Families of operators that do the same to a slice of a weight as to the whole."""
_MIXING = {"norm", "reduction", "attention"}
"""Families of operators whose result at one index depends on the others: of attention, softmax."""


@dataclass(frozen=True, slots=True, eq=False)
class Cleaned:
    """A functional graph, and the weights in it that were computed: new name → what they were computed from."""

    graph: torch.fx.GraphModule
    materialised: Mapping[str, tuple[str, ...]]


def clean(exported: Any, graph: torch.fx.GraphModule) -> Cleaned:
    """Return the exported program as a plain graph module that later stages can label and rewrite.

    Args:
        exported: what `torch.export` returned.
        graph: what `unlift` makes of it; changed in place.
    """
    _inline_regions(graph)
    _drop_assertions(graph)
    if not _functionalise(graph):
        graph = exported.run_decompositions({}).module(check_guards=False)
        _inline_regions(graph)
        _drop_assertions(graph)
        _functionalise(graph)
    _refuse_sizes_by_value(graph)
    _spell_out_sizes(graph)
    einsum.spell_out(graph.graph)
    _fold_scalars(graph)
    materialised = _materialise(graph)
    graph.graph.eliminate_dead_code()
    return Cleaned(_plain(graph), materialised)


def _inline_regions(graph: torch.fx.GraphModule) -> None:
    """Put what forward does inside `torch.autocast(enabled=False)` or `torch.no_grad()` among the rest.

    Raises:
        UnsupportedModel: autocast is on in forward: the precision of each operator is then not the program's to say. Or
            a conditional or a loop over tensor values.
    """
    for node in list(graph.graph.nodes):
        if node.target is wrap_with_autocast:
            device, _, enabled, _, body, *operands = node.args
            if enabled and device == "cpu":
                raise UnsupportedModel(
                    f"forward turns autocast on for the processor{_line_of(attribute(graph, str(body.target)))}; "
                    "take that out, and cast the model itself"
                )
        elif node.target is wrap_with_set_grad_enabled:
            _, body, *operands = node.args
        elif isinstance(node.target, HigherOrderOperator):
            where = last_own_line(str(node.meta.get("stack_trace", ""))) or UNKNOWN
            raise UnsupportedModel(
                f"'{node.target}' at {where} chooses its way, or repeats it, by values of tensors; write one way "
                "through forward, or shrink a submodule without it by --part"
            )
        else:
            continue
        inner = attribute(graph, str(body.target)).graph
        made = dict(zip((n for n in inner.nodes if n.op == "placeholder"), operands, strict=True))
        with graph.graph.inserting_before(node):
            for step in inner.nodes:
                if step.op not in ("placeholder", "output"):
                    made[step] = graph.graph.node_copy(step, made.__getitem__)
        results = [made.get(x, x) for x in next(n for n in inner.nodes if n.op == "output").args[0]]
        for user in list(node.users):  # each takes one of the results
            user.replace_all_uses_with(results[user.args[1]])
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        if not body.users:
            graph.graph.erase_node(body)


def _refuse_sizes_by_value(graph: torch.fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else ()
            if any(is_symbolic(size) and size.node.hint is None for size in sizes):
                where = last_own_line(str(node.meta.get("stack_trace", ""))) or UNKNOWN
                raise UnsupportedModel(
                    f"'{node.target}' at {where} returns as much as values say (a choice by a mask), which leaves no "
                    "size to plan with; shrink a submodule without it by --part, or try --tracer torch-pruning"
                )


def _line_of(body: torch.fx.GraphModule) -> str:
    traces = (str(node.meta.get("stack_trace", "")) for node in body.graph.nodes)
    found = next(filter(None, map(last_own_line, traces)), "")
    return f" around {found}" if found else ""


def _spell_out_sizes(graph: torch.fx.GraphModule) -> None:
    """`x.reshape_as(y)` becomes a reshape to y's sizes: what it means, whatever becomes of y."""
    for node in list(graph.graph.nodes):
        if node.target not in _LIKE_ANOTHER:
            continue
        x, other = node.args
        with graph.graph.inserting_before(node):
            sizes = [
                hint(size) if not is_symbolic(size) else _size(graph.graph, other, axis, size)
                for axis, size in enumerate(other.meta["val"].shape)
            ]
        node.target, node.args = aten.reshape.default, (x, sizes)


def _size(graph: torch.fx.Graph, of: torch.fx.Node, axis: int, size: Any) -> torch.fx.Node:
    node = graph.call_function(aten.sym_size.int, (of, axis))
    node.meta["val"] = size
    return node


def _materialise(graph: torch.fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """Replace each weight that norms or reductions compute from parameters alone (weight norm, standardisation).

    What it comes out as becomes a parameter of its own, which can be sliced; its sources stay only where they are read
    elsewhere. Weights that are merely reshaped or scaled element by element need no such thing.
    """
    sources = _sources_of_constants(graph)
    named: dict[str, tuple[str, ...]] = {}
    for node in list(graph.graph.nodes):
        for weight in _computed_weights(node, sources):
            learned = [s for s in sources[weight] if isinstance(attribute(graph, s), nn.Parameter)]
            if not learned:
                continue
            origin, value = tuple(dict.fromkeys(sources[weight])), _computed(graph, _region(weight, sources), weight)
            same = (n for n, o in named.items() if o == origin and torch.equal(attribute(graph, n), value))
            name = next(same, None) or _free_name(graph, learned, named)  # a module called twice computes it twice
            if name not in named:
                _set(graph, name, value)
            with graph.graph.inserting_before(weight):
                held = graph.graph.get_attr(name)
            held.meta = {"val": weight.meta.get("val")}
            weight.replace_all_uses_with(held)
            named[name] = origin
    graph.graph.eliminate_dead_code()
    read = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    return {name: tuple(s for s in origin if s not in read) for name, origin in named.items()}


def _computed_weights(node: torch.fx.Node, sources: Mapping[torch.fx.Node, Any]) -> Iterator[torch.fx.Node]:
    """Tensors that a call reads and whose values depend on more of their sources than a slice holds.

    The weight of a convolution or linear layer may be computed in any way; what else there is (biases, gains, operands
    of products) counts where a norm, a reduction or a softmax is on the way, and no contraction (a learned query,
    projected).
    """
    if node.op != "call_function" or node in sources:
        return
    kind = str(node.target).split(".")[1] if "." in str(node.target) else ""
    own = [*node.args[1:2], node.kwargs.get("weight")] if kind in _CONTRACTIONS else []
    for weight in node.all_input_nodes:
        if weight.op != "call_function" or weight not in sources:
            continue
        families = {_family(n) for n in _region(weight, sources) if n.op == "call_function"}
        whole, mixed = families <= _SLICE_ALIKE, families & _MIXING and families <= _SLICE_ALIKE | _MIXING
        if not whole if weight in own else mixed and weight.meta["val"].numel() > 1:
            yield weight


def _family(node: torch.fx.Node) -> str:
    """Of the operator's rule; picking one of several results moves them."""
    if node.target is operator.getitem:
        return "movement"
    rule = rules().get(str(node.target))
    return rule.family if rule else ""


def _fold_scalars(graph: torch.fx.GraphModule) -> None:
    """Write numbers that are read out of constant tensors (the strides of a detector's levels) into the calls."""
    sources = _sources_of_constants(graph)
    for node in list(graph.graph.nodes):
        if node.target not in _SCALARS or node not in sources:
            continue
        if any(isinstance(attribute(graph, s), nn.Parameter) for s in sources[node]):
            continue
        number = _evaluated(graph, node)
        _replace_by_number(node, number)
        graph.graph.erase_node(node)


def _replace_by_number(node: torch.fx.Node, number: float) -> None:
    def exchanged(argument: torch.fx.Node) -> Any:
        return number if argument is node else argument

    for user in list(node.users):
        user.args = torch.fx.map_arg(user.args, exchanged)
        user.kwargs = torch.fx.map_arg(user.kwargs, exchanged)


def _sources_of_constants(graph: torch.fx.GraphModule) -> dict[torch.fx.Node, list[str]]:
    """Nodes that depend on parameters and literals alone → the names of those parameters."""
    sources: dict[torch.fx.Node, list[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            sources[node] = [str(node.target)]
        elif node.op == "call_function" and node.all_input_nodes and all(n in sources for n in node.all_input_nodes):
            sources[node] = [s for n in node.all_input_nodes for s in sources[n]]
    return sources


def _region(weight: torch.fx.Node, constants: Mapping[torch.fx.Node, Any]) -> list[torch.fx.Node]:
    """All that `weight` is computed from, in order."""
    found: dict[torch.fx.Node, None] = {}
    todo = [weight]
    while todo:
        node = todo.pop()
        if node not in found:
            found[node] = None
            todo += node.all_input_nodes
    return [n for n in constants if n in found]


def _computed(graph: torch.fx.GraphModule, region: list[torch.fx.Node], weight: torch.fx.Node) -> nn.Parameter:
    read = [attribute(graph, str(n.target)) for n in region if n.op == "get_attr"]
    value = _evaluated(graph, weight).detach().clone()
    return nn.Parameter(value, requires_grad=any(getattr(x, "requires_grad", False) for x in read))


def _evaluated(graph: torch.fx.GraphModule, wanted: torch.fx.Node) -> Any:
    """The value of a node that needs no inputs."""
    with torch.no_grad():
        return Executor(graph, {}, device=None).only(Frontier(0, {}), wanted.name)


def _free_name(graph: torch.fx.GraphModule, sources: list[str], taken: Container[str]) -> str:
    """`conv.weight` where no parameter is called so (a parametrisation hides it), else `conv.weight_computed`.

    A parameter from which several weights are computed lends its name to each, with a number from the second one on.
    """
    owner, _, leaf = sources[0].partition(".parametrizations.")
    largest = max(sources, key=lambda s: attribute(graph, s).numel())
    name = f"{owner}.{leaf.partition('.')[0]}" if leaf else f"{largest}_computed"
    numbered = (name if k == 1 else f"{name}_{k}" for k in count(1))
    return next(candidate for candidate in numbered if candidate not in taken)


def _set(graph: torch.fx.GraphModule, path: str, value: nn.Parameter) -> None:
    owner, _, leaf = path.rpartition(".")
    module = graph.get_submodule(owner)
    module.__dict__.pop(leaf, None)
    module.register_parameter(leaf, value)


def _plain(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same graph in an ordinary GraphModule, without what `ExportedProgram.module()` hooks on.

    Where all inputs are plain arguments, outputs are rebuilt by the graph itself (it can return tuples and
    dictionaries): such a module can be copied and saved without torch's pytree machinery.
    """
    info = getattr(graph.graph._codegen, "pytree_info", None)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    if info is not None and flat_inputs(info.in_spec) and plain_containers(info.out_spec):
        output.args = (pytree.tree_unflatten(list(output.args[0]), info.out_spec),)
        graph.graph.set_codegen(torch.fx.graph.CodeGen())
    plain = torch.fx.GraphModule(graph, graph.graph, "Program")
    plain.eval()
    return plain


def _drop_assertions(graph: torch.fx.GraphModule) -> None:
    for node in reversed(list(graph.graph.nodes)):
        called = node.op in ("call_function", "call_module") and not node.users
        if called and any(mark in str(node.target) for mark in _ASSERTIONS):
            graph.graph.erase_node(node)


def _functionalise(graph: torch.fx.GraphModule) -> bool:
    """Replace in-place operators by plain ones; False where a mutated value is seen through a view.

    A slice that is mutated is written back into what it was sliced from, and what it was sliced from is that from then
    on. Any other view that was there before and is read later calls for torch's own functionalisation.
    """
    order: dict[torch.fx.Node, float] = {node: k for k, node in enumerate(graph.graph.nodes)}
    family = _alias_families(graph)
    for node in list(graph.graph.nodes):
        if not mutates(node):
            continue
        chain, now = _slices_up(node.args[0]), order[node]
        if chain[-1].op != "call_function" or _plain_overload(node.target) is None:
            return False
        older = (n for n in family[chain[0]] if order[n] < now and n not in chain)
        if any(order[user] > now for relative in older for user in relative.users):
            return False
        node.target = _plain_overload(node.target)
        changed = _in_its_dtype(node, node.args[0].meta["val"].dtype)
        order[changed] = now
        _replace_later(chain[0], changed, order, now)
        for step, (view, whole) in enumerate(pairwise(chain), 1):
            with graph.graph.inserting_after(changed):
                arguments = (whole, changed, *view.args[1:])
                written = graph.graph.call_function(_SCATTERS[view.target], arguments, dict(view.kwargs))
            written.meta = {**node.meta, "val": whole.meta.get("val")}
            order[written] = now + step / (len(chain) + 1)
            _replace_later(whole, written, order, order[written])
            changed = written
            _join(family, whole, written)
        if len(chain) > 1:
            _join(family, chain[-1], node)
    return True


def _in_its_dtype(node: torch.fx.Node, dtype: torch.dtype) -> torch.fx.Node:
    """What a plain operator gives, in the dtype of what its in-place form would have written into."""
    values = [n.meta.get("val") for n in node.all_input_nodes]
    if all(x.dtype == dtype for x in values if isinstance(x, torch.Tensor)):
        return node
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta = dict(node.meta)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    return cast


_SCATTERS: Mapping[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def _slices_up(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The value, what it is a slice or an element of, and so on up to a value that is neither."""
    chain = [node]
    while chain[-1].target in _SCATTERS:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


def _replace_later(old: torch.fx.Node, new: torch.fx.Node, order: Mapping[torch.fx.Node, float], now: float) -> None:
    old.replace_all_uses_with(new, delete_user_cb=lambda user: order[user] > now)


def _join(family: dict[torch.fx.Node, list[torch.fx.Node]], old: torch.fx.Node, new: torch.fx.Node) -> None:
    family[old].append(new)  # one list for all who are in it
    family[new] = family[old]


def _plain_overload(op: Any) -> Any:
    packet, overload = op.name().removeprefix("aten::"), op._overloadname
    name = packet.split(".")[0]
    if not name.endswith("_") or not hasattr(torch.ops.aten, name[:-1]):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1]), overload, None)


def _alias_families(graph: torch.fx.GraphModule) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """Values that may share memory: joined by operators whose result may be a view of an argument."""
    family: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in graph.graph.nodes:
        family[node] = [node]
        schema = getattr(node.target, "_schema", None)
        views = schema is None or any(r.alias_info is not None for r in schema.returns) or "dropout" in str(node.target)
        if node.op == "call_function" and views and not mutates(node):
            for source in node.all_input_nodes:
                merged = list(dict.fromkeys(family[source] + family[node]))
                for member in merged:
                    family[member] = merged
    return family
