"""Trace, cut, count and verify a model without a traced program, by running the user's own module.

There is no label replay, and only the example's path through forward is known. The module's tensors are sliced on a
deep copy; the result is compared with the masked dense model on several inputs that take the same path.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from surgery.capture import evaluating, require_finite, validate_inputs
from surgery.core import (
    BLIND,
    TOLERANCE,
    Callee,
    CheckResult,
    CompactModel,
    CostFn,
    Coupling,
    InputSpec,
    Program,
    conditioned,
    copied,
    count_macs,
    first_line,
    sample_inputs,
    where_raised,
)
from surgery.coupling import (
    Cut,
    plan_from_dead,
)
from surgery.cutting.comparison import relative_error, require
from surgery.cutting.own_class import transplant
from surgery.errors import CheckFailed, UnsupportedModel

ONE_PATH = "no label replay, one path exported: the one that the example input takes through the model's forward"

# -- tracing ---------------------------------------------------------------------------------------------------------


def trace(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Program:
    """Describe `model` and its example call, without a graph; the path is followed again when needed.

    Args:
        model: any module whose forward runs on the inputs; unchanged, including its mode.
        example_inputs: one tensor or a tuple of positional inputs; they choose the path through the model.
        example_kwargs: keyword inputs.

    Raises:
        InvalidInput: a weight is not finite, or the model does not run on the inputs.
    """
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    require_finite(model)
    with evaluating(model):
        validate_inputs(model, args, kwargs)
        batched = _takes_any_batch(model, args, kwargs)
        unseen = _off_the_path(model, args, kwargs)
    notes = [ONE_PATH]
    if not batched:
        notes.append("batch is fixed at the example's: the model computes something else on twice the batch")
    if unseen:
        notes.append(f"not on the example's path, and left whole: {', '.join(unseen)}")
    return Program(
        graph=None,
        nodes=(),
        inputs=tuple(_describe(model, args, kwargs, dynamic=(0,) if batched else ())),
        example_args=args,
        example_kwargs=kwargs,
        fingerprint=_fingerprint(model),
        notes=tuple(notes),
        model=model,
        tracer="torch-pruning",
    )


def _takes_any_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the doubled batch gives the example's outputs twice."""

    def twice(x: Any) -> Any:
        return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x

    def tensors(result: Any) -> list[Tensor]:
        return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]

    with torch.no_grad():
        once = [twice(x) for x in tensors(model(*args, **kwargs))]
        try:
            both = tensors(model(*pytree.tree_map(twice, args), **pytree.tree_map(twice, dict(kwargs))))
        except Exception:  # any exception the user's forward raises
            return False
    return len(once) == len(both) and all(
        a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in zip(once, both, strict=True)
    )


