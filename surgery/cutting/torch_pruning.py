"""Groups from torch-pruning's DependencyGraph, for models that `torch.export` cannot capture.

The graph follows autograd along the example's path through forward, so data-dependent control flow is supported.
torch-pruning maps indices of each layer to indices of the next; these pairs are tied as labels, which gives groups like
those of `couple`. torch-pruning treats every unknown operator as element-wise; here, channels that reach such an
operator are frozen, with its name as the reason.

Source: Fang et al. 2023, DepGraph (arXiv:2301.12900).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from surgery.core import Coupling, LabelSet, Layer, Layers, Mask, Program, Value, copied, first_line, where_raised
from surgery.coupling import frozen_axes, groups_of, kept_names
from surgery.errors import UnsupportedModel

_CHANNEL_AXIS = 1
# fmt: off
_PER_CHANNEL = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Exp", "Log", "Sqrt", "Rsqrt", "Pow", "Clone", "Alias",
        "ToCopy", "Clamp", "ClampMin", "ClampMax", "Relu", "Hardtanh", "Hardswish", "Hardsigmoid", "Silu",
        "Gelu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Celu", "Mish", "Softplus", "LogSigmoid", "Threshold",
        "MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "UpsampleNearest2D",
        "UpsampleBilinear2D", "UpsampleBicubic2D", "UpsampleNearestExact2D", "ReflectionPad2D",
        "ReplicationPad2D",
    }
)
# fmt: on
"""Names that autograd gives to channel-wise operators."""


class _Index(NamedTuple):
    """Index for torch-pruning's mappings: a position and its label."""

    idx: int
    root_idx: int


def couple(program: Program, *, keep: Sequence[str] = ()) -> Coupling:
    """Find the groups of units that may be removed; arguments and errors are those of `surgery.couple`.

    Raises:
        InvalidInput: a pattern of `keep` matches nothing.
        UnsupportedModel: torch-pruning cannot follow the model; the message names the user's source line.
    """
    model, graph, marks, sequences = _dependency_graph(program)
    labels = LabelSet()
    labels.where = "torch-pruning's dependency graph"
    params = _labelled(model, labels)
    for name, pattern in (kept_names(program, keep) if keep else {}).items():
        if name in params:
            for layers in params[name].axes:
                labels.freeze(layers, f"kept by --keep {pattern}")
    contracted = _tie(graph, marks, _Owners.of(model, params, without=sequences), labels)
    groups = groups_of(labels, params)
    for group in groups:
        if not any((site.tensor, site.axis) in contracted for site in group.sites):
            labels.freeze((np.array(group.units),), "no layer was found that sums over these channels")
        elif group.size == 1:
            labels.freeze((np.array(group.units),), "a single unit, which the axis cannot do without")
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


def _labelled(model: nn.Module, labels: LabelSet) -> dict[str, Value]:
    """Create labels for every axis of every tensor, shared tensors once."""
    params: dict[str, Value] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        axes = tuple((labels.fresh(size),) if size > 1 else () for size in tensor.shape)
        params[name] = Value(tuple(tensor.shape), axes, name)
    return params


_LEAVES = ("weight", "bias", "running_mean", "running_var")
_Axes = list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class _Owners:
    """Channel axes of layers: module → (output axes, input axes), each a list of (tensor, axis)."""

    sides: Mapping[nn.Module, tuple[_Axes, _Axes]]
    params: Mapping[str, Value]

    def size(self, site: tuple[str, int]) -> int:
        return self.params[site[0]].shape[site[1]]

    def layers(self, site: tuple[str, int]) -> Layers:
        return self.params[site[0]].axes[site[1]]

    @classmethod
    def of(cls, model: nn.Module, params: Mapping[str, Value], *, without: Set[nn.Module]) -> _Owners:
        names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        sides = {}
        for module in model.modules():
            axes = _channel_axes(module)
            if axes is not None and module not in without:
                own = {leaf: names[id(t)] for leaf in _LEAVES if (t := getattr(module, leaf, None)) is not None}
                out, into = ([(own[leaf], axis) for leaf, axis in side if leaf in own] for side in axes)
                sides[module] = (out, into)
        return cls(sides, params)


