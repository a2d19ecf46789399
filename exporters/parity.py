"""Compare an ONNX file with its torch model, on random inputs at several batch sizes.

The difference is relative to the part of the output that varies with the input, since a constant offset could otherwise
hide an error. If hardly anything varies, the comparison is reported as inconclusive.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exporters.session import open_session, session_options
from exporters.signature import BATCH, HEIGHT, WIDTH, Tensors, name_outputs
from surgery.core import BLIND, ROUNDINGS, TOLERANCE as TOLERANCES, Callee, explained
from surgery.errors import CheckFailed, InvalidInput

TOLERANCE = TOLERANCES[torch.float32]
ROUNDING = 1e-5  # differences up to this share of the whole output are float32 rounding, summed over a network
CLEAR = 0.75  # share of the draws on which torch's own rounding must be small: the others prove little

BATCHES = (1, 2, 7)
DRAWS = 3
_Outputs = Mapping[str, np.ndarray]
_NEAR = 0.05
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class OutputParity:
    """Comparison of one output: maximum over all runs. For integers, shares of differing elements."""

    error: float  # largest difference over the largest value of the part that varies with the input
    varying: float  # that largest value over the largest value of the output
    difference: float  # largest difference over the largest value of the output
    errors: tuple[float, ...] = ()  # like `error`, of every single draw
    rounding: float | None = None  # the torch model's own error in float32 if that explains `error`

    @property
    def blind(self) -> bool:
        """Whether too little varies with the input for `error` to be meaningful."""
        return self.varying < BLIND

    def is_rounding(self, own: OutputParity) -> bool:
        """Return whether each draw differs by at most `ROUNDINGS` times as much as torch from its float64, `own`."""
        if len(self.errors) != len(own.errors):
            return False
        pairs = list(zip(self.errors, own.errors, strict=True))
        clear = sum(mine < BLIND for _, mine in pairs)
        return clear >= CLEAR * len(pairs) and all(x <= max(TOLERANCE, ROUNDINGS * mine) < np.inf for x, mine in pairs)

    @property
    def unclear(self) -> bool:
        """Whether the comparison is inconclusive: blind, or too close to rounding."""
        return self.blind or (self.rounding is None and self.error > TOLERANCE and self.difference <= ROUNDING)

    @property
    def wrong(self) -> bool:
        """Whether the file computes something else."""
        differs = self.difference > TOLERANCE or (self.error > TOLERANCE and not self.unclear)
        return differs and self.rounding is None


@dataclass(frozen=True, slots=True)
class Parity:
    """Comparison of an ONNX file with a torch model."""

    outputs: Mapping[str, OutputParity]  # by name
    batches: tuple[int, ...]  # batch sizes that the torch model runs at

    @property
    def error(self) -> float | None:
        """Largest relative error over the outputs where the comparison can see; None where it is blind in all."""
        return max((o.error for o in self.outputs.values() if not o.blind), default=None)


def parity(path: str | os.PathLike[str], call: Callee, tensors: Tensors, *, near_example: bool = False) -> Parity:
    """Compare an ONNX file in ONNX Runtime with the torch model, in eval mode on the CPU, on random inputs.

    Batches of 1, 2 and 7 are run where the file's first axis is called `batch`, other sizes where axes are called
    `height` and `width`. Floating-point inputs are drawn with the example's mean and deviation, all others from
    the example's own values, three times per batch. Where the two differ by more than `TOLERANCE`, the torch model
    is compared with itself in float64. `near_example` stays within 5 % of the example. Raises CheckFailed if ONNX
    Runtime cannot run the file, or outputs have other names or shapes; InvalidInput if the model does not run.
    """
    session = open_session(path, session_options(torch.get_num_threads()), kind=CheckFailed)
    generator = torch.Generator().manual_seed(0)
    inputs: list[list[dict[str, Tensor]]] = []
    expected: list[list[_Outputs]] = []
    batches: dict[int, None] = {}
    for batch, shapes in _sizes(session, tensors):
        draws = [
            {name: _draw(tensor, shapes[name], generator, near_example) for name, tensor in tensors.items()}
            for _ in range(DRAWS)
        ]
        try:
            expected.append([_run_torch(call, draw) for draw in draws])
        except Exception as error:
            if inputs:  # the network itself takes no other size: nothing to compare
                continue
            whose = type(call.module).__name__
            raise InvalidInput(f"{whose} does not run on inputs like the example: {error}") from error
        inputs.append(draws)
        batches[batch] = None
    found = _compared(expected, [[_run_onnx(session, draw, path) for draw in draws] for draws in inputs], path)
    if any(output.error > TOLERANCE and not output.blind for output in found.values()):
        own = _in_float64(call, inputs, expected)
        for name in found.keys() & own.keys():
            if found[name].error > TOLERANCE and not found[name].blind and found[name].is_rounding(own[name]):
                found[name] = replace(found[name], rounding=own[name].error)
    return Parity(found, tuple(batches))


def _in_float64(
    call: Callee, inputs: Sequence[Sequence[Tensors]], expected: Sequence[Sequence[_Outputs]]
) -> Mapping[str, OutputParity]:
    """Compare the torch model's outputs with its own in float64; empty if it does not run in float64."""
    double = call.on(copy.deepcopy(call.module).double())

    def exact(draw: Tensors) -> _Outputs:
        return _run_torch(double, {n: t.double() if t.is_floating_point() else t for n, t in draw.items()})

    try:
        found = [[exact(draw) for draw in draws] for draws in inputs]
        return _compared(expected, found, "the torch model")
    except Exception:  # a model may insist on its own precision, in any way
        return {}


