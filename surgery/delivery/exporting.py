"""A result's ONNX files: dense, masked and compact, of the whole model or of the part that was shrunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from exporters import onnx
from exporters.signature import bind
from surgery import __version__
from surgery.core import Clock
from surgery.cutting import masked
from surgery.delivery import artifacts as artefacts
from surgery.errors import CheckFailed, InvalidInput, UnsupportedModel
from surgery.pipeline import Result


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is written and timed: the model that was shrunk, or the whole one around the part that was."""

    dense: torch.nn.Module
    around: Callable[[torch.nn.Module], torch.nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic: tuple[tuple[int, ...], ...] | None
    batch: int

    @classmethod
    def of(cls, result: Result, *, whole: bool) -> Subject:
        """The whole model, of whose dynamic axes nothing is known but that the first may be the batch; or the part."""
        program = result.program
        if whole and result.whole is not None:
            args, kwargs = result.whole.example.example if result.whole.example is not None else ((), {})
            first = next((x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)), None)
            batch = first.shape[0] if first is not None and first.dim() else 1
            return cls(result.whole.model, result.whole.around, args, kwargs, None, batch)
        dynamic = tuple(spec.dynamic for spec in program.inputs)
        batch = program.inputs[0].shape[0] if program.inputs and program.inputs[0].shape else 1
        dense = program.dense.model
        return cls(dense, lambda module: module, program.example_args, program.example_kwargs, dynamic, batch)

    def axes(self) -> dict[str, tuple[int, ...]] | None:
        """Input name → dynamic axes; None where they are not known."""
        if self.dynamic is None:
            return None
        return dict(zip(bind(self.dense, self.args, self.kwargs).tensors, self.dynamic, strict=True))


def export(
    result: Result, folder: Path, scratch: Path, settings: onnx.ExportSettings, clock: Clock
) -> tuple[dict[str, onnx.ExportResult], Subject, list[str]]:
    """Export the three models: around the part that was shrunk, if any and if possible, else what was shrunk."""
    if result.whole is None:
        subject = Subject.of(result, whole=False)
        return _three(result, subject, folder, scratch, settings, clock), subject, []
    name = result.whole.name
    try:
        subject = Subject.of(result, whole=True)
        exports = _three(result, subject, folder, scratch, settings, clock)
        return exports, subject, [f"ONNX and times: the whole model around part '{name}'"]
    except (UnsupportedModel, InvalidInput, CheckFailed) as error:
        subject = Subject.of(result, whole=False)
        exports = _three(result, subject, folder, scratch, settings, clock)
        return exports, subject, [f"ONNX and times: the part alone, '{name}'; the whole model cannot be had: {error}"]


def _three(
    result: Result, subject: Subject, folder: Path, scratch: Path, settings: onnx.ExportSettings, clock: Clock
) -> dict[str, onnx.ExportResult]:
    """Export dense, masked and compact; the masked one is only there to be timed."""
    program, plan = result.program, result.plan
    models: dict[str, tuple[Callable[[], Any], Path]] = {
        "dense": (lambda: subject.dense, folder / artefacts.DENSE_ONNX),
        "masked": (lambda: subject.around(masked(result.cut)), scratch / "masked.onnx"),
        "compact": (lambda: subject.around(result.compact.module), folder / artefacts.COMPACT_ONNX),
    }
    origin = {
        "tool_version": __version__,
        "budget": f"{plan.budget.kind} {plan.budget.amount:g}" if plan.budget else "none",
        "plan_sha256": plan.digest,
        "dense_fingerprint": program.fingerprint,
    }
    if (predicted := plan.settings.get("predicted_latency_ratio")) is not None:
        origin["predicted_latency_ratio"] = f"{predicted:.6f}"  # what acceptances on the device are compared with
    exports = {}
    for name, (model, path) in models.items():
        with clock(f"export {name}"):
            exports[name] = onnx.export(
                model(),
                subject.args,
                path,
                replace(settings, dynamo=program.has_graph),
                example_kwargs=subject.kwargs,
                dynamic_axes=subject.axes(),
                metadata={**origin, "model": name},
            )
    return exports


def whole_figures(result: Result, subject: Subject) -> dict[str, Any]:
    """Return the table's rows with parameters and MACs of the whole model, where that is what is written and timed."""
    if result.whole is None or subject.dense is not result.whole.model:
        return {}
    counts = result.report["part"]["whole"]
    side = {"dense": 0, "masked": 0, "compact": 1}
    return {
        "models": [
            {
                **row,
                "parameters": counts["params"][side[row["name"]]],
                "macs": counts["macs"][side[row["name"]]] if counts["macs"] else None,
            }
            for row in result.report["models"]
        ]
    }


def fixed_sizes(result: Result, subject: Subject, export: onnx.ExportResult) -> list[str]:
    """Return which images' height and width the file fixes, where the program's own notes do not say so already."""
    if subject.dynamic is not None and result.program.has_graph:
        return []
    tensors = bind(subject.dense, subject.args, subject.kwargs).tensors
    images = [n for n, t in tensors.items() if t.dim() == 4 and not {2, 3} & set(export.dynamic.get(n, {}))]
    return [f"ONNX: height and width of input '{name}' are fixed at the example's" for name in images]


def notes_of(exports: Mapping[str, onnx.ExportResult]) -> list[str]:
    """Return each note once, with the models it is about."""
    about: dict[str, list[str]] = {}
    for name, export in exports.items():
        for note in export.notes:
            about.setdefault(note, []).append(name)
    return [f"ONNX ({', '.join(names)}): {note}" for note, names in about.items()]
