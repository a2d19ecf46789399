"""Verify that the compact model computes the same as the masked dense model, in two independent ways.

*Label replay* runs the rewritten program on the survivors' labels with the operator rules: integers, no tolerances. The
*numerical comparison* runs the dense program with dead input slices of contractions zeroed, and the compact model, on
distinct well-conditioned values in float64, then on the real weights; dropped blocks and whole models likewise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture import Whole, evaluating
from surgery.core import (
    BLIND,
    ROUNDINGS,
    TOLERANCE,
    Block,
    Callee,
    CheckResult,
    CompactModel,
    Executor,
    LabelMismatch,
    Layers,
    Plan,
    Program,
    Value,
    copied,
    count_macs,
    count_params,
    elsewhere,
    first_line,
    flat_outputs,
    fresh,
    gather,
    is_constant,
    is_symbolic,
    narrowest,
    sample_inputs,
    shapes_of,
    state_of,
    tensors_of,
    well_conditioned,
    where_raised,
)
from surgery.coupling import (
    BranchConstants,
    Cut,
    branch_constants,
    called,
    dead_blocks,
    find_blocks,
    in_float64,
    index_table,
    propagate_labels,
    spread,
    values_in,
)
from surgery.errors import CheckFailed, InvalidInput, SurgeryError

_DRAWS = 4  # draws of well-conditioned values until the output varies
REPORT = "nothing was written; please report this model"
_DISTINCT = "distinct, well-conditioned values"

Rounds = list[list[Tensor]]
"""Inputs or outputs of each run."""


def check_cut(cut: Cut, compact: CompactModel, *, seed: int = 0) -> CheckResult:
    """Verify a compact model against the dense program; arguments, result and errors are those of `surgery.check`."""
    _require_slices(cut, compact)
    for k in range(seed, seed + _DRAWS):
        drawn, shapes = _draw(cut, compact, k)
        replayed = replay(cut, compact, shapes)
        notes: tuple[str, ...] = ()
        if cut.head_order:  # the dense network computes the same in this order
            own = well_conditioned(cut.program, seed=k)
            error, _ = relative_error(outputs_of(cut.program, own, k), outputs_of(cut.program, drawn.dense, k))
            reference = Executor(cut.program.graph, own, dtype=torch.float64)
            notes = _explained(reference, drawn.rounds, error, torch.float64, "members in another order")
        found = [drawn.outputs, *_of_module(cut, compact, drawn.kept, drawn.rounds)]
        error64, varying = _compare(drawn.reference(), drawn.rounds, found)
        if varying >= BLIND or not drawn.outputs[0]:
            break  # a remaining unit may happen to be inactive on these values
    if not drawn.outputs[0]:
        raise CheckFailed(
            "inconclusive: the model returns no floating-point tensor; shrink what comes before its last step, with "
            "--submodule or as a module of its own"
        )
    if varying < BLIND:
        raise CheckFailed(
            f"inconclusive: on well-conditioned values, drawn {_DRAWS} times, only {varying:.1e} of the output varies "
            "with the input; cut less, or use an example input that reaches the output"
        )
    require(error64, torch.float64, _DISTINCT)
    notes += _require_other_sizes(drawn)
    state, rounds = cut.reordered(state_of(cut.program)), _rounds(cut.program, seed)
    reference, real = cut.masked_run(state), None
    found = [_of_graph(compact, None, rounds), *_of_module(cut, compact, None, rounds)]
    difference, varying = _compare(reference, rounds, found)
    if varying < BLIND:
        notes += (
            f"inconclusive on the real weights: only {varying:.1e} of their output varies with the input "
            "(a zero head, or untrained layer scales); equality was shown on well-conditioned values",
        )
    else:
        real = difference
        notes += _explained(reference, rounds, real, narrowest(cut.program), "the real weights")
    if cut.program.whole is not None:
        notes += check_dropped(cut.program, cut.plan, seed=seed)
    meaning = "masked original (inputs from removed units set to zero in every layer)"
    if any(group.inexact and cut.plan.dead.get(group.name) for group in cut.coupling.groups):
        meaning += ", norms, means and sums over the survivors"
    return CheckResult(replayed, error64, real, varying, meaning, notes)


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """Well-conditioned values, and the rewritten program's outputs on them."""

    cut: Cut
    compact: CompactModel
    dense: Mapping[str, Tensor]  # values of the dense program's tensors, in head order
    kept: Mapping[str, Tensor]  # values of the compact model's tensors
    rounds: Rounds
    outputs: Rounds

    def reference(self) -> Executor:
        """The masked dense program."""
        return self.cut.masked_run(self.dense, torch.float64)


