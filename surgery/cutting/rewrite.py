"""The compact model: slice every tensor and update literal sizes of calls, or return the user's own class.

The program is always rewritten; the user's own class is returned instead if it computes the same. Standard modules are
updated from their tensors. If a literal of a call changed and an integer attribute of its module equals it, such as
`self.num_heads`, the attribute is changed too.
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from surgery.capture import evaluating, module_of
from surgery.core import (
    TOLERANCE,
    Callee,
    CompactModel,
    Executor,
    Program,
    arguments_of,
    copied,
    elsewhere,
    empty_caches,
    first_line,
    flat_outputs,
    sample_inputs,
    tensors_of,
    well_conditioned,
)
from surgery.coupling import CompactGraph, Cut, called, hold, values_in
from surgery.cutting.attention import resize_attention
from surgery.errors import IllegalCut
from surgery.ops import Replacement, Rewrite, Scaled, rules

Literals = dict[tuple[str, int], set[int]]
"""Module and size in one of its calls → the sizes that it changed to."""


def rewrite_program(cut: Cut) -> CompactModel:
    """Return the user's class if possible, else the rewritten program; IllegalCut if an axis would become empty."""
    sliced = cut.tensors()
    graph, literals = _rewritten(cut, sliced)
    module, why, stuck = _own_class(cut, graph, sliced, literals)
    graph.train(cut.program.model.training)
    if module is None:
        return CompactModel(graph, "graph", why, graph, _lost_in_training(cut.program), stuck)
    return CompactModel(module, "module", why, graph)


def masked(cut: Cut) -> nn.Module:
    """Return a copy of the dense model with dead slices set to zero, as masking tools do."""
    module: nn.Module = copied(cut.program.dense.model)
    tensors = dict(module.named_parameters(remove_duplicate=False))
    left = {name for name, _ in cut.program.model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name in tensors.keys() - left:  # of dropped blocks
            tensors[name].zero_()
        for name, tensor in cut.reordered(module.state_dict()).items():
            module.state_dict()[name].copy_(tensor)
        for c in cut.plan.cuts:
            # The weights behind a parametrisation (weight norm) are divided by their norm: zeros would become NaN.
            if c.tensor in tensors and "parametrizations" not in c.tensor:
                tensors[c.tensor].index_fill_(c.axis, torch.tensor(c.dead, device=tensors[c.tensor].device), 0.0)
    return module


# The rewritten program. ----------------------------------------------------------------------------------------------


def _rewritten(cut: Cut, sliced: Mapping[str, Tensor]) -> tuple[CompactGraph, Literals]:
    """Copy the graph with arguments at the new sizes; also return the changed sizes."""
    program, labelled, table = cut.program, cut.coupling.labelled, rules()
    for name, value in labelled.values.items():
        if any(axis and not cut.masks(v, a).any() for v in values_in(value) for a, axis in enumerate(v.axes)):
            raise IllegalCut(f"the plan leaves nothing of a value at node '{name}'; remove fewer units there")
    root = hold(nn.Module(), sliced, program.model)
    graph = torch.fx.Graph()
    graph.set_codegen(copy.deepcopy(program.graph.graph._codegen))
    new: dict[torch.fx.Node, torch.fx.Node] = {}
    literals: Literals = {}
    for node in program.graph.graph.nodes:
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], lambda n: new[n]))
            continue
        new[node] = graph.node_copy(node, lambda n: new[n])
        new[node].meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        rule = table.get(str(node.target))
        if node.op == "call_function" and rule is not None and rule.rewrite is not None and node.name in labelled.calls:
            raw, out = arguments_of(node), labelled.values[node.name]
            outputs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
            change = rule.rewrite(Rewrite(labelled.calls[node.name], raw, outputs, cut.masks))
            for name, value in change.items() if not isinstance(change, Replacement) else ():
                for a, b in zip(pytree.tree_leaves(raw[name]), pytree.tree_leaves(value), strict=False):
                    if isinstance(a, int) and isinstance(b, int) and a != b:
                        literals.setdefault((module_of(node), a), set()).add(b)
            _apply_change(graph, root, new[node], change, new)
    leaves = pytree.tree_leaves(program.example_args)
    places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]
    root.fixed_sizes = tuple(  # type: ignore[assignment]
        (place, axis, size)
        for place, spec in zip(places, program.inputs, strict=False)
        for axis, size in enumerate(spec.shape)
        if axis not in spec.dynamic
    )
    module = CompactGraph(root, graph)
    module.eval()
    return module, literals


