"""Compact networks stored in a folder between steps: planned on one machine, distilled possibly on another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from benchmarks.studies.latency.bench import loop_of, tell
from benchmarks.studies.latency.rivals import Subject
from surgery.capture import trace
from surgery.config import Budget
from surgery.core import Plan
from surgery.coupling import Cut, couple, drop
from surgery.cutting import masked


@dataclass(frozen=True, slots=True, eq=False)
class Ours:
    """A compact network.

    Attributes:
        module: in eval mode.
        plan: what was cut.
        facts: MACs, plan refinement, distillation.
    """

    module: nn.Module
    plan: Plan
    facts: Mapping[str, Any]


def planned(
    name: str, subject: Subject, images: Tensor, budget: Budget, folder: Path, *, deploy: str = "fp32", threads: int = 1
) -> Ours:
    """Plan, cut and reconstruct by images; taken from the folder where that was done before."""
    if not holds(folder, name):
        tell(name)
        result = surgery.shrink(
            subject.module,
            subject.inputs,
            surgery.recipe(budget=budget, data=images, recover="reconstruct", deploy=deploy, threads=threads),
        )
        facts: dict[str, Any] = {"macs": round(subject.kept(result.model), 4)}
        if budget.latency is not None:
            facts |= {"planned_for": deploy, "loop": loop_of(result.report)}
        ours = Ours(result.model, result.plan, facts)
        keep(folder, name, ours)
        return ours
    return kept(folder, name, subject)


def zeroed(subject: Subject, plan: Plan) -> nn.Module:
    """Return the dense network with zeros in place of what the plan removes."""
    program = drop(trace(subject.module, subject.inputs), plan.dropped)
    return masked(Cut(program, couple(program, keep=tuple(plan.settings.get("keep", ()))), plan))


def shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that a row of a table holds."""
    return {key: value for key, value in facts.items() if key not in ("loop", "marks")}


# The folder. ---------------------------------------------------------------------------------------------------------


def holds(folder: Path, name: str) -> bool:
    """Tell whether a network is there whole."""
    return (folder / f"{name}.json").is_file()


def keep(folder: Path, name: str, ours: Ours) -> None:
    """Write the plan, the weights and, last, the facts."""
    ours.plan.save(folder / f"{name}.plan.json")
    keep_weights(folder, name, ours.module, ours.facts)


def keep_weights(folder: Path, name: str, module: nn.Module, facts: Mapping[str, Any]) -> None:
    """Write the weights and, last, the facts of a network whose shape is known elsewhere."""
    state = {key: x.detach().clone().contiguous() for key, x in module.state_dict().items()}
    save_file(state, folder / f"{name}.safetensors")
    partial = folder / f"{name}.json.partial"
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / f"{name}.json")


def kept(folder: Path, name: str, subject: Subject) -> Ours:
    """Return what `keep` wrote of a network that was cut from this one."""
    plan = Plan.load(folder / f"{name}.plan.json")
    module = surgery.apply(plan, subject.module, subject.inputs).eval()
    return Ours(module, plan, with_weights(folder, name, module))


def with_weights(folder: Path, name: str, module: nn.Module) -> dict[str, Any]:
    """Put the weights that `keep_weights` wrote into a network in place; returns the facts."""
    module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    facts: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return facts
