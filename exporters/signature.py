"""Names of a model's inputs and outputs.

Inputs are called like the parameters of `forward`, outputs `output`, `output_0`.. or like the keys of the dictionary
that `forward` returns. Everything the exporter and the parity check need to know about one call of a model lies here,
so that both name and feed the same tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from surgery.errors import InvalidInput

BATCH, HEIGHT, WIDTH = "batch", "height", "width"

Axes = Mapping[str, tuple[int, ...]]
"""Input name → axes whose size may vary between calls."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of `forward`: its leaves in signature order, and a name for every tensor among them.

    Attributes:
        signature: of `forward`.
        spec: how the leaves build ``(args, kwargs)``.
        leaves: tensors and constants.
        names: one per leaf; None for what is not a tensor.
    """

    signature: inspect.Signature
    spec: Any
    leaves: tuple[Any, ...]
    names: tuple[str | None, ...]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensor inputs by name, in forward's order."""
        return {name: leaf for name, leaf in zip(self.names, self.leaves, strict=True) if name is not None}

    def arguments(self, tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` of the same call with other tensors."""
        leaves = [leaf if name is None else tensors[name] for name, leaf in zip(self.names, self.leaves, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Call:
        """Return the same call with other tensors."""
        leaves = [leaf if name is None else tensors[name] for name, leaf in zip(self.names, self.leaves, strict=True)]
        return Call(self.signature, self.spec, tuple(leaves), self.names)

    def dynamic_shapes(self, axes: Axes) -> dict[str, Any]:
        """Return `axes` in the form that `torch.export` asks for: the call's own nesting, by parameter of `forward`."""
        dynamic = torch.export.Dim.DYNAMIC
        leaves = [dict.fromkeys(axes.get(name, ()), dynamic) or None if name else None for name in self.names]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return dict(self.signature.bind(*args, **kwargs).arguments)


def bind(model: torch.nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Call:
    """Match example inputs with the parameters of the model's `forward`.

    Args:
        model: its `forward` gives the names; parameter `x` holding a tuple of tensors gives `x_0`, `x_1`, ...
        example_inputs: a tensor, or the tuple of positional inputs.
        example_kwargs: keyword inputs.

    Raises:
        InvalidInput: `forward` does not take these inputs, or there is no tensor among them.
    """
    given = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*given, **dict(example_kwargs or {}))
    except TypeError as error:
        raise InvalidInput(
            f"{type(model).__name__}.forward{signature} does not take the example inputs ({error}); "
            "give one value per parameter"
        ) from error
    paths, spec = pytree.tree_flatten_with_path((bound.args, bound.kwargs))
    heads = _positional_names(signature, len(bound.args))
    names: list[str | None] = []
    for (side, head, *rest), leaf in paths:
        top = heads[_key(head)] if _key(side) == 0 else str(_key(head))
        named = isinstance(leaf, torch.Tensor)
        names.append(_unique("_".join((top, *(str(_key(k)) for k in rest))), names) if named else None)
    if not any(names):
        raise InvalidInput(f"no tensor among the example inputs of {type(model).__name__}; an exported model needs one")
    return Call(signature, spec, tuple(leaf for _, leaf in paths), tuple(names))


def name_outputs(output: Any, taken: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Return the tensors that a model returned, by name, in their own order; what is not a tensor is left out.

    Args:
        output: what `forward` returned: a tensor (`output`), a sequence (`output_0`, ...), or a dictionary (its keys).
        taken: input names; an output of the same name gets the prefix `output_`.
    """
    paths, _ = pytree.tree_flatten_with_path(output)
    tensors = [(path, leaf) for path, leaf in paths if isinstance(leaf, torch.Tensor)]
    if len(tensors) == 1 and not any(isinstance(_key(k), str) for k in tensors[0][0]):
        return {_unique("output", taken): tensors[0][1]}
    named: dict[str, torch.Tensor] = {}
    for path, leaf in tensors:
        parts = [str(_key(k)) for k in path]
        name = "_".join(parts if isinstance(_key(path[0]), str) else ["output", *parts])
        name = f"output_{name}" if name in taken else name
        named[_unique(name, (*taken, *named))] = leaf
    return named


def default_axes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return axis 0 of every tensor that has as many rows as the first one with any: the batch."""
    rows = next((t.shape[0] for t in tensors.values() if t.ndim), None)
    return {name: (0,) if t.ndim and t.shape[0] == rows else () for name, t in tensors.items()}


def check_axes(tensors: Mapping[str, torch.Tensor], axes: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, ...]]:
    """Return `axes` with every input listed and no negative axis.

    Raises:
        InvalidInput: no input has this name, or the input has no such axis.
    """
    for name in axes:
        if name not in tensors:
            raise InvalidInput(f"dynamic axes are given for '{name}', which is no input; inputs: {', '.join(tensors)}")
    checked = {}
    for name, tensor in tensors.items():
        for axis in axes.get(name, ()):
            if not -tensor.ndim <= axis < tensor.ndim:
                raise InvalidInput(f"input '{name}' of shape {tuple(tensor.shape)} has no axis {axis} to make dynamic")
        checked[name] = tuple(sorted({axis % tensor.ndim for axis in axes.get(name, ())}))
    return checked


def axis_name(name: str, axis: int, ndim: int) -> str:
    """Return what a dynamic axis is called: `batch`, for images ``(N, C, H, W)`` also `height` and `width`."""
    if axis == 0:
        return BATCH
    return {2: HEIGHT, 3: WIDTH}.get(axis, f"{name}_{axis}") if ndim == 4 else f"{name}_{axis}"


def with_batch(tensors: Mapping[str, torch.Tensor], axes: Axes, batch: int) -> dict[str, torch.Tensor]:
    """Return the tensors with `batch` rows where axis 0 is dynamic, by repeating what is there. Never aliased."""
    return {
        name: tensor[torch.arange(batch) % tensor.shape[0]] if 0 in axes.get(name, ()) else tensor.clone()
        for name, tensor in tensors.items()
    }


def _positional_names(signature: inspect.Signature, count: int) -> list[str]:
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names.extend(f"{parameter.name}_{k}" for k in range(count - len(names)))
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names[:count]


def _key(entry: Any) -> Any:
    """Return the index, key or attribute name in one step of a path through nested containers."""
    for attribute in ("idx", "key", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def _unique(name: str, taken: Collection[str | None] | Sequence[str | None]) -> str:
    while name in taken:
        name += "_"
    return name
