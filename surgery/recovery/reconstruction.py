"""Reconstruction: refit each layer's weights to the outputs of the dense model's layer.

Layers are fitted in network order on the compact model's own activations, with all previous layers already fitted, so
that errors do not accumulate; docs/explanation/reconstruction.md derives it.

Source: after Luo et al. 2017, ThiNet (arXiv:1707.06342); the compact model's own inputs and the rectifier after Zhang
et al. 2016 (arXiv:1505.06798).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from surgery.capture import evaluating
from surgery.core import CompactModel, Executor, Frontier, LabelledGraph, Masks, Value, arguments_of, state_of
from surgery.coupling import Cut
from surgery.errors import InvalidInput
from surgery.importance import (
    Contraction,
    Layer,
    Moments,
    Solution,
    drawn,
    find_contractions,
    folds_for,
    solve,
    value_rows,
)

aten = torch.ops.aten

Batches = Sequence[Sequence[Tensor]]
MEMORY = 2**31  # maximum bytes of activations kept between layers; beyond that, runs restart further back
ROWS, FEWEST_ROWS, MOST_ROWS = 16, 20_000, 80_000
"""Sufficient number of rows per weight of an output, and the minimum in total; more are used if cheap."""
LITTLE, FEW_VALUES = 1e10, 1e8  # numbers of products, and of input values, per layer that count as cheap
MOST_VALUES = 2**29  # maximum values kept for one layer, of both networks together: 2 GiB in float32
_CLAMPS: dict[Any, tuple[Any, Any]] = {
    aten.relu.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
}
"""Operator → bounds, or the arguments that hold them."""
_TINY = 1e-8
_SAME = 1e-9  # a layer whose relative error is below this is left unchanged


@dataclass(frozen=True, slots=True)
class Fitted:
    """The result of fitting one layer."""

    name: str  # of the weight, or of the norm's scale
    rows: int
    unknowns: int  # weights of one output
    ridge: float  # infinite if only the shift was fitted
    before: float  # squared error over the variance of the target, as cut
    after: float  # likewise after the fit, on held-out images


def reconstruct(
    cut: Cut,
    compact: CompactModel,
    batches: Batches,
    *,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[Fitted]:
    """Fit the compact model's weights in place on batches of its inputs; return each fitted layer, in order.

    At most `memory` bytes of activations are kept between layers. Raises InvalidInput if values are not finite.
    """
    labelled, whole, graph = cut.coupling.labelled, cut.program.dense, compact.graph
    tensors = (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
    dense = Executor(whole.graph, cut.reordered(state_of(whole)))
    small = Executor(graph, {name: tensor.detach() for name, tensor in tensors})
    found, sizes = [], [len(batch[0]) for batch in batches]
    with torch.no_grad(), evaluating(graph):  # its operators have their own flags
        runs = [(dense.start(batch), small.start(batch)) for batch in batches]
        layers = [
            _fitting(c, labelled) for c in find_contractions(graph, dense.place.keys()) if c.node in labelled.values
        ]
        ends = [dense.place[layer.aim] + 1 for layer in layers]
        for k, layer in enumerate(layers):
            progress(k / len(layers))
            fit = _Fit(layer, dense, small, labelled.values[layer.aim], cut.masks, sizes, seed + k)
            to = min(ends[k:]), small.place[layer.node]
            # The compact model's run stops before the layer, whose weights change; the dense one's after the target.
            reached: list[tuple[Frontier, Frontier]] | None = []
            for b, run in enumerate(runs):
                a, z = dense.advance(run[0], to[0]), small.advance(run[1], to[1])
                fit.add(b, a, z)
                if b == 0 and (a.bytes + z.bytes) * len(runs) > memory:
                    reached = None
                if reached is not None:
                    reached.append((a, z))
            runs = runs if reached is None else reached
            if (done := fit.finish()) is not None:
                found.append(done)
    progress(1.0)
    return found


def _fitting(found: Contraction, labelled: LabelledGraph) -> Contraction:
    """Return the layer, with a sum as target only if the shapes agree."""
    shapes = [getattr(labelled.values.get(name), "shape", None) for name in (found.node, found.other, found.aim)]
    if found.other and not shapes[0] == shapes[1] == shapes[2]:
        return replace(found, aim=found.norm or found.node, other="")
    return found


def _rails(node: torch.fx.Node) -> tuple[float, float]:
    """Return the bounds below and above which an operation's result is constant in its input."""
    names = _CLAMPS.get(node.target)
    ends = [arguments_of(node).get(name) if isinstance(name, str) else name for name in names or ()]
    if not names or not all(end is None or isinstance(end, (int, float)) for end in ends):
        return -inf, inf
    low, high = ends
    return -inf if low is None else float(low), inf if high is None else float(high)


