"""The oracle: is the compact model what the dense one computes when the removed units count as removed?

Two independent answers. *Label replay* runs the rewritten program on the survivors' labels, with the same operator
rules and locked labels: integers, no data, no tolerance. The *numeric* comparison runs the dense program with dead
input slices of contractions zeroed, and the compact model, on distinct well-conditioned values in float64, then on the
real weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.capture import evaluating
from surgery.core import (
    BLIND,
    TOLERANCE,
    Callee,
    CheckResult,
    CompactModel,
    Coupling,
    Executor,
    LabelledGraph,
    LabelMismatch,
    Layers,
    Masks,
    Plan,
    Program,
    Value,
    first_line,
    flat_outputs,
    gather,
    is_constant,
    narrowest,
    other_sizes,
    sample_inputs,
    shapes_of,
    state_of,
    well_conditioned,
)
from surgery.coupling import InDouble, Move, arranged, couple, index_table, masked_run, moves_of, propagate_labels
from surgery.cutting.comparison import apart, relative_error, require, rounds_of, within_rounding
from surgery.cutting.rewrite import compact_state, masks_of, slice_tensors
from surgery.errors import CheckFailed

_DRAWS = 4
"""Of well-conditioned values, before giving up on seeing the output vary."""


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
        CheckFailed: labels do not match, numbers differ by more than 1e-10 in float64 or 1e-4 in float32 (on the real
            weights: and by more than rounding explains), or the output varies too little with the input to tell.
    """
    coupling = coupling or couple(program, keep=tuple(plan.settings.get("keep", ())))
    masks = masks_of(program, plan, coupling)
    labelled = coupling.labelled
    moves = moves_of(coupling, plan.arranged)
    _require_slices(program, plan, moves, compact)
    for drawn in range(seed, seed + _DRAWS):
        unmoved = well_conditioned(program, seed=drawn)
        dense = arranged(unmoved, moves)
        cut_state = compact_state(dense, plan)
        rounds = [sample_inputs(program, seed=drawn + 100 + k, dtype=torch.float64) for k in range(rounds_of(program))]
        outputs, shapes = _recorded(compact, cut_state, rounds)
        replayed = replay(program, compact, labelled, masks, plan, shapes)
        notes = _require_unchanged(program, unmoved, dense, drawn) if moves else ()
        found = [outputs, *_of_module(program, compact, cut_state, rounds)]
        masked_dense = partial(masked_run, program, labelled, masks, dense, torch.float64)
        reference = masked_dense()
        error64, varying = _compare(reference, rounds, found)
        if varying >= BLIND or not outputs[0]:
            break  # else one unit that is left may happen to be dead on these values
    if not outputs[0]:
        raise CheckFailed(
            "cannot tell: the model returns no floating-point tensor; shrink what comes before its last step, with "
            "--part or as a module of its own"
        )
    if varying < BLIND:
        raise CheckFailed(
            f"cannot tell: on well-conditioned values, drawn {_DRAWS} times, only {varying:.1e} of the output varies "
            "with the input; cut less, or use an example input that reaches the output"
        )
    require(error64, torch.float64, "distinct, well-conditioned values")
    notes += _require_elsewhere(program, masked_dense, cut_state, compact, rounds, outputs)
    real = arranged(state_of(program), moves)
    rounds = [sample_inputs(program, seed=seed + 100 + k) for k in range(rounds_of(program))]
    reference = masked_run(program, labelled, masks, real)
    found = [_of_graph(compact, None, rounds), *_of_module(program, compact, None, rounds)]
    error, varying = _compare(reference, rounds, found)
    told: float | None = error
    if varying < BLIND:
        told = None
        notes += (
            f"cannot tell on the real weights: only {varying:.1e} of their output varies with the input "
            "(a zero head, or untrained layer scales); equality was shown on well-conditioned values",
        )
    elif not error <= TOLERANCE[narrowest(program)]:
        notes += (within_rounding(reference, rounds, real, error, narrowest(program), "the real weights"),)
    return CheckResult(replayed, error64, told, varying, _meaning(coupling, plan), notes)


