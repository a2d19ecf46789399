"""Report data: the contents of report.json, documented in docs/reference/report.md.

`describe` returns decisions and verification, `with_origin` adds the model's origin.
Costs and times are arguments, so that a report can be rendered from its JSON without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from surgery import __version__

if TYPE_CHECKING:
    import torch

    from surgery.core import CheckResult, CompactModel, Plan
    from surgery.coupling import Cut
    from surgery.inputs import LoadedModel

SCHEMA = 1
VERDICT = "accuracy unknown: not fit to deploy"


def describe(
    cut: Cut,
    costs: Mapping[str, tuple[int, int]],
    loop: Any = None,
    *,
    compact: CompactModel | None = None,
    verdict: CheckResult | None = None,
) -> dict[str, Any]:
    """Return the report on a decision: what is pruned, what is left untouched and why, and the verification.

    `costs`: ``params``, ``macs`` and ``channels`` → (dense, kept); `loop`: log of a latency budget's refinement;
    `compact` and `verdict`: None if not cut yet (`surgery show`).
    """
    program, coupling, plan = cut.program, cut.coupling, cut.plan
    kept = None
    if compact is not None:
        kept = {"kind": compact.kind, "why": compact.why, "lost_in_training": list(compact.lost_in_training)}
    rows = [
        {"name": name, "parameters": costs["params"][k], "macs": costs["macs"][k], "onnx_bytes": None}
        for name, k in (("dense", 0), ("masked", 0), ("compact", 1))
    ]
    return {
        "schema": SCHEMA,
        "tool": {"name": "model-surgery", "version": __version__},
        "accuracy": {"status": "unknown", "verdict": VERDICT, "next_command": None},
        "model": {
            "name": type(program.dense.model).__name__,
            "weights": None,
            "fingerprint": program.fingerprint,
            "tracer": program.tracer,
            "inputs": [as_json(spec) for spec in program.inputs],
        },
        "budget": _budget(plan, costs),
        "latency": json.loads(json.dumps(loop.to_dict())) if loop is not None else None,
        "settings": json.loads(json.dumps(dict(plan.settings))),
        "plan": {"digest": plan.digest, "notes": list(plan.notes), "reasons": dict(plan.reasons)},
        "compact": kept,
        "models": rows,
        "groups": [
            {
                "name": group.name,
                "from": group.size,
                "to": group.size - len(plan.dead.get(group.name, ())),
                "inexact": group.inexact,
                "sites": [f"{site.tensor}:{site.axis}" for site in group.sites],
            }
            for group in coupling.groups
        ],
        "dropped": [{"name": n, "constant": bool(x), "reason": plan.reasons.get(n)} for n, x in plan.dropped.items()],
        "frozen": [as_json(frozen) for frozen in coupling.frozen],
        "check": as_json(verdict) if verdict else None,
        **{"timing": None, "command": None, "files": {}, "stages_s": {}, "notes": list(program.notes)},
    }


def _budget(plan: Plan, costs: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
    if plan.budget is None or plan.budget.is_latency:
        return None
    kind, (dense, kept) = plan.budget.kind, costs[plan.budget.kind]
    share = kept / dense if dense else 1.0
    return {"kind": kind, "fraction": plan.budget.amount, "dense": dense, "kept": kept, "kept_fraction": share}


def with_origin(
    data: Mapping[str, Any], model: LoadedModel, *, next_command: str | None = None, command: str | None = None
) -> dict[str, Any]:
    """Return the report with the model's origin, the command line and the command to run next."""
    return {
        **data,
        "accuracy": {**data["accuracy"], "next_command": next_command},
        "model": {**data["model"], "name": model.name, "weights": model.weights},
        "command": command,
        "notes": [*model.warnings, *model.notes, *data["notes"]],
    }


def as_json(value: Any) -> Any:
    """Return a dataclass as JSON values, with tuples as lists."""
    return json.loads(json.dumps(asdict(value)))


def layer_shapes(dense: torch.nn.Module, compact: torch.nn.Module) -> list[dict[str, Any]]:
    """Return the shape of each weight of two axes or more, before and after (None for a removed one)."""
    kept = {name: list(x.shape) for name, x in compact.named_parameters()}
    shapes = {name: list(x.shape) for name, x in dense.named_parameters() if x.dim() > 1}
    return [{"name": name, "dense": shape, "compact": kept.get(name)} for name, shape in shapes.items()]


def deployed_precision(data: Mapping[str, Any]) -> str:
    """Return the precision that a latency budget refers to; `fp32` for other budgets."""
    return str(((data["latency"] or {}).get("device") or {}).get("precision", "fp32"))
