"""Shrink one submodule of a larger model: find its inputs, and put what became of it back.

The whole model is run once, up to the point where it calls the part: nothing behind that point needs to run, so a
detector whose post-processing cannot be captured still has a backbone that can. The part's inputs and outputs keep
their sizes; it is checked on its own, and the whole model around it where that runs.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture import evaluating
from surgery.core import (
    TOLERANCE,
    CheckResult,
    Plan,
    Program,
    copied,
    count_macs,
    count_params,
    first_line,
    fresh,
    names_dtype,
    narrowest,
    state_of,
    where_raised,
)
from surgery.coupling import (
    Cut,
)
from surgery.errors import CheckFailed, InvalidInput, PlanMismatch, SurgeryError


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """A model, one part of it, and a call of that part.

    Attributes:
        model: the whole dense model, never changed.
        name: dotted path of the part.
        module: the part.
        args: positional inputs of the part.
        kwargs: keyword inputs of the part.
        example_args: the whole model's inputs, which led there; None where only the part's are known.
        example_kwargs: likewise.
    """

    model: nn.Module
    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    example_args: tuple[Any, ...] | None = None
    example_kwargs: Mapping[str, Any] | None = None

    @property
    def call(self) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
        """What a tracer is given."""
        return self.module, self.args, self.kwargs

    def around(self, part: nn.Module) -> nn.Module:
        """Return a copy of the whole model with another module in the part's place."""
        around: nn.Module = copied(self.model, {id(self.module): part})
        return around


class _Reached(BaseException):
    """Ends the run where the part is called; not an Exception, so that no handler of the user's takes it."""


def find(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule called `name`; raises InvalidInput with near names where there is none."""
    modules: dict[str, nn.Module] = {path: module for path, module in model.named_modules() if path}
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
        raise InvalidInput(f"--part {name!r} names no submodule; near names: {', '.join(near) or 'none'}")
    return modules[name]


def reach(model: nn.Module, name: str, example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> Whole:
    """Run the model until it calls the part, and return that call.

    Args:
        model: the whole model; left as it was, mode included.
        name: dotted path of the part.
        example_inputs: of the whole model: one argument, or a tuple of positional arguments.
        example_kwargs: of the whole model.

    Raises:
        InvalidInput: there is no such part, it is never called, or the model fails before it is.
    """
    part = find(model, name)
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((inputs, named))
        raise _Reached

    hook = part.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            model(*fresh(args), **fresh(kwargs))
    except _Reached:
        pass
    except Exception as error:  # whatever the user's forward raises
        raise InvalidInput(
            f"the model does not run as far as part '{name}': {where_raised(error)}: {first_line(error)}"
        ) from error
    finally:
        hook.remove()
    if not found:
        raise InvalidInput(f"part '{name}' is never called on these inputs; name a submodule that forward runs")
    inputs, named = fresh(found[0])
    return Whole(model, name, part, inputs, named, args, kwargs)


def plain_arguments(program: Program) -> dict[str, Any]:
    """Return what a plan records of keyword arguments that are no tensors: ``{"arguments": ...}``, or nothing."""
    plain = {k: v for k, v in program.example_kwargs.items() if v is None or isinstance(v, (bool, int, float, str))}
    return {"arguments": plain} if plain else {}


def of_plan(
    plan: Plan, dense_model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> Whole | None:
    """Return the part that the plan is for, with inputs from the plan where none of the whole model are given."""
    name = plan.settings.get("part")
    if name is None:
        return None
    if example_inputs is not None:
        return reach(dense_model, name, example_inputs, example_kwargs)
    module = find(dense_model, name)
    return Whole(dense_model, name, module, *inputs_of(plan, module))


def inputs_of(plan: Plan, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs of the plan's signature, on the model's device: (args, kwargs)."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for spec in plan.inputs:
        dtype = getattr(torch, spec.dtype.removeprefix("torch."))
        values = torch.randn(spec.shape, generator=generator) if dtype.is_floating_point else torch.zeros(spec.shape)
        tensors[spec.name] = values.to(device=device, dtype=dtype)
    parameters, plain = inspect.signature(model.forward).parameters, dict(plan.settings.get("arguments", {}))
    if list(tensors) == list(parameters)[: len(tensors)]:
        keyword = {name for name in tensors if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY}
        args = tuple(value for name, value in tensors.items() if name not in keyword)
        return args, {**{name: tensors[name] for name in keyword}, **plain}
    if tensors.keys() <= parameters.keys():
        return (), {**tensors, **plain}
    raise PlanMismatch(
        f"the plan's inputs ({', '.join(tensors)}) are not the parameters of this {type(model).__name__}'s forward "
        f"({', '.join(parameters)}): it was made for another architecture; if not, pass example_inputs"
    )


# -- checking the whole ----------------------------------------------------------------------------------------------


class _Masked(nn.Module):
    """The dense part, run so that removed units count as removed, in the precision of its inputs."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut

    def __deepcopy__(self, memo: dict[int, Any]) -> _Masked:
        return self  # holds the dense model's own tensors, and changes nothing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        dtype = next((x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state_of(self._cut.program).items()}
        return self._cut.masked_run(self._cut.reordered(state)).run(*leaves)


def masked_part(cut: Cut) -> nn.Module:
    """Return a module that computes what the dense part computes when removed units count as removed."""
    return _Masked(cut)


def check(
    whole: Whole, reference: nn.Module, compact: nn.Module, verdict: CheckResult, program: Program
) -> CheckResult:
    """Compare the whole model around the compact part with the whole model around the masked dense part.

    Args:
        whole: the dense model and its example call.
        reference: the masked part.
        compact: the whole model around the compact part.
        verdict: what the part's own check found.
        program: the dense part, traced.

    Returns:
        The verdict, with a note on what was compared.

    Raises:
        CheckFailed: the dense model runs, and the compact one does not or returns something else.
    """
    calls: list[int] = []
    try:
        with_reference = whole.around(reference)
        find(with_reference, whole.name).register_forward_pre_hook(lambda module, inputs: calls.append(1))
        wanted, dtype = _run_whole(whole, with_reference)
    except Exception as error:  # the dense model need not run beyond its part: a missing operator, say
        why = f"the whole model does not run here ({first_line(error)})"
        return replace(verdict, notes=(*verdict.notes, f"part '{whole.name}' was checked on its own only: {why}"))
    try:
        got, _ = _run_whole(whole, compact, dtype)
    except Exception as error:  # whatever the user's forward raises
        raise CheckFailed(
            f"the whole model does not run around the compact part '{whole.name}': {where_raised(error)}: "
            f"{first_line(error)}; nothing was written"
        ) from error
    inside = narrowest(program) if program.has_graph and names_dtype(program) else dtype
    difference, allowed = _difference(wanted, got), max(TOLERANCE[dtype], TOLERANCE[inside])
    if not difference <= allowed:
        raise CheckFailed(
            f"around the compact part '{whole.name}' the whole model differs by {difference:.1e} from what it computes "
            f"around the masked one (allowed: {allowed:.0e}); nothing was written; please report this model"
        )
    times = "; it is called several times, the first call's inputs were used" if len(calls) > 1 else ""
    note = f"part '{whole.name}' was checked on its own {_INSIDE} (difference {difference:.1e}){times}"
    return replace(verdict, notes=(*verdict.notes, note))


_INSIDE = "and in the whole model"


def _run_whole(whole: Whole, model: nn.Module, dtype: torch.dtype | None = None) -> tuple[list[Tensor], torch.dtype]:
    """Run in float64 where the model permits, else as it is; outputs flat."""
    if dtype is None:
        try:
            return _run_whole(whole, model, torch.float64)
        except Exception:  # whatever the user's forward raises, a dtype it insists on above all
            dtype = next((p.dtype for p in whole.model.parameters() if p.dtype in TOLERANCE), torch.float32)
    subject = copied(model).to(dtype)
    example = (whole.example_args or (), dict(whole.example_kwargs or {}))
    args, kwargs = pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, fresh(example)
    )
    with evaluating(subject), torch.no_grad():
        result = subject(*args, **kwargs)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)], dtype


