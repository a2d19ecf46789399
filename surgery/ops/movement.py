"""Operators that move or create values.

Movement is run on integer labels, created values get new ones, and sizes follow the remaining units.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core import Layers, Step, Value, step
from surgery.ops.examples import between_convs, between_linears, fork_convs
from surgery.ops.index import Changes, picked, slice_bounds
from surgery.ops.moments import joined
from surgery.ops.registry import (
    Call,
    Coupled,
    Example,
    Lowering,
    Replacement,
    Rewrite,
    Rule,
    Shape,
    follow_sizes,
    free,
    register,
)

aten = torch.ops.aten


def _run(call: Call, op: Any) -> Coupled:
    extra = {k: v for k, v in call.bound.items() if not isinstance(v, Value)}
    name = next(k for k, v in call.bound.items() if isinstance(v, Value))
    return call.move(call.value(name), lambda labels: op(**{name: labels, **extra}))


def _moves(
    name: str,
    function: Callable[[Tensor], Tensor],
    rewrite: Callable[[Rewrite], Changes] | None = None,
    *,
    around: Callable[..., Example] = between_convs,
    couple: Callable[[Call], Coupled] | None = None,
    onnx: Lowering | None = None,
    summary: str = "run on labels",
    **sizes: int,
) -> Rule:
    op = operator.attrgetter(name)(aten)
    couple = couple or (lambda call: _run(call, op))
    example = around(function, **sizes)
    return Rule(f"aten.{name}", "movement", couple, example, rewrite, onnx=onnx, summary=summary)


def _reorders(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    """Permute and transpose: the order of the axes is the shape of an empty tensor of sizes 0, 1, 2, .. afterwards."""
    op = operator.attrgetter(name)(aten)

    def onnx(a: Mapping[str, Any], shapes: Mapping[str, Shape], out: Shape) -> Sequence[Step]:
        source = next(iter(shapes))
        return [step("Transpose", source, perm=list(op(**{**a, source: torch.empty(tuple(range(len(out))))}).shape))]

    return _moves(name, function, onnx=onnx)


def _frozen_axis(name: str, function: Callable[[Tensor], Tensor], *, argument: str = "dim") -> Rule:
    """Select and unbind address single indices of an axis, which is never cut; the others pass."""
    op = operator.attrgetter(name)(aten)

    def couple(call: Call) -> Coupled:
        call.freeze(call.value("self"), call[argument], "single indices of this axis are picked out")
        return _run(call, op)

    return _moves(name, function, couple=couple, summary="the axis whose indices it names is never cut")


def _twice(op: Any) -> Callable[[Tensor], Tensor]:
    """A transposition of matrices, and back."""
    return lambda x: op(op(x.flatten(0, 1))).reshape(-1, 6, 12)


def _view(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    """Labels are expanded over the other axes without a copy, which `view` rejects; `reshape` is equivalent."""

    def couple(call: Call) -> Coupled:
        return call.move(call.value("self"), lambda labels: labels.reshape(call["size"]))

    return _moves(name, function, follow_sizes("size"), couple=couple, onnx=free)


def _couple_pixel_shuffle(call: Call) -> Coupled:
    """The channels that become the pixels of one block are tied: single rows and columns are never removed."""
    out = _run(call, aten.pixel_shuffle.default)
    if isinstance(out, Value):
        for layers in out.axes[-2:]:
            call.labels.freeze(layers, f"{call.labels.where}: rows and columns of an image stay")
    return out


def _couple_expand(call: Call) -> Value:
    """An axis expanded from length one is constant, so its indices can be removed individually."""
    x, shape = call.value("self"), call.outputs[0]
    lead = len(shape) - len(x.shape)
    axes: dict[int, Layers] = {}
    for a, size in enumerate(shape):
        same = a >= lead and x.shape[a - lead] == size
        axes[a] = call.passed(x, a - lead) if same else call.created(a, size)
    return call.out(axes)


def _shuffled(r: Rewrite) -> Changes:
    """Groups with unequal numbers of survivors cannot be shuffled as groups: select channels one by one."""
    channels = torch.arange(r.bound["self"].shape[1]).reshape(1, -1, 1, 1)
    return picked(r, 1, aten.channel_shuffle(channels, r.bound["groups"]).flatten().numpy())


def _rolled(r: Rewrite) -> Changes:
    shifts = list(r.raw["shifts"])
    for k, dim in enumerate(r.bound["dims"]):
        keep = r.keep("self", dim)
        if not keep.all():
            shifts[k] = int(keep[len(keep) - r.bound["shifts"][k] % len(keep) :].sum())
    return {"shifts": shifts}


def _squeezed(r: Rewrite) -> Changes:
    """An axis that has shrunk to one must not be squeezed: name the axes explicitly."""
    dense: Shape = r.bound["self"].shape
    if not any(now == 1 != before for now, before in zip(r.mask.shape(r.bound["self"]), dense, strict=True)):
        return {}
    wanted = r.bound.get("dim", range(len(dense)))
    single = [d for d in ([wanted] if isinstance(wanted, int) else wanted) if dense[d] == 1]
    if not single:
        return Replacement(aten.alias.default, (r.raw["self"],))
    return Replacement(aten.squeeze.dims, (r.raw["self"], single))


def _split_sizes(r: Rewrite) -> Changes:
    """Chunk and split: if survivors are distributed unevenly, list the size of every piece."""
    dim = r.bound["dim"] % len(r.bound["self"].shape)
    pieces = [r.mask.shape(out)[dim] for out in r.outputs]
    if pieces == [out.shape[dim] for out in r.outputs]:
        return {}
    if "split_sizes" in r.bound:
        return {"split_sizes": pieces}
    return Replacement(aten.split_with_sizes.default, (r.raw["self"], pieces, dim))


def _couple_cat(call: Call) -> Value:
    tensors = [t for t in call["tensors"] if t.shape != (0,)]
    rank = len(call.outputs[0])
    dim = call["dim"] % rank
    axes = {a: _tied(call, tensors, a) for a in range(rank) if a != dim}
    pieces = [call.labels.canon(call.passed(t, dim)) for t in tensors]
    zeros = [np.zeros(t.shape[dim], dtype=np.int64) for t in tensors]
    axes[dim] = tuple(
        np.concatenate([p[k] if k < len(p) else z for p, z in zip(pieces, zeros, strict=True)])
        for k in range(max(map(len, pieces)))
    )
    return call.out(axes)


def _tied(call: Call, tensors: Sequence[Value], axis: int) -> Layers:
    """Tie the labels of an axis shared by all tensors."""
    layers = call.passed(tensors[0], axis)
    for other in tensors[1:]:
        layers = call.tie(tensors[0], axis, other, axis)
    return layers


def _couple_stack(call: Call) -> Value:
    dim = call["dim"] % len(call.outputs[0])
    axes = range(len(call.outputs[0]) - 1)
    return call.out({a if a < dim else a + 1: _tied(call, call["tensors"], a) for a in axes})


def _pads(bound: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(before, after) for each axis; torch lists them from the last axis backwards."""
    rank = len(bound["self"].shape)
    flat = list(bound.get("pad", bound.get("padding")))
    flat += [0] * (2 * rank - len(flat))
    return list(zip(flat[::2], flat[1::2], strict=True))[::-1]


