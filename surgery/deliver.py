"""What a finished run leaves behind: `save` exports, times and writes the set of files, `load` reads it back.

The set is described in `artefacts`, the report in docs/report.md. Every file but the report is a function of the model,
the seed and the arguments; the plan and the weights are so byte by byte.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from exporters.ort_format import to_ort
from exporters.quantize import Quantised
from exporters.runtimes import Reader, require_readable
from exporters.session import OnnxModel
from exporters.signature import bind
from surgery import __version__, artefacts, precisions, report, report_steps
from surgery.cut import masked
from surgery.errors import CheckFailed, InvalidInput, UnsupportedModel
from surgery.evaluate import Evaluate
from surgery.ir import Plan, Report
from surgery.pipeline import Result, apply
from surgery.precisions import Precisions
from surgery.recover.agreement import Agreement
from surgery.request import Clock, Progress
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
        precisions: in which files are written.
        min_ort: version of the oldest ONNX Runtime that is to read the files; None: 1.17.
        formats: `onnx`, and `ort` for compact files in ONNX Runtime's own format beside it.

    Raises:
        InvalidInput: a value is out of range.
    """

    opset: int | None = None
    threads: int = 1
    batch: int = 1
    runs: int = 2000
    seed: int = 0
    precisions: Precisions = field(default_factory=Precisions)
    min_ort: str | None = None
    formats: tuple[str, ...] = ("onnx",)

    def __post_init__(self) -> None:
        # Said before the long work: more threads than there are cores, a negative seed.
        Settings(batch=self.batch, threads=self.threads, seed=self.seed)
        if wrong := [name for name in self.formats if name not in ("onnx", "ort")]:
            raise InvalidInput(f"format '{wrong[0]}': there are onnx and ort")
        if self.min_ort is not None:
            Reader.of(self.min_ort)


