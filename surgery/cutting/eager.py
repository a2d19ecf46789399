"""Trace, couple, cut, count and verify a model that `torch.export` cannot capture, by running the user's own module.

Groups come from torch-pruning's DependencyGraph, which follows autograd along the example's path: its maps from indices
of a layer to those of the next are tied as labels. It treats every unknown operator as element-wise; here, channels
that reach one are frozen. Source: Fang et al. 2023, DepGraph (arXiv:2301.12900).
"""

from __future__ import annotations

import hashlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from surgery.capture import evaluating, validate_inputs
from surgery.core import (
    BLIND,
    TOLERANCE,
    Callee,
    CheckResult,
    CompactModel,
    CostFn,
    Coupling,
    InputSpec,
    LabelSet,
    Program,
    Value,
    conditioned_copy,
    copied,
    count_macs,
    count_params,
    first_line,
    flat_outputs,
    require_finite,
    sample_inputs,
    where_raised,
)
from surgery.coupling import ALONE, Cut, batch_size, frozen_axes, groups_of, kept_names, plan_from_dead
from surgery.cutting.rewrite import transplant
from surgery.cutting.verify import relative_error, require
from surgery.errors import CheckFailed, UnsupportedModel

ONE_PATH = "no label replay, one path exported: the one that the example input takes through the model's forward"


# Tracing. ------------------------------------------------------------------------------------------------------------


def trace(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None, *, fixed_size: bool = True
) -> Program:
    """Describe `model` and its example call, without a graph; arguments and errors are those of `surgery.trace`."""
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    require_finite(model.state_dict(keep_vars=True), type(model).__name__)
    with evaluating(model):
        validate_inputs(model, args, kwargs)
        batched = _takes_any_batch(model, args, kwargs)
        seen = set(_trail(model, args, kwargs)[0])
    notes = [ONE_PATH]
    if not batched:
        notes.append("batch is fixed at the example's: the model computes something else on twice the batch")
    holders = (name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)))
    if unseen := [name for name in holders if name not in seen]:
        notes.append(f"not on the example's path, and left whole: {', '.join(unseen)}")
    inputs = []
    for name, value in inspect.signature(model.forward).bind(*args, **kwargs).arguments.items():
        for k, leaf in enumerate(x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)):
            full, dtype = name if leaf is value else f"{name}_{k}", str(leaf.dtype).removeprefix("torch.")
            inputs.append(InputSpec(full, tuple(leaf.shape), dtype, (0,) if batched and leaf.dim() else ()))
    digest = hashlib.sha256()  # not of the path, which depends on the input
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {module.extra_repr()}\n".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
    return Program(None, tuple(inputs), args, kwargs, digest.hexdigest(), tuple(notes), model, tracer="torch-pruning")


def _takes_any_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the doubled batch gives the example's outputs twice."""

    def twice(tree: Any) -> Any:
        return pytree.tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x, tree)

    with torch.no_grad():
        once = pytree.tree_leaves(twice(model(*args, **kwargs)))
        try:
            both = pytree.tree_leaves(model(*twice(args), **twice(dict(kwargs))))
        except Exception:  # any exception the user's forward raises
            return False
    pairs = [(a, b) for a, b in zip(once, both, strict=False) if isinstance(a, Tensor)]
    same = (a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in pairs)
    return len(once) == len(both) and all(same)


