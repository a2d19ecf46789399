"""What a finished run leaves behind: `save` exports, times and writes the set of files, `load` reads it back.

The set is described in `artifacts`, the report in docs/reference/report.md. Every file but the report depends only on
the model, the seed and the arguments; the plan and the weights are identical byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from onnx import load as load_onnx
from safetensors import SafetensorError
from safetensors.torch import load_file, save as to_safetensors
from torch.utils import _pytree as pytree

from exporters import onnx
from exporters.formats import FORMATS, ONNX, Format, validate_formats
from exporters.quantize import Int8, Quantised
from exporters.runtimes import Reader, require_readable
from exporters.session import OnnxModel
from exporters.signature import bind
from surgery.capture import evaluating
from surgery.config import Recipe, to_toml
from surgery.core import Clock, Plan, Progress, quiet
from surgery.delivery import artifacts as artefacts, exporting as exports, precisions
from surgery.delivery.precisions import Precisions
from surgery.errors import InvalidInput
from surgery.latency import Limits, Settings, by_operator, ort
from surgery.pipeline import Result, apply
from surgery.planning import int8_of
from surgery.recovery import Agreement, Evaluate, verdict_on
from surgery.report import Report, deployed_precision, with_files


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

    @classmethod
    def of(cls, recipe: Recipe) -> Measurement:
        """Return what a recipe says of it."""
        output, target = recipe.output, recipe.target
        return cls(
            output.opset,
            target.threads,
            target.batch,
            output.runs,
            recipe.selection.seed,
            Precisions(recipe.precisions, int8_of(recipe)),
            output.min_ort,
            output.format,
        )

    def __post_init__(self) -> None:
        # Said before the long work: more threads than there are cores, a negative seed.
        Settings(batch=self.batch, threads=self.threads, seed=self.seed)
        validate_formats(self.formats)
        _ = self.export_settings

    @property
    def export_settings(self) -> onnx.ExportSettings:
        """How ONNX files are exported."""
        return onnx.ExportSettings(self.opset, self.min_ort)


def save(
    result: Result,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> Report:
    """Export, time and write the set of files; `out` is replaced as a whole once everything is done.

    Args:
        result: what `shrink` returned.
        out: the folder to be; one that holds files of yours is refused.
        recipe: how to export and time; None: as the result's.
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
    asked = recipe or result.recipe
    if not isinstance(asked, Recipe):
        raise InvalidInput(f"recipe is of type {type(asked).__name__}; make one with surgery.recipe(...)")
    how = Measurement.of(asked)
    clock, regained = Clock(progress), result.recovery
    how, without = _deployed(how, result)
    precisions.refuse_without_images(how.precisions, regained.seen if regained is not None else None)
    with artefacts.output_set(out) as folder, tempfile.TemporaryDirectory(prefix="surgery-") as scratch:
        files = _write_models(result, folder, Path(scratch), how, clock)
        (folder / artefacts.RECIPE).write_text(to_toml(replace(result.recipe, output=asked.output)), encoding="utf-8")
        timing, doubts = _time(files, how, clock)
        digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        notes = [*files.notes, *exports.notes_of(files.written)]
        notes += [*exports.fixed_sizes(result, files.subject, files.written["compact"]), *doubts, *without]
        notes += precisions.notes(files.fewer, timing, deployed_precision(result.report))
        data = _measured(result, files, timing, digests, notes, how, clock)
        if evaluate is not None:
            with clock("evaluate"):
                data["evaluation"] = _evaluated(files, evaluate, how.threads)
        return Report(data).write(folder)


def validate_output(recipe: Recipe) -> None:
    """Raise InvalidInput, before the long work, where files cannot be written as asked, or need images."""
    how = Measurement.of(recipe)
    if how.precisions.fewer and recipe.data.data is None:
        asked = ",".join(how.precisions.fewer)
        option = f"--precision {asked}" if recipe.output.precision != ("fp32",) else f"--deploy {asked}"
        raise InvalidInput(f"{option} needs images to calibrate on: give them with --data")
    if recipe.output.int8_keep and "int8" not in recipe.precisions:
        raise InvalidInput("--int8-keep is of files in int8: ask for them with --precision int8 or --deploy int8")


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


def _deployed(how: Measurement, result: Result) -> tuple[Measurement, list[str]]:
    """Write what the plan is for as well, where there are images to calibrate it on; else say so."""
    deploy, made = (result.plan.settings.get(key) for key in ("deploy", "int8"))
    wanted = precisions.with_deployed(how.precisions, deploy or "fp32")
    if made is not None and wanted.int8 == Int8():  # as the plan was timed, where nothing else is asked for
        wanted = replace(wanted, int8=_as_planned(made))
    if wanted == how.precisions or (result.recovery is not None and result.recovery.seen is not None):
        return replace(how, precisions=wanted), []
    return how, [f"the widths were chosen for {deploy}; without --data there is nothing to calibrate such files on"]


def _as_planned(made: Any) -> Int8:
    """How files in int8 were made when the plan was timed."""
    try:
        return Int8(**{**made, "keep": tuple(made["keep"])})
    except (TypeError, KeyError) as error:
        raise InvalidInput(f"the plan's setting int8={made!r} is not one that `surgery shrink` writes") from error


def _of_deployed(result: Result, judged: Mapping[str, Agreement]) -> dict[str, Any]:
    """The verdict on the file that the plan is for, where that is not the float one."""
    found = judged.get(f"compact {deployed_precision(result.report)}")
    if found is None or result.recovery is None:
        return {}
    return verdict_on(result.recovery, found, "compact int8")


