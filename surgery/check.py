"""The oracle: is the compact model what the dense one computes when the removed units count as removed?

Two independent answers. *Label replay* runs the rewritten program on the survivors' labels, with the same operator
rules and locked labels: integers, no data, no tolerance. The *numeric* comparison runs the dense program with dead
input slices of contractions zeroed, and the compact model, on distinct well-conditioned values in float64, then on the
real weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from surgery.couple import Masks, Wiring, couple, run, shapes_of
from surgery.cut import as_call, compact_state, masks_of
from surgery.errors import CheckFailed
from surgery.ir import CheckResult, CompactModel, Coupling, Plan, Program
from surgery.labels import LabelMismatch, Value, gather, is_constant
from surgery.numerics import Run, flat_outputs, masked_run, sample_inputs, state_of, well_conditioned
from surgery.tolerances import BLIND, TOLERANCE
from surgery.trace import evaluating, first_line


def check(
    program: Program, plan: Plan, compact: CompactModel, *, coupling: Coupling | None = None, seed: int = 0
) -> CheckResult:
    """Verify a compact model against the dense program.

    Args:
        program: the dense model, traced.
        plan: what was removed.
        compact: what `cut` returned; its weights must still be slices of the dense ones.
        coupling: what `couple` returned, where it is at hand.
        seed: of the values and inputs.

    Returns:
        Errors relative to the part of the output that varies with the input.

    Raises:
        CheckFailed: labels do not match, numbers differ by more than 1e-10 in float64 or 1e-4 in float32, or the
            output varies too little with the input to tell.
    """
    coupling = coupling or couple(program, keep=tuple(plan.settings.get("keep", ())))
    masks = masks_of(program, plan, coupling)
    wiring: Wiring = coupling.facts
    replayed = replay(program, compact, wiring, masks, plan)
    dense = well_conditioned(program, seed=seed)
    error64, varying = _compare(program, wiring, masks, dense, compact_state(dense, plan), compact, seed)
    if varying < BLIND:
        raise CheckFailed(
            f"cannot tell: on well-conditioned values only {varying:.1e} of the output varies with the input; "
            "use an example input that reaches the output"
        )
    _require(error64, torch.float64, "distinct, well-conditioned values")
    real = {k: v.detach() for k, v in state_of(program).items()}
    error, varying = _compare(program, wiring, masks, real, None, compact, seed)
    notes: tuple[str, ...] = ()
    told: float | None = error
    if varying < BLIND:
        told = None
        notes = (
            f"cannot tell on the real weights: only {varying:.1e} of their output varies with the input "
            "(a zero head, or untrained layer scales); equality was shown on well-conditioned values",
        )
    else:
        _require(error, _precision(real), "the real weights")
    return CheckResult(replayed, error64, told, varying, _meaning(coupling, plan), notes)


def _require(error: float, dtype: torch.dtype, what: str) -> None:
    tolerance = TOLERANCE[dtype]
    if not error <= tolerance:
        raise CheckFailed(
            f"the compact model differs from the masked dense model by {error:.1e} on {what} "
            f"(allowed: {tolerance:.0e}); nothing was written; please report this model"
        )


def _precision(state: Mapping[str, Tensor]) -> torch.dtype:
    found = [t.dtype for t in state.values() if t.dtype in TOLERANCE]
    return max(found, key=lambda d: TOLERANCE[d]) if found else torch.float32


def _meaning(coupling: Coupling, plan: Plan) -> str:
    inexact = [g.name for g in coupling.groups if g.inexact and plan.dead.get(g.name)]
    zeroed = "dense model with the dead input slices of every contraction zeroed"
    return f"{zeroed}, norms and means over the survivors" if inexact else zeroed


# -- label replay ----------------------------------------------------------------------------------------------------


def replay(program: Program, compact: CompactModel, wiring: Wiring, masks: Masks, plan: Plan) -> int:
    """Run the rewritten program on the survivors' labels; return how many values were compared.

    Raises:
        CheckFailed: an operator joins units that the dense program keeps apart, or a value has other survivors.
    """
    dead = wiring.dead_roots(plan.dead)
    atoms = wiring.atoms.locked(dead)

    def labels(name: str, tensor: Tensor) -> Value:
        value = wiring.params.get(name)
        if value is None:
            return Value(tuple(tensor.shape), ((),) * tensor.dim(), name)
        expected = _survivors(value, wiring, masks)
        if expected.shape != tuple(tensor.shape):
            raise LabelMismatch(f"'{name}' has shape {tuple(tensor.shape)}, its survivors {expected.shape}")
        return expected

    try:
        shapes = fake_shapes(compact.graph, sample_inputs(program, seed=0))
        values, _ = run(compact.graph, labels, lambda node: shapes[node.name], atoms)
        return _same_labels(values, wiring, masks)
    except LabelMismatch as error:
        raise CheckFailed(f"label replay: {error}; nothing was written; please report this model") from error


def _survivors(value: Value, wiring: Wiring, masks: Masks) -> Value:
    axes = []
    for a, layers in enumerate(value.axes):
        index = np.flatnonzero(masks(value, a)) if layers else None
        axes.append(gather(wiring.atoms.canon(layers), index) if index is not None else ())
    return Value(masks.shape(value), tuple(axes), value.param)


def _same_labels(values: Mapping[str, Any], wiring: Wiring, masks: Masks) -> int:
    """Compare each value of the cut program with the survivors of the dense value of the same name."""
    compared = 0
    for name, dense in wiring.values.items():
        pairs = zip(_tensors(dense), _tensors(values.get(name)), strict=False)
        for before, after in pairs:
            expected = _survivors(before, wiring, masks)
            if expected.shape != after.shape:
                raise LabelMismatch(f"value '{name}' has shape {after.shape}, its survivors {expected.shape}")
            for a in range(len(after.shape)):
                if not _equal(expected.axes[a], wiring.atoms.canon(after.axes[a])):
                    raise LabelMismatch(
                        f"axis {a} of value '{name}' holds other units than the dense program's survivors"
                    )
            compared += 1
    return compared


def _tensors(value: Any) -> list[Value]:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in items if isinstance(v, Value)]


def _equal(a: Any, b: Any) -> bool:
    left = sorted(x.tolist() for x in a if not is_constant(x))
    right = sorted(x.tolist() for x in b if not is_constant(x))
    return bool(left == right)


def fake_shapes(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> dict[str, Any]:
    """Shapes of all values of a graph, found without computing any.

    Raises:
        LabelMismatch: an operator does not accept the sizes it meets.
    """
    shapes: dict[str, Any] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def record(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # torch raises several kinds for sizes that do not fit
            raise LabelMismatch(f"node '{node.name}' ({node.target}) does not run: {first_line(error)}") from error
        shapes[node.name] = shapes_of(result)
        return result

    with mode:
        fake = {k: mode.from_tensor(v) for k, v in _tensors_of(graph).items()}
        arguments = [mode.from_tensor(x) for x in inputs]
        Run(graph, fake, record).run(*arguments)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    shapes.update({n.name: tuple(x.shape) for n, x in zip(placeholders, inputs, strict=True)})
    return shapes


def _tensors_of(graph: torch.fx.GraphModule) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(graph.named_parameters(remove_duplicate=False))
    return named | dict(graph.named_buffers(remove_duplicate=False))


# -- numbers ---------------------------------------------------------------------------------------------------------


def _compare(
    program: Program,
    wiring: Wiring,
    masks: Masks,
    dense: Mapping[str, Tensor],
    cut_state: Mapping[str, Tensor] | None,
    compact: CompactModel,
    seed: int,
) -> tuple[float, float]:
    """Relative error and varying share; `cut_state` None: the compact model's own weights."""
    dtype = torch.float64 if cut_state is not None else None
    rounds = [sample_inputs(program, seed=seed + 100 + k, dtype=dtype) for k in range(_rounds(program))]
    reference = masked_run(program, wiring, masks, dense)
    candidates: list[Callable[[list[Tensor]], Any]] = [_graph_runner(compact, cut_state)]
    if compact.kind == "module":
        candidates.append(_module_runner(program, compact, cut_state))
    with torch.no_grad():
        wanted = [flat_outputs(reference.run(*inputs)) for inputs in rounds]
        worst, varying = 0.0, 1.0
        for candidate in candidates:
            got = [flat_outputs(candidate(inputs)) for inputs in rounds]
            error, share = relative_error(wanted, got)
            worst, varying = max(worst, error), share
    return worst, varying


