"""Make the smaller model: slice every tensor, rewrite what the program bakes in, and give the user's class back.

The rewritten program is always built. The user's own class, with its submodules sliced, is returned instead whenever
its forward computes the same at the new sizes; then trainers, `isinstance` checks and methods go on working.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from surgery.capture import evaluating, module_of, source_of
from surgery.core import (
    TOLERANCE,
    Callee,
    CompactModel,
    Coupling,
    Cut,
    Executor,
    LabelledGraph,
    Masks,
    Plan,
    Program,
    all_tensors,
    bind,
    copied,
    first_line,
    flat_outputs,
    other_sizes,
    sample_inputs,
    well_conditioned,
)
from surgery.coupling import (
    CompactGraph,
    InDouble,
    Move,
    arranged,
    couple,
    hold,
    moved,
    moves_of,
    require_own_cuts,
    rewrite_view,
)
from surgery.cutting.own_class import Literal, raised_in, transplant
from surgery.errors import IllegalCut, PlanMismatch
from surgery.ops import Replacement, Scaled, rules


def cut(program: Program, plan: Plan, *, coupling: Coupling | None = None) -> CompactModel:
    """Return a smaller copy of the traced model without the plan's dead units.

    Args:
        program: what `trace` returned; left unchanged.
        plan: for each `Cut(tensor, axis, dead)` a tensor of shape (.., C, ..) becomes (.., C - len(dead), ..).
        coupling: what `couple` returned for this program, where it is at hand.

    Returns:
        Module with the dense model's signature, output shapes and parameter names; trainable.

    Raises:
        PlanMismatch: the plan was made for another architecture, or contradicts itself.
        IllegalCut: an axis would be left empty.

    Source: coupled groups after Fang et al. 2023 (arXiv:2301.12900); label propagation is derived in `couple.py`.
    """
    coupling = coupling or couple(program, keep=tuple(plan.settings.get("keep", ())))
    masks = masks_of(program, plan, coupling)
    labelled = coupling.labelled
    sliced = slice_tensors(program, plan, moves_of(coupling, plan.arranged))
    graph, literals = _rewrite(program, labelled, masks, sliced)
    lost = _lost_in_training(program)
    module, why, stuck = _own_class(program, plan, graph, sliced, literals)
    graph.train(program.model.training)
    if module is None:
        return CompactModel(graph, "graph", why, graph, lost, stuck)
    return CompactModel(module, "module", why, graph)


def masks_of(program: Program, plan: Plan, coupling: Coupling) -> Masks:
    """Which indices survive; raises PlanMismatch where plan and program do not belong together."""
    if plan.fingerprint != program.fingerprint:
        raise PlanMismatch(
            "the plan was made for another architecture (its fingerprint differs from this model's); "
            "use the model it was made for, or make a new plan"
        )
    require_own_cuts(plan, coupling)
    labelled = coupling.labelled
    return Masks(labelled, labelled.dead_roots(plan.dead))


# -- tensors ---------------------------------------------------------------------------------------------------------


def slice_tensors(program: Program, plan: Plan, moves: Sequence[Move]) -> dict[str, Tensor]:
    """Every parameter and buffer of the model and of the graph, as a copy, moved and without dead positions.

    Parameters stay parameters, with their `requires_grad`; tied ones stay one object.
    """
    tensors = all_tensors(program)
    moving = {(id(tensors[move.tensor]), move.axis, move.orders.tobytes()): move for move in moves}  # tied ones once
    cuts: dict[int, dict[int, Tensor]] = {}
    for c in plan.cuts:
        cuts.setdefault(id(tensors[c.tensor]), {})[c.axis] = _survivors(c)
    out: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in copies:
            value = tensor.detach()
            for key, move in moving.items():
                value = moved(value, move) if key[0] == id(tensor) else value
            for axis, index in cuts.get(id(tensor), {}).items():
                value = value.index_select(axis, index.to(value.device))
            value = value.clone(memory_format=torch.contiguous_format)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = value
        out[name] = copies[id(tensor)]
    return out


def _survivors(c: Cut) -> Tensor:
    return _others(c.size, c.dead)


@lru_cache(maxsize=256)  # the cuts of one group, which follow each other, have the same
def _others(size: int, dead: tuple[int, ...]) -> Tensor:
    alive = torch.ones(size, dtype=torch.bool)
    alive[list(dead)] = False
    return alive.nonzero().squeeze(1)


def masked(program: Program, plan: Plan, coupling: Coupling) -> nn.Module:
    """Return a copy of the dense model whose dead slices are zero and still there: what masking tools make."""
    module: nn.Module = copied(program.dense.model)
    tensors = dict(module.named_parameters(remove_duplicate=False))
    left = {name for name, _ in program.model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name in tensors.keys() - left:  # of blocks that are gone
            tensors[name].zero_()
        for name, tensor in arranged(module.state_dict(), moves_of(coupling, plan.arranged)).items():
            module.state_dict()[name].copy_(tensor)
        for c in plan.cuts:
            # The weights behind a parametrisation (weight norm) are divided by their norm: zeros would become NaN.
            if c.tensor in tensors and "parametrizations" not in c.tensor:
                tensors[c.tensor].index_fill_(c.axis, torch.tensor(c.dead, device=tensors[c.tensor].device), 0.0)
    return module


# -- the program -----------------------------------------------------------------------------------------------------


def _rewrite(
    program: Program, labelled: LabelledGraph, masks: Masks, sliced: Mapping[str, Tensor]
) -> tuple[CompactGraph, list[Literal]]:
    """Copy the graph with every call's arguments brought to the new sizes; also list the sizes that changed."""
    _refuse_empty(labelled, masks)
    table = rules()
    root = hold(nn.Module(), sliced, program.model)
    graph = torch.fx.Graph()
    graph.set_codegen(copy.deepcopy(program.graph.graph._codegen))
    new: dict[torch.fx.Node, torch.fx.Node] = {}
    literals: list[Literal] = []
    for node in program.graph.graph.nodes:
        if node.op == "output":
            graph.output(torch.fx.map_arg(node.args[0], lambda n: new[n]))
            continue
        copied = graph.node_copy(node, lambda n: new[n])
        copied.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
        new[node] = copied
        rule = table.get(str(node.target))
        if node.op == "call_function" and rule is not None and rule.rewrite is not None and node.name in labelled.calls:
            raw = bind(node, lambda n: n).raw
            change = rule.rewrite(rewrite_view(labelled, masks, node.name, raw))
            new[node] = _apply_change(graph, root, copied, change, new)
            literals += _literals(node, raw, change)
    root.fixed_sizes = _fixed_sizes(program)  # type: ignore[assignment]
    module = CompactGraph(root, graph, "Compact")
    module.eval()
    return module, literals