# The steps of `save`. ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Files:
    """The models that were written: in float32, in fewer bits, of which models, and what there is to say of them."""

    written: Mapping[str, onnx.ExportResult]
    fewer: Mapping[str, Quantised]
    subject: exports.Subject
    notes: tuple[str, ...]

    @property
    def paths(self) -> dict[str, Path]:
        """Name of a row → its ONNX file."""
        full = {name: export.path for name, export in self.written.items()}
        return full | {name: file.path for name, file in self.fewer.items()}


def _write_models(result: Result, folder: Path, scratch: Path, how: Measurement, clock: Clock) -> _Files:
    result.plan.save(folder / artefacts.PLAN)
    (folder / artefacts.COMPACT_WEIGHTS).write_bytes(weights_bytes(result.model))
    with clock("save"):
        notes = _save_program(result, folder / artefacts.COMPACT_PT2)
    written, subject, where = exports.export(result, folder, scratch, how.export_settings, clock)
    fewer = _in_fewer_bits(result, subject, written, folder, how, clock)
    files = _Files(written, fewer, subject, (*notes, *where))
    for name in dict.fromkeys(how.formats):
        if name != ONNX:
            with clock(f"{name} format"):
                _in_format(FORMATS[name], subject, files.paths)
    return files


def _measured(
    result: Result,
    files: _Files,
    timing: dict[str, Any],
    digests: dict[str, str],
    notes: list[str],
    how: Measurement,
    clock: Clock,
) -> dict[str, Any]:
    """The report's values, with what was found of the files."""
    data = with_files(
        {
            **result.report,
            **exports.whole_figures(result, files.subject),
            "stages_s": {**result.report["stages_s"], **clock.seconds},
        },
        onnx_bytes={name: export.bytes for name, export in files.written.items()},
        timing=timing,
        files_sha256=digests,
        notes=notes,
    )
    with clock("profile"):
        data["operators"] = _operators(data["timing"], files.paths)
    judged = _judged(result, files.subject, files.fewer, how, clock)
    data["models"] = precisions.rows(data["models"], files.fewer, judged, timing)
    data["accuracy"] = {**data["accuracy"], **_of_deployed(result, judged)}
    return data


def _evaluated(files: _Files, evaluate: Evaluate, threads: int) -> dict[str, Any]:
    models = (name for name in files.paths if name != "masked")
    return {name: evaluate(OnnxModel(files.paths[name], threads=threads)) for name in models}


def _save_program(result: Result, path: Path) -> list[str]:
    """Write the compact model as an exported program with a dynamic batch; returns why there is none, if so."""
    program = result.program
    if not program.has_graph:
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


def _in_fewer_bits(
    result: Result,
    subject: exports.Subject,
    written: Mapping[str, onnx.ExportResult],
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
    sources = {name: written[name].path for name in ("dense", "compact")}
    with clock("fewer bits"):
        found = precisions.write(sources, folder, how.precisions, result.recovery.seen, whole=whole)
    if how.min_ort is not None:
        for file in found.values():
            model = load_onnx(file.path, load_external_data=False)
            require_readable(model, Reader.of(how.min_ort), file.path.name)
    return found


def _in_format(form: Format, subject: exports.Subject, files: Mapping[str, Path]) -> None:
    """Write the compact files in another format beside them, in the precisions that it takes."""
    tensors = bind(subject.dense, subject.args, subject.kwargs).tensors
    inputs = {name: tensor.numpy(force=True) for name, tensor in tensors.items()}
    for name, path in files.items():
        model, _, precision = name.partition(" ")
        if model == "compact" and (precision or "fp32") in form.precisions:
            form.convert(path, path.with_suffix(form.suffix), inputs)


def _judged(
    result: Result, subject: exports.Subject, fewer: Mapping[str, Quantised], how: Measurement, clock: Clock
) -> dict[str, Agreement]:
    """What each row comes to: the float ones as torch models, which the files are known to equal."""
    found = precisions.of_steps(result.recovery)
    reference = result.recovery.reference if result.recovery is not None else None
    known = result.whole is not None and result.whole.example is not None
    if fewer and reference is not None and known == (result.whole is not None and subject.dense is result.whole.model):
        with clock("judge files"):
            found |= precisions.judge({name: file.path for name, file in fewer.items()}, reference, how.threads)
    return found


def _time(files: _Files, how: Measurement, clock: Clock) -> tuple[dict[str, Any], list[str]]:
    """Return the timer's findings as JSON values, and a note where another batch than asked for was timed."""
    subject = files.subject
    tensors = bind(subject.dense, subject.args, subject.kwargs).tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fixed = not all(any(0 in axes for axes in export.dynamic.values()) for export in files.written.values())
    batch = subject.batch if fixed else how.batch
    notes = [f"timed at batch {batch}, which the model fixes"] if batch != how.batch else []
    settings, limits = Settings(batch, how.threads, how.seed, shapes), Limits(max_runs=how.runs)
    timing = ort.time(files.paths, settings, limits, baseline="dense", progress=clock.progress)
    return json.loads(json.dumps(timing.to_dict())), notes


def _operators(timing: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Milliseconds by operator of each file but the masked one, run as it was timed."""
    how = timing["settings"]
    settings = Settings.from_json({name: how[name] for name in ("batch", "threads", "seed", "shapes", "provider")})
    return {name: dict(by_operator(path, settings)) for name, path in files.items() if name != "masked"}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
