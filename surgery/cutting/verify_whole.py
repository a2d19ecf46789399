"""Compare the whole model around a compact submodule with the whole model around the masked dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.capture import Whole, evaluating
from surgery.core import (
    TOLERANCE,
    CheckResult,
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
from surgery.coupling import Cut
from surgery.errors import CheckFailed, SurgeryError


class _MaskedPart(nn.Module):
    """The masked dense submodule, run in the precision of its inputs."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut

    def __deepcopy__(self, memo: dict[int, Any]) -> _MaskedPart:
        return self  # shares the dense model's tensors, and does not modify them

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        dtype = next((x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state_of(self._cut.program).items()}
        return self._cut.masked_run(self._cut.reordered(state)).run(*leaves)


def masked_part(cut: Cut) -> nn.Module:
    """Return the masked dense submodule as a module."""
    return _MaskedPart(cut)


def check_whole(
    whole: Whole, reference: nn.Module, compact: nn.Module, verdict: CheckResult, program: Program
) -> CheckResult:
    """Compare the whole model around the compact submodule with that around the masked dense one.

    Args:
        whole: the dense model and its example call.
        reference: the masked submodule.
        compact: the whole model around the compact submodule.
        verdict: result of verifying the submodule alone.
        program: the dense submodule, traced.

    Returns:
        The result, with a note on what was compared.

    Raises:
        CheckFailed: the dense model runs, but the compact one fails or differs.
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


def _difference(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Return the largest difference relative to the output's largest magnitude, maximum over outputs."""
    if [x.shape for x in wanted] != [x.shape for x in got]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(wanted, got, strict=True) if a.numel()]
    return max((float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs), default=0.0)


# -- report ----------------------------------------------------------------------------------------------------------


def describe_whole(whole: Whole, compact: nn.Module, verdict: CheckResult) -> dict[str, Any]:
    """Return report data on the submodule: its name, the extent of the verification, and the whole model's costs."""
    inside = any(_INSIDE in note for note in verdict.notes)
    params = [count_params(whole.model), count_params(compact)]
    return {
        "name": whole.name,
        "checked": f"on its own {_INSIDE}" if inside else "on its own",
        "whole": {"params": params, "macs": _macs(whole, compact) if inside else None},
    }


def _macs(whole: Whole, compact: nn.Module) -> list[int] | None:
    """Return MACs of the whole example call, dense and compact; None if they cannot be counted."""
    if whole.example is None:
        return None
    try:
        return [count_macs(model, *whole.example.example) for model in (whole.model, compact)]
    except SurgeryError:
        return None


def notes_on_whole(data: Mapping[str, Any]) -> list[str]:
    """Return notes on which model the report's figures refer to, given the result of `describe_whole`."""
    params, macs = data["whole"]["params"], data["whole"]["macs"]
    counted = f"MACs of the example {macs[0]:,} → {macs[1]:,}" if macs else "its MACs cannot be counted"
    return [
        f"part '{data['name']}': the budget is the part's alone; "
        f"the whole model: parameters {params[0]:,} → {params[1]:,}, {counted}"
    ]
