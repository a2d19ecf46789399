"""Differences between runs of a network, and how much of them is due to rounding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from surgery.core import BLIND, ROUNDINGS, TOLERANCE, Executor, Program, flat_outputs, is_symbolic, sample_inputs
from surgery.errors import CheckFailed, InvalidInput


def apart(program: Program, state: Mapping[str, Tensor], other: Mapping[str, Tensor], seed: int) -> float:
    """Return the relative error of the dense program with other weights, in float64: see `relative_error`."""
    return relative_error(outputs_of(program, state, seed), outputs_of(program, other, seed))[0]


def outputs_of(program: Program, state: Mapping[str, Tensor], seed: int) -> list[list[Tensor]]:
    """Return the dense program's outputs with these weights, in float64, on random inputs, by run."""
    rounds = [sample_inputs(program, seed=seed + 100 + k, dtype=torch.float64) for k in range(rounds_of(program))]
    with torch.no_grad():
        return [flat_outputs(Executor(program.graph, state, dtype=torch.float64).run(*inputs)) for inputs in rounds]


def within_rounding(
    reference: Executor,
    rounds: list[list[Tensor]],
    state: Mapping[str, Tensor],
    error: float,
    dtype: torch.dtype,
    what: str,
) -> str:
    """Return a note if rounding in the masked dense model explains a difference; otherwise raise.

    A deep network may amplify rounding errors beyond the tolerance. This is measured by moving every weight by one unit
    in the last place and comparing the outputs.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        return x * (1 + torch.finfo(x.dtype).eps * sign.to(x.dtype))

    with torch.no_grad():
        runs = [
            [flat_outputs(reference.on(weights).run(*inputs)) for inputs in rounds]
            for weights in (state, {name: moved(tensor) for name, tensor in state.items()})
        ]
    rounding, _ = relative_error(*runs)
    if not (error <= ROUNDINGS * rounding and rounding < BLIND):
        require(error, dtype, what)
    return (
        f"rounding is amplified on {what}: moving each weight by its last bit moves the dense output by "
        f"{rounding:.1e}, the difference is {error:.1e}"
    )


REPORT = "nothing was written; please report this model"


def require(error: float, dtype: torch.dtype, what: str, advice: str = REPORT) -> None:
    """Raise CheckFailed if an error exceeds the tolerance of this precision."""
    tolerance = TOLERANCE[dtype]
    if not error <= tolerance:
        raise CheckFailed(
            f"the compact model differs from the masked dense model by {error:.1e} on {what} "
            f"(allowed: {tolerance:.0e}); {advice}"
        )


def rounds_of(program: Program) -> int:
    """Return the number of runs of a comparison.

    One run of two samples suffices if the batch is the first axis of every output; otherwise two runs are compared.
    """
    output = next(n for n in program.graph.graph.nodes if n.op == "output")
    values = [n.meta.get("val") for n in output.all_input_nodes]
    per_sample = all(isinstance(v, Tensor) and v.dim() > 0 and is_symbolic(v.shape[0]) for v in values)
    return 1 if values and per_sample else 2


def relative_error(wanted: list[list[Tensor]], got: list[list[Tensor]]) -> tuple[float, float]:
    """Compare outputs over several samples.

    Args:
        wanted: output tensors of each run; inputs differ between runs, or between samples along the first axis.
        got: the outputs to compare, likewise.

    Returns:
        The largest difference divided by the largest deviation from the mean over samples (maximum over outputs), and
        the share of an output's magnitude that varies (minimum over outputs).
    """
    worst, share = 0.0, 1.0
    for outputs, others in zip(zip(*wanted, strict=True), zip(*got, strict=True), strict=True):
        reference, other = (torch.cat([t.double().reshape(t.shape or (1,)) for t in x]) for x in (outputs, others))
        if reference.shape != other.shape:
            return float("inf"), share
        deviation = (reference - reference.mean(0, keepdim=True)).abs().max()
        difference = (reference - other).abs().max()
        scale = reference.abs().max()
        if not bool(torch.isfinite(reference).all()):
            raise InvalidInput("the dense model's own output is not finite; load weights that do not overflow")
        if not bool(torch.isfinite(difference)):
            return float("inf"), share
        share = min(share, float(deviation / scale.clamp_min(1e-300)))
        worst = max(worst, float(difference / deviation.clamp_min(1e-300)) if difference > 0 else 0.0)
    return worst, share
