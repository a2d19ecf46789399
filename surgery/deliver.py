"""What a finished run leaves behind: `save` exports, times and writes the set of files, `load` reads it back.

The set is described in `artefacts`, the report in docs/report.md. Every file but the report is a function of the model,
the seed and the arguments; the plan and the weights are so byte by byte.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch.utils import _pytree as pytree

from benchmarks import ort
from benchmarks.session import Settings
from exporters import onnx
from exporters.signature import bind
from surgery import __version__, artefacts, report
from surgery.errors import InvalidInput
from surgery.ir import Plan, Program, Report
from surgery.pipeline import Clock, Progress, Result, apply
from surgery.trace import evaluating, quiet


@dataclass(frozen=True, slots=True)
class Measurement:
    """How `save` exports and times.

    Attributes:
        opset: of the ONNX files; None: the exporter's own choice.
        threads: intra-op threads of ONNX Runtime.
        batch: items per timed run.
        runs: at most so many timed runs per model.
        seed: of the inputs and of the order in which models are timed.

    Raises:
        InvalidInput: a value is out of range.
    """

    opset: int | None = None
    threads: int = 1
    batch: int = 1
    runs: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        # Said before the long work: more threads than there are cores, a negative seed.
        Settings(batch=self.batch, threads=self.threads, seed=self.seed)


def save(
    result: Result, out: str | Path, measurement: Measurement | None = None, *, progress: Progress | None = None
) -> Report:
    """Export, time and write the set of files; `out` is replaced as a whole once everything is done.

    Args:
        result: what `shrink` returned.
        out: the folder to be; one that holds files of yours is refused.
        measurement: how to export and time.
        progress: told each step.

    Returns:
        The result's report with sizes, times and digests of the files: what report.json holds.

    Raises:
        InvalidInput: the folder cannot be written.
        UnsupportedModel: the model cannot be exported.
        CheckFailed: an exported model does not compute what the torch model computes.
    """
    how = measurement or Measurement()
    clock = Clock(progress)
    with artefacts.output_set(out) as folder, tempfile.TemporaryDirectory(prefix="surgery-") as scratch:
        result.plan.save(folder / artefacts.PLAN)
        (folder / artefacts.COMPACT_WEIGHTS).write_bytes(weights_bytes(result.model))
        with clock("save"):
            notes = _save_program(result, folder / artefacts.COMPACT_PT2)
        exports = _export(result, folder, Path(scratch), how.opset, clock)
        timing, doubts = _time(result, exports, how, clock)
        notes += [*_export_notes(exports), *doubts]
        data = report.measured(
            {**result.report, "stages_s": {**result.report["stages_s"], **clock.seconds}},
            onnx_bytes={name: export.bytes for name, export in exports.items()},
            timing=timing,
            files_sha256={path.name: _sha256(path) for path in sorted(folder.iterdir())},
            notes=notes,
        )
        written = Report(data)
        (folder / artefacts.REPORT).write_text(written.to_json(), encoding="utf-8")
        (folder / artefacts.REPORT_TEXT).write_text(report.render_markdown(data), encoding="utf-8")
    return written


def weights_bytes(module: torch.nn.Module) -> bytes:
    """Return the state dictionary in safetensors format: the same bytes for the same tensors, tied ones written out."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    return bytes(to_safetensors(state))