def _apply_change(
    graph: torch.fx.Graph,
    root: nn.Module,
    node: torch.fx.Node,
    change: Mapping[str, Any] | Replacement,
    new: Mapping[torch.fx.Node, torch.fx.Node],
) -> None:
    """Change the arguments, or the operator, of a call in place."""

    def resolved(x: Any) -> Any:
        if isinstance(x, torch.fx.Node):
            return new.get(x, x)
        if isinstance(x, Scaled):
            shared, size = gcd(x.numerator, x.denominator), new[x.node]
            # A name of its own, because values are compared by the names of the dense program's nodes.
            for op, number in ((operator.mul, x.numerator // shared), (operator.floordiv, x.denominator // shared)):
                size = graph.create_node("call_function", op, (size, number), name="_scaled_size")
            return size
        if isinstance(x, Tensor):
            name = f"_index_{node.name}"
            root.register_buffer(name, x, persistent=False)
            return graph.get_attr(name)
        return type(x)(resolved(y) for y in x) if isinstance(x, (list, tuple)) else x

    with graph.inserting_before(node):
        if isinstance(change, Replacement):
            node.args, node.kwargs, node.target = tuple(resolved(a) for a in change.args), {}, change.op
            return
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        raw = arguments_of(node)
        for name, value in change.items():
            if raw.get(name) == value:
                continue
            if (position := names.index(name)) < len(node.args):
                node.update_arg(position, resolved(value))
            else:
                node.update_kwarg(name, resolved(value))


# The user's own class. -----------------------------------------------------------------------------------------------


def _own_class(
    cut: Cut, graph: CompactGraph, sliced: Mapping[str, Tensor], literals: Literals
) -> tuple[nn.Module | None, str, str]:
    """Return the user's class if it computes the same as the graph, the reason, and the submodule at fault."""
    program = cut.program
    if isinstance(program.model, torch.fx.GraphModule):
        return None, program.why_graph or "the model is a graph already", ""
    if program.materialised:
        first = next(iter(program.materialised))
        return None, f"forward computes the weight '{first}' from others, at its old size", ""
    named = {n for n, _ in program.model.named_parameters(remove_duplicate=False)}
    named |= {n for n, _ in program.model.named_buffers()}
    stray = [c.tensor for c in cut.plan.cuts if c.tensor not in named]
    if stray:
        return None, f"forward builds the tensor '{stray[0]}' itself, at a size that would have to change", ""
    groups: dict[str, int] = {}
    for node in graph.graph.nodes:
        raw = arguments_of(node) if node.op == "call_function" else {}
        weight, count = raw.get("weight"), raw.get("groups", raw.get("num_groups"))
        if isinstance(weight, torch.fx.Node) and isinstance(count, int):
            groups[str(weight.target)] = count
    module = transplant(program.model, sliced, groups)
    resize_attention(module, cut.plan.cuts)
    repaired = _repair(module, literals)
    differs, stuck = _differs(cut, graph, module)
    if why := differs or _fails_in_training(program, module):
        return None, why, stuck or repaired
    return module, "its forward computes the same at the new sizes", ""


def _differs(cut: Cut, graph: CompactGraph, module: nn.Module) -> tuple[str | None, str]:
    """Return why the user's class differs from the rewritten program (None if it does not), and in which submodule."""
    state = cut.kept(well_conditioned(cut.program))

    def ran(other_batch: bool, by: int) -> tuple[str, list[Tensor], list[Tensor]] | None:
        """Run the rewritten program; return a description of the sizes, the inputs and the outputs."""
        sizes = "the new sizes" + ", for another batch or image" * (other_batch or by != 0)
        drawn = sample_inputs(cut.program, seed=7, dtype=torch.float64, by=by)
        inputs = [x[:1] if other_batch and isinstance(x, Tensor) else x for x in drawn]
        unsure = (Exception,) if other_batch or by else ()  # the dense model may not accept another size either
        with suppress(*unsure), torch.no_grad(), evaluating(graph):
            return sizes, inputs, flat_outputs(Executor(graph, state, dtype=torch.float64).run(*inputs))
        return None

    for sizes, inputs, wanted in filter(None, (ran(False, 0), *elsewhere(cut.program, ran))):
        try:
            got = called(Callee.of(cut.program, module), state, inputs)
        except Exception as error:  # any exception the user's forward raises at unexpected sizes
            return f"its forward does not run at {sizes}: {first_line(error)}", _raised_in(error, module)
        if [t.shape for t in got] != [t.shape for t in wanted]:
            return f"its forward returns other shapes at {sizes}", ""
        pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if a.numel()]
        worst = max((float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs), default=0.0)
        if not worst <= TOLERANCE[torch.float64]:
            return f"its forward computes something else at {sizes} (relative difference {worst:.1e})", ""
    return None, ""


def _raised_in(error: BaseException, model: nn.Module) -> str:
    """Return the path of the innermost non-torch module in whose code the error was raised; "" if none."""
    paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and not type(module).__module__.startswith("torch.nn.modules."):
            return paths.get(id(module), "")
    return ""


def transplant(model: nn.Module, sliced: Mapping[str, Tensor], groups: Mapping[str, int]) -> nn.Module:
    """Return a copy of `model` with the sliced tensors, and sizes of standard modules updated from them.

    `groups`: weight name → remaining groups of its convolution or normalisation.
    """
    made: nn.Module = copied(model, {id(tensor): sliced[name] for name, tensor in tensors_of(model).items()})
    empty_caches(made)
    for name, module in made.named_modules():
        weight, count = module._parameters.get("weight"), groups.get(f"{name}.weight")
        if isinstance(module, _NormBase):
            sized = weight if weight is not None else module._buffers.get("running_mean")
            module.num_features = sized.shape[0] if sized is not None else module.num_features
        elif weight is None:
            continue
        elif isinstance(module, _ConvNd):
            module.groups = count or module.groups
            first, second = weight.shape[0], weight.shape[1] * module.groups
            module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        elif isinstance(module, nn.GroupNorm):
            module.num_groups, module.num_channels = count or module.num_groups, weight.shape[0]
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = weight.shape
        elif isinstance(module, nn.PReLU):
            module.num_parameters = weight.shape[0]
    return made


def _repair(model: nn.Module, literals: Literals) -> str:
    """Guess integer attributes from the literals of calls in their module; returns the first changed module."""
    repaired = []
    for path, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.MultiheadAttention)):
            continue
        for name, value in list(vars(module).items()):
            after = literals.get((path, value), ()) if type(value) is int and not name.startswith("_") else ()
            if len(after) == 1:
                setattr(module, name, *after)
                repaired.append(path)
    return next(iter(repaired), "")


