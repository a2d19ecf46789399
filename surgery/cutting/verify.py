"""Verify that the compact model computes the same as the masked dense model.

There are two independent checks. *Label replay* runs the rewritten program on the survivors' labels, with the same
operator rules and locked labels: on integers, without data or tolerances. The *numerical comparison* runs the dense
program with dead input slices of contractions zeroed, and the compact model, on distinct well-conditioned values in
float64, then on the real weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
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
    Executor,
    LabelMismatch,
    Layers,
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
from surgery.coupling import (
    Cut,
    InDouble,
    index_table,
    propagate_labels,
)
from surgery.cutting.comparison import REPORT, apart, relative_error, require, rounds_of, within_rounding
from surgery.errors import CheckFailed

_DRAWS = 4
"""Draws of well-conditioned values until the output varies."""


def check_cut(cut: Cut, compact: CompactModel, *, seed: int = 0) -> CheckResult:
    """Verify a compact model against the dense program; arguments, result and errors are those of `surgery.check`."""
    _require_slices(cut, compact)
    for k in range(seed, seed + _DRAWS):
        drawn, shapes = _draw(cut, compact, k)
        replayed = replay(cut, compact, shapes)
        notes = _require_order_exact(cut, drawn, k) if cut.head_order else ()
        found = [drawn.outputs, *_of_module(cut, compact, drawn.kept, drawn.rounds)]
        error64, varying = _compare(drawn.reference(), drawn.rounds, found)
        if varying >= BLIND or not drawn.outputs[0]:
            break  # a remaining unit may happen to be inactive on these values
    if not drawn.outputs[0]:
        raise CheckFailed(
            "cannot tell: the model returns no floating-point tensor; shrink what comes before its last step, with "
            "--submodule or as a module of its own"
        )
    if varying < BLIND:
        raise CheckFailed(
            f"cannot tell: on well-conditioned values, drawn {_DRAWS} times, only {varying:.1e} of the output varies "
            "with the input; cut less, or use an example input that reaches the output"
        )
    require(error64, torch.float64, "distinct, well-conditioned values")
    notes += _require_other_sizes(drawn)
    error, varying, more = _on_real_weights(cut, compact, seed)
    return CheckResult(replayed, error64, error, varying, _meaning(cut), notes + more)


@dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """Well-conditioned values, and the rewritten program's outputs on them.

    Attributes:
        cut: the cut to verify.
        compact: its compact model.
        dense: values of the dense program's tensors, in head order.
        kept: values of the compact model's tensors.
        rounds: inputs of each run.
        outputs: outputs of the rewritten program, by run.
    """

    cut: Cut
    compact: CompactModel
    dense: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    rounds: list[list[Tensor]]
    outputs: list[list[Tensor]]

    def reference(self, batch: int | None = None) -> Executor:
        """The masked dense program."""
        return self.cut.masked_run(self.dense, torch.float64, batch=batch)


def _draw(cut: Cut, compact: CompactModel, seed: int) -> tuple[_Drawn, Mapping[str, Any]]:
    """Draw well-conditioned values, and record the shapes of all values of the rewritten program."""
    dense = cut.reordered(well_conditioned(cut.program, seed=seed))
    kept, rounds = cut.kept(dense), _rounds(cut, seed, torch.float64)
    outputs, shapes = _recorded(compact, kept, rounds)
    return _Drawn(cut, compact, dense, kept, rounds, outputs), shapes


def _rounds(cut: Cut, seed: int, dtype: torch.dtype | None = None) -> list[list[Tensor]]:
    count = rounds_of(cut.program)
    return [sample_inputs(cut.program, seed=seed + 100 + k, dtype=dtype) for k in range(count)]


def _on_real_weights(cut: Cut, compact: CompactModel, seed: int) -> tuple[float | None, float, tuple[str, ...]]:
    """Return the error in the weights' own precision (None if inconclusive), the varying share, and notes."""
    state, rounds = cut.reordered(state_of(cut.program)), _rounds(cut, seed)
    reference, precision = cut.masked_run(state), narrowest(cut.program)
    found = [_of_graph(compact, None, rounds), *_of_module(cut, compact, None, rounds)]
    error, varying = _compare(reference, rounds, found)
    if varying < BLIND:
        return (
            None,
            varying,
            (
                f"cannot tell on the real weights: only {varying:.1e} of their output varies with the input "
                "(a zero head, or untrained layer scales); equality was shown on well-conditioned values",
            ),
        )
    if error <= TOLERANCE[precision]:
        return error, varying, ()
    return error, varying, (within_rounding(reference, rounds, state, error, precision, "the real weights"),)