def load(folder: str | Path, dense_model: torch.nn.Module, example_inputs: Any = None) -> torch.nn.Module:
    """Return the finished compact model of a folder that `save` or `surgery shrink` wrote, with its weights.

    Args:
        folder: holds plan.json and compact.safetensors.
        dense_model: same architecture as was shrunk, any weights; left unchanged.
        example_inputs: as for `shrink`; None: made from the plan's input signature.

    Raises:
        PlanMismatch: there is no plan, or it was made for another architecture.
        InvalidInput: the weights are missing or do not fit.
    """
    place = Path(folder) / artefacts.COMPACT_WEIGHTS
    compact = apply(Plan.load(Path(folder) / artefacts.PLAN), dense_model, example_inputs)
    try:
        compact.load_state_dict(load_file(place))
    except (OSError, SafetensorError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise InvalidInput(f"{place}: not the weights of this plan's compact model ({why}); shrink it again") from error
    return compact


# The steps of `save`. ------------------------------------------------------------------------------------------------


def _save_program(result: Result, path: Path) -> list[str]:
    """Write the compact model as an exported program with a dynamic batch; returns why there is none, if so."""
    program = result.program
    if program.tracer != "export":
        return [f"no {path.name}: torch.export cannot capture this model"]
    args, kwargs = program.example_args, dict(program.example_kwargs)
    specs = iter(program.inputs)

    def axes(leaf: object) -> dict[int, Any] | None:
        if not isinstance(leaf, torch.Tensor):
            return None
        dims = next(specs).dynamic
        return {axis: torch.export.Dim.DYNAMIC if axis == 0 else torch.export.Dim.AUTO for axis in dims}

    by_argument, by_keyword = pytree.tree_map(axes, (args, kwargs))
    shapes = (*by_argument, *by_keyword.values())
    with evaluating(result.model), quiet(), torch.no_grad():
        exported = torch.export.export(result.model, args, kwargs, dynamic_shapes=shapes, strict=False)
        torch.export.save(exported, path)
    return []


def _export(
    result: Result, folder: Path, scratch: Path, opset: int | None, clock: Clock
) -> dict[str, onnx.ExportResult]:
    """Export the three models; the masked one is only there to be timed."""
    program, plan = result.program, result.plan
    subjects: dict[str, tuple[Callable[[], Any], Path]] = {
        "dense": (lambda: program.model, folder / artefacts.DENSE_ONNX),
        "masked": (lambda: _masked(program, plan), scratch / "masked.onnx"),
        "compact": (lambda: result.model, folder / artefacts.COMPACT_ONNX),
    }
    tensors = bind(program.model, program.example_args, program.example_kwargs).tensors
    origin = {
        "tool_version": __version__,
        "budget": f"{plan.budget.kind} {plan.budget.fraction:g}" if plan.budget else "none",
        "plan_sha256": plan.digest,
        "dense_fingerprint": program.fingerprint,
    }
    exports = {}
    for name, (subject, path) in subjects.items():
        with clock(f"export {name}"):
            exports[name] = onnx.export(
                subject(),
                program.example_args,
                path,
                example_kwargs=program.example_kwargs,
                opset=opset,
                dynamic_axes={name: spec.dynamic for name, spec in zip(tensors, program.inputs, strict=True)},
                metadata={**origin, "model": name},
                dynamo=program.tracer == "export",
            )
    return exports


def _masked(program: Program, plan: Plan) -> torch.nn.Module:
    """Return a copy of the dense model whose dead slices are zero: what masking buys, which is nothing."""
    model: torch.nn.Module = copy.deepcopy(program.model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for cut in plan.cuts:
            # The weights behind a parametrisation (weight norm) are divided by their norm: zeros would become NaN.
            if cut.tensor in parameters and "parametrizations" not in cut.tensor:
                parameters[cut.tensor].index_fill_(
                    cut.axis, torch.tensor(cut.dead).to(parameters[cut.tensor].device), 0
                )
    return model


def _export_notes(exports: Mapping[str, onnx.ExportResult]) -> list[str]:
    """Return each note once, with the models it is about."""
    about: dict[str, list[str]] = {}
    for name, export in exports.items():
        for note in export.notes:
            about.setdefault(note, []).append(name)
    return [f"ONNX ({', '.join(names)}): {note}" for note, names in about.items()]


def _time(
    result: Result, exports: Mapping[str, onnx.ExportResult], how: Measurement, clock: Clock
) -> tuple[dict[str, Any], list[str]]:
    """Return the timer's findings as JSON values, and a note where another batch than asked for was timed."""
    program = result.program
    tensors = bind(program.model, program.example_args, program.example_kwargs).tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fixed = not all(any(0 in axes for axes in export.dynamic.values()) for export in exports.values())
    batch = program.inputs[0].shape[0] if fixed else how.batch
    notes = [f"timed at batch {batch}, which the model fixes"] if batch != how.batch else []
    timing = ort.time(
        {name: export.path for name, export in exports.items()},
        batch=batch,
        threads=how.threads,
        max_runs=how.runs,
        baseline="dense",
        seed=how.seed,
        input_shapes=shapes,
        progress=clock.progress,
    )
    return json.loads(json.dumps(timing.to_dict())), notes


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