def _couple_pad(call: Call) -> Coupled:
    """Constant padding of a labelled axis adds indices that can be removed."""
    if call.bound.get("mode", "constant") != "constant":
        return _couple_own_padding(call)
    pads = _pads(call.bound)
    cropped = [a for a, sizes in enumerate(pads) if min(sizes) < 0]
    axes = call.axes(call.value("self"), cropped, "cropped by negative padding")
    for a, (before, after) in enumerate(pads):
        layers = call.labels.canon(axes.get(a, ()))
        if layers and (before or after):
            first = call.labels.created(f"{call.key}:{a}:before", before)
            last = call.labels.created(f"{call.key}:{a}:after", after)
            head = np.concatenate([first, layers[0], last])
            axes[a] = (head, *(np.pad(layer, (before, after)) for layer in layers[1:]))
    return call.out(axes)


def _couple_own_padding(call: Call) -> Coupled:
    """Reflection, replication and similar paddings repeat indices of the padded axes: those are never cut."""
    padded = [a for a, sizes in enumerate(_pads(call.bound)) if any(sizes)]
    return call.out(call.axes(call.value("self"), padded, "padded with its own values"))


def _rewrite_pad(r: Rewrite) -> Changes:
    flat = list(r.raw["pad"])
    for back, (before, after) in enumerate(reversed(_pads(r.bound))):
        keep = r.mask(r.outputs[0], -1 - back)
        if not keep.all() and 2 * back < len(flat):
            flat[2 * back : 2 * back + 2] = int(keep[:before].sum()), int(keep[len(keep) - after :].sum())
    return {"pad": flat}