def _difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference over the output's largest magnitude, worst over outputs."""
    if [x.shape for x in wanted] != [x.shape for x in got]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(wanted, got, strict=True) if a.numel()]
    return max((float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs), default=0.0)


# -- what the report says --------------------------------------------------------------------------------------------


def describe(whole: Whole, compact: nn.Module, verdict: CheckResult) -> dict[str, Any]:
    """Return what the report says of the part: its name, how far the check went, and the whole model's figures."""
    inside = any(_INSIDE in note for note in verdict.notes)
    params = [count_params(whole.model), count_params(compact)]
    return {
        "name": whole.name,
        "checked": f"on its own {_INSIDE}" if inside else "on its own",
        "whole": {"params": params, "macs": _macs(whole, compact) if inside else None},
    }


def _macs(whole: Whole, compact: nn.Module) -> list[int] | None:
    """MACs of the whole example call, dense and compact; None where the whole cannot be counted."""
    args, kwargs = whole.example_args or (), whole.example_kwargs
    try:
        return [count_macs(model, args, kwargs) for model in (whole.model, compact)]
    except SurgeryError:
        return None


def notes(data: Mapping[str, Any]) -> list[str]:
    """Say of which model the report's figures are, given what `describe` returned."""
    params, macs = data["whole"]["params"], data["whole"]["macs"]
    counted = f"MACs of the example {macs[0]:,} → {macs[1]:,}" if macs else "its MACs cannot be counted"
    return [
        f"part '{data['name']}': the budget is the part's alone; "
        f"the whole model: parameters {params[0]:,} → {params[1]:,}, {counted}"
    ]