def _off_the_path(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Return modules with their own parameters that the example does not run."""
    seen = set(trail(model, args, kwargs)[0])
    holders = (name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)))
    return [name for name in holders if name not in seen]


def trail(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Run the model and return the names of its modules in execution order, and the result.

    Two runs with equal trails are assumed to follow the same path.
    """
    names: list[str] = []

    def hook(name: str) -> Any:
        return lambda module, inputs: names.append(name)

    hooks = [m.register_forward_pre_hook(hook(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            result = model(*args, **kwargs)
    finally:
        for handle in hooks:
            handle.remove()
    return names, result


def _describe(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, dynamic: tuple[int, ...]
) -> Iterator[InputSpec]:
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    for name, value in bound.arguments.items():
        leaves = [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
        for k, leaf in enumerate(leaves):
            full, dtype = name if leaf is value else f"{name}_{k}", str(leaf.dtype).removeprefix("torch.")
            yield InputSpec(full, tuple(leaf.shape), dtype, dynamic if leaf.dim() else ())


def _fingerprint(model: nn.Module) -> str:
    """Digest of the modules, their settings and tensor shapes, but not of the path, which depends on the input."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {module.extra_repr()}\n".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
    return digest.hexdigest()


# -- cutting ---------------------------------------------------------------------------------------------------------


def slice_module(cut: Cut) -> CompactModel:
    """Return a copy of the user's module without the plan's dead units.

    Raises:
        UnsupportedModel: the forward does not run at the new sizes; the message names the user's source line.
    """
    module = _sliced(cut)
    with evaluating(module):
        _run_at_new_sizes(module, cut.program)
    return CompactModel(module, "module", "the forward as it stands runs at the new sizes", None)


def _sliced(cut: Cut) -> nn.Module:
    tensors, model = cut.tensors(), cut.program.model
    grouped = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, _ConvNd) and m.groups > 1}
    # Only depthwise grouped convolutions are ever cut, with one group per channel.
    depthwise = {c.tensor: tensors[c.tensor].shape[0] for c in cut.plan.cuts if c.tensor in grouped}
    module, _ = transplant(model, tensors, [], depthwise)
    return module


def _run_at_new_sizes(module: nn.Module, program: Program) -> None:
    try:
        with torch.no_grad():
            module(*program.example_args, **program.example_kwargs)
    except Exception as error:  # any exception the user's forward raises at unexpected sizes
        raise UnsupportedModel(
            f"the forward does not run at the new sizes, at {where_raised(error)}: {first_line(error)}; let that line "
            "take its sizes from the data (x.flatten(1), x.shape), or keep the layers before it whole with --keep"
        ) from error


# -- costs -----------------------------------------------------------------------------------------------------------


def cost_functions(program: Program, coupling: Coupling) -> Mapping[str, CostFn]:
    """Return functions that compute the cost of a pruned network, like `surgery.coupling.cost.cost_functions`.

    MACs are counted by running a cut copy along the example's path, which takes about a second per new plan.
    """
    known: dict[tuple[Any, ...], int] = {}

    def cut(dead: Mapping[str, Sequence[int]]) -> Cut:
        plan = plan_from_dead(coupling, dead, fingerprint=program.fingerprint, inputs=program.inputs)
        return Cut(program, coupling, plan)

    def macs(dead: Mapping[str, Sequence[int]]) -> int:
        key = tuple(sorted((name, tuple(units)) for name, units in dead.items() if units))
        if key not in known:
            module = slice_module(cut(dead)).module
            batch = program.inputs[0].shape[0] if program.inputs and program.inputs[0].shape else 1
            known[key] = count_macs(module, program.example_args, program.example_kwargs, batch=batch)
        return known[key]

    def params(dead: Mapping[str, Sequence[int]]) -> int:
        shapes = {name: list(parameter.shape) for name, parameter in program.model.named_parameters()}
        for c in cut(dead).plan.cuts:
            if c.tensor in shapes:
                shapes[c.tensor][c.axis] -= len(c.dead)
        return sum(prod(shape) for shape in shapes.values())

    return {"macs": macs, "params": params}


# -- checking --------------------------------------------------------------------------------------------------------

_ROUNDS = 4
_TRIES = 40
_SEEDS = 3


def check_module(cut: Cut, compact: CompactModel, *, seed: int = 0) -> CheckResult:
    """Verify a compact module against the dense one with consumers' dead input slices zeroed, on several inputs.

    Args:
        cut: the dense model and its plan.
        compact: result of `slice_module`.
        seed: seed of values and inputs.

    Raises:
        CheckFailed: outputs differ by more than 1e-10 in float64 or 1e-4 in float32, or the check is inconclusive.
    """
    program = cut.program
    with evaluating(program.model):
        path, _ = trail(program.model, program.example_args, program.example_kwargs)
    error64, varying, doubts = _on_distinct_values(cut, compact.module, path, seed=seed)
    notes = [ONE_PATH, *doubts]
    if varying < BLIND:
        raise CheckFailed(
            f"cannot tell: on well-conditioned values only {varying:.1e} of the output varies with the input; "
            "use an example input that reaches the output"
        )
    require(error64, torch.float64, "distinct, well-conditioned values", _ADVICE)
    real = copied(program.model)
    found = _compare(program, _mask(real, cut), compact.module, path, seed=seed, dtype=None)
    if found is None:
        raise CheckFailed(f"cannot tell on the real weights: {_OFF_PATH}")
    error, varying = found
    if varying < BLIND:
        notes.append(f"cannot tell on the real weights: only {varying:.1e} of their output varies with the input")
    else:
        require(error, _precision(real), "the real weights", _ADVICE)
    reference = f"dense model with the dead input slices of every layer zeroed, on {_ROUNDS} inputs"
    return CheckResult(0, error64, None if varying < BLIND else error, varying, reference, tuple(notes))


def masked_copy(cut: Cut) -> nn.Module:
    """Return a copy of the dense module in which units are treated as removed."""
    return _mask(copied(cut.program.model), cut)


_ADVICE = (
    "torch-pruning's groups do not hold for this model, or its forward chooses its way by values, and a smaller model "
    "may choose another; nothing was written; shrink a submodule that is without it, by --submodule"
)
_OFF_PATH = f"fewer than {_ROUNDS} of {_TRIES} inputs take the example's path through the model"


def _mask(dense: nn.Module, cut: Cut) -> nn.Module:
    """Zero, in place, the dead slices along contracted axes; returns the module."""
    tensors = dict(dense.named_parameters())
    with torch.no_grad():
        for c in cut.plan.cuts:
            if (c.tensor, c.axis) in cut.coupling.contracted:
                tensors[c.tensor].index_fill_(c.axis, torch.tensor(c.dead, device=tensors[c.tensor].device), 0.0)
    return dense


def _on_distinct_values(
    cut: Cut, compact: nn.Module, path: list[str], *, seed: int
) -> tuple[float, float, tuple[str, ...]]:
    """Compare in float64 on well-conditioned weights, or on the real ones if those do not take the example's path."""
    program = cut.program
    for attempt in range(_SEEDS + 1):
        dense = copied(program.model).double()
        if attempt < _SEEDS:
            _condition(program, dense, path, seed=seed + attempt)
        state = cut.kept({**dict(dense.named_parameters()), **dict(dense.named_buffers())})
        small = copied(compact).double()
        with torch.no_grad():
            for name, tensor in (*small.named_parameters(), *small.named_buffers()):
                tensor.copy_(state[name])
        found = _compare(program, _mask(dense, cut), small, path, seed=seed, dtype=torch.float64)
        if found is not None:
            elsewhere = ("well-conditioned values take another path: float64 was compared on the real weights",)
            return *found, elsewhere if attempt == _SEEDS else ()
    raise CheckFailed(f"cannot tell: {_OFF_PATH}")


def _condition(program: Program, model: nn.Module, path: list[str], *, seed: int) -> None:
    """Set every tensor to well-conditioned values, and batch norms to the statistics of their input."""
    generator = torch.Generator().manual_seed(seed)
    statistics = ((n, b) for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var")))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *statistics):
            if tensor.is_floating_point():
                tensor.copy_(conditioned(name, tensor, generator))
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(_settle) for norm in norms]
    try:
        with evaluating(model):
            for args, kwargs in _inputs(program, seed=seed, dtype=torch.float64, count=_TRIES):
                if trail(model, args, kwargs)[0] == path:
                    break
    finally:
        for hook in hooks:
            hook.remove()


def _settle(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0]
    dims = [a for a in range(x.dim()) if a != 1]
    mean, var = x.mean(dims), x.var(dims, unbiased=False)
    spread = torch.linspace(0.7, 1.3, len(mean), dtype=x.dtype, device=x.device)
    norm.running_mean.copy_(mean + 0.1 * var.sqrt() * (spread - 1))  # type: ignore[operator]
    norm.running_var.copy_(var * spread + 1e-3 * var.mean() + 1e-6)  # type: ignore[operator]


def _inputs(program: Program, *, seed: int, dtype: torch.dtype | None, count: int) -> Iterator[tuple[Any, Any]]:
    """Yield random inputs, alternating with inputs near the example, which are more likely to take its path."""
    callee = Callee.of(program)
    for k in range(count):
        drawn = sample_inputs(program, seed=seed + 100 + k, dtype=dtype)
        if k % 2:
            drawn = [_near(e, x) for e, x in zip(callee.leaves, drawn, strict=True)]
        yield callee.arguments(drawn)


def _near(example: Any, drawn: Any) -> Any:
    if not (isinstance(drawn, Tensor) and drawn.is_floating_point()):
        return drawn
    example = example.to(drawn.dtype)
    return example + 0.2 * example.abs().mean().clamp_min(1e-2) * drawn


def _compare(
    program: Program, dense: nn.Module, compact: nn.Module, path: list[str], *, seed: int, dtype: torch.dtype | None
) -> tuple[float, float] | None:
    """Return relative error and varying share over inputs that take the path; None if too few do."""
    wanted: list[list[Tensor]] = []
    got: list[list[Tensor]] = []
    with evaluating(dense), evaluating(compact), torch.no_grad():
        for args, kwargs in _inputs(program, seed=seed, dtype=dtype, count=_TRIES):
            taken, result = trail(dense, args, kwargs)
            if taken != path:
                continue
            wanted.append(_outputs(result))
            got.append(_outputs(compact(*args, **kwargs)))
            if len(wanted) == _ROUNDS:
                return relative_error(wanted, got)
    return None


def _outputs(result: Any) -> list[Tensor]:
    leaves = (x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point())
    return [x if x.dim() else x[None] for x in leaves]


def _precision(model: nn.Module) -> torch.dtype:
    found = [p.dtype for p in model.parameters() if p.dtype in TOLERANCE]
    return max(found, key=lambda d: TOLERANCE[d]) if found else torch.float32