def _fixed_sizes(program: Program) -> tuple[tuple[int, int, int], ...]:
    leaves = pytree.tree_leaves(program.example_args)
    places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]
    return tuple(
        (place, axis, size)
        for place, spec in zip(places, program.inputs, strict=False)
        for axis, size in enumerate(spec.shape)
        if axis not in spec.dynamic
    )


def _refuse_empty(labelled: LabelledGraph, masks: Masks) -> None:
    for name, value in labelled.values.items():
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(v, "axes") and any(layers and not masks(v, a).any() for a, layers in enumerate(v.axes)):
                raise IllegalCut(f"the plan leaves nothing of a value at node '{name}'; remove fewer units there")


def _apply_change(
    graph: torch.fx.Graph,
    root: nn.Module,
    node: torch.fx.Node,
    change: Mapping[str, Any] | Replacement,
    new: Mapping[torch.fx.Node, torch.fx.Node],
) -> torch.fx.Node:
    def resolved(x: Any) -> Any:
        if isinstance(x, torch.fx.Node):
            return new.get(x, x)
        if isinstance(x, Scaled):
            return _scaled(graph, new[x.node], x.numerator, x.denominator)
        if isinstance(x, Tensor):
            name = f"_index_{node.name}"
            root.register_buffer(name, x, persistent=False)
            return graph.get_attr(name)
        if isinstance(x, (list, tuple)):
            return type(x)(resolved(y) for y in x)
        return x

    with graph.inserting_before(node):
        if isinstance(change, Replacement):
            node.args, node.kwargs, node.target = tuple(resolved(a) for a in change.args), {}, change.op
            return node
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        raw = bind(node, lambda n: n).raw
        for name, value in change.items():
            position = names.index(name)
            if raw.get(name) == value:
                continue
            if position < len(node.args):
                node.update_arg(position, resolved(value))
            else:
                node.update_kwarg(name, resolved(value))
    return node


