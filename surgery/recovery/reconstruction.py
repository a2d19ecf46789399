"""Reconstruction: refit each layer's weights to the outputs of the dense model's layer.

Layers are fitted in network order on the compact model's own activations, with all previous layers already fitted, so
that errors do not accumulate. If a layer's result is added to a stream, the target is the sum, so that the layer also
compensates for the stream's error. Before a ReLU (or ReLU6), negative targets may be any negative value (and those
above six any value above six). This needs no labels or gradients, and memory does not grow with the number of images.

Source: after Luo et al. 2017, ThiNet (arXiv:1707.06342); the compact model's own inputs and the rectifier after Zhang
et al. 2016 (arXiv:1505.06798).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

import torch
from torch import Tensor

from surgery.capture import evaluating
from surgery.core import (
    CompactModel,
    Executor,
    Frontier,
    LabelledGraph,
    Masks,
    Value,
    arguments_of,
    state_of,
)
from surgery.coupling import Cut
from surgery.errors import InvalidInput
from surgery.importance import (
    CONVOLUTIONS,
    LINEAR,
    Contraction,
    Folded,
    Moments,
    Solution,
    Window,
    convolution_rows,
    drawn,
    find_contractions,
    folds_for,
    solve,
    value_rows,
)

aten = torch.ops.aten

Batches = Sequence[Sequence[Tensor]]
MEMORY = 2**31
"""Maximum bytes of activations kept between layers; beyond that, runs restart further back."""
ROWS, FEWEST_ROWS, MOST_ROWS = 16, 20_000, 80_000
"""Sufficient number of rows per weight of an output, and the minimum in total; more are used if cheap."""
LITTLE, FEW_VALUES = 1e10, 1e8
"""Numbers of products, and of input values, per layer that count as cheap."""
MOST_VALUES = 2**29
"""Maximum values kept for one layer, of both networks together: 2 GiB in float32."""
_CLAMPS = {aten.hardtanh.default: ("min_val", "max_val"), aten.clamp.default: ("min", "max")}
_TINY = 1e-8
_SAME = 1e-9
"""A layer whose relative error is below this is left unchanged."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The result of fitting one layer.

    Attributes:
        name: name of the weight, or of the norm's scale.
        rows: number of rows it was fitted on.
        unknowns: number of weights of one output.
        ridge: the chosen ridge; infinite if only the shift was fitted.
        before: squared error over the variance of the target, as cut.
        after: squared error after the fit, likewise, on held-out images.
    """

    name: str
    rows: int
    unknowns: int
    ridge: float
    before: float
    after: float

    @property
    def scarce(self) -> bool:
        """Whether there are fewer rows than unknowns, so that the fit depends on the ridge."""
        return self.rows < self.unknowns


def reconstruct(
    cut: Cut,
    compact: CompactModel,
    batches: Batches,
    *,
    seed: int = 0,
    memory: int = MEMORY,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[Fitted]:
    """Fit the compact model's weights in place; the dense model is unchanged.

    Args:
        cut: the dense program and its plan.
        compact: the compact model; its graph and module share their tensors.
        batches: batches of the model's inputs, on the CPU.
        seed: seed of the sampled positions.
        memory: bytes of activations to keep between layers.
        progress: called with the completed fraction.

    Returns:
        The result of each fitted layer, in order.

    Raises:
        InvalidInput: values within either model are not finite.
    """
    with evaluating(compact.graph):  # its operators have their own flags
        return _each(cut, compact, batches, seed, memory, progress)


def _each(
    cut: Cut,
    compact: CompactModel,
    batches: Batches,
    seed: int,
    memory: int,
    progress: Callable[[float], None],
) -> list[Fitted]:
    labelled, whole = cut.coupling.labelled, cut.program.dense
    dense = Folded(whole.graph, cut.reordered(state_of(whole)))
    small = Folded(compact.graph, tensors_of(compact.graph))
    found, sizes = [], [len(batch[0]) for batch in batches]
    runs = [(dense.start(batch), small.start(batch)) for batch in batches]
    layers = [
        _fitting(c, labelled) for c in find_contractions(compact.graph, dense.place.keys()) if c.node in labelled.values
    ]
    ends = [dense.place[layer.aim] + 1 for layer in layers]
    for k, layer in enumerate(layers):
        progress(k / len(layers))
        fit = _Fit(layer, dense, small, labelled.values[layer.aim], cut.masks, sizes, seed + k)
        to = min(ends[k:]), small.place[layer.node]
        runs = _march(dense, small, runs, to, fit, memory)
        if (done := fit.finish()) is not None:
            found.append(done)
    progress(1.0)
    return found


def tensors_of(graph: torch.nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, detached but sharing memory with the module."""
    named = (graph.named_parameters(remove_duplicate=False), graph.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for pairs in named for name, tensor in pairs}


def _fitting(found: Contraction, labelled: LabelledGraph) -> Contraction:
    """Return the layer, with a sum as target only if the shapes agree."""
    shapes = [getattr(labelled.values.get(name), "shape", None) for name in (found.node, found.other, found.aim)]
    if found.other and not shapes[0] == shapes[1] == shapes[2]:
        return replace(found, aim=found.norm or found.node, other="")
    return found