def _fails_in_training(program: Program, module: nn.Module) -> str | None:
    """Return why forward fails in training mode, whose branches were not traced."""
    unseen = _unseen(program)
    if not unseen:
        return None
    trial = copied(module)
    for m in trial.modules():
        m.training = True
    try:
        with torch.no_grad():
            trial(*program.example_args, **program.example_kwargs)
    except Exception as error:  # any exception the user's forward raises
        return f"its forward in training mode also runs '{unseen[0]}', which was not traced: {first_line(error)}"
    return None


def _unseen(program: Program) -> list[str]:
    """Return parameters that the traced program does not read."""
    seen = {str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"}
    seen |= {name for sources in program.materialised.values() for name in sources}
    return [n for n, _ in program.model.named_parameters() if n not in seen]


@cache
def _reads_training(kind: type[nn.Module]) -> bool:
    """Return whether forward depends on the mode in its own source; only its branches in eval mode were traced."""
    try:
        return not kind.__module__.startswith("torch.nn.") and "self.training" in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # no source
        return False


def _lost_in_training(program: Program) -> tuple[str, ...]:
    """Return training-time behaviour that the traced program loses, since eval mode does not run it."""
    lost = []
    traced = {module_of(n) for n in program.graph.graph.nodes if "dropout" in str(n.target)}
    for name, module in program.model.named_modules():
        kind = type(module).__name__
        rates = [float(r) for a in ("p", "drop_prob") if isinstance(r := getattr(module, a, None), (int, float))]
        if ("Drop" in kind or "StochasticDepth" in kind) and rates and rates[0] > 0 and name not in traced:
            lost.append(f"{kind} '{name}'")
        if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            lost.append(f"attention dropout of '{name}'")
        if isinstance(module, _BatchNorm) and module.momentum is None and module.track_running_stats:
            lost.append(f"cumulative statistics of '{name}' (momentum None)")
        if _reads_training(type(module)):  # type: ignore[arg-type]
            lost.append(f"what forward of '{name or kind}' does only where self.training is set")
    if any(isinstance(m, _BatchNorm) for m in program.model.modules()):
        lost.append("num_batches_tracked, which batch norms count up")
    lost += [f"the computation of '{name}' from {', '.join(s)}" for name, s in program.materialised.items()]
    heads = dict.fromkeys(name.split(".")[0] for name in _unseen(program))
    return (*lost, *(f"'{head}', which evaluation mode does not run" for head in heads))