def _require_unchanged(
    program: Program, unmoved: Mapping[str, Tensor], moved: Mapping[str, Tensor], seed: int
) -> tuple[str, ...]:
    """The dense network has to compute the same with its heads' members in another order."""
    error, what = apart(program, unmoved, moved, seed), "members in another order"
    if error <= TOLERANCE[torch.float64]:
        return ()
    rounds = [sample_inputs(program, seed=seed + 100 + k, dtype=torch.float64) for k in range(rounds_of(program))]
    reference = Executor(program.graph, unmoved, dtype=torch.float64)
    return (within_rounding(reference, rounds, unmoved, error, torch.float64, what),)


def _require_slices(program: Program, plan: Plan, moves: Sequence[Move], compact: CompactModel) -> None:
    """Every tensor of the compact model has to be the slice of the dense one that the plan says."""
    replaced = {name for sources in program.materialised.values() for name in sources}
    wanted = (program.model.state_dict().keys() - replaced) | program.materialised.keys()
    strange = wanted ^ compact.module.state_dict().keys()
    if strange:
        raise CheckFailed(f"'{min(strange)}' is in the state of only one of the dense and the compact model")
    slices = slice_tensors(program, plan, moves)
    for module in (compact.graph, compact.module):
        for name, tensor in _tensors_of(module).items():
            if name in slices and not torch.equal(tensor, slices[name].detach().cpu()):
                raise CheckFailed(
                    f"'{name}' is not the slice of the dense tensor that the plan says; nothing was written; if its "
                    "weights were not changed after the cut, please report this model"
                )


def _require_elsewhere(
    program: Program,
    masked_dense: Callable[..., Executor],
    cut_state: Mapping[str, Tensor],
    compact: CompactModel,
    rounds: list[list[Tensor]],
    outputs: list[list[Tensor]],
) -> tuple[str, ...]:
    """Compare at other batches and sizes, where these are dynamic; return notes on what could not be compared.

    A batch of three (also of a model that mixes samples) and another height and width go into one run where the dense
    model takes both; then a batch of one.
    """

    def same(batch: int | None, by: int = 0) -> tuple[str, ...] | None:
        """Notes; None where the dense model does not run on such inputs."""
        sized = [sample_inputs(program, seed=55 + k, dtype=torch.float64, by=by) for k in range(len(rounds))]
        batches = _batched(sized if by else rounds, batch)
        reference = masked_dense(batch=batch)
        wanted = _given(reference, batches)
        if wanted is None and by:
            return None
        if wanted is None and _given(Executor(program.graph, reference.state, dtype=torch.float64), batches) is None:
            return None
        what = " and ".join(["another height and width"] * bool(by) + [f"a batch of {batch}"] * bool(batch))
        try:
            found = [_of_graph(compact, cut_state, batches)]
            if batch != 1:  # the cut has tried the class with a single sample
                found += _of_module(program, compact, cut_state, batches)
            # masks do not fit axes that are other ones at this batch
            wanted = wanted or _batched(outputs, batch)
        except Exception as raised:  # whatever an operator raises at a size that it does not expect
            raise CheckFailed(
                f"the compact model does not do what the dense one does on {what}, though it does on the example's: "
                f"{first_line(raised)}; {_REPORT}"
            ) from raised
        error = max(relative_error(wanted, [_shaped(y, wanted[0]) for y in got])[0] for got in found)
        if error <= TOLERANCE[torch.float64]:
            return ()
        return (within_rounding(reference, batches, reference.state, error, torch.float64, what),)

    batch = 3 if all(0 in spec.dynamic for spec in program.inputs) else None
    changes = other_sizes(program)
    notes = next((x for by in changes[:1] if batch and (x := same(batch, by)) is not None), None)
    if notes is None:
        notes = (same(batch) or ()) if batch else ()
        alone = next((x for by in changes if (x := same(None, by)) is not None), None)
        if changes and alone is None:  # there is nothing to compare with
            notes += (
                "not compared at another height and width: the dense model, though traced for free ones, takes "
                f"none of those tried ({', '.join(f'{by:+d} pixels' for by in changes)})",
            )
        notes += alone or ()
    return notes + ((same(1) or ()) if batch else ())


