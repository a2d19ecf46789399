"""An oracle for pruned models that uses weights and outputs only, and no code of any of the tools.

The dense model has distinct values in all its parameters, so each value of a compact tensor identifies a dense
element. The missing elements are set to zero in a copy of the dense model, and the two must then compute the same.
Where a norm or a mean averages over an axis that was cut, the copy may average over the survivors instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

TOLERANCE = 1e-7
"""Largest relative difference, in float64, of a cut that is right."""

DOES_NOT_RUN = "the cut model does not run"

Kept = Tensor
"""Which elements of a dense tensor survive: a mask of its shape."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the oracle found.

    Attributes:
        sound: True or False; None if undecided.
        error: relative difference of the outputs; None where they could not be compared.
        meaning: `zeroed`, or `survivors` if norms and means are taken over the remaining channels.
        why: in words, where `sound` is not True.
        gradients: of a sound cut: largest relative difference of the gradients of one training step, over parameters;
            None where they could not be computed.
        untrainable: why they could not.
    """

    sound: bool | None
    error: float | None = None
    meaning: str = "zeroed"
    why: str = ""
    gradients: float | None = None
    untrainable: str = ""


def judge(dense: nn.Module, compact: nn.Module, batches: Sequence[tuple[Any, ...]]) -> Verdict:
    """Compare the compact model with the dense model whose missing elements are zero.

    Args:
        dense: float64, with distinct parameter values; unchanged.
        compact: what a tool made of a copy of it, float64.
        batches: at least two calls' arguments: only what varies between them can be compared.
    """
    computed = _Computed.of(dense, batches[0])
    try:
        kept = survivors(dense, compact, computed)
    except NotASlice as error:
        return Verdict(False, why=str(error))
    try:
        got = [_outputs(compact, batch) for batch in batches]
    except Exception as error:  # the cut model may fail in any way
        return Verdict(False, why=f"{DOES_NOT_RUN}: {said(error)}")
    masked = _zeroed(dense, kept)
    modes: Mapping[str, Callable[[], TorchFunctionMode]] = {
        "zeroed": lambda: _Masked(computed, {}),
        "survivors": lambda: _Masked(computed, {id(p): kept[n] for n, p in masked.named_parameters() if n in kept}),
    }
    least = float("inf")
    for meaning, mode in modes.items():
        wanted = []
        for batch in batches:
            with mode():
                wanted.append(_outputs(masked, batch))
        shapes = [tuple(x.shape) for x in got[0]], [tuple(x.shape) for x in wanted[0]]
        if shapes[0] != shapes[1]:
            return Verdict(False, why=f"outputs of shape {shapes[0]} in place of {shapes[1]}")
        found, varying = _difference(wanted, got)
        if varying < 1e-9:
            return Verdict(None, why="the masked dense model's output does not vary with its input")
        if found <= TOLERANCE:
            try:
                gradients = _step_difference(masked, compact, kept, batches[0], mode)
            except Exception as error:  # as may its backward pass
                return Verdict(True, found, meaning, untrainable=said(error))
            return Verdict(True, found, meaning, gradients=gradients)
        least = min(least, found)
    return Verdict(False, least, why=f"outputs differ by {least:.1e}")


# From values to survivors. -------------------------------------------------------------------------------------------


class NotASlice(Exception):
    """A tensor of the cut model is no slice of the dense one."""


def survivors(dense: nn.Module, compact: nn.Module, computed: _Computed) -> dict[str, Kept]:
    """Return what of each dense parameter and statistic survives; marks weights computed on the way too."""
    theirs = {**dict(dense.named_parameters(remove_duplicate=False)), **_statistics(dense)}
    kept: dict[str, Kept] = {}
    for name, tensor in compact.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name in theirs and (found := _slice_of(theirs[name], tensor)) is not None:
            kept[name] = found
        elif not computed.claim(tensor) and name in theirs:
            raise NotASlice(f"{name} {tuple(tensor.shape)} is no slice of the dense {tuple(theirs[name].shape)}")
    return kept


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b for name, b in model.named_buffers(remove_duplicate=False) if "running_" in name}


def _slice_of(dense: Tensor, cut: Tensor) -> Kept | None:
    """Return which elements of `dense` are in `cut`, each once; None where it holds others, or more than one of them.

    Each convolution group or attention head may have kept members of its own, so this need not be a rectangle. Whether
    the elements are in their places follows from the outputs.
    """
    if cut.dim() != dense.dim():
        return None
    if cut.shape == dense.shape and torch.equal(dense, cut):
        return torch.ones(dense.shape, dtype=torch.bool)
    return found if (found := _rectangle(dense, cut)) is not None else _anywhere(dense, cut)


def _rectangle(dense: Tensor, cut: Tensor) -> Kept | None:
    """The usual case, found from one line along each axis."""
    if cut.numel() == 0 or not (found := (dense == cut.flatten()[0]).nonzero()[:1].tolist()):
        return None
    places = []
    for axis in range(cut.dim()):
        line = dense[tuple(slice(None) if a == axis else at for a, at in enumerate(found[0]))]
        first = cut[tuple(slice(None) if a == axis else 0 for a in range(cut.dim()))]
        places.append((first[:, None] == line).int().argmax(1))
    grid = torch.meshgrid(*places, indexing="ij")
    if any(len(set(x.tolist())) != len(x) for x in places) or not torch.equal(dense[grid], cut):
        return None
    kept = torch.zeros(dense.shape, dtype=torch.bool)
    kept[grid] = True
    return kept


def _anywhere(dense: Tensor, cut: Tensor) -> Kept | None:
    """Each element looked up on its own."""
    values, order = dense.detach().flatten().sort()
    wanted = cut.detach().flatten()
    place = torch.searchsorted(values, wanted).clamp_max(len(values) - 1)
    if not torch.equal(values[place], wanted):
        return None
    kept = torch.zeros(dense.numel(), dtype=torch.bool)
    kept[order[place]] = True
    return kept.reshape(dense.shape) if int(kept.sum()) == cut.numel() else None


def _keep(tensor: Tensor, kept: Kept) -> Tensor:
    """Return the tensor with zeros where an element does not survive."""
    return torch.where(kept, tensor.detach(), torch.zeros((), dtype=tensor.dtype))


def _zeroed(dense: nn.Module, kept: Mapping[str, Kept]) -> nn.Module:
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        named = {**dict(masked.named_parameters(remove_duplicate=False)), **_statistics(masked)}
        for name, tensor in named.items():
            if name in kept and not name.endswith("running_var"):
                tensor.copy_(_keep(tensor, kept[name]))
    return masked


# Weights that the model computes from its parameters. ----------------------------------------------------------------


_CONTRACTIONS = ("conv1d", "conv2d", "conv3d", "linear")


class _Computed:
    """Weights of contractions that are no parameters, by the number of the call, and what survives of them."""

    def __init__(self, weights: Mapping[int, Tensor]) -> None:
        self.weights = dict(weights)
        self.kept: dict[int, Kept] = {}

    @classmethod
    def of(cls, dense: nn.Module, batch: tuple[Any, ...]) -> _Computed:
        record = _Record({id(p) for p in dense.parameters()})
        with record:
            _outputs(dense, batch)
        return cls(record.weights)

    def claim(self, cut: Tensor) -> bool:
        """Whether `cut` is a slice of one of the weights."""
        for call, weight in self.weights.items():
            if call not in self.kept and (found := _slice_of(weight, cut)) is not None:
                self.kept[call] = found
                return True
        return False


class _Record(TorchFunctionMode):
    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.parameters, self.weights, self.calls = parameters, {}, 0  # type: ignore[var-annotated]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _CONTRACTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if id(weight) not in self.parameters:
                self.weights[self.calls] = weight.detach().clone()
            self.calls += 1
        return func(*args, **kwargs)


class _Masked(TorchFunctionMode):
    """Run the masked dense model: computed weights masked, and norms and means over survivors where asked."""

    def __init__(self, computed: _Computed, owners: Mapping[int, Kept]) -> None:
        super().__init__()
        self.computed, self.owners, self.calls = computed, owners, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _CONTRACTIONS:
            call, self.calls = self.calls, self.calls + 1
            if call in self.computed.kept:
                weight = _keep(self.computed.weights[call], self.computed.kept[call])
                return func(args[0], weight, *args[2:], **kwargs)
        if self.owners and name in _OVER_SURVIVORS:
            return _OVER_SURVIVORS[name](self.owners, func, *args, **kwargs)
        return func(*args, **kwargs)


def _alive(owners: Mapping[int, Kept], weight: Tensor | None, x: Tensor, axes: Iterable[int]) -> Tensor:
    """Mask over `x` (broadcastable), 1 where the normalised index survives: by the weight, else by what is all zero."""
    axes = [a % x.dim() for a in axes]
    alive = torch.ones([1] * x.dim(), dtype=x.dtype)
    for k, axis in enumerate(axes):
        if weight is not None and id(weight) in owners:
            mask = owners[id(weight)].movedim(k, 0).reshape(x.shape[axis], -1).any(1)
        else:
            mask = (x != 0).movedim(axis, 0).flatten(1).any(1)
        alive = alive * mask.to(x.dtype).reshape([-1 if a == axis else 1 for a in range(x.dim())])
    return alive


def _layer_norm(
    owners: Any, func: Any, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    axes = list(range(x.dim() - len(shape), x.dim()))
    alive = _alive(owners, weight, x, axes)
    mean = _mean(x, alive, axes)
    out = (x - mean) * torch.rsqrt(_mean((x - mean) ** 2, alive, axes) + eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias) * alive


def _rms_norm(owners: Any, func: Any, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    axes = list(range(x.dim() - len(shape), x.dim()))
    alive = _alive(owners, weight, x, axes)
    small = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * torch.rsqrt(_mean(x**2, alive, axes) + small) * alive
    return out if weight is None else out * weight


def _group_norm(
    owners: Any, func: Any, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    alive = _alive(owners, weight, x, [1])
    parts = x.reshape(x.shape[0], groups, x.shape[1] // groups, -1)
    living = alive.expand(1, x.shape[1], *[1] * (x.dim() - 2)).reshape(1, groups, -1, 1)
    mean = _mean(parts, living, [2, 3])
    out = (parts - mean) * torch.rsqrt(_mean((parts - mean) ** 2, living, [2, 3]) + eps)
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    out = out.reshape(x.shape)
    out = out if weight is None else out * weight.reshape(per_channel)
    return (out if bias is None else out + bias.reshape(per_channel)) * alive


def _mean_over(owners: Any, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    dim = args[0] if args else kwargs.get("dim", kwargs.get("axis"))
    if dim is None or not isinstance(x, Tensor):
        return func(x, *args, **kwargs)  # type: ignore[no-any-return]
    axes = [dim] if isinstance(dim, int) else list(dim)
    alive = _alive({}, None, x, [a for a in axes if a % x.dim()])
    if func.__name__ == "mean":
        keep = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
        out = _mean(x, alive, axes)
        return out if keep else out.squeeze([a % x.dim() for a in axes])
    return func(x, *args, **kwargs)  # type: ignore[no-any-return]


def _mean(x: Tensor, alive: Tensor, axes: Iterable[int]) -> Tensor:
    axes = list(axes)
    with torch._C.DisableTorchFunction():
        return (x * alive).sum(axes, keepdim=True) / alive.expand_as(x).sum(axes, keepdim=True).clamp_min(1)


_OVER_SURVIVORS: Mapping[str, Callable[..., Tensor]] = {
    F.layer_norm.__name__: _layer_norm,
    F.rms_norm.__name__: _rms_norm,
    F.group_norm.__name__: _group_norm,
    "mean": _mean_over,
}


# Comparing. ----------------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, batch: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [x.detach() for x in _pytree.tree_leaves(model(*batch)) if isinstance(x, Tensor)]


def _difference(wanted: Sequence[Sequence[Tensor]], got: Sequence[Sequence[Tensor]]) -> tuple[float, float]:
    """Largest difference over the part of each output that varies between batches, and the smallest such part."""
    worst, least = 0.0, float("inf")
    for k in range(len(wanted[0])):
        varying = float((wanted[0][k][:1] - wanted[1][k][:1]).abs().max())
        size = max(float(wanted[0][k].abs().max()), 1e-30)
        worst = max(
            worst, *(float((w[k] - g[k]).abs().max()) / max(varying, 1e-30) for w, g in zip(wanted, got, strict=True))
        )
        least = min(least, varying / size)
    return worst, least


def _step_difference(
    masked: nn.Module,
    compact: nn.Module,
    kept: Mapping[str, Kept],
    batch: tuple[Any, ...],
    mode: Callable[[], TorchFunctionMode],
) -> float:
    """Largest difference of a parameter's gradients, relative to its largest one; layers as in evaluation mode.

    A parameter whose gradients are rounding errors of others (below 1e-9 of the largest of all) is relative to those.
    """
    theirs = {n: p for n, p in masked.named_parameters(remove_duplicate=False) if n in kept and p.requires_grad}
    mine = {n: p for n, p in compact.named_parameters() if n in theirs}
    got = _gradients(compact, list(mine.values()), batch)
    with mode():
        wanted = _gradients(masked, [theirs[n] for n in mine], batch)
    found = []
    for (name, p), g, w in zip(mine.items(), got, wanted, strict=True):
        alive, dense = kept[name], theirs[name].detach()
        order, place = p.detach().flatten().argsort(), dense[alive].argsort()
        found.append((g.flatten()[order], w[alive][place]))
    floor = 1e-9 * max(float(w.abs().max()) for _, w in found)
    return max(float((g - w).abs().max()) / max(float(w.abs().max()), floor, 1e-300) for g, w in found)


def _gradients(model: nn.Module, parameters: list[nn.Parameter], batch: tuple[Any, ...]) -> list[Tensor]:
    """Of the mean square of each output, zero where a parameter is not used."""
    leaves = [x for x in _pytree.tree_leaves(model(*batch)) if isinstance(x, Tensor) and x.requires_grad]
    loss = torch.stack([x.square().mean() for x in leaves]).sum()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def said(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"