def _require_order_exact(cut: Cut, drawn: _Drawn, seed: int) -> tuple[str, ...]:
    """Raise unless the dense network computes the same in the plan's head order."""
    own, what = well_conditioned(cut.program, seed=seed), "members in another order"
    error = apart(cut.program, own, drawn.dense, seed)
    if error <= TOLERANCE[torch.float64]:
        return ()
    reference = Executor(cut.program.graph, own, dtype=torch.float64)
    return (within_rounding(reference, drawn.rounds, own, error, torch.float64, what),)


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
        for name, tensor in _tensors_of(module).items():
            if name in slices and not torch.equal(tensor, slices[name].detach().cpu()):
                raise CheckFailed(
                    f"'{name}' is not the slice of the dense tensor that the plan says; nothing was written; if its "
                    "weights were not changed after the cut, please report this model"
                )


# -- other sizes of the inputs ---------------------------------------------------------------------------------------


def _require_other_sizes(drawn: _Drawn) -> tuple[str, ...]:
    """Compare at other batch and image sizes, if dynamic; return notes on what could not be compared.

    A batch of three and another height and width are combined in one run if the dense model accepts both; a batch of
    one follows.
    """
    program = drawn.cut.program
    batched, changes = all(0 in spec.dynamic for spec in program.inputs), other_sizes(program)
    notes = _compare_at(drawn, 3, changes[0]) if batched and changes else None
    if notes is None:
        notes = (_compare_at(drawn, 3) or ()) if batched else ()
        found = next((x for by in changes if (x := _compare_at(drawn, None, by)) is not None), None)
        if changes and found is None:  # no reference
            notes += (
                "not compared at another height and width: the dense model, though traced for free ones, takes "
                f"none of those tried ({', '.join(f'{by:+d} pixels' for by in changes)})",
            )
        notes += found or ()
    return notes + ((_compare_at(drawn, 1) or ()) if batched else ())


def _compare_at(drawn: _Drawn, batch: int | None, by: int = 0) -> tuple[str, ...] | None:
    """Compare at another batch, with images larger by `by` pixels; None if the dense model does not run."""
    cut, compact = drawn.cut, drawn.compact
    count = len(drawn.rounds)
    sized = [sample_inputs(cut.program, seed=55 + k, dtype=torch.float64, by=by) for k in range(count)]
    rounds, reference = _batched(sized if by else drawn.rounds, batch), drawn.reference(batch)
    wanted = _outputs_or_none(reference, rounds)
    if wanted is None:
        plain = Executor(cut.program.graph, reference.state, dtype=torch.float64)
        if by or _outputs_or_none(plain, rounds) is None:
            return None
    what = " and ".join(["another height and width"] * bool(by) + [f"a batch of {batch}"] * bool(batch))
    try:
        found = [_of_graph(compact, drawn.kept, rounds)]
        if batch != 1:  # `cut` has tested the class with a single sample
            found += _of_module(cut, compact, drawn.kept, rounds)
        wanted = wanted or _batched(drawn.outputs, batch)  # masks do not fit axes whose length depends on the batch
    except Exception as raised:  # any exception an operator raises at an unexpected size
        raise CheckFailed(
            f"the compact model does not do what the dense one does on {what}, though it does on the example's: "
            f"{first_line(raised)}; {REPORT}"
        ) from raised
    error = max(relative_error(wanted, [_shaped(y, wanted[0]) for y in got])[0] for got in found)
    if error <= TOLERANCE[torch.float64]:
        return ()
    return (within_rounding(reference, rounds, reference.state, error, torch.float64, what),)


