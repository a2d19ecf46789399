"""Movement operators: their rule is to run them on integer labels. Literal sizes follow the survivors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core import Layers, Step, Value, step
from surgery.ops.examples import between_convs, between_linears, fork_convs
from surgery.ops.index import picked
from surgery.ops.moments import joined
from surgery.ops.registry import Call, Coupled, Example, Lowering, Replacement, Rewrite, Rule, Shape, free, register

aten = torch.ops.aten
Changes = Mapping[str, Any] | Replacement


def _run(call: Call, op: Any) -> Coupled:
    extra = {k: v for k, v in call.bound.items() if not isinstance(v, Value)}
    name = next(k for k, v in call.bound.items() if isinstance(v, Value))
    return call.move(call.value(name), lambda labels: op(**{name: labels, **extra}))


def _moves(
    name: str,
    function: Callable[[Tensor], Tensor],
    *,
    rewrite: Callable[[Rewrite], Changes] | None = None,
    example: Example | None = None,
    after: int = 0,
    couple: Callable[[Call], Coupled] | None = None,
    onnx: Lowering | None = None,
) -> Rule:
    op = operator.attrgetter(name)(aten)
    return Rule(
        op=f"aten.{name}",
        family="movement",
        couple=couple or (lambda call: _run(call, op)),
        rewrite=rewrite,
        onnx=onnx,
        example=example or between_convs(function, after=after),
        summary="run on labels",
    )


def _onnx_order(order: Callable[[Mapping[str, Any], list[int]], list[int]]) -> Lowering:
    def onnx(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
        axes = list(range(len(out)))
        return [step("Transpose", next(iter(shapes)), perm=order(a, axes))]

    return onnx


def _exchanged(axes: list[int], first: int, second: int) -> list[int]:
    axes[first], axes[second] = axes[second], axes[first]
    return axes


_PERMUTED = _onnx_order(lambda a, axes: [axes[d] for d in a["dims"]])
_TRANSPOSED = _onnx_order(lambda a, axes: _exchanged(axes, a["dim0"], a["dim1"]))


def _onnx_cat(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
    return [step("Concat", *(name for name in shapes if name.startswith("tensors")), axis=a["dim"] % len(out))]


def _sizes(argument: str) -> Callable[[Rewrite], Changes]:
    """Literal output sizes follow the survivors."""

    def rewrite(r: Rewrite) -> Changes:
        return {argument: r.sizes(argument, r.outputs[0].shape, r.shape_of(r.outputs[0]))}

    return rewrite


def _unflatten_sizes(r: Rewrite) -> Changes:
    first = r.bound["dim"] % len(r.bound["self"].shape)
    count = len(r.bound["sizes"])
    out = r.outputs[0]
    dense, compact = out.shape[first : first + count], r.shape_of(out)[first : first + count]
    return {"sizes": r.sizes("sizes", dense, compact)}


def _split_sizes(r: Rewrite) -> Changes:
    """Chunk and split: if survivors are distributed unevenly, list the size of every piece."""
    dim = r.bound["dim"] % len(r.bound["self"].shape)
    pieces = [r.shape_of(out)[dim] for out in r.outputs]
    if all(out.shape[dim] == piece for out, piece in zip(r.outputs, pieces, strict=True)):
        return {}
    if "split_sizes" in r.bound:
        return {"split_sizes": pieces}
    return Replacement(aten.split_with_sizes.default, (r.raw["self"], pieces, dim))


_OPEN = 2**63 - 1
"""The end of a slice without an explicit end."""


def _bounds(r: Rewrite) -> Changes:
    """Slice: start and end count survivors; with a step, the survivors are picked by a constant index."""
    dim = r.bound["dim"] % len(r.bound["self"].shape)
    keep = r.keep("self", dim)
    if keep.all():
        return {}
    size = len(keep)
    start, stop, step = slice(r.bound["start"], r.bound["end"], r.bound.get("step", 1)).indices(size)
    if step == 1:  # keep bounds relative to the end: the axis may be longer in another call
        first, last = r.bound["start"] or 0, r.bound["end"]
        whole = last is None or last > size or (last == size and not isinstance(r.raw["end"], int))
        begin = -int(keep[start:].sum()) if first < 0 else int(keep[:start].sum())
        if whole:
            return {"start": begin, "end": _OPEN}
        return {"start": begin, "end": (-int(keep[stop:].sum()) or _OPEN) if last < 0 else int(keep[:stop].sum())}
    return picked(r, dim, np.arange(start, stop, step))


def _shuffled(r: Rewrite) -> Changes:
    """Groups with unequal numbers of survivors cannot be shuffled as groups: select channels one by one."""
    x: Value = r.bound["self"]
    if r.keep("self", 1).all():
        return {}
    channels = torch.arange(x.shape[1]).reshape(1, -1, 1, 1)
    return picked(r, 1, aten.channel_shuffle(channels, r.bound["groups"]).flatten().numpy())


def _rolled(r: Rewrite) -> Changes:
    x: Value = r.bound["self"]
    changed = [
        a
        for a in range(len(x.shape))
        if a in {d % len(x.shape) for d in r.bound["dims"]} and not r.keep("self", a).all()
    ]
    if not changed:
        return {}
    shifts = list(r.raw["shifts"])
    for k, dim in enumerate(r.bound["dims"]):
        if dim % len(x.shape) not in changed:
            continue
        keep = r.keep("self", dim)
        shift = r.bound["shifts"][k] % len(keep)
        shifts[k] = int(keep[len(keep) - shift :].sum())
    return {"shifts": shifts}


def _squeezed(r: Rewrite) -> Changes:
    """An axis that has shrunk to one must not be squeezed: name the axes explicitly."""
    dense: Shape = r.bound["self"].shape
    if not any(now == 1 != before for now, before in zip(r.shape_of(r.bound["self"]), dense, strict=True)):
        return {}
    wanted = r.bound.get("dim", range(len(dense)))
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    gone = [d for d in wanted if dense[d] == 1]
    return (
        Replacement(aten.squeeze.dims, (r.raw["self"], gone))
        if gone
        else Replacement(aten.alias.default, (r.raw["self"],))
    )


def _couple_view(call: Call) -> Coupled:
    """Labels are expanded over the other axes without a copy, which `view` rejects; `reshape` is equivalent."""
    return call.move(call.value("self"), lambda labels: labels.reshape(call["size"]))


def _couple_pixel_shuffle(call: Call) -> Coupled:
    """The channels that become the pixels of one block are tied: single rows and columns are never removed."""
    out = _run(call, aten.pixel_shuffle.default)
    if isinstance(out, Value):
        for layers in out.axes[-2:]:
            call.labels.freeze(layers, f"{call.labels.where}: rows and columns of an image stay")
    return out


def _couple_cat(call: Call) -> Value:
    tensors = [t for t in call["tensors"] if t.shape != (0,)]
    rank = len(call.outputs[0])
    dim = call["dim"] % rank
    axes = {a: _tied(call, tensors, a) for a in range(rank) if a != dim}
    return call.out({**axes, dim: _concatenated(call, tensors, dim)})


def _tied(call: Call, tensors: Sequence[Value], axis: int) -> Layers:
    """Tie the labels of an axis shared by all tensors."""
    layers = call.passed(tensors[0], axis)
    for other in tensors[1:]:
        layers = call.tie(tensors[0], axis, other, axis)
    return layers


def _concatenated(call: Call, tensors: Sequence[Value], dim: int) -> Layers:
    pieces = [call.labels.canon(call.passed(t, dim)) for t in tensors]
    depth = max(len(p) for p in pieces)
    zeros = [np.zeros(t.shape[dim], dtype=np.int64) for t in tensors]
    return tuple(
        np.concatenate([p[k] if k < len(p) else z for p, z in zip(pieces, zeros, strict=True)]) for k in range(depth)
    )


def _couple_stack(call: Call) -> Value:
    dim = call["dim"] % len(call.outputs[0])
    axes = range(len(call.outputs[0]) - 1)
    return call.out({a if a < dim else a + 1: _tied(call, call["tensors"], a) for a in axes})


def _couple_expand(call: Call) -> Value:
    """An axis expanded from length one is constant, so its indices can be removed individually."""
    x, shape = call.value("self"), call.outputs[0]
    lead = len(shape) - len(x.shape)
    axes: dict[int, Layers] = {}
    for a, size in enumerate(shape):
        if a >= lead and x.shape[a - lead] == size:
            axes[a] = call.passed(x, a - lead)
        elif size > 1 and isinstance(call.raw_size(a), int):
            axes[a] = (call.labels.created(f"{call.key}:{a}", size),)
    return call.out(axes)


def _pads(bound: Mapping[str, Any], rank: int) -> list[tuple[int, int]]:
    """(before, after) for each axis; torch lists them from the last axis backwards."""
    flat = list(bound["pad"]) + [0] * (2 * rank - len(bound["pad"]))
    return [(flat[2 * (rank - 1 - a)], flat[2 * (rank - 1 - a) + 1]) for a in range(rank)]


def _couple_pad(call: Call) -> Coupled:
    """Constant padding of a labelled axis adds indices that can be removed."""
    x = call.value("self")
    if call.bound.get("mode", "constant") != "constant":
        return _couple_own_padding(call)
    axes: dict[int, Layers] = {}
    for a, (before, after) in enumerate(_pads(call.bound, len(x.shape))):
        layers = call.labels.canon(call.passed(x, a))
        if before < 0 or after < 0:
            call.freeze(x, a, "cropped by negative padding")
            layers = ()
        if layers and (before or after):
            axes[a] = _padded(call, layers, a, before, after)
        else:
            axes[a] = layers
    return call.out(axes)


def _couple_own_padding(call: Call) -> Coupled:
    """Reflection, replication and similar paddings repeat indices of the padded axes: those are never cut."""
    x = call.value("self")
    padding = call.bound.get("pad", call.bound.get("padding"))
    axes: dict[int, Layers] = {}
    for a, pads in enumerate(_pads({"pad": padding}, len(x.shape))):
        if any(pads):
            call.freeze(x, a, "padded with its own values")
        else:
            axes[a] = call.passed(x, a)
    return call.out(axes)


def _padded(call: Call, layers: Layers, axis: int, before: int, after: int) -> Layers:
    first = call.labels.created(f"{call.key}:{axis}:before", before)
    last = call.labels.created(f"{call.key}:{axis}:after", after)
    none = [np.zeros(len(first), dtype=np.int64), np.zeros(len(last), dtype=np.int64)]
    head = np.concatenate([first, layers[0], last])
    return (head, *(np.concatenate([none[0], layer, none[1]]) for layer in layers[1:]))


def _rewrite_pad(r: Rewrite) -> Changes:
    rank = len(r.bound["self"].shape)
    flat = list(r.raw["pad"])
    for a, (before, after) in enumerate(_pads(r.bound, rank)):
        keep = r.mask(r.outputs[0], a)
        at = 2 * (rank - 1 - a)
        if not keep.all() and at < len(flat):
            flat[at], flat[at + 1] = int(keep[:before].sum()), int(keep[len(keep) - after :].sum())
    return {"pad": flat}


def _frozen_axis(name: str, function: Callable[[Tensor], Tensor], *, argument: str = "dim") -> Rule:
    """Select and unbind address single indices of an axis, which is never cut; the others pass."""
    op = operator.attrgetter(name)(aten)

    def couple(call: Call) -> Coupled:
        call.freeze(call.value("self"), call[argument], "single indices of this axis are picked out")
        return _run(call, op)

    return Rule(
        op=f"aten.{name}",
        family="movement",
        couple=couple,
        example=between_convs(function),
        summary="the axis whose indices it names is never cut",
    )


def _padded_example(pad: Callable[..., Tensor]) -> Example:
    return between_convs(lambda x: pad(x, [1, 1, 0, 0, 2, 3]), after=13)


_PAD = Rule(
    op="aten.pad.default",
    family="movement",
    couple=_couple_pad,
    rewrite=_rewrite_pad,
    example=_padded_example(F.pad),
    summary="constant padding of channels may go channel by channel",
)

register(
    _moves(
        "view.default",
        lambda x: aten.view(x, [x.shape[0], 2, 4, 10, 10]).flatten(1, 2),
        rewrite=_sizes("size"),
        couple=_couple_view,
        onnx=free,
    ),
    _moves(
        "reshape.default",
        lambda x: x.transpose(2, 3).reshape(x.shape[0], 8, 10, 10),
        rewrite=_sizes("shape"),
        onnx=free,
    ),
    _moves(
        "_unsafe_view.default",
        lambda x: aten._unsafe_view(x, [x.shape[0], 8, 10, 10]),
        rewrite=_sizes("size"),
        couple=_couple_view,
        onnx=free,
    ),
    _moves("flatten.using_ints", torch.flatten, example=between_linears(lambda x: x.flatten(1), after=72), onnx=free),
    _moves(
        "unflatten.int",
        lambda x: aten.unflatten.int(x, 1, [4, 2]).flatten(1, 2),
        rewrite=_unflatten_sizes,
        onnx=free,
    ),
    _moves("permute.default", lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), onnx=_PERMUTED),
    _moves("transpose.int", lambda x: x.transpose(1, 2).transpose(1, 2), onnx=_TRANSPOSED),
    _moves("swapaxes.default", lambda x: aten.swapaxes(aten.swapaxes(x, 1, 2), 1, 2)),
    _moves("movedim.int", lambda x: x.movedim(1, 3).movedim(3, 1)),
    _moves(
        "t.default",
        lambda x: x,
        example=between_linears(lambda x: aten.t(aten.t(x.flatten(0, 1))).unflatten(0, (-1, 6))),
    ),
    _moves(
        "numpy_T.default",
        lambda x: x,
        example=between_linears(lambda x: aten.numpy_T(aten.numpy_T(x.flatten(0, 1))).unflatten(0, (-1, 6))),
    ),
    _moves("unsqueeze.default", lambda x: x.unsqueeze(1).squeeze(1), onnx=free),
    _moves("squeeze.dim", lambda x: aten.squeeze.dim(x.unsqueeze(2), 2), rewrite=_squeezed, onnx=free),
    _moves("squeeze.dims", lambda x: aten.squeeze.dims(x.unsqueeze(2), [2]), rewrite=_squeezed, onnx=free),
    _moves("squeeze.default", lambda x: aten.squeeze.default(x.unsqueeze(2)), rewrite=_squeezed, onnx=free),
    _moves("slice.Tensor", lambda x: x[:, 2:7], rewrite=_bounds, after=5),
    _moves("flip.default", lambda x: x.flip(1)),
    _moves("roll.default", lambda x: x.roll(3, 1), rewrite=_rolled),
    _moves("repeat.default", lambda x: x.repeat(1, 2, 1, 1), after=16),
    _moves("tile.default", lambda x: aten.tile(x, [1, 2, 1, 1]), after=16),
    _moves("repeat_interleave.self_int", lambda x: x.repeat_interleave(2, 1), after=16),
    _moves("pixel_shuffle.default", lambda x: F.pixel_shuffle(x, 2), couple=_couple_pixel_shuffle, after=2),
    _moves("pixel_unshuffle.default", lambda x: F.pixel_unshuffle(x, 2), after=32),
    _moves("channel_shuffle.default", lambda x: aten.channel_shuffle(x, 2), rewrite=_shuffled),
    _moves("chunk.default", lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), rewrite=_split_sizes),
    _moves("split.Tensor", lambda x: torch.cat(torch.split(x, 3, 1)[::-1], 1), rewrite=_split_sizes),
    _moves("split_with_sizes.default", lambda x: torch.cat(torch.split(x, [3, 5], 1)[::-1], 1), rewrite=_split_sizes),
    _moves(
        "tensor_split.indices", lambda x: torch.cat(torch.tensor_split(x, [3, 5], 1)[::-1], 1), rewrite=_split_sizes
    ),
    _moves("tensor_split.sections", lambda x: torch.cat(x.tensor_split(3, 1)[::-1], 1), rewrite=_split_sizes),
    _moves("reflection_pad2d.default", lambda x: aten.reflection_pad2d(x, [1, 1, 1, 1]), couple=_couple_own_padding),
    _moves("replication_pad2d.default", lambda x: aten.replication_pad2d(x, [1, 1, 1, 1]), couple=_couple_own_padding),
    _frozen_axis("unfold.default", lambda x: x.unfold(2, 3, 1).sum(-1), argument="dimension"),
    _frozen_axis("select.int", lambda x: x + x[:, :, :, 0].unsqueeze(3)),
    _frozen_axis("unbind.int", lambda x: torch.stack(x.unbind(2), 2)),
    Rule(
        op="aten.cat.default",
        family="movement",
        couple=_couple_cat,
        onnx=_onnx_cat,
        is_sum=True,
        moments=lambda a: joined(a["tensors"], a["dim"]),
        example=fork_convs(lambda a, b: torch.cat([a, b], 1), after=16),
        summary="labels laid end to end",
    ),
    Rule(
        op="aten.stack.default",
        family="movement",
        couple=_couple_stack,
        example=fork_convs(lambda a, b: torch.stack([a, b], 1).flatten(1, 2), after=16),
        summary="ties its operands",
    ),
    Rule(
        op="aten.expand.default",
        family="movement",
        couple=_couple_expand,
        rewrite=_sizes("size"),
        example=fork_convs(lambda a, b: a * b.mean((1, 2, 3), keepdim=True).expand(-1, 8, 10, 10)),
        summary="indices of a grown axis may go one by one",
    ),
    _PAD,
    replace(_PAD, op="aten.constant_pad_nd.default", example=_padded_example(aten.constant_pad_nd)),
)
