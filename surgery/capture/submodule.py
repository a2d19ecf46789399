"""Find a submodule of a larger model, and the inputs it is called with.

The whole model is run once, up to the call of the submodule. Nothing after that call needs to run, so the backbone of a
detector can be captured even if its post-processing cannot.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import psutil
import torch
from torch import nn

from surgery.capture.tracing import evaluating
from surgery.core import Callee, Plan, Program, copied, first_line, fresh, where_raised
from surgery.errors import InvalidInput, PlanMismatch


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """The whole dense model, and the submodule to be pruned with the call the model makes of it."""

    model: nn.Module
    name: str
    part: Callee
    example: Callee | None = None  # the whole model's example call, if known

    @property
    def call(self) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
        """The arguments for a tracer."""
        return self.part.module, *self.part.example

    def around(self, part: nn.Module) -> nn.Module:
        """Return a copy of the whole model with the submodule replaced."""
        around: nn.Module = copied(self.model, {id(self.part.module): part})
        return around


class _Reached(BaseException):
    """Ends the run at the call of the submodule; not an Exception, so that the user's handlers do not catch it."""


def find(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule called `name`; raises InvalidInput with similar names if there is none."""
    modules: dict[str, nn.Module] = {path: module for path, module in model.named_modules() if path}
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
        similar = f"; similar names: {', '.join(near)}" if near else ""
        raise InvalidInput(f"--submodule {name!r} names no submodule{similar}")
    return modules[name]


def reach(model: nn.Module, name: str, example_inputs: Any, example_kwargs: Mapping[str, Any] | None) -> Whole:
    """Run the whole model on its inputs until it calls the submodule; InvalidInput if it never does."""
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
    except Exception as error:  # any exception the user's forward raises
        raise InvalidInput(
            f"the model does not run as far as part '{name}': {where_raised(error)}: {first_line(error)}"
        ) from error
    finally:
        hook.remove()
    if not found:
        raise InvalidInput(f"part '{name}' is never called on these inputs; name a submodule that forward runs")
    inputs, named = fresh(found[0])
    return Whole(model, name, Callee(part, inputs, named), Callee(model, args, kwargs))


def plain_arguments(program: Program) -> dict[str, Any]:
    """Return the non-tensor keyword arguments recorded in a plan: ``{"arguments": ...}``, or an empty dict."""
    plain = {k: v for k, v in program.example_kwargs.items() if v is None or isinstance(v, (bool, int, float, str))}
    return {"arguments": plain} if plain else {}


def of_plan(
    plan: Plan, dense_model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None
) -> Whole | None:
    """Return the submodule of the plan, with inputs from the plan if none of the whole model are given."""
    name = plan.settings.get("part")
    if name is None:
        return None
    if example_inputs is not None:
        return reach(dense_model, name, example_inputs, example_kwargs)
    module = find(dense_model, name)
    return Whole(dense_model, name, Callee(module, *inputs_of(plan, module)))


def inputs_of(plan: Plan, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs of the plan's signature, on the model's device: (args, kwargs)."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for spec in plan.inputs:
        dtype = getattr(torch, spec.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise PlanMismatch(f"the plan's input '{spec.name}' has the type {spec.dtype!r}, which torch does not have")
        needed, memory = prod(spec.shape) * dtype.itemsize, psutil.virtual_memory().total
        if needed > memory:
            raise PlanMismatch(
                f"the plan's input '{spec.name}' of shape {spec.shape} takes {needed / 2**30:,.0f} GiB and this "
                f"machine has {memory / 2**30:,.0f}; pass example inputs, or make a new plan if the file was edited"
            )
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