def _batched(rounds: list[list[Tensor]], batch: int | None) -> list[list[Tensor]]:
    """Rounds at a batch of three, made of those of two, or of one (then two); None: as they are."""
    if batch is None:
        return rounds
    if batch == 1:
        return [[x[k : k + 1] if _is_tensor(x) else x for x in rounds[0]] for k in range(2)]
    return [[torch.cat([x, x[:1]]) if _is_tensor(x) else x for x in inputs] for inputs in rounds]


def _shaped(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """At a batch of one, axes of length one may be gone."""
    pairs = zip(tensors, like, strict=True)
    return [x.reshape(y.shape) if x.numel() == y.numel() else x for x, y in pairs]


def _given(run: Executor, rounds: list[list[Tensor]]) -> list[list[Tensor]] | None:
    """Outputs by round; None where it does not run."""
    try:
        with torch.no_grad():
            return [flat_outputs(run.run(*inputs)) for inputs in rounds]
    except Exception:  # whatever the operators raise
        return None


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _meaning(coupling: Coupling, plan: Plan) -> str:
    inexact = [g.name for g in coupling.groups if g.inexact and plan.dead.get(g.name)]
    zeroed = "dense model with the dead input slices of every contraction zeroed"
    return f"{zeroed}, norms, means and sums over the survivors" if inexact else zeroed


# -- label replay ----------------------------------------------------------------------------------------------------


def replay(
    program: Program,
    compact: CompactModel,
    labelled: LabelledGraph,
    masks: Masks,
    plan: Plan,
    shapes: Mapping[str, Any],
) -> int:
    """Run the rewritten program on the survivors' labels; return how many values were compared.

    Args:
        program: the dense model, traced.
        compact: the model to verify.
        labelled: labels of the dense program's values.
        masks: which indices of them survive.
        plan: what was removed.
        shapes: of the values of the rewritten program in a run, by node.

    Raises:
        CheckFailed: an operator joins units that the dense program keeps apart, or a value has other survivors.
    """
    dead = labelled.dead_roots(plan.dead)
    labels = labelled.labels.locked(dead)

    def labels_of(name: str, tensor: Tensor) -> Value:
        value = labelled.params.get(name)
        if value is None:
            return Value(tuple(tensor.shape), ((),) * tensor.dim(), name, index_table(tensor))
        expected = _survivors(value, labelled, masks)
        if expected.shape != tuple(tensor.shape):
            raise LabelMismatch(f"'{name}' has shape {tuple(tensor.shape)}, its survivors {expected.shape}")
        return expected

    try:
        compared: list[int] = []

        def settled(name: str, value: Any) -> Any:
            pairs = _pairs(name, labelled.values.get(name), value)
            verified = [_verified(name, *pair, labelled, masks) for pair in pairs]
            compared.append(len(verified))
            return value if not verified else tuple(verified) if isinstance(value, (tuple, list)) else verified[0]

        propagate_labels(compact.graph, labels_of, lambda node: shapes[node.name], labels, settled)
        return sum(compared)
    except LabelMismatch as error:
        raise _mismatch(error) from error


def _survivors(value: Value, labelled: LabelledGraph, masks: Masks) -> Value:
    axes = []
    for a, layers in enumerate(value.axes):
        index = np.flatnonzero(masks(value, a)) if layers else None
        axes.append(gather(labelled.labels.canon(layers), index) if index is not None else ())
    return Value(masks.shape(value), tuple(axes), value.param, value.table)


def _pairs(name: str, dense: Any, compact: Any) -> list[tuple[Value, Value]]:
    """The tensors of a value in the dense program and in the cut one."""
    before, after = _tensors(dense), _tensors(compact)
    if before and len(before) != len(after):
        raise LabelMismatch(f"node '{name}' gives {len(after)} tensors, the dense one {len(before)}")
    return list(zip(before, after, strict=False))


def _tensors(value: Any) -> list[Value]:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in items if isinstance(v, Value)]


def _verified(name: str, dense: Value, compact: Value, labelled: LabelledGraph, masks: Masks) -> Value:
    """The survivors of the dense value of this name, which the computed one has to equal.

    Operators lose the labels of an axis that shrank to one index; going on with the survivors restores them.
    """
    expected = _survivors(dense, labelled, masks)
    if expected.shape != compact.shape:
        raise LabelMismatch(f"value '{name}' has shape {compact.shape}, its survivors {expected.shape}")
    for a in range(len(compact.shape)):
        if not _equal(expected.axes[a], labelled.labels.canon(compact.axes[a])):
            raise LabelMismatch(f"axis {a} of value '{name}' holds other units than the dense program's survivors")
    return expected