def _trail(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Run the model; return the names of its modules in execution order, which identify its path, and the result."""
    names: list[str] = []

    def hook(name: str) -> Any:
        return lambda module, inputs: names.append(name)

    hooks = [m.register_forward_pre_hook(hook(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            return names, model(*args, **kwargs)
    finally:
        for handle in hooks:
            handle.remove()


# Coupling. -----------------------------------------------------------------------------------------------------------

_PER_CHANNEL = """
Add Sub Mul Div Neg Abs Exp Log Sqrt Rsqrt Pow Clone Alias ToCopy Clamp ClampMin ClampMax Relu Hardtanh Hardswish
Hardsigmoid Silu Gelu Sigmoid Tanh LeakyRelu Elu Celu Mish Softplus LogSigmoid Threshold MaxPool2DWithIndices AvgPool2D
AdaptiveAvgPool2D AdaptiveMaxPool2D UpsampleNearest2D UpsampleBilinear2D UpsampleBicubic2D UpsampleNearestExact2D
ReflectionPad2D ReplicationPad2D
"""
"""Names that autograd gives to channel-wise operators."""


class _Index(NamedTuple):
    """Index for torch-pruning's mappings: a position and its label."""

    idx: int
    root_idx: int


def couple(program: Program, *, keep: Sequence[str] = ()) -> Coupling:
    """Find the groups of units that may be removed, like `surgery.couple`; UnsupportedModel if that is impossible."""
    model, graph, marks, sequences = _dependency_graph(program)
    labels, params = LabelSet(), dict[str, Value]()
    labels.where = "torch-pruning's dependency graph"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # shared tensors once
        axes = tuple((labels.fresh(size),) if size > 1 else () for size in tensor.shape)
        params[name] = Value(tuple(tensor.shape), axes)
    for name, pattern in (kept_names(program, keep) if keep else {}).items():
        for layers in params[name].axes if name in params else ():
            labels.freeze(layers, f"kept by --keep {pattern}")
    contracted = _tie(graph, marks, _sides(model, sequences), params, labels)
    groups = groups_of(labels, params)
    for group in groups:
        if not any((site.tensor, site.axis) in contracted for site in group.sites):
            labels.freeze((np.array(group.units),), "no layer was found that sums over these channels")
        elif group.size == 1:
            labels.freeze((np.array(group.units),), ALONE)
    kept = tuple(g for g in groups if labels.reason(g.units[0]) is None)
    shapes = {name: value.shape for name, value in params.items()}
    return Coupling(kept, tuple(frozen_axes(labels, params, kept)), shapes, contracted=frozenset(contracted))


def _dependency_graph(program: Program) -> tuple[nn.Module, Any, list[Any], Set[nn.Module]]:
    """Return a copy of the model, its graph, autograd nodes of the inputs, and linear layers over sequences."""
    model = copied(program.model)
    for tensor in model.parameters():
        if tensor.is_floating_point():
            tensor.requires_grad_(True)  # autograd is what torch-pruning follows
    marks: list[Any] = []
    sequences: set[nn.Module] = set()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):  # its channels are not on the second axis, as torch-pruning assumes
            layer.register_forward_pre_hook(lambda m, x: sequences.add(m) if x[0].dim() != 2 else None)

    def marked(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        out = x.detach().clone().requires_grad_(True) * 1.0
        marks.append(out.grad_fn)
        return out

    def forward(model: nn.Module, inputs: Any) -> Any:
        args, kwargs = pytree.tree_map(marked, (program.example_args, dict(program.example_kwargs)))
        return model(*args, **kwargs)

    def outputs(result: Any) -> list[Tensor]:
        # The product gives each output its own operator, which torch-pruning recognizes as an output.
        return [x * 1.0 for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            graph = tp.DependencyGraph().build_dependency(
                model, (), forward_fn=forward, output_transform=outputs, verbose=False
            )
        except Exception as error:  # any exception of the user's forward or torch-pruning
            raise UnsupportedModel(
                f"torch-pruning cannot follow this model, at {where_raised(error)}: {first_line(error)}; "
                "try --submodule for a submodule that it can follow"
            ) from error
    return model, graph, marks, sequences


_LEAVES = ("weight", "bias", "running_mean", "running_var")
_Axes = list[tuple[str, int]]


_Sides = Mapping[nn.Module, tuple[_Axes, _Axes]]
"""Channel axes of layers: module → (output axes, input axes), each a list of (tensor, axis)."""


def _sides(model: nn.Module, without: Set[nn.Module]) -> _Sides:
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    sides = {}
    for module in model.modules():
        axes = None if module in without else _channel_axes(module)
        if axes is not None:
            own = {leaf: names[id(t)] for leaf in _LEAVES if (t := getattr(module, leaf, None)) is not None}
            out, into = ([(own[leaf], axis) for leaf, axis in side if leaf in own] for side in axes)
            sides[module] = (out, into)
    return sides


def _channel_axes(module: nn.Module) -> tuple[_Axes, _Axes] | None:
    """Return the axes of a standard layer's output and input channels in its tensors; None if unknown."""
    own_forward = not (type(module).forward.__module__ or "").startswith("torch.nn.modules.")
    if parametrize.is_parametrized(module) or own_forward:  # may do anything with the weights
        return None
    if isinstance(module, nn.Linear):
        return [("weight", 0), ("bias", 0)], [("weight", 1)]
    if isinstance(module, _ConvNd) and module.groups == 1:
        out, into = (1, 0) if module.transposed else (0, 1)
        return [("weight", out), ("bias", 0)], [("weight", into)]
    same: _Axes = [(leaf, 0) for leaf in _LEAVES]
    depthwise = isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return [], []
    return (same, same) if depthwise or isinstance(module, (_NormBase, nn.PReLU)) else None


def _tie(
    graph: Any, marks: Sequence[Any], sides: _Sides, params: Mapping[str, Value], labels: LabelSet
) -> set[tuple[str, int]]:
    """Tie the channels of every layer to their dependents; returns the contracted axes."""
    sites = {site for out, into in sides.values() for site in (*out, *into)}
    met = {(t, axis): np.zeros(params[t].shape[axis], dtype=np.bool_) for t, axis in sites}
    contracted: set[tuple[str, int]] = set()

    for module, node in graph.module2node.items():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        fresh = labels.fresh(module.out_channels if isinstance(module, _ConvNd) else module.out_features)
        start = [_Index(k, label) for k, label in enumerate(fresh.tolist())]
        handler = graph.get_pruner_of_module(module).prune_out_channels
        for target, inward, pairs, refusal in _walk(node, handler, start, lambda n: _refusal(n, marks, sides)):
            carried = np.array([pair.root_idx for pair in pairs], dtype=np.int64)
            if refusal is not None:
                labels.freeze((carried,), refusal)
                continue
            out, into = sides.get(target.module, ([], []))
            contracted.update(into if inward and into != out else ())
            where = [pair.idx for pair in pairs]
            for name, axis in into if inward else out:
                layers, reached = params[name].axes[axis], met[name, axis]
                if not layers or max(where) >= len(reached) or min(where) < 0:
                    labels.freeze((carried,), _OTHER_WIDTH)
                else:
                    labels.tie((layers[0][where],), (carried,), len(where))
                    reached[where] = True
    for name, value in params.items():
        for axis, layers in enumerate(value.axes):
            rest = ~met[name, axis] if (name, axis) in met else slice(None)
            labels.freeze(tuple(layer[rest] for layer in layers), _NOT_MET if axis < 2 else _KERNEL)
    return contracted


_OTHER_WIDTH = "meets a layer of another width: the channels are broadcast, or counted otherwise"
_NOT_MET = "fed by a network input, or by something that torch-pruning does not follow"
_KERNEL = "the operator needs this axis whole"


def _walk(
    root: Any, handler: Any, start: list[_Index], refuse: Callable[[Any], str | None]
) -> Iterator[tuple[Any, bool, list[_Index], str | None]]:
    """Yield dependents of a layer's output channels: (node, whether on its input side, positions, refusal).

    `DependencyGraph.get_pruning_group` loses ties if channels share a position, and continues past unknown operators.
    """
    pending, seen = [(root, handler, start)], set()
    while pending:
        node, handler, pairs = pending.pop()
        key = (id(node), handler, frozenset(pairs))
        if key in seen:
            continue
        seen.add(key)
        refusal = refuse(node)
        yield node, handler.__name__ == "prune_in_channels", pairs, refusal
        for dependency in node.dependencies if refusal is None else ():
            if dependency.is_triggered_by(handler):
                mapped = pairs
                for mapping in dependency.index_mapping:
                    mapped = mapping(mapped) if mapping is not None else mapped
                if mapped:
                    pending.append((dependency.target, dependency.handler, mapped))


def _refusal(node: Any, marks: Sequence[Any], sides: _Sides) -> str | None:
    """Return why channels that reach this node are not cut; None if it is channel-wise or contracts them."""
    kind, grad = node.type, node.grad_fn
    if kind == tp.ops.OPTYPE.OUTPUT:
        return "network output"
    if any(grad is mark for mark in marks):
        return "tied to a network input"
    if kind == tp.ops.OPTYPE.CONCAT:
        fits = grad._saved_dim == 1 and node.module.offsets is not None
        return None if fits else "torch.cat along another axis than the channels"
    if kind == tp.ops.OPTYPE.RESHAPE:
        size = getattr(grad, "_saved_self_sym_sizes", ())
        return None if len(size) in (2, 4) else "a view that splits or joins other axes than those of an image"
    if kind == tp.ops.OPTYPE.ELEMENTWISE:
        # autograd shows the transposed weight of a linear layer as an extra input
        transposed = not node.inputs and grad.name().startswith("TBackward")
        return None if transposed else _unknown_operator(grad)
    if node.module in sides:
        return None
    name = type(node.module).__name__
    return f"{name}: only torch's own plain or depthwise convolutions, flat linear layers and batch norms are followed"


def _unknown_operator(grad: Any) -> str | None:
    """Return why an operator is not known to be channel-wise; None if it is."""
    name = re.sub(r"Backward\d*$", "", grad.name())
    if name == "Mean" and hasattr(grad, "_saved_dim"):
        rank = len(grad._saved_self_sym_sizes)
        if rank == 4 and {d % 2**64 if d < 2**63 else d - 2**64 + rank for d in grad._saved_dim} <= {2, 3}:
            return None
    if name == "ConstantPadNd" and len(grad._saved_pad) <= 4:
        return None
    return None if name in _PER_CHANNEL.split() else f"operator {name}: not known to treat channel by channel"


# Cutting and costs. --------------------------------------------------------------------------------------------------


def slice_module(cut: Cut) -> CompactModel:
    """Return a copy without the plan's dead units; UnsupportedModel if its forward does not run at the new sizes."""
    tensors, program = cut.tensors(), cut.program
    grouped = {f"{n}.weight" for n, m in program.model.named_modules() if isinstance(m, _ConvNd) and m.groups > 1}
    # Only depthwise grouped convolutions are ever cut, with one group per channel.
    depthwise = {c.tensor: tensors[c.tensor].shape[0] for c in cut.plan.cuts if c.tensor in grouped}
    module = transplant(program.model, tensors, depthwise)
    try:
        with evaluating(module), torch.no_grad():
            module(*program.example_args, **program.example_kwargs)
    except Exception as error:  # any exception the user's forward raises at unexpected sizes
        raise UnsupportedModel(
            f"the forward does not run at the new sizes, at {where_raised(error)}: {first_line(error)}; let that line "
            "take its sizes from the data (x.flatten(1), x.shape), or keep the layers before it whole with --keep"
        ) from error
    return CompactModel(module, "module", "the forward as it stands runs at the new sizes", None)


def cost_functions(program: Program, coupling: Coupling) -> Mapping[str, CostFn]:
    """Return functions like `surgery.coupling.cost_functions`, which run a cut copy: about a second per new plan."""

    @cache
    def costs(dead: tuple[tuple[str, tuple[int, ...]], ...]) -> Mapping[str, int]:
        plan = plan_from_dead(program, coupling, dict(dead))
        module = slice_module(Cut(program, coupling, plan)).module
        macs = count_macs(module, program.example_args, program.example_kwargs, batch=batch_size(program))
        return {"macs": macs, "params": count_params(module)}

    def of(kind: str) -> CostFn:
        return lambda dead: costs(tuple(sorted((name, tuple(units)) for name, units in dead.items() if units)))[kind]

    return {kind: of(kind) for kind in ("macs", "params")}


# Checking. -----------------------------------------------------------------------------------------------------------

_ROUNDS = 4
_TRIES = 40
_SEEDS = 3
_ADVICE = (
    "torch-pruning's groups do not hold for this model, or its forward chooses its way by values, and a smaller model "
    "may choose another; nothing was written; shrink a submodule that is without it, by --submodule"
)
_OFF_PATH = f"fewer than {_ROUNDS} of {_TRIES} inputs take the example's path through the model"


def check_module(cut: Cut, compact: CompactModel, *, seed: int = 0) -> CheckResult:
    """Verify a compact module against the dense one with consumers' dead input slices zeroed, on several inputs."""
    model = cut.program.model
    with evaluating(model):
        path, _ = _trail(model, cut.program.example_args, cut.program.example_kwargs)
    error64, varying, doubts = _on_distinct_values(cut, compact.module, path, seed=seed)
    notes = [ONE_PATH, *doubts]
    if varying < BLIND:
        raise CheckFailed(
            f"inconclusive: on well-conditioned values only {varying:.1e} of the output varies with the input; "
            "use an example input that reaches the output"
        )
    require(error64, torch.float64, "distinct, well-conditioned values", _ADVICE)
    found = _compare(cut.program, masked_copy(cut), compact.module, path, seed=seed, dtype=None)
    if found is None:
        raise CheckFailed(f"inconclusive on the real weights: {_OFF_PATH}")
    error, varying = found
    if varying < BLIND:
        notes.append(f"inconclusive on the real weights: only {varying:.1e} of their output varies with the input")
    else:
        kinds = [p.dtype for p in model.parameters() if p.dtype in TOLERANCE]
        require(error, max(kinds, key=lambda d: TOLERANCE[d], default=torch.float32), "the real weights", _ADVICE)
    reference = f"masked original (inputs from removed units set to zero in every layer), on {_ROUNDS} inputs"
    return CheckResult(0, error64, None if varying < BLIND else error, varying, reference, tuple(notes))


def masked_copy(cut: Cut, dense: nn.Module | None = None) -> nn.Module:
    """Return a copy of the dense module, or the given one, with dead slices along contracted axes set to zero."""
    dense = copied(cut.program.model) if dense is None else dense
    tensors = dict(dense.named_parameters())
    with torch.no_grad():
        for c in cut.plan.cuts:
            if (c.tensor, c.axis) in cut.coupling.contracted:
                tensors[c.tensor].index_fill_(c.axis, torch.tensor(c.dead, device=tensors[c.tensor].device), 0.0)
    return dense


def _on_distinct_values(
    cut: Cut, compact: nn.Module, path: list[str], *, seed: int
) -> tuple[float, float, tuple[str, ...]]:
    """Compare in float64 on well-conditioned weights, or on the real ones if those do not take the example's path."""
    program = cut.program
    for attempt in range(_SEEDS + 1):
        dense = copied(program.model).double()
        if attempt < _SEEDS:
            dense = conditioned_copy(dense, partial(_takes, program, path, seed + attempt), seed + attempt)
        state = cut.kept({**dict(dense.named_parameters()), **dict(dense.named_buffers())})
        small = copied(compact).double()
        with torch.no_grad():
            for name, tensor in (*small.named_parameters(), *small.named_buffers()):
                tensor.copy_(state[name])
        found = _compare(program, masked_copy(cut, dense), small, path, seed=seed, dtype=torch.float64)
        if found is not None:
            elsewhere = ("well-conditioned values take another path: float64 was compared on the real weights",)
            return *found, elsewhere if attempt == _SEEDS else ()
    raise CheckFailed(f"inconclusive: {_OFF_PATH}")


def _takes(program: Program, path: list[str], seed: int, model: nn.Module) -> bool:
    """Run the model in float64 until an input takes the path; return whether one does."""
    with evaluating(model):
        return any(_trail(model, *call)[0] == path for call in _inputs(program, seed=seed, dtype=torch.float64))


def _inputs(program: Program, *, seed: int, dtype: torch.dtype | None) -> Iterator[tuple[Any, Any]]:
    """Yield random inputs, alternating with inputs near the example, which are more likely to take its path."""
    callee = Callee.of(program)

    def near(example: Any, drawn: Any) -> Any:
        if not (isinstance(drawn, Tensor) and drawn.is_floating_point()):
            return drawn
        example = example.to(drawn.dtype)
        return example + 0.2 * example.abs().mean().clamp_min(1e-2) * drawn

    for k in range(_TRIES):
        drawn = sample_inputs(program, seed=seed + 100 + k, dtype=dtype)
        yield callee.arguments([near(*pair) for pair in zip(callee.leaves, drawn, strict=True)] if k % 2 else drawn)


def _compare(
    program: Program, dense: nn.Module, compact: nn.Module, path: list[str], *, seed: int, dtype: torch.dtype | None
) -> tuple[float, float] | None:
    """Return relative error and varying share over inputs that take the path; None if too few do."""
    wanted: list[list[Tensor]] = []
    got: list[list[Tensor]] = []
    with evaluating(dense), evaluating(compact), torch.no_grad():
        for args, kwargs in _inputs(program, seed=seed, dtype=dtype):
            taken, result = _trail(dense, args, kwargs)
            if taken != path:
                continue
            wanted.append(flat_outputs(result))
            got.append(flat_outputs(compact(*args, **kwargs)))
            if len(wanted) == _ROUNDS:
                return relative_error(wanted, got)
    return None