def _rounds(program: Program) -> int:
    """One run holds two samples where batch is dynamic; otherwise two runs are compared."""
    return 1 if program.inputs and program.inputs[0].shape[:1] > (1,) and 0 in program.inputs[0].dynamic else 2


def _graph_runner(compact: CompactModel, state: Mapping[str, Tensor] | None) -> Callable[[list[Tensor]], Any]:
    def call(inputs: list[Tensor]) -> Any:
        tensors = state if state is not None else _tensors_of(compact.graph)
        with evaluating(compact.graph):
            return Run(compact.graph, tensors, dtype=torch.float64 if state is not None else None).run(*inputs)

    return call


def _module_runner(
    program: Program, compact: CompactModel, state: Mapping[str, Tensor] | None
) -> Callable[[list[Tensor]], Any]:
    def call(inputs: list[Tensor]) -> Any:
        args, kwargs = as_call(program, inputs)
        module = compact.module
        with evaluating(module):
            if state is None:
                return module(*args, **kwargs)
            own = _tensors_of(module)
            return torch.func.functional_call(module, {k: v for k, v in state.items() if k in own}, args, kwargs)

    return call


def relative_error(wanted: list[list[Tensor]], got: list[list[Tensor]]) -> tuple[float, float]:
    """Compare outputs over several samples.

    Args:
        wanted: for each run its output tensors; runs, or samples along the first axis, differ in their input.
        got: likewise.

    Returns:
        The largest difference over the largest deviation from the mean over samples, worst over outputs; and the
        smallest share of an output's magnitude that varies, over outputs.
    """
    worst, share = 0.0, 1.0
    for outputs, others in zip(zip(*wanted, strict=True), zip(*got, strict=True), strict=True):
        reference, other = torch.cat([t.double() for t in outputs]), torch.cat([t.double() for t in others])
        if reference.shape != other.shape:
            return float("inf"), share
        deviation = (reference - reference.mean(0, keepdim=True)).abs().max()
        difference = (reference - other).abs().max()
        scale = reference.abs().max()
        if not bool(torch.isfinite(difference)):
            return float("inf"), share
        share = min(share, float(deviation / scale.clamp_min(1e-300)))
        worst = max(worst, float(difference / deviation.clamp_min(1e-300)) if difference > 0 else 0.0)
    return worst, share