def _draw(cut: Cut, compact: CompactModel, seed: int) -> tuple[_Drawn, Mapping[str, Any]]:
    """Draw well-conditioned values, and record the shapes of the rewritten program's values."""
    dense = cut.reordered(well_conditioned(cut.program, seed=seed))
    kept, rounds = cut.kept(dense), _rounds(cut.program, seed, torch.float64)
    shapes: dict[str, Any] = {}

    def record(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # torch raises several exception types for mismatched sizes
            said = f"label replay: node '{node.name}' ({node.target}) does not run: {first_line(error)}; {REPORT}"
            raise CheckFailed(said) from error
        shapes.setdefault(node.name, shapes_of(result))
        return result

    outputs = _of_graph(compact, kept, rounds, record)
    placeholders = [n.name for n in compact.graph.graph.nodes if n.op == "placeholder"]
    shapes |= {name: shapes_of(x) for name, x in zip(placeholders, rounds[0], strict=True)}
    return _Drawn(cut, compact, dense, kept, rounds, outputs), shapes


def _rounds(program: Program, seed: int, dtype: torch.dtype | None = None, by: int = 0) -> Rounds:
    """Draw one run of two samples if the batch is the first axis of every output; otherwise two runs to compare."""
    output = next(n for n in program.graph.graph.nodes if n.op == "output")
    values = [n.meta.get("val") for n in output.all_input_nodes]
    per_sample = all(isinstance(v, Tensor) and v.dim() > 0 and is_symbolic(v.shape[0]) for v in values)
    count = 1 if values and per_sample else 2
    return [sample_inputs(program, seed=seed + 100 + k, dtype=dtype, by=by) for k in range(count)]


def _require_slices(cut: Cut, compact: CompactModel) -> None:
    """Raise unless every tensor of the compact model is the planned slice of the dense one."""
    program = cut.program
    replaced = {name for sources in program.materialised.values() for name in sources}
    wanted = (program.model.state_dict().keys() - replaced) | program.materialised.keys()
    strange = wanted ^ compact.module.state_dict().keys()
    if strange:
        raise CheckFailed(f"'{min(strange)}' is in the state of only one of the dense and the compact model")
    slices = cut.tensors()
    for module in (compact.graph, compact.module):
        for name, tensor in tensors_of(module).items():
            if name in slices and not torch.equal(tensor.cpu(), slices[name].cpu()):
                raise CheckFailed(
                    f"'{name}' is not the slice of the dense tensor that the plan says; nothing was written; if its "
                    "weights were not changed after the cut, please report this model"
                )


def _require_other_sizes(drawn: _Drawn) -> tuple[str, ...]:
    """Compare at other batch and image sizes, if dynamic; return notes, also on what could not be compared."""
    program = drawn.cut.program
    found = elsewhere(program, lambda batch, by: _compare_at(drawn, 3 if batch else None, by))
    if found and found[-1] is None:
        found[-1] = ("not compared at another size: the dense model, though traced for free ones, takes none tried",)
    if program.any_batch:
        found.append(_compare_at(drawn, 1))
    return tuple(note for notes in found for note in notes or ())


def _compare_at(drawn: _Drawn, batch: int | None, by: int = 0) -> tuple[str, ...] | None:
    """Compare at another batch, with images larger by `by` pixels; None if the dense model does not run."""
    cut, compact, reference = drawn.cut, drawn.compact, drawn.reference()
    rounds = _batched(_rounds(cut.program, 55, torch.float64, by) if by else drawn.rounds, batch)
    wanted: Rounds | None = None
    with suppress(Exception):  # operators raise any exception at a size that they do not accept
        wanted = _outputs(reference, rounds)
    if wanted is None and not by:  # masks may not fit if an axis of length one is missing at a batch of one
        with suppress(Exception):
            _outputs(Executor(cut.program.graph, reference.state, dtype=torch.float64), rounds)
            wanted = _batched(drawn.outputs, batch)
    if wanted is None:
        return None
    what = " and ".join(["another height and width"] * bool(by) + [f"a batch of {batch}"] * bool(batch))
    try:
        found = [_of_graph(compact, drawn.kept, rounds)]
        if batch != 1:  # `cut` has tested the class with a single sample
            found += _of_module(cut, compact, drawn.kept, rounds)
    except Exception as raised:  # any exception an operator raises at an unexpected size
        raise CheckFailed(
            f"the compact model does not do what the dense one does on {what}, though it does on the example's: "
            f"{first_line(raised)}; {REPORT}"
        ) from raised
    worst = 0.0
    for got in found:  # axes of length one may be missing at a batch of one
        pairs = [zip(outputs, wanted[0], strict=True) for outputs in got]
        like = [[x.reshape(y.shape) if x.numel() == y.numel() else x for x, y in pair] for pair in pairs]
        worst = max(worst, relative_error(wanted, like)[0])
    return _explained(reference, rounds, worst, torch.float64, what)


def _batched(rounds: Rounds, batch: int | None) -> Rounds:
    """Return rounds at a batch of three, from two samples, or from two rounds of one; None: unchanged."""
    if batch is None:
        return rounds
    if batch == 1:
        return [[x[k : k + 1] if isinstance(x, Tensor) else x for x in rounds[0]] for k in range(2)]
    return [[torch.cat([x, x[:1]]) if isinstance(x, Tensor) else x for x in inputs] for inputs in rounds]


# Label replay. -------------------------------------------------------------------------------------------------------


def replay(cut: Cut, compact: CompactModel, shapes: Mapping[str, Any]) -> int:
    """Run the rewritten program, with values of these shapes, on the survivors' labels; return how many were compared.

    Raises CheckFailed if an operator ties units that are separate in the dense program, or a value has other survivors.
    """
    labelled = cut.coupling.labelled
    locked = labelled.labels.locked(labelled.dead_roots(cut.plan.dead))
    compared: list[int] = []

    def survivors(value: Value) -> Value:
        axes = [
            gather(labelled.labels.canon(layers), np.flatnonzero(cut.masks(value, a))) if layers else ()
            for a, layers in enumerate(value.axes)
        ]
        return Value(cut.masks.shape(value), tuple(axes), value.table)

    def labels(name: str, tensor: Tensor) -> Value:
        value = labelled.params.get(name)
        if value is None:
            return Value(tuple(tensor.shape), ((),) * tensor.dim(), index_table(tensor))
        expected = survivors(value)
        if expected.shape != tuple(tensor.shape):
            raise LabelMismatch(f"'{name}' has shape {tuple(tensor.shape)}, its survivors {expected.shape}")
        return expected

    def settled(name: str, value: Any) -> Any:
        dense, found = values_in(labelled.values.get(name)), values_in(value)
        if dense and len(dense) != len(found):
            raise LabelMismatch(f"node '{name}' gives {len(found)} tensors, the dense one {len(dense)}")
        verified = [survivors(x) for x in dense]  # operators lose the labels of an axis that shrank to one index
        for wanted, got in zip(verified, found, strict=False):
            if wanted.shape != got.shape:
                raise LabelMismatch(f"value '{name}' has shape {got.shape}, its survivors {wanted.shape}")
            for a, layers in enumerate(got.axes):
                if not _equal(wanted.axes[a], labelled.labels.canon(layers)):
                    raise LabelMismatch(f"axis {a} of value '{name}' holds other units than the dense program's")
        compared.append(len(verified))
        return value if not verified else tuple(verified) if isinstance(value, (tuple, list)) else verified[0]

    try:
        propagate_labels(compact.graph, labels, lambda node: shapes[node.name], locked, settled)
    except LabelMismatch as error:
        raise CheckFailed(f"label replay: {error}; {REPORT}") from error
    return sum(compared)


def _equal(wanted: Layers, found: Layers) -> bool:
    """Return whether two axes hold the same units; a constant layer may be missing, but must not differ."""
    left, right = sorted(x.tolist() for x in wanted), sorted(x.tolist() for x in found)
    varying = sorted(x.tolist() for x in wanted if not is_constant(x))
    if varying == sorted(x for x in right if len(set(x)) > 1) and all(x in left for x in right):
        return True
    # Equal units in different layers: a smaller axis may need fewer layers.
    if not wanted or not found or len(wanted[0]) != len(found[0]):
        return False
    units = [[set(labels) - {0} for labels in zip(*layers, strict=True)] for layers in (left, right)]
    everywhere = set.intersection(*units[0])
    return all(a - everywhere == b - everywhere and b <= a for a, b in zip(*units, strict=True))


def relative_error(wanted: Rounds, got: Rounds) -> tuple[float, float]:
    """Compare outputs of runs or samples (first axis) with different inputs.

    Returns the largest difference divided by the largest deviation from the mean over samples (maximum over outputs),
    and the share of an output's magnitude that varies (minimum over outputs).
    """
    worst, share = 0.0, 1.0
    for outputs, others in zip(zip(*wanted, strict=True), zip(*got, strict=True), strict=True):
        reference, other = (torch.cat([t.double().reshape(t.shape or (1,)) for t in x]) for x in (outputs, others))
        if reference.shape != other.shape:
            return float("inf"), share
        deviation = (reference - reference.mean(0, keepdim=True)).abs().max()
        difference, scale = (reference - other).abs().max(), reference.abs().max()
        if not bool(torch.isfinite(reference).all()):
            raise InvalidInput("the dense model's own output is not finite; load weights that do not overflow")
        if not bool(torch.isfinite(difference)):
            return float("inf"), share
        share = min(share, float(deviation / scale.clamp_min(1e-300)))
        worst = max(worst, float(difference / deviation.clamp_min(1e-300)) if difference > 0 else 0.0)
    return worst, share


def outputs_of(program: Program, state: Mapping[str, Tensor], seed: int) -> Rounds:
    """Return the dense program's outputs with these weights, in float64, on random inputs, by run."""
    return _outputs(Executor(program.graph, state, dtype=torch.float64), _rounds(program, seed, torch.float64))


def _outputs(run: Executor, rounds: Rounds) -> Rounds:
    with torch.no_grad():
        return [flat_outputs(run.run(*inputs)) for inputs in rounds]


def require(error: float, dtype: torch.dtype, what: str, advice: str = REPORT) -> None:
    """Raise CheckFailed if an error exceeds the tolerance of this precision."""
    tolerance = TOLERANCE[dtype]
    if not error <= tolerance:
        raise CheckFailed(
            f"the compact model differs from the masked dense model by {error:.1e} on {what} "
            f"(allowed: {tolerance:.0e}); {advice}"
        )


def _explained(reference: Executor, rounds: Rounds, error: float, dtype: torch.dtype, what: str) -> tuple[str, ...]:
    """Return a note if an error above the tolerance is explained by rounding in the reference; raise if it is not.

    The effect of rounding is measured by moving every weight by one unit in the last place.
    """
    if error <= TOLERANCE[dtype]:
        return ()
    generator = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        sign = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        return x * (1 + torch.finfo(x.dtype).eps * sign.to(x.dtype))

    other = reference.on({name: moved(tensor) for name, tensor in reference.state.items()})
    rounding, _ = relative_error(_outputs(reference, rounds), _outputs(other, rounds))
    if not (error <= ROUNDINGS * rounding and rounding < BLIND):
        require(error, dtype, what)
    return (
        f"rounding is amplified on {what}: moving each weight by its last bit moves the dense output by "
        f"{rounding:.1e}, the difference is {error:.1e}",
    )


def _compare(reference: Executor, rounds: Rounds, found: list[Rounds]) -> tuple[float, float]:
    """Return the largest relative error over all ways to run the compact model, and the varying share."""
    wanted = _outputs(reference, rounds)
    errors = [relative_error(wanted, outputs) for outputs in found]
    return max(error for error, _ in errors), errors[0][1]


def _of_graph(
    compact: CompactModel, state: Mapping[str, Tensor] | None, rounds: Rounds, override: Any = None
) -> Rounds:
    """Return the rewritten program's outputs by round, in float64 on `state`, or on its own weights if None."""
    dtype = None if state is None else torch.float64
    if state is None:
        state = {name: tensor.detach().cpu() for name, tensor in tensors_of(compact.graph).items()}
    run = Executor(compact.graph, state, override, dtype)
    with evaluating(compact.graph):
        return _outputs(run, rounds)


def _of_module(cut: Cut, compact: CompactModel, state: Mapping[str, Tensor] | None, rounds: Rounds) -> list[Rounds]:
    """Return the outputs of the user's class, if that is the compact model, in a list of at most one item."""
    if compact.kind != "module":
        return []
    callee = Callee.of(cut.program, compact.module)
    return [[called(callee, state, inputs) for inputs in rounds]]


# Dropped blocks. -----------------------------------------------------------------------------------------------------


def check_dropped(program: Program, plan: Plan, *, seed: int = 0) -> tuple[str, ...]:
    """Verify a program without blocks against the program as it was traced, in float64; return notes.

    In the traced program, dropped branches are replaced by their constants, and dropped layers by their inputs, on
    distinct, well-conditioned values. Dead branches are compared unchanged on the real weights.
    """
    whole = program.dense
    gone = [block for block in find_blocks(whole) if block.name in plan.dropped]
    constants = branch_constants(whole, plan.dropped)
    _require_shifted(program, constants)
    worst = _apart(program, plan, gone, constants, well_conditioned(whole, seed=seed), seed)
    require(worst, torch.float64, f"dropping {len(gone)} blocks, on {_DISTINCT}")
    names = dead_blocks(whole, gone)
    dead = [block for block in gone if block.name in names and not block.is_layer]
    if not dead:
        return ()
    inside = {name for block in dead for name in block.nodes}
    others = [block for block in gone if block not in dead and not {*block.nodes, block.sum} <= inside]
    worst = _apart(program, plan, others, constants, in_float64(state_of(whole)), seed)
    require(worst, torch.float64, f"taking out {len(dead)} dead blocks, on the real weights")
    return (f"{len(dead)} dead blocks taken out: relative error {worst:.1e} in float64 on the real weights",)


def _apart(
    program: Program,
    plan: Plan,
    gone: Collection[Block],
    constants: BranchConstants,
    state: Mapping[str, Tensor],
    seed: int,
) -> float:
    """Return the largest relative difference of the traced program with these blocks overridden, at several sizes."""
    whole = program.dense
    branches = {block.branch: plan.dropped[block.name] for block in gone if not block.is_layer}
    layers = {name for block in gone if block.is_layer for name in (*block.nodes, block.sum)}

    def override(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        if node.name not in branches:  # the last node of a branch may also be that of a layer within it
            return args[0] if node.name in layers else NotImplemented
        value = torch.zeros_like(node.target(*args, **kwargs))  # type: ignore[operator]
        constant = branches[node.name]
        return value + spread(constant, node.meta["val"].shape).to(value.dtype) if constant else value

    own = in_float64(state_of(program))
    small = {name: state.get(name, constants.added.get(name, value)) for name, value in own.items()}
    small |= {name: small[name] + shift for name, shift in constants.shifts.items() if name in small}
    reference = Executor(whole.graph, state, override, torch.float64)
    shifted = Executor(program.graph, small, dtype=torch.float64)

    def difference(other_batch: bool, by: int) -> float | None:
        inputs = sample_inputs(whole, seed=seed + 31, dtype=torch.float64, by=by, other_batch=other_batch)
        try:
            wanted = _outputs(reference, [inputs])
        except Exception:  # any exception an operator raises at a size it does not accept
            if other_batch or by:
                return None
            raise
        found = _outputs(shifted, [inputs])
        if [x.shape for x in wanted[0]] != [x.shape for x in found[0]] or not wanted[0]:
            raise CheckFailed("the model without its blocks returns other outputs; please report it")
        return relative_error(wanted, found)[0]

    errors = [difference(False, 0), *elsewhere(whole, difference)]
    return max(error for error in errors if error is not None)


def _require_shifted(program: Program, constants: BranchConstants) -> None:
    """Raise unless tensors that absorb a constant contain it, and all others are unchanged."""
    before, after = state_of(program.dense), state_of(program)
    for name in after.keys() & before.keys():
        wanted = before[name]
        if name in constants.shifts:
            wanted = (wanted.double() + constants.shifts[name]).to(wanted.dtype)
        if not torch.equal(after[name], wanted):
            raise CheckFailed(f"'{name}' was changed, or does not contain the constant folded into it")
    for name, value in constants.added.items():
        if name not in after or not torch.equal(after[name], value.to(after[name].dtype)):
            raise CheckFailed(f"'{name}' does not contain the constant of a dropped block")


# The whole model around a submodule. ---------------------------------------------------------------------------------


class MaskedPart(nn.Module):
    """The masked dense submodule, run in the precision of its inputs."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedPart:
        return self  # shares the dense model's tensors, and does not modify them

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the masked program returns."""
        leaves = pytree.tree_leaves((args, kwargs))
        dtype = next((x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state_of(self._cut.program).items()}
        return self._cut.masked_run(self._cut.reordered(state)).run(*leaves)


_INSIDE = "and in the whole model"


def check_whole(
    whole: Whole, reference: nn.Module, compact: nn.Module, verdict: CheckResult, program: Program
) -> CheckResult:
    """Compare the whole model `compact` around the compact submodule with that around the masked one, `reference`.

    Returns the submodule's `verdict` with a note on what was compared; raises CheckFailed if the dense model runs, but
    the compact one fails or differs.
    """
    calls: list[int] = []
    try:
        with_reference = whole.around(reference)
        with_reference.get_submodule(whole.name).register_forward_pre_hook(lambda module, inputs: calls.append(1))
        wanted, dtype = _run_whole(whole, with_reference)
    except Exception as error:  # the dense model may fail outside the submodule, for instance for a missing operator
        why = f"the whole model does not run here ({first_line(error)})"
        return replace(verdict, notes=(*verdict.notes, f"part '{whole.name}' was checked on its own only: {why}"))
    try:
        got, _ = _run_whole(whole, compact, dtype)
    except Exception as error:  # any exception the user's forward raises
        raise CheckFailed(
            f"the whole model does not run around the compact part '{whole.name}': {where_raised(error)}: "
            f"{first_line(error)}; nothing was written"
        ) from error
    nodes = program.graph.graph.nodes if program.has_graph else ()
    literals = pytree.tree_leaves([(n.args, dict(n.kwargs)) for n in nodes])
    casts = any(isinstance(x, torch.dtype) and x.is_floating_point for x in literals)
    inside = narrowest(program) if casts else dtype
    allowed = max(TOLERANCE[dtype], TOLERANCE[inside])
    difference = 0.0 if [x.shape for x in wanted] == [x.shape for x in got] else float("inf")
    for x, y in zip(wanted, got, strict=True) if difference == 0 else ():
        if x.numel():
            a, b = x.double(), y.double()
            difference = max(difference, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    if not difference <= allowed:
        raise CheckFailed(
            f"around the compact part '{whole.name}' the whole model differs by {difference:.1e} from what it computes "
            f"around the masked one (allowed: {allowed:.0e}); {REPORT}"
        )
    times = "; it is called several times, the first call's inputs were used" if len(calls) > 1 else ""
    note = f"part '{whole.name}' was checked on its own {_INSIDE} (difference {difference:.1e}){times}"
    return replace(verdict, notes=(*verdict.notes, note))


def _run_whole(whole: Whole, model: nn.Module, dtype: torch.dtype | None = None) -> tuple[list[Tensor], torch.dtype]:
    """Run in float64 if the model permits, else in its own precision; return flat outputs."""
    if dtype is None:
        try:
            return _run_whole(whole, model, torch.float64)
        except Exception:  # any exception the user's forward raises, typically for a fixed dtype
            dtype = next((p.dtype for p in whole.model.parameters() if p.dtype in TOLERANCE), torch.float32)
    subject = copied(model).to(dtype)
    example = whole.example.example if whole.example is not None else ((), {})
    args, kwargs = pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, fresh(example)
    )
    with evaluating(subject), torch.no_grad():
        result = subject(*args, **kwargs)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)], dtype


def describe_whole(whole: Whole, compact: nn.Module, verdict: CheckResult) -> tuple[dict[str, Any], str]:
    """Return report data on the submodule (its name, what was verified, the whole model's costs), and a note."""
    inside = any(_INSIDE in note for note in verdict.notes)
    params, macs = [count_params(whole.model), count_params(compact)], None
    if inside and whole.example is not None:
        with suppress(SurgeryError):
            macs = [count_macs(model, *whole.example.example) for model in (whole.model, compact)]
    counted = f"MACs of the example {macs[0]:,} → {macs[1]:,}" if macs else "its MACs cannot be counted"
    data = {
        "name": whole.name,
        "checked": f"on its own {_INSIDE}" if inside else "on its own",
        "whole": {"params": params, "macs": macs},
    }
    return data, (
        f"part '{whole.name}': the budget is the part's alone; "
        f"the whole model: parameters {params[0]:,} → {params[1]:,}, {counted}"
    )
