"""Slice the user's own module: its tensors, and the attributes that repeat their sizes.

Standard torch modules are brought up to date from their tensors. A class of the user's own may keep sizes that the
program has baked in, such as `self.num_heads`: where a literal of a call that ran in that module changed and an
integer attribute of the module equals it, the attribute follows. That is a guess, and a safe one, because the result
is only used if it computes what the rewritten program computes.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from surgery.core import copied, empty_caches

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Literal:
    """A size in a call: what it was and has become (None where another operator took its place), and where."""

    module: str
    before: int | None
    after: int | None
    where: str


def transplant(
    model: nn.Module,
    sliced: Mapping[str, Tensor],
    literals: Sequence[Literal],
    graph: torch.fx.GraphModule | None,
    *,
    groups: Mapping[str, int] | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of `model` that holds the sliced tensors, and in which submodules a size was guessed.

    Args:
        model: the dense module, left unchanged.
        sliced: every parameter and buffer, at its new size.
        literals: the sizes that changed in calls.
        graph: the rewritten program, which knows how many groups each convolution is left with.
        groups: weight name → groups, where there is no program.
    """
    with_tensors = _copy_around(model, sliced)
    groups = {**(_group_counts(graph) if graph is not None else {}), **(groups or {})}
    for name, module in with_tensors.named_modules():
        _update(module, groups.get(f"{name}.weight"))
    return with_tensors, _repair(with_tensors, literals)


def raised_in(error: BaseException, model: nn.Module) -> str:
    """Return the path of the innermost module, none of torch's own, in whose code the error was raised; "" if none."""
    paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and not type(module).__module__.startswith("torch.nn.modules."):
            return paths.get(id(module), "")
    return ""


def _copy_around(model: nn.Module, sliced: Mapping[str, Tensor]) -> nn.Module:
    """Deep-copy the module without copying the tensors that are replaced."""
    memo: dict[int, Any] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        memo[id(tensor)] = sliced[name]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        memo[id(buffer)] = sliced[name]
    duplicate = copied(model, memo)
    empty_caches(duplicate)
    return duplicate


def _group_counts(graph: torch.fx.GraphModule) -> dict[str, int]:
    """Weight name → groups of the convolution or normalisation that reads it."""
    counts: dict[str, int] = {}
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        names = [a.name for a in schema.arguments]
        for argument in ("groups", "num_groups"):
            if argument in names and "weight" in names:
                at, weight_at = names.index(argument), names.index("weight")
                value = node.args[at] if at < len(node.args) else node.kwargs.get(argument, 1)
                weight = node.args[weight_at] if weight_at < len(node.args) else node.kwargs.get("weight")
                if isinstance(weight, torch.fx.Node) and isinstance(value, int):
                    counts[str(weight.target)] = value
    return counts


def _update(module: nn.Module, groups: int | None) -> None:
    """Bring the size attributes of a standard module up to date with its tensors."""
    weight = module._parameters.get("weight")
    if isinstance(module, _ConvNd) and weight is not None:
        module.groups = groups or module.groups
        first, second = weight.shape[0], weight.shape[1] * module.groups
        if module.transposed:
            module.in_channels, module.out_channels = first, second
        else:
            module.out_channels, module.in_channels = first, second
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _NormBase):
        sized = weight if weight is not None else module._buffers.get("running_mean")
        module.num_features = sized.shape[0] if sized is not None else module.num_features
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_groups, module.num_channels = groups or module.num_groups, weight.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]


def _repair(model: nn.Module, literals: Sequence[Literal]) -> tuple[str, ...]:
    """Let integer attributes follow the literals of the calls that ran in their module; returns which modules'."""
    wanted: dict[tuple[str, int], set[int]] = {}
    for literal in literals:
        if literal.before is not None and literal.after is not None:
            wanted.setdefault((literal.module, literal.before), set()).add(literal.after)
    modules, repaired = dict(model.named_modules()), []
    for (path, before), after in wanted.items():
        module = modules.get(path)
        if module is None or len(after) > 1 or type(module).__module__.startswith("torch.nn.modules.conv"):
            continue
        for name, value in list(vars(module).items()):
            if type(value) is int and value == before and not name.startswith("_"):
                setattr(module, name, next(iter(after)))
                repaired.append(path)
    return tuple(dict.fromkeys(repaired))
