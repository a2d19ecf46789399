"""Names of a model's inputs, outputs and dynamic axes.

Inputs are called like the parameters of `forward`, outputs `output`, `output_0`.. or like the keys of the dictionary
that `forward` returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, arange, nn
from torch.utils import _pytree as pytree

from surgery.core import Callee
from surgery.errors import InvalidInput

BATCH, HEIGHT, WIDTH = "batch", "height", "width"

Axes = Mapping[str, tuple[int, ...]]
"""Input name → axes whose size may vary between calls."""

Tensors = Mapping[str, Tensor]
"""Input name → tensor, in the order of `forward`'s parameters."""


def bind(model: nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None = None) -> tuple[Callee, dict[str, Tensor]]:
    """Return the example call, and its tensors by name (`x_0`, ... in `x`); InvalidInput if `forward` refuses it."""
    given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*given, **dict(kwargs or {}))
    except TypeError as error:
        raise InvalidInput(
            f"{type(model).__name__}.forward{signature} does not take the example inputs ({error}); "
            "give one value per parameter"
        ) from error
    tensors: dict[str, Tensor] = {}
    for (head, *rest), leaf in pytree.tree_flatten_with_path(dict(bound.arguments))[0]:
        if isinstance(leaf, Tensor):
            parameter = signature.parameters[_key(head)]
            top = [] if parameter.kind is inspect.Parameter.VAR_KEYWORD else [parameter.name]
            tensors[_unique("_".join((*top, *(str(_key(k)) for k in rest))), tensors)] = leaf
    if not tensors:
        raise InvalidInput(f"no tensor among the example inputs of {type(model).__name__}; an exported model needs one")
    return Callee(model, bound.args, bound.kwargs), tensors


def name_outputs(output: Any, taken: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tensors that a model returned, by name, in their own order; what is not a tensor is left out.

    A tensor is `output`, those of a sequence `output_0`, ..., of a dictionary its keys, prefixed by `output_` if taken.
    """
    paths, _ = pytree.tree_flatten_with_path(output)
    tensors = [([_key(step) for step in path], leaf) for path, leaf in paths if isinstance(leaf, Tensor)]
    if len(tensors) == 1 and not any(isinstance(key, str) for key in tensors[0][0]):
        return {_unique("output", taken): tensors[0][1]}
    named: dict[str, Tensor] = {}
    for keys, leaf in tensors:
        name = "_".join(map(str, keys if isinstance(keys[0], str) else ["output", *keys]))
        named[_unique(f"output_{name}" if name in taken else name, (*taken, *named))] = leaf
    return named


def default_axes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Return axis 0 of every tensor that has as many rows as the first one with any: the batch."""
    rows = next((t.shape[0] for t in tensors.values() if t.ndim), None)
    return {name: (0,) if t.ndim and t.shape[0] == rows else () for name, t in tensors.items()}


def check_axes(tensors: Tensors, axes: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...]]:
    """Return `axes` with every input listed and no negative axis; raises InvalidInput if there is no such axis."""
    if unknown := axes.keys() - tensors.keys():
        raise InvalidInput(
            f"dynamic axes are given for '{unknown.pop()}', which is no input; inputs: {', '.join(tensors)}"
        )
    for name, chosen in axes.items():
        shape = tuple(tensors[name].shape)
        if wrong := [axis for axis in chosen if not -len(shape) <= axis < len(shape)]:
            raise InvalidInput(f"input '{name}' of shape {shape} has no axis {wrong[0]} to make dynamic")
    return {name: tuple(sorted({axis % t.ndim for axis in axes.get(name, ())})) for name, t in tensors.items()}


def axis_name(name: str, axis: int, ndim: int) -> str:
    """Return what a dynamic axis is called: `batch`, for images ``(N, C, H, W)`` also `height` and `width`."""
    if axis == 0:
        return BATCH
    return {2: HEIGHT, 3: WIDTH}.get(axis, f"{name}_{axis}") if ndim == 4 else f"{name}_{axis}"


def with_batch(tensors: Tensors, axes: Axes, batch: int) -> dict[str, Tensor]:
    """Return the tensors with `batch` rows where axis 0 is dynamic, by repeating what is there. Never aliased."""
    return {
        name: tensor[arange(batch) % tensor.shape[0]] if 0 in axes.get(name, ()) else tensor.clone()
        for name, tensor in tensors.items()
    }


def _key(entry: Any) -> Any:
    """Return the index, key or attribute name in one step of a path through nested containers."""
    return next((getattr(entry, a) for a in ("idx", "key", "name") if hasattr(entry, a)), str(entry))


def _unique(name: str, taken: Collection[str] | Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name