def _equal(wanted: Layers, found: Layers) -> bool:
    """Whether two axes hold the same units; a layer that is the same all along may be missing, but not be another."""
    left, right = sorted(x.tolist() for x in wanted), sorted(x.tolist() for x in found)
    varying = sorted(x.tolist() for x in wanted if not is_constant(x))
    if varying == sorted(x for x in right if len(set(x)) > 1) and all(x in left for x in right):
        return True
    # The same units in other layers: smaller pieces of an axis may fit into fewer of them.
    if not wanted or not found or len(wanted[0]) != len(found[0]):
        return False
    units = [[set(labels) - {0} for labels in zip(*layers, strict=True)] for layers in (left, right)]
    everywhere = set.intersection(*units[0])
    return all(a - everywhere == b - everywhere and b <= a for a, b in zip(*units, strict=True))


def _mismatch(what: Any) -> CheckFailed:
    return CheckFailed(f"label replay: {what}; {_REPORT}")


_REPORT = "nothing was written; please report this model"


def _tensors_of(graph: torch.nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(graph.named_parameters(remove_duplicate=False))
    named |= dict(graph.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


# -- numbers ---------------------------------------------------------------------------------------------------------


def _compare(reference: Executor, rounds: list[list[Tensor]], found: list[list[list[Tensor]]]) -> tuple[float, float]:
    """Largest relative error of several ways to compute the compact model's outputs by round, and the varying share."""
    with torch.no_grad():
        wanted = [flat_outputs(reference.run(*inputs)) for inputs in rounds]
    errors = [relative_error(wanted, outputs) for outputs in found]
    return max(error for error, _ in errors), errors[0][1]


def _recorded(
    compact: CompactModel, state: Mapping[str, Tensor], rounds: list[list[Tensor]]
) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """Outputs of the rewritten program by round, in float64, and the shapes of all its values in the first."""
    shapes: dict[str, Any] = {}

    def record(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # torch raises several kinds for sizes that do not fit
            raise _mismatch(f"node '{node.name}' ({node.target}) does not run: {first_line(error)}") from error
        shapes.setdefault(node.name, shapes_of(result))
        return result

    outputs = _of_graph(compact, state, rounds, record)
    placeholders = [n.name for n in compact.graph.graph.nodes if n.op == "placeholder"]
    return outputs, shapes | {name: shapes_of(x) for name, x in zip(placeholders, rounds[0], strict=True)}


def _of_graph(
    compact: CompactModel, state: Mapping[str, Tensor] | None, rounds: list[list[Tensor]], override: Any = None
) -> list[list[Tensor]]:
    """Outputs of the rewritten program by round, in float64 on a given state; `state` None: on its own weights."""
    tensors = state if state is not None else _tensors_of(compact.graph)
    run = Executor(compact.graph, tensors, override, torch.float64 if state is not None else None)
    with torch.no_grad(), evaluating(compact.graph):
        return [flat_outputs(run.run(*inputs)) for inputs in rounds]


def _of_module(
    program: Program, compact: CompactModel, state: Mapping[str, Tensor] | None, rounds: list[list[Tensor]]
) -> list[list[list[Tensor]]]:
    """Likewise those of the user's class, where it runs smaller: the only item, if any."""
    if compact.kind != "module":
        return []
    module, callee = compact.module, Callee.of(program, compact.module)
    own = {k: v.detach().cpu() for k, v in (*module.named_parameters(), *module.named_buffers())}
    values = own if state is None else {k: state.get(k, v) for k, v in own.items()}
    written = [name for name, _ in module.named_buffers()]

    def call(inputs: list[Tensor]) -> list[Tensor]:
        args, kwargs = callee.arguments(inputs)
        held = values | {name: values[name].clone() for name in written}  # forward may write into them
        return flat_outputs(torch.func.functional_call(module, held, args, kwargs))

    with torch.no_grad(), evaluating(module), nullcontext() if state is None else InDouble():
        return [[call(inputs) for inputs in rounds]]