def _scaled(graph: torch.fx.Graph, size: torch.fx.Node, numerator: int, denominator: int) -> torch.fx.Node:
    shared = gcd(numerator, denominator)
    # Names of their own: the names of the dense program's nodes are what values are compared by.
    product = graph.create_node("call_function", operator.mul, (size, numerator // shared), name="_scaled_size")
    return graph.create_node("call_function", operator.floordiv, (product, denominator // shared), name="_scaled_size")


def _literals(node: torch.fx.Node, raw: Mapping[str, Any], change: Mapping[str, Any] | Replacement) -> list[Literal]:
    """The integers that changed, and where the user's code computed them."""
    if isinstance(change, Replacement):
        return [Literal(module_of(node), None, None, f"{node.target} at {source_of(node)}")]
    out = []
    for name, value in change.items():
        before, after = pytree.tree_leaves(raw[name]), pytree.tree_leaves(value)
        for a, b in zip(before, after, strict=False):
            if isinstance(a, int) and isinstance(b, int) and a != b:
                out.append(Literal(module_of(node), a, b, f"{node.target} at {source_of(node)}"))
    return out


# -- the user's own class --------------------------------------------------------------------------------------------


def _own_class(
    program: Program, plan: Plan, graph: CompactGraph, sliced: Mapping[str, Tensor], literals: list[Literal]
) -> tuple[nn.Module | None, str, str]:
    """The user's class with sliced submodules, where it computes what the rewritten program computes; why; stuck."""
    if isinstance(program.model, torch.fx.GraphModule):
        without = (
            "without its blocks forward is another" if program.whole is not None else "the model is a graph already"
        )
        return None, without, ""
    if program.materialised:
        weight = next(iter(program.materialised))
        return None, f"forward computes the weight '{weight}' from others, at its old size", ""
    named = _named(program.model)
    stray = [c.tensor for c in plan.cuts if c.tensor not in named]
    if stray:
        return None, f"forward builds the tensor '{stray[0]}' itself, at a size that would have to change", ""
    module, repaired = transplant(program.model, sliced, literals, graph)
    why, stuck = _differs(program, plan, graph, module)
    why, stuck = why or _fails_in_training(program, module), stuck or next(iter(repaired), "")
    return (None, why, stuck) if why else (module, "its forward computes the same at the new sizes", "")


def _named(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}


def _differs(program: Program, plan: Plan, graph: CompactGraph, module: nn.Module) -> tuple[str | None, str]:
    """Why the user's class does not compute what the rewritten program computes (None where it does), and in which."""
    state = compact_state(well_conditioned(program), plan)
    named = {k: state[k] for k, _ in module.named_parameters() if k in state}
    callee = Callee.of(program, module)
    for sizes, inputs, wanted in _runs(program, graph, state):
        args, kwargs = callee.arguments(inputs)
        # forward may write into its buffers
        named |= {k: state.get(k, buffer).clone() for k, buffer in module.named_buffers()}
        try:
            with torch.no_grad(), evaluating(module), InDouble():
                got = flat_outputs(torch.func.functional_call(module, named, args, kwargs))
        except Exception as error:  # whatever the user's forward raises at sizes it was not written for
            return f"its forward does not run at {sizes}: {first_line(error)}", raised_in(error, module)
        if [t.shape for t in got] != [t.shape for t in wanted]:
            return f"its forward returns other shapes at {sizes}", ""
        worst = max((_apart(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)
        if not worst <= TOLERANCE[torch.float64]:
            return f"its forward computes something else at {sizes} (relative difference {worst:.1e})", ""
    return None, ""


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def _runs(
    program: Program, graph: CompactGraph, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """What the rewritten program gives for the example's sizes, and a single sample of other ones where they are free.

    Yields:
        What the sizes are, the inputs, the outputs.
    """

    def outputs(inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad(), evaluating(graph):
            return flat_outputs(Executor(graph, state, dtype=torch.float64).run(*inputs))

    inputs = sample_inputs(program, seed=7, dtype=torch.float64)
    yield "the new sizes", inputs, outputs(inputs)
    batched = all(0 in spec.dynamic for spec in program.inputs)
    for by in (*other_sizes(program), 0):
        given = sample_inputs(program, seed=7, dtype=torch.float64, by=by)
        single = [x[:1] if batched and isinstance(x, Tensor) else x for x in given]
        if any(isinstance(x, Tensor) and x.shape != y.shape for x, y in zip(single, inputs, strict=True)):
            with suppress(Exception):  # whatever its operators raise: the dense model may take no such size either
                yield "the new sizes, for another batch or image", single, outputs(single)
                return


def compact_state(state: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The same values without the plan's dead positions."""
    out = dict(state)
    for c in plan.cuts:
        if c.tensor in out:
            out[c.tensor] = out[c.tensor].detach().index_select(c.axis, _survivors(c))
    return out


def _fails_in_training(program: Program, module: nn.Module) -> str | None:
    """Branches that only run in training were not traced: they must still fit."""
    unseen = _unseen(program)
    if not unseen:
        return None
    trial = copied(module)
    for m in trial.modules():
        m.training = True
    try:
        with torch.no_grad():
            trial(*program.example_args, **program.example_kwargs)
    except Exception as error:  # whatever the user's forward raises
        return f"its forward in training mode also runs '{unseen[0]}', which was not traced: {first_line(error)}"
    return None


def _unseen(program: Program) -> list[str]:
    seen = {str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"}
    seen |= {name for sources in program.materialised.values() for name in sources}
    return [n for n, _ in program.model.named_parameters() if n not in seen]


@lru_cache(maxsize=256)
def _reads_training(kind: type[nn.Module]) -> bool:
    """Whether the source of forward mentions the mode; branches on it were traced in evaluation mode only."""
    try:
        return "self.training" in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def _lost_in_training(program: Program) -> tuple[str, ...]:
    """What the traced program no longer does in training: what evaluation mode skips without a trace."""
    lost = []
    traced = {module_of(n) for n in program.graph.graph.nodes if "dropout" in str(n.target)}
    for name, module in program.model.named_modules():
        kind = type(module).__name__
        rate = next(
            (float(r) for a in ("p", "drop_prob") if isinstance(r := getattr(module, a, None), (int, float))), 0.0
        )
        if ("Drop" in kind or "StochasticDepth" in kind) and rate > 0 and name not in traced:
            lost.append(f"{kind} '{name}'")
        if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            lost.append(f"attention dropout of '{name}'")
        if isinstance(module, _BatchNorm) and module.momentum is None and module.track_running_stats:
            lost.append(f"cumulative statistics of '{name}' (momentum None)")
        if not type(module).__module__.startswith("torch.nn.") and _reads_training(type(module)):  # type: ignore[arg-type]
            lost.append(f"what forward of '{name or type(module).__name__}' does only where self.training is set")
    if any(isinstance(m, _BatchNorm) for m in program.model.modules()):
        lost.append("num_batches_tracked, which batch norms count up")
    lost += [f"the computation of '{name}' from {', '.join(s)}" for name, s in program.materialised.items()]
    heads = dict.fromkeys(name.split(".")[0] for name in _unseen(program))
    return (*lost, *(f"'{head}', which evaluation mode does not run" for head in heads))