def _pad_rule(name: str) -> Rule:
    pad = operator.attrgetter(name)(aten)
    example = between_convs(lambda x: pad(x, [1, 1, 0, 0, 2, 3]), after=13)
    summary = "constant padding of channels may go channel by channel"
    return Rule(f"aten.{name}", "movement", _couple_pad, example, _rewrite_pad, summary=summary)


def _couple_uniform(call: Call) -> Value:
    for value in call.tensors():  # new_zeros(x, ..) takes only dtype and device from x
        call.axes(value)
    return call.out({a: call.created(a, size) for a, size in enumerate(call.outputs[0])})


def _uniform(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    summary = "uniform: its literal sizes shrink with what it meets"
    example = between_convs(function)
    return Rule(f"aten.{name}", "creation", _couple_uniform, example, follow_sizes("size"), summary=summary)


def _enumeration(name: str, function: Callable[[Tensor], Tensor]) -> Rule:
    example, summary = between_convs(function), "counts indices: never cut"
    return Rule(f"aten.{name}", "creation", lambda call: Value.plain(call.outputs[0]), example, summary=summary)


register(
    _view("view.default", lambda x: aten.view(x, [x.shape[0], 2, 4, 10, 10]).flatten(1, 2)),
    _view("_unsafe_view.default", lambda x: aten._unsafe_view(x, [x.shape[0], 8, 10, 10])),
    _moves("reshape.default", lambda x: x.transpose(2, 3).reshape(-1, 8, 10, 10), follow_sizes("shape"), onnx=free),
    _moves("flatten.using_ints", lambda x: x.flatten(1), around=between_linears, after=72, onnx=free),
    _moves("unflatten.int", lambda x: aten.unflatten.int(x, 1, [4, 2]).flatten(1, 2), follow_sizes("sizes"), onnx=free),
    _reorders("permute.default", lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
    _reorders("transpose.int", lambda x: x.transpose(1, 2).transpose(1, 2)),
    _moves("swapaxes.default", lambda x: aten.swapaxes(aten.swapaxes(x, 1, 2), 1, 2)),
    _moves("movedim.int", lambda x: x.movedim(1, 3).movedim(3, 1)),
    _moves("t.default", _twice(aten.t), around=between_linears),
    _moves("numpy_T.default", _twice(aten.numpy_T), around=between_linears),
    _moves("unsqueeze.default", lambda x: x.unsqueeze(1).squeeze(1), onnx=free),
    _moves("squeeze.dim", lambda x: aten.squeeze.dim(x.unsqueeze(2), 2), _squeezed, onnx=free),
    _moves("squeeze.dims", lambda x: aten.squeeze.dims(x.unsqueeze(2), [2]), _squeezed, onnx=free),
    _moves("squeeze.default", lambda x: aten.squeeze.default(x.unsqueeze(2)), _squeezed, onnx=free),
    _moves("slice.Tensor", lambda x: x[:, 2:7], slice_bounds, after=5),
    _moves("flip.default", lambda x: x.flip(1)),
    _moves("roll.default", lambda x: x.roll(3, 1), _rolled),
    _moves("repeat.default", lambda x: x.repeat(1, 2, 1, 1), after=16),
    _moves("tile.default", lambda x: aten.tile(x, [1, 2, 1, 1]), after=16),
    _moves("repeat_interleave.self_int", lambda x: x.repeat_interleave(2, 1), after=16),
    _moves("pixel_shuffle.default", lambda x: F.pixel_shuffle(x, 2), couple=_couple_pixel_shuffle, after=2),
    _moves("pixel_unshuffle.default", lambda x: F.pixel_unshuffle(x, 2), after=32),
    _moves("channel_shuffle.default", lambda x: aten.channel_shuffle(x, 2), _shuffled),
    _moves("chunk.default", lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), _split_sizes),
    _moves("split.Tensor", lambda x: torch.cat(torch.split(x, 3, 1)[::-1], 1), _split_sizes),
    _moves("split_with_sizes.default", lambda x: torch.cat(torch.split(x, [3, 5], 1)[::-1], 1), _split_sizes),
    _moves("tensor_split.indices", lambda x: torch.cat(x.tensor_split([3, 5], 1)[::-1], 1), _split_sizes),
    _moves("tensor_split.sections", lambda x: torch.cat(x.tensor_split(3, 1)[::-1], 1), _split_sizes),
    _moves("reflection_pad2d.default", lambda x: aten.reflection_pad2d(x, [1, 1, 1, 1]), couple=_couple_own_padding),
    _moves("replication_pad2d.default", lambda x: aten.replication_pad2d(x, [1, 1, 1, 1]), couple=_couple_own_padding),
    _frozen_axis("unfold.default", lambda x: x.unfold(2, 3, 1).sum(-1), argument="dimension"),
    _frozen_axis("select.int", lambda x: x + x[:, :, :, 0].unsqueeze(3)),
    _frozen_axis("unbind.int", lambda x: torch.stack(x.unbind(2), 2)),
    Rule(
        "aten.cat.default",
        "movement",
        _couple_cat,
        fork_convs(lambda a, b: torch.cat([a, b], 1), after=16),
        onnx=lambda a, shapes, out: [
            step("Concat", *(n for n in shapes if n.startswith("tensors")), axis=a["dim"] % len(out))
        ],
        is_sum=True,
        moments=lambda a: joined(a["tensors"], a["dim"]),
        summary="labels laid end to end",
    ),
    Rule(
        "aten.stack.default",
        "movement",
        _couple_stack,
        fork_convs(lambda a, b: torch.stack([a, b], 1).flatten(1, 2), after=16),
        summary="ties its operands",
    ),
    Rule(
        "aten.expand.default",
        "movement",
        _couple_expand,
        fork_convs(lambda a, b: a * b.mean((1, 2, 3), keepdim=True).expand(-1, 8, 10, 10)),
        follow_sizes("size"),
        summary="indices of a grown axis may go one by one",
    ),
    _pad_rule("pad.default"),
    _pad_rule("constant_pad_nd.default"),
    _uniform("zeros.default", lambda x: x + torch.zeros(8, 1, 1, dtype=x.dtype)),
    _uniform("ones.default", lambda x: x + torch.ones(8, 1, 1, dtype=x.dtype)),
    _uniform("full.default", lambda x: x + torch.full((8, 1, 1), 0.5, dtype=x.dtype)),
    _uniform("new_zeros.default", lambda x: x + x.new_zeros((8, 1, 1))),
    _uniform("new_ones.default", lambda x: x + x.new_ones((8, 1, 1))),
    _uniform("new_full.default", lambda x: x + x.new_full((8, 1, 1), 0.5)),
    _enumeration("arange.default", lambda x: x + aten.arange(10, dtype=x.dtype)),
    _enumeration("arange.start_step", lambda x: x + aten.arange.start_step(0, 10, 1, dtype=x.dtype)),
)