class _Fit(Layer):
    """Collects the rows of one layer, and fits it; a second time if a rectifier follows."""

    def __init__(
        self,
        found: Contraction,
        dense: Executor,
        cut: Executor,
        aim: Value,
        masks: Masks,
        sizes: Sequence[int],
        seed: int,
    ) -> None:
        super().__init__(found, cut)
        self._dense, self._cut, self._sizes = dense, cut, sizes
        self._alive = {
            a: torch.from_numpy(mask).nonzero().flatten()
            for a, axis in enumerate(aim.axes)
            if axis and not (mask := masks(aim, a)).all()
        }
        self._generator = torch.Generator().manual_seed(seed)
        read = self.groups * (self.inputs + 1)
        cheap = min(MOST_ROWS, int(min(LITTLE / (self.inputs + 1) ** 2, FEW_VALUES / read)))
        enough = max(FEWEST_ROWS, ROWS * (self.inputs + 1), cheap)
        held = read + 2 * self.groups * self.outputs
        self._most = ceil(max(1, min(enough, MOST_VALUES // held)) / sum(sizes))
        self._scale, _ = self.affine()
        self._prior = self._weights()
        self._folds = [Moments.none(self.groups, self.inputs, self.outputs) for _ in range(folds_for(self.inputs))]
        # Bounds outside which no consumer of the target depends on its value.
        rails = [_rails(user) for user in cut.nodes[cut.place[found.aim]].users]
        self._rails = min((low for low, _ in rails), default=-inf), max((high for _, high in rails), default=inf)
        self._rows: list[tuple[int, Tensor, Tensor, Tensor | float]] = []
        """Fold, inputs (rows, groups, n), targets (rows, groups, outputs), and the sum's other operand."""

    def _weights(self) -> Tensor:
        """Return (groups, n + 1, outputs): the current weights including the norm's scale and shift."""
        scale, offset = self.affine()
        bias = self.state[self.found.bias].double() if self.found.bias else torch.zeros_like(offset)
        shape = (self.groups, 1, self.outputs)
        return torch.cat([self.kernels() * scale.reshape(shape), (scale * bias + offset).reshape(shape)], 1)

    def add(self, k: int, dense: Frontier, cut: Frontier) -> None:
        """Add rows of one batch; the compact model's run is before the layer, the dense one's after the target."""
        x, target = self._cut.value(self.input, cut.values), self._dense.only(dense, self.found.aim)
        for a, alive in self._alive.items():
            target = target.index_select(a, alive)
        axis = self.channel_axis(target)
        at = drawn(target.movedim(axis, -1).shape[1:-1], self._most, self._generator)
        given, aim, other = self.rows(x, at), value_rows(target, axis, self.groups, at), None
        if self.found.other:
            other = value_rows(self._cut.only(cut, self.found.other), axis, self.groups, at)
        if len(given) > (limit := self._most * self._sizes[k]):  # positions are folded into the batch axis
            some = torch.randperm(len(given), generator=self._generator)[:limit].sort().values
            given, aim, other = given[some], aim[some], None if other is None else other[some]
        fold, shift = k % len(self._folds), 0.0 if other is None else other
        self._folds[fold].add(given, aim - shift)
        if self._rails != (-inf, inf):
            self._rows.append((fold, given, aim, shift))

    def finish(self) -> Fitted | None:
        """Fit and write the weights; returns None if the error was already negligible."""
        layer, whole = self.found, sum(self._folds[1:], self._folds[0])
        shift, name = bool(layer.norm or layer.bias), layer.weight or layer.norm_names[0]
        if not all(bool(sums.isfinite().all()) for sums in (whole.xx, whole.yy)):
            raise InvalidInput(
                f"what {name} reads or gives is not finite on these images, so that it cannot be fitted to them: "
                "choose another recovery (--recover bn), or another precision of the model"
            )
        solution = solve(self._folds, self._prior, shift=shift)
        if solution.before <= _SAME:
            return None
        self._write(whole, solution)
        if self._rows:
            self._write(whole, solve(self._rectified(), self._prior, shift=shift, ridge=solution.ridge))
        return Fitted(name, whole.count, self.inputs, solution.ridge, solution.before, solution.after)

    def _rectified(self) -> list[Moments]:
        """Return moments of the same rows, with targets outside the bounds replaced by the layer's output."""
        folds, (low, high) = [fold.wanting_nothing() for fold in self._folds], self._rails
        weight = self._weights().to(torch.promote_types(self._rows[0][1].dtype, torch.float32))
        for fold, given, aim, other in self._rows:
            own = given.to(weight.dtype).transpose(0, 1) @ weight[:, :-1] + weight[:, -1:]
            now = own.transpose(0, 1) + other
            aim = torch.where(aim <= low, now.clamp_max(low), torch.where(aim >= high, now.clamp_min(high), aim))
            folds[fold].want(given, aim - other)
        return folds

    def _write(self, whole: Moments, solution: Solution) -> None:
        found, state = self.found, self.state
        weight, shift = solution.weight[:, :-1], solution.weight[:, -1].flatten()
        if self.own is None:
            kernel, scale = self.kernels(), weight.flatten()
        else:
            known = self._scale.abs() > _TINY  # the norm ignores the other channels, whose kernels are unchanged
            shape = (self.groups, 1, self.outputs)
            divisor = torch.where(known, self._scale, 1.0).reshape(shape)
            kernel = torch.where(known.reshape(shape), weight / divisor, self.kernels())
            scale = torch.where(known, self._scale, 0.0)
            self.own.copy_(kernel.transpose(1, 2).reshape(self.own.shape))
        if not found.norm:
            if found.bias:
                state[found.bias].copy_(shift)
            return
        mean, var = (values.flatten() for values in whole.moments_of(kernel))
        mean = mean + state[found.bias].double() if found.bias else mean
        gamma, beta, running_mean, running_var = (state[name] for name in found.norm_names)
        running_mean.copy_(mean)
        running_var.copy_(var)
        gamma.copy_(scale * (var + self.epsilon).sqrt())
        beta.copy_(shift + scale * mean)