def _march(
    dense: Executor,
    cut: Executor,
    runs: list[tuple[Frontier, Frontier]],
    to: tuple[int, int],
    fit: _Fit,
    memory: int,
) -> list[tuple[Frontier, Frontier]]:
    """Advance all runs to a layer and collect its rows; return where the next pass starts.

    The compact model's run stops before the layer, whose weights will change; the dense one's after the target.
    """
    reached: list[tuple[Frontier, Frontier]] = []
    with torch.no_grad():
        for k, (a, b) in enumerate(runs):
            a, b = dense.advance(a, to[0]), cut.advance(b, to[1])
            fit.look(k, a, b)
            if k == 0 and (a.bytes + b.bytes) * len(runs) > memory:
                memory = -1
            if memory >= 0:
                reached.append((a, b))
    return reached if memory >= 0 else runs


def _rails(node: torch.fx.Node) -> tuple[float, float]:
    """Return the bounds below and above which an operation's result is constant in its input."""
    if node.target == aten.relu.default:
        return 0.0, inf
    if node.target == aten.relu6.default:
        return 0.0, 6.0
    if node.target in _CLAMPS:
        names = _CLAMPS[node.target]
        given = arguments_of(node)
        low, high = (given.get(name) for name in names)
        if all(x is None or isinstance(x, (int, float)) for x in (low, high)):
            return -inf if low is None else float(low), inf if high is None else float(high)
    return -inf, inf


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Rows of one batch.

    Attributes:
        fold: the fold they belong to.
        given: inputs, (rows, groups, n).
        aim: the dense model's values, (rows, groups, outputs).
        other: the sum's other operand, of the same shape; 0 if none.
    """

    fold: int
    given: Tensor
    aim: Tensor
    other: Tensor | float


class _Fit:
    """Collects the rows of one layer, and fits it; a second time if a rectifier follows."""

    def __init__(
        self,
        layer: Contraction,
        dense: Executor,
        cut: Executor,
        aim: Value,
        masks: Masks,
        sizes: Sequence[int],
        seed: int,
    ) -> None:
        self.layer, self._dense, self._cut, self._sizes = layer, dense, cut, sizes
        self._node = cut.nodes[cut.place[layer.node]]
        self._raw = arguments_of(self._node)
        self._alive = [
            torch.from_numpy(mask).nonzero().flatten() if axis and not (mask := masks(aim, a)).all() else None
            for a, axis in enumerate(aim.axes)
        ]
        self._generator = torch.Generator().manual_seed(seed)
        self._weight = cut.state[layer.weight] if layer.weight else None
        if self._weight is None:
            self._groups, self._inputs, self._outputs = len(cut.state[layer.norm_names[0]]), 1, 1
        else:
            self._groups = int(self._raw["groups"]) if self._node.target in CONVOLUTIONS else 1
            self._inputs, self._outputs = self._weight[0].numel(), len(self._weight) // self._groups
        self._scale, _ = self._affine()
        self._prior = self._weights()
        count = folds_for(self._inputs)
        self._folds = [Moments.none(self._groups, self._inputs, self._outputs) for _ in range(count)]
        self._rails = self._between()
        self._rows: list[_Rows] | None = None if self._rails == (-inf, inf) else []

    def _between(self) -> tuple[float, float]:
        """Return the bounds outside which no consumer of the target depends on its value."""
        users = self._cut.nodes[self._cut.place[self.layer.aim]].users
        rails = [_rails(user) for user in users]
        return min((low for low, _ in rails), default=-inf), max((high for _, high in rails), default=inf)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and offset per channel of the norm after the contraction."""
        if not self.layer.norm:
            width = len(self._cut.state[self.layer.weight])
            return torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        gamma, beta, mean, var = (self._cut.state[name].double() for name in self.layer.norm_names)
        scale = gamma / (var + self._epsilon()).sqrt()
        return scale, beta - scale * mean

    def _epsilon(self) -> float:
        return float(arguments_of(self._cut.nodes[self._cut.place[self.layer.norm]])["eps"])

    def _weights(self) -> Tensor:
        """Return (groups, n + 1, outputs): the current weights including the norm's scale and shift."""
        scale, offset = self._affine()
        if self._weight is None:
            weight = torch.ones(self._groups, 1, 1, dtype=torch.float64)
        else:
            weight = self._per_group(self._weight)
        bias = self._cut.state[self.layer.bias].double() if self.layer.bias else torch.zeros_like(offset)
        shift = scale * bias + offset
        shape = (self._groups, 1, self._outputs)
        return torch.cat([weight * scale.reshape(shape), shift.reshape(shape)], 1)

    def _per_group(self, weight: Tensor) -> Tensor:
        """(groups, n, outputs), float64."""
        return weight.double().reshape(self._groups, self._outputs, self._inputs).transpose(1, 2)

    def look(self, k: int, dense: Frontier, cut: Frontier) -> None:
        """Add one batch; the compact model's run is before the layer, the dense one's after the target."""
        x = self._cut.value(self._raw["input"], cut.values)
        wanted, linear = self._dense.only(dense, self.layer.aim), self._node.target == LINEAR
        axis = wanted.dim() - 1 if linear else 1
        for a, alive in enumerate(self._alive):
            wanted = wanted if alive is None or a == axis else wanted.index_select(a, alive)
        read = self._groups * (self._inputs + 1)
        cheap = min(MOST_ROWS, int(min(LITTLE / (self._inputs + 1) ** 2, FEW_VALUES / read)))
        enough = max(FEWEST_ROWS, ROWS * (self._inputs + 1), cheap)
        held = read + 2 * self._groups * self._outputs
        most = ceil(max(1, min(enough, MOST_VALUES // held)) / sum(self._sizes))
        at = drawn(wanted.movedim(axis, -1).shape[1:-1], most, self._generator)

        aim = value_rows(wanted, axis, 1, at)
        if (alive := self._alive[axis]) is not None:
            aim = aim.index_select(2, alive)
        aim = aim.reshape(len(aim), self._groups, -1)
        other: Tensor | float = 0.0
        if self.layer.other:
            other = value_rows(self._cut.only(cut, self.layer.other), axis, self._groups, at)
        if self._weight is not None and self._node.target in CONVOLUTIONS:
            given = convolution_rows(x, Window.of(self._raw, self._weight), self._groups, at)
        else:
            given = value_rows(x, axis, self._groups, at)
        if len(given) > (limit := most * self._sizes[k]):  # positions are folded into the batch axis
            some = torch.randperm(len(given), generator=self._generator)[:limit].sort().values
            given, aim, other = given[some], aim[some], other[some] if isinstance(other, Tensor) else other
        fold = k % len(self._folds)
        self._folds[fold].add(given, aim - other)
        if self._rows is not None:
            self._rows.append(_Rows(fold, given, aim, other))

    def finish(self) -> Fitted | None:
        """Fit and write the weights; returns None if the error was already negligible."""
        shift, name = bool(self.layer.norm or self.layer.bias), self.layer.weight or self.layer.norm_names[0]
        whole = sum(self._folds[1:], self._folds[0])
        if not all(bool(sums.isfinite().all()) for sums in (whole.xx, whole.yy)):
            raise InvalidInput(
                f"what {name} reads or gives is not finite on these images, so that it cannot be fitted to them: "
                "choose another recovery (--recover bn), or another precision of the model"
            )
        solution = solve(self._folds, self._prior, shift=shift)
        if solution.before <= _SAME:
            return None
        self._write(whole, solution)
        if self._rows is not None:
            folds = self._rectified(self._rows)
            again = solve(folds, self._prior, shift=shift, ridge=solution.ridge)
            self._write(whole, again)
        return Fitted(name, whole.count, self._inputs, solution.ridge, solution.before, solution.after)

    def _rectified(self, rows: Sequence[_Rows]) -> list[Moments]:
        """Return moments of the same rows, with targets outside the bounds replaced by the layer's output."""
        folds, (low, high) = [fold.wanting_nothing() for fold in self._folds], self._rails
        weight = self._weights().to(torch.promote_types(rows[0].given.dtype, torch.float32))
        for each in rows:
            own = each.given.to(weight.dtype).transpose(0, 1) @ weight[:, :-1] + weight[:, -1:]
            now, aim = own.transpose(0, 1) + each.other, each.aim
            aim = torch.where(aim <= low, now.clamp_max(low), torch.where(aim >= high, now.clamp_min(high), aim))
            folds[each.fold].want(each.given, aim - each.other)
        return folds

    def _write(self, whole: Moments, solution: Solution) -> None:
        layer, state = self.layer, self._cut.state
        weight, shift = solution.weight[:, :-1], solution.weight[:, -1].flatten()
        if self._weight is None:
            kernel, scale = torch.ones_like(weight), weight.flatten()
        else:
            known = self._scale.abs() > _TINY  # the norm ignores the other channels, whose kernels are unchanged
            shape = (self._groups, 1, self._outputs)
            divisor = torch.where(known, self._scale, 1.0).reshape(shape)
            kernel = torch.where(known.reshape(shape), weight / divisor, self._per_group(self._weight))
            scale = torch.where(known, self._scale, 0.0)
            self._weight.copy_(kernel.transpose(1, 2).reshape(self._weight.shape))
        if not layer.norm:
            if layer.bias:
                state[layer.bias].copy_(shift)
            return
        mean, var = (values.flatten() for values in whole.moments_of(kernel))
        mean = mean + state[layer.bias].double() if layer.bias else mean
        gamma, beta, running_mean, running_var = (state[name] for name in layer.norm_names)
        running_mean.copy_(mean)
        running_var.copy_(var)
        gamma.copy_(scale * (var + self._epsilon()).sqrt())
        beta.copy_(shift + scale * mean)