def _batched(rounds: list[list[Tensor]], batch: int | None) -> list[list[Tensor]]:
    """Return rounds at a batch of three, from two samples, or from two rounds of one; None: unchanged."""
    if batch is None:
        return rounds
    if batch == 1:
        return [[x[k : k + 1] if isinstance(x, Tensor) else x for x in rounds[0]] for k in range(2)]
    return [[torch.cat([x, x[:1]]) if isinstance(x, Tensor) else x for x in inputs] for inputs in rounds]


def _shaped(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Restore axes of length one that are missing at a batch of one."""
    pairs = zip(tensors, like, strict=True)
    return [x.reshape(y.shape) if x.numel() == y.numel() else x for x, y in pairs]


def _outputs_or_none(run: Executor, rounds: list[list[Tensor]]) -> list[list[Tensor]] | None:
    try:
        with torch.no_grad():
            return [flat_outputs(run.run(*inputs)) for inputs in rounds]
    except Exception:  # any exception of an operator
        return None


def _meaning(cut: Cut) -> str:
    inexact = any(group.inexact and cut.plan.dead.get(group.name) for group in cut.coupling.groups)
    zeroed = "dense model with the dead input slices of every contraction zeroed"
    return f"{zeroed}, norms, means and sums over the survivors" if inexact else zeroed


# -- label replay ----------------------------------------------------------------------------------------------------


def replay(cut: Cut, compact: CompactModel, shapes: Mapping[str, Any]) -> int:
    """Run the rewritten program on the survivors' labels; return how many values were compared.

    Args:
        cut: the dense program and its plan.
        compact: the model to verify.
        shapes: shapes of the rewritten program's values in a run, by node.

    Raises:
        CheckFailed: an operator ties units that are separate in the dense program, or a value has other survivors.
    """
    labelled = cut.coupling.labelled
    locked = labelled.labels.locked(labelled.dead_roots(cut.plan.dead))
    compared: list[int] = []

    def labels(name: str, tensor: Tensor) -> Value:
        value = labelled.params.get(name)
        if value is None:
            return Value(tuple(tensor.shape), ((),) * tensor.dim(), name, index_table(tensor))
        expected = _survivors(value, cut)
        if expected.shape != tuple(tensor.shape):
            raise LabelMismatch(f"'{name}' has shape {tuple(tensor.shape)}, its survivors {expected.shape}")
        return expected

    def settled(name: str, value: Any) -> Any:
        verified = [_verified(name, *pair, cut) for pair in _pairs(name, labelled.values.get(name), value)]
        compared.append(len(verified))
        return value if not verified else tuple(verified) if isinstance(value, (tuple, list)) else verified[0]

    try:
        propagate_labels(compact.graph, labels, lambda node: shapes[node.name], locked, settled)
    except LabelMismatch as error:
        raise _mismatch(error) from error
    return sum(compared)


def _survivors(value: Value, cut: Cut) -> Value:
    labels, axes = cut.coupling.labelled.labels, []
    for a, layers in enumerate(value.axes):
        index = np.flatnonzero(cut.masks(value, a)) if layers else None
        axes.append(gather(labels.canon(layers), index) if index is not None else ())
    return Value(cut.masks.shape(value), tuple(axes), value.param, value.table)


def _pairs(name: str, dense: Any, compact: Any) -> list[tuple[Value, Value]]:
    """Yield the tensors of a value in the dense program and in the cut one."""
    before, after = _tensors(dense), _tensors(compact)
    if before and len(before) != len(after):
        raise LabelMismatch(f"node '{name}' gives {len(after)} tensors, the dense one {len(before)}")
    return list(zip(before, after, strict=False))


def _tensors(value: Any) -> list[Value]:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in items if isinstance(v, Value)]


def _verified(name: str, dense: Value, compact: Value, cut: Cut) -> Value:
    """Return the survivors of the dense value of this name; raise if the computed value differs.

    Operators lose the labels of an axis that shrank to one index; returning the survivors restores them.
    """
    expected = _survivors(dense, cut)
    if expected.shape != compact.shape:
        raise LabelMismatch(f"value '{name}' has shape {compact.shape}, its survivors {expected.shape}")
    for a in range(len(compact.shape)):
        if not _equal(expected.axes[a], cut.coupling.labelled.labels.canon(compact.axes[a])):
            raise LabelMismatch(f"axis {a} of value '{name}' holds other units than the dense program's survivors")
    return expected


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


def _mismatch(what: Any) -> CheckFailed:
    return CheckFailed(f"label replay: {what}; {REPORT}")


def _tensors_of(graph: torch.nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(graph.named_parameters(remove_duplicate=False))
    named |= dict(graph.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


# -- numbers ---------------------------------------------------------------------------------------------------------


def _compare(reference: Executor, rounds: list[list[Tensor]], found: list[list[list[Tensor]]]) -> tuple[float, float]:
    """Return the largest relative error over all ways to run the compact model, and the varying share."""
    with torch.no_grad():
        wanted = [flat_outputs(reference.run(*inputs)) for inputs in rounds]
    errors = [relative_error(wanted, outputs) for outputs in found]
    return max(error for error, _ in errors), errors[0][1]


def _recorded(
    compact: CompactModel, state: Mapping[str, Tensor], rounds: list[list[Tensor]]
) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """Return outputs of the rewritten program by round, in float64, and the shapes of all values in the first."""
    shapes: dict[str, Any] = {}

    def record(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:  # torch raises several exception types for mismatched sizes
            raise _mismatch(f"node '{node.name}' ({node.target}) does not run: {first_line(error)}") from error
        shapes.setdefault(node.name, shapes_of(result))
        return result

    outputs = _of_graph(compact, state, rounds, record)
    placeholders = [n.name for n in compact.graph.graph.nodes if n.op == "placeholder"]
    return outputs, shapes | {name: shapes_of(x) for name, x in zip(placeholders, rounds[0], strict=True)}


def _of_graph(
    compact: CompactModel, state: Mapping[str, Tensor] | None, rounds: list[list[Tensor]], override: Any = None
) -> list[list[Tensor]]:
    """Return the rewritten program's outputs by round, in float64 on `state`, or on its own weights if None."""
    tensors = state if state is not None else _tensors_of(compact.graph)
    run = Executor(compact.graph, tensors, override, torch.float64 if state is not None else None)
    with torch.no_grad(), evaluating(compact.graph):
        return [flat_outputs(run.run(*inputs)) for inputs in rounds]


def _of_module(
    cut: Cut, compact: CompactModel, state: Mapping[str, Tensor] | None, rounds: list[list[Tensor]]
) -> list[list[list[Tensor]]]:
    """Return the outputs of the user's class, if that is the compact model, in a list of at most one item."""
    if compact.kind != "module":
        return []
    module, callee = compact.module, Callee.of(cut.program, compact.module)
    own = {k: v.detach().cpu() for k, v in (*module.named_parameters(), *module.named_buffers())}
    values = own if state is None else {k: state.get(k, v) for k, v in own.items()}
    written = [name for name, _ in module.named_buffers()]

    def call(inputs: list[Tensor]) -> list[Tensor]:
        args, kwargs = callee.arguments(inputs)
        held = values | {name: values[name].clone() for name in written}  # forward may write to them
        return flat_outputs(torch.func.functional_call(module, held, args, kwargs))

    with torch.no_grad(), evaluating(module), nullcontext() if state is None else InDouble():
        return [[call(inputs) for inputs in rounds]]