def _compared(
    expected: Sequence[Sequence[_Outputs]], got: Sequence[Sequence[_Outputs]], whose: Any
) -> dict[str, OutputParity]:
    cases = [_compare_draws(a, b, whose) for a, b in zip(expected, got, strict=True)]
    return {name: _pool([case[name] for case in cases]) for name in cases[0]}


def _sizes(session: Any, tensors: Tensors) -> Iterator[tuple[int, dict[str, tuple[int, ...]]]]:
    """Yield batches and input shapes to run, the example's first, following the names of the file's dynamic axes."""
    named = {i.name: tuple(i.shape) for i in session.get_inputs()}
    dynamic = {dim for shape in named.values() for dim in shape if isinstance(dim, str)}
    rows = next((t.shape[0] for t in tensors.values() if t.ndim), 1)
    sizes = [(rows, 0, 0)] + [(batch, 0, 0) for batch in BATCHES if BATCH in dynamic and batch != rows]
    if dynamic & {HEIGHT, WIDTH}:
        sizes.append((rows, 32, 64))
    for batch, taller, wider in sizes:
        more, shapes = {HEIGHT: taller, WIDTH: wider}, {}
        for name, t in tensors.items():
            dims = zip(named.get(name, t.shape), t.shape, strict=True)
            shapes[name] = tuple(batch if dim == BATCH else n + more.get(dim, 0) for dim, n in dims)
        yield batch, shapes


def _draw(example: Tensor, shape: Sequence[int], generator: torch.Generator, near: bool) -> Tensor:
    if not example.is_floating_point():
        if near or not example.numel():
            return _tiled(example, shape)
        return example.flatten()[torch.randint(example.numel(), tuple(shape), generator=generator)]
    spread, mean = torch.std_mean(example.double(), correction=0)
    usual = bool(torch.isfinite(spread)) and float(spread) > 0
    scale, centre = (float(spread), float(mean)) if usual else (1.0, 0.0)
    noise = torch.randn(tuple(shape), generator=generator) * scale
    drawn = _tiled(example, shape) + _NEAR * noise if near else centre + noise
    return drawn.to(example.dtype)


def _tiled(example: Tensor, shape: Sequence[int]) -> Tensor:
    for axis, length in enumerate(shape):
        example = example.index_select(axis, torch.arange(length) % example.shape[axis])
    return example


def _run_torch(call: Callee, tensors: Tensors) -> dict[str, np.ndarray]:
    args, kwargs = call.arguments(list(tensors.values()))
    with torch.no_grad():
        output = call.module(*args, **kwargs)
    return {name: tensor.numpy(force=True) for name, tensor in name_outputs(output, tuple(tensors)).items()}


def _run_onnx(session: Any, tensors: Tensors, path: Any) -> dict[str, np.ndarray]:
    given = {i.name: tensors[i.name].numpy(force=True) for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    shapes = {name: x.shape for name, x in given.items()}
    with explained(f"ONNX Runtime cannot run {path} on inputs of shape {shapes}", CheckFailed):
        return dict(zip(names, session.run(names, given), strict=True))


def _compare_draws(expected: Sequence[_Outputs], got: Sequence[_Outputs], path: Any) -> dict[str, _Magnitudes]:
    if set(expected[0]) != set(got[0]):
        raise CheckFailed(f"{path} has the outputs {sorted(got[0])}, the model returns {sorted(expected[0])}")
    compared = {}
    for name in expected[0]:
        shapes = [(y[name].shape, z[name].shape) for y, z in zip(expected, got, strict=True)]
        if any(a != b for a, b in shapes):
            raise CheckFailed(f"{path}: output '{name}' has shape {shapes[0][1]}, the model returns {shapes[0][0]}")
        if len({a for a, _ in shapes}) > 1:
            raise CheckFailed(
                f"{path}: the shape of output '{name}' depends on the values of the input, so it cannot be compared"
            )
        compared[name] = _magnitudes(np.stack([y[name] for y in expected]), np.stack([z[name] for z in got]))
    return compared


class _Magnitudes(NamedTuple):
    """Largest difference of each draw, largest value of the part that varies with the input, largest value."""

    differences: tuple[float, ...]
    varying: float
    scale: float


def _magnitudes(expected: np.ndarray, got: np.ndarray) -> _Magnitudes:
    rows = tuple(range(1, expected.ndim))
    if not expected.size:
        return _Magnitudes((0.0,), 0.0, 0.0)
    if not np.issubdtype(expected.dtype, np.floating):
        varying = np.any(expected != expected[:1], axis=0)
        return _Magnitudes(tuple(np.mean(expected != got, axis=rows).tolist()), float(np.mean(varying)), 1.0)
    expected, got = expected.astype(np.float64), got.astype(np.float64)
    odd = ~np.isfinite(expected)  # masks of -inf are legitimate, as long as both have them in the same places
    if not np.array_equal(odd, ~np.isfinite(got)) or not np.array_equal(expected[odd], got[odd], equal_nan=True):
        return _Magnitudes((np.inf,), 0.0, 0.0)
    expected, got = np.where(odd, 0.0, expected), np.where(odd, 0.0, got)
    return _Magnitudes(
        differences=tuple(np.abs(got - expected).max(axis=rows).tolist()),
        varying=float(np.abs(expected - expected.mean(axis=0)).max()),
        scale=float(np.abs(expected).max()),
    )


def _pool(runs: Sequence[_Magnitudes]) -> OutputParity:
    differences = [difference for run in runs for difference in run.differences]
    varying, scale = max(run.varying for run in runs), max(run.scale for run in runs)
    return OutputParity(
        error=max(differences) / max(varying, _TINY),
        varying=varying / max(scale, _TINY),
        difference=max(differences) / max(scale, _TINY),
        errors=tuple(difference / max(varying, _TINY) for difference in differences),
    )