def _channel_axes(module: nn.Module) -> tuple[_Axes, _Axes] | None:
    """Return the axes of a standard layer's output and input channels in its tensors; None if unknown."""
    same: _Axes | None = None
    if parametrize.is_parametrized(module) or not _is_standard(module):
        return None
    if isinstance(module, _ConvNd):
        out, into = (1, 0) if module.transposed else (0, 1)
        if module.groups == 1:
            return [("weight", out), ("bias", 0)], [("weight", into)]
        same = [("weight", 0), ("bias", 0)] if module.groups == module.in_channels == module.out_channels else None
    elif isinstance(module, nn.Linear):
        return [("weight", 0), ("bias", 0)], [("weight", 1)]
    elif isinstance(module, _NormBase):
        same = [(leaf, 0) for leaf in _LEAVES]
    elif isinstance(module, nn.PReLU):
        same = [("weight", 0)] if module.num_parameters > 1 else []
    return None if same is None else (same, same)


def _is_standard(module: nn.Module) -> bool:
    """Return whether the module runs torch's own forward; a user's forward may do anything with the weights."""
    return (type(module).forward.__module__ or "").startswith("torch.nn.modules.")


def _tie(graph: Any, marks: Sequence[Any], owners: _Owners, labels: LabelSet) -> set[tuple[str, int]]:
    """Tie the channels of every layer to their dependents; returns the contracted axes."""
    sites = {site for out, into in owners.sides.values() for site in (*out, *into)}
    met = {site: np.zeros(owners.size(site), dtype=np.bool_) for site in sites}
    contracted: set[tuple[str, int]] = set()
    refuse = partial(_refusal, marks=marks, owners=owners)
    for module, node in graph.module2node.items():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        fresh = labels.fresh(module.out_channels if isinstance(module, _ConvNd) else module.out_features)
        start = [_Index(k, label) for k, label in enumerate(fresh.tolist())]
        handler = graph.get_pruner_of_module(module).prune_out_channels
        for target, inward, pairs, refusal in _walk(node, handler, start, refuse):
            carried = np.array([pair.root_idx for pair in pairs], dtype=np.int64)
            if refusal is not None:
                labels.freeze((carried,), refusal)
                continue
            out, into = owners.sides.get(target.module, ([], []))
            contracted.update(into if inward and into != out else ())
            for site in into if inward else out:
                _meet(labels, owners.layers(site), [pair.idx for pair in pairs], carried, met[site])
    for name, value in owners.params.items():
        for axis, layers in enumerate(value.axes):
            rest = ~met[name, axis] if (name, axis) in met else slice(None)
            labels.freeze(tuple(layer[rest] for layer in layers), _NOT_MET if axis < 2 else _KERNEL)
    return contracted


_NOT_MET = "fed by a network input, or by something that torch-pruning does not follow"
_KERNEL = "the operator needs this axis whole"


def _meet(labels: LabelSet, layers: Layers, where: list[int], carried: Layer, met: Mask) -> None:
    """Tie channels to the positions that they reach."""
    if not layers or max(where) >= len(met) or min(where) < 0:
        labels.freeze((carried,), "meets a layer of another width: the channels are broadcast, or counted otherwise")
        return
    labels.tie((layers[0][where],), (carried,), len(where))
    met[where] = True


def _walk(
    root: Any, handler: Any, start: list[_Index], refuse: Callable[[Any], str | None]
) -> Iterator[tuple[Any, bool, list[_Index], str | None]]:
    """Yield dependents of a layer's output channels: (node, whether on its input side, positions, refusal).

    Like `DependencyGraph.get_pruning_group`, which however loses a tie if two channels reach one position, and
    continues past unknown operators.
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


def _refusal(node: Any, marks: Sequence[Any], owners: _Owners) -> str | None:
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
        return None if _is_transposed_weight(node) else _unknown_operator(grad)
    if node.module in owners.sides:
        return None
    name = type(node.module).__name__
    return f"{name}: only torch's own plain or depthwise convolutions, flat linear layers and batch norms are followed"


def _is_transposed_weight(node: Any) -> bool:
    """Return whether a node is the transposed weight of a linear layer, which autograd shows as an extra input."""
    return not node.inputs and node.grad_fn.name().startswith("TBackward")


def _unknown_operator(grad: Any) -> str | None:
    """Return why an operator is not known to be channel-wise; None if it is."""
    name = re.sub(r"Backward\d*$", "", grad.name())
    if name == "Mean" and hasattr(grad, "_saved_dim"):
        rank = len(grad._saved_self_sym_sizes)
        if rank == 4 and {d % 2**64 if d < 2**63 else d - 2**64 + rank for d in grad._saved_dim} <= {2, 3}:
            return None
    if name == "ConstantPadNd" and len(grad._saved_pad) <= 4:
        return None
    return None if name in _PER_CHANNEL else f"operator {name}: not known to treat channel by channel"