def save(
    result: Result,
    out: str | Path,
    measurement: Measurement | None = None,
    *,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> Report:
    """Export, time and write the set of files; `out` is replaced as a whole once everything is done.

    Args:
        result: what `shrink` returned.
        out: the folder to be; one that holds files of yours is refused.
        measurement: how to export and time.
        evaluate: a function of a model that returns figures by name; it judges the files in ONNX Runtime.
        progress: told each step.

    Returns:
        The result's report with sizes, times and digests of the files: what report.json holds.

    Raises:
        InvalidInput: the folder cannot be written.
        UnsupportedModel: the model cannot be exported.
        CheckFailed: an exported model does not compute what the torch model computes.
    """
    if not isinstance(result, Result):
        raise InvalidInput(f"save takes what surgery.shrink returned, not an object of type {type(result).__name__}")
    how = measurement or Measurement()
    if not isinstance(how, Measurement):
        raise InvalidInput(f"measurement is of type {type(how).__name__}; give a surgery.deliver.Measurement")
    clock, regained = Clock(progress), result.recovery
    precisions.refuse_without_images(how.precisions, regained.seen if regained is not None else None)
    with artefacts.output_set(out) as folder, tempfile.TemporaryDirectory(prefix="surgery-") as scratch:
        result.plan.save(folder / artefacts.PLAN)
        (folder / artefacts.COMPACT_WEIGHTS).write_bytes(weights_bytes(result.model))
        with clock("save"):
            notes = _save_program(result, folder / artefacts.COMPACT_PT2)
        exports, subject, where = _export(result, folder, Path(scratch), how, clock)
        fewer = _in_fewer_bits(result, subject, exports, folder, how, clock)
        timed = {**{name: export.path for name, export in exports.items()}, **{n: f.path for n, f in fewer.items()}}
        if "ort" in how.formats:
            with clock("ort format"):
                _in_ort_format(subject, timed)
        timing, doubts = _time(subject, exports, timed, how, clock)
        notes += [*where, *_export_notes(exports), *_fixed_sizes(result, subject, exports["compact"]), *doubts]
        notes += precisions.notes(fewer, timing)
        data = report.measured(
            {
                **result.report,
                **_whole_figures(result, subject),
                "stages_s": {**result.report["stages_s"], **clock.seconds},
            },
            onnx_bytes={name: export.bytes for name, export in exports.items()},
            timing=timing,
            files_sha256={path.name: _sha256(path) for path in sorted(folder.iterdir())},
            notes=notes,
        )
        data["models"] = precisions.rows(data["models"], fewer, _judged(result, subject, fewer, how, clock), timing)
        if evaluate is not None:
            with clock("evaluate"):
                data["evaluation"] = {
                    name: evaluate(OnnxModel(path, threads=how.threads))
                    for name, path in timed.items()
                    if name != "masked"
                }
        if (drawing := report_steps.chart(data)) is not None:
            (folder / artefacts.RECOVERY).write_bytes(drawing)
            data["files"][artefacts.RECOVERY] = _sha256(folder / artefacts.RECOVERY)
        written = Report(data)
        (folder / artefacts.REPORT).write_text(written.to_json(), encoding="utf-8")
        (folder / artefacts.REPORT_TEXT).write_text(report.render_markdown(data), encoding="utf-8")
    return written


def weights_bytes(module: torch.nn.Module) -> bytes:
    """Return the state dictionary in safetensors format: the same bytes for the same tensors, tied ones written out."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    return bytes(to_safetensors(state))


def load(
    folder: str | Path,
    dense_model: torch.nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Return the finished compact model of a folder that `save` or `surgery shrink` wrote, with its weights.

    Args:
        folder: holds plan.json and compact.safetensors.
        dense_model: same architecture as was shrunk, any weights; left unchanged.
        example_inputs: as for `shrink`; None: made from the plan's input signature.
        example_kwargs: as for `shrink`; numbers, strings and flags are in the plan.

    Raises:
        PlanMismatch: there is no plan, or it was made for another architecture.
        InvalidInput: the weights are missing or do not fit.
    """
    if not isinstance(folder, (str, Path)):
        raise InvalidInput(f"the folder is of type {type(folder).__name__}; give the path that save wrote to")
    place = Path(folder) / artefacts.COMPACT_WEIGHTS
    plan = Plan.load(Path(folder) / artefacts.PLAN)
    compact = apply(plan, dense_model, example_inputs, example_kwargs=example_kwargs)
    try:
        compact.load_state_dict(load_file(place))
    except (OSError, SafetensorError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise InvalidInput(f"{place}: not the weights of this plan's compact model ({why}); shrink it again") from error
    return compact


# The steps of `save`. ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """What is written and timed: the model that was shrunk, or the whole one around the part that was."""

    dense: torch.nn.Module
    around: Callable[[torch.nn.Module], torch.nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic: tuple[tuple[int, ...], ...] | None
    batch: int

    @classmethod
    def of(cls, result: Result, *, whole: bool) -> _Subject:
        """The whole model, of whose dynamic axes nothing is known but that the first may be the batch; or the part."""
        program = result.program
        if whole and result.whole is not None:
            args, kwargs = result.whole.example_args or (), result.whole.example_kwargs or {}
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
    module = result.compact.module
    with evaluating(module), quiet(), torch.no_grad():
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        for node in exported.graph.nodes:  # they name files of this machine
            node.meta.pop("stack_trace", None)
        torch.export.save(exported, path)
    return [f"{path.name} holds the part '{result.whole.name}' alone"] if result.whole else []


def _export(
    result: Result, folder: Path, scratch: Path, how: Measurement, clock: Clock
) -> tuple[dict[str, onnx.ExportResult], _Subject, list[str]]:
    """Export the three models: around the part that was shrunk, if any and if possible, else what was shrunk."""
    if result.whole is None:
        subject = _Subject.of(result, whole=False)
        return _export_three(result, subject, folder, scratch, how, clock), subject, []
    name = result.whole.name
    try:
        subject = _Subject.of(result, whole=True)
        exports = _export_three(result, subject, folder, scratch, how, clock)
        return exports, subject, [f"ONNX and times: the whole model around part '{name}'"]
    except (UnsupportedModel, InvalidInput, CheckFailed) as error:
        subject = _Subject.of(result, whole=False)
        exports = _export_three(result, subject, folder, scratch, how, clock)
        return exports, subject, [f"ONNX and times: the part alone, '{name}'; the whole model cannot be had: {error}"]


def _export_three(
    result: Result, subject: _Subject, folder: Path, scratch: Path, how: Measurement, clock: Clock
) -> dict[str, onnx.ExportResult]:
    """Export dense, masked and compact; the masked one is only there to be timed."""
    program, plan = result.program, result.plan
    models: dict[str, tuple[Callable[[], Any], Path]] = {
        "dense": (lambda: subject.dense, folder / artefacts.DENSE_ONNX),
        "masked": (lambda: subject.around(masked(program, plan, result.coupling)), scratch / "masked.onnx"),
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
                example_kwargs=subject.kwargs,
                opset=how.opset,
                min_ort=how.min_ort,
                dynamic_axes=subject.axes(),
                metadata={**origin, "model": name},
                dynamo=program.tracer == "export",
            )
    return exports


def _in_fewer_bits(
    result: Result,
    subject: _Subject,
    exports: Mapping[str, onnx.ExportResult],
    folder: Path,
    how: Measurement,
    clock: Clock,
) -> dict[str, Quantised]:
    """Write the dense and the compact file in the precisions of fewer bits."""
    if not how.precisions.fewer:
        return {}
    assert result.recovery is not None and result.recovery.seen is not None, "refused before"
    whole = result.whole is not None and subject.dense is result.whole.model
    if whole and not result.recovery.seen.given:
        raise InvalidInput("--precision: the whole model's own inputs are not known; leave --part or --precision out")
    sources = {name: exports[name].path for name in ("dense", "compact")}
    with clock("fewer bits"):
        found = precisions.write(sources, folder, how.precisions, result.recovery.seen, whole=whole)
    if how.min_ort is not None:
        for file in found.values():
            require_readable(file.path, Reader.of(how.min_ort))
    return found


def _in_ort_format(subject: _Subject, files: Mapping[str, Path]) -> None:
    """Write the compact files in ONNX Runtime's own format beside them."""
    tensors = bind(subject.dense, subject.args, subject.kwargs).tensors
    inputs = {name: tensor.numpy(force=True) for name, tensor in tensors.items()}
    for name, path in files.items():
        if name.startswith("compact"):
            to_ort(path, path.with_suffix(".ort"), inputs)


def _judged(
    result: Result, subject: _Subject, fewer: Mapping[str, Quantised], how: Measurement, clock: Clock
) -> dict[str, Agreement]:
    """What each row comes to: the float ones as torch models, which the files are known to equal."""
    found = precisions.of_steps(result.recovery)
    reference = result.recovery.reference if result.recovery is not None else None
    known = result.whole is not None and result.whole.example_args is not None
    if fewer and reference is not None and known == (result.whole is not None and subject.dense is result.whole.model):
        with clock("judge files"):
            found |= precisions.judge({name: file.path for name, file in fewer.items()}, reference, how.threads)
    return found


def _whole_figures(result: Result, subject: _Subject) -> dict[str, Any]:
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


def _fixed_sizes(result: Result, subject: _Subject, export: onnx.ExportResult) -> list[str]:
    """Return which images' height and width the file fixes, where the program's own notes do not say so already."""
    if subject.dynamic is not None and result.program.tracer == "export":
        return []
    tensors = bind(subject.dense, subject.args, subject.kwargs).tensors
    images = [n for n, t in tensors.items() if t.dim() == 4 and not {2, 3} & set(export.dynamic.get(n, {}))]
    return [f"ONNX: height and width of input '{name}' are fixed at the example's" for name in images]


def _export_notes(exports: Mapping[str, onnx.ExportResult]) -> list[str]:
    """Return each note once, with the models it is about."""
    about: dict[str, list[str]] = {}
    for name, export in exports.items():
        for note in export.notes:
            about.setdefault(note, []).append(name)
    return [f"ONNX ({', '.join(names)}): {note}" for note, names in about.items()]


def _time(
    subject: _Subject,
    exports: Mapping[str, onnx.ExportResult],
    files: Mapping[str, Path],
    how: Measurement,
    clock: Clock,
) -> tuple[dict[str, Any], list[str]]:
    """Return the timer's findings as JSON values, and a note where another batch than asked for was timed."""
    tensors = bind(subject.dense, subject.args, subject.kwargs).tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fixed = not all(any(0 in axes for axes in export.dynamic.values()) for export in exports.values())
    batch = subject.batch if fixed else how.batch
    notes = [f"timed at batch {batch}, which the model fixes"] if batch != how.batch else []
    timing = ort.time(
        files,
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
