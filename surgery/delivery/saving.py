"""Save and load results: `save` exports, times and writes the files, `load` reads the compact model back.

The set is described in `artifacts`, the report in docs/reference/report.md. All files except the report are
determined by the model, the seed and the arguments; plan and weights are byte-identical.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from exporters.formats import validate_formats
from exporters.onnx import ExportSettings
from exporters.quantize import FEWEST
from exporters.session import OnnxModel
from surgery.config import Recipe, to_toml
from surgery.core import Clock, Plan, Progress
from surgery.delivery import standings
from surgery.delivery.artifacts import COMPACT_WEIGHTS, PLAN, RECIPE, output_set
from surgery.delivery.files import (
    Files,
    deployed_recipe,
    fewer_bits,
    images_of,
    write_files,
)
from surgery.errors import InvalidInput
from surgery.latency import Limits, Settings, by_operator, ort
from surgery.pipeline import Result, apply
from surgery.recovery import Agreement, Evaluate, verdict_on
from surgery.report import Report, deployed_precision, with_files


def save(
    result: Result,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> Report:
    """Export, time and write the set of files; `out` is replaced as a whole at the end.

    Args:
        result: result of `shrink`.
        out: the output folder; must not contain other files.
        recipe: export and timing options; None: those of the result.
        evaluate: a function of a model that returns figures by name, to evaluate the files in ONNX Runtime.
        progress: called with each step.

    Returns:
        The contents of report.json: the result's report with sizes, times and digests of the files.

    Raises:
        InvalidInput: the folder cannot be written.
        UnsupportedModel: the model cannot be exported.
        CheckFailed: an exported model differs from the torch model.
    """
    if not isinstance(result, Result):
        raise InvalidInput(f"save takes what surgery.shrink returned, not an object of type {type(result).__name__}")
    asked = recipe or result.recipe
    if not isinstance(asked, Recipe):
        raise InvalidInput(f"recipe is of type {type(asked).__name__}; make one with surgery.recipe(...)")
    _validate_runtime(asked)
    how, notes = deployed_recipe(result, asked)
    _validate_images(result, how)
    clock = Clock(progress)
    with output_set(out) as folder, tempfile.TemporaryDirectory(prefix="surgery-") as scratch:
        files = write_files(result, how, folder, Path(scratch), clock)
        (folder / RECIPE).write_text(to_toml(replace(result.recipe, output=asked.output)), encoding="utf-8")
        data = _described(result, files, how, notes, clock)
        data["files"] = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        if evaluate is not None:
            with clock("evaluate"):
                models = {name: path for name, path in files.paths.items() if name != "masked"}
                data["evaluation"] = {n: evaluate(OnnxModel(p, threads=how.target.threads)) for n, p in models.items()}
        return Report(data).write(folder)


def validate_output(recipe: Recipe) -> None:
    """Raise InvalidInput early if the requested files cannot be written, or need images."""
    _validate_runtime(recipe)
    if fewer_bits(recipe) and recipe.data.data is None:
        asked = ",".join(fewer_bits(recipe))
        option = f"--precision {asked}" if recipe.output.precision != ("fp32",) else f"--deploy {asked}"
        raise InvalidInput(f"{option} needs images to calibrate on: give them with --data")
    if recipe.output.int8_keep and "int8" not in recipe.precisions:
        raise InvalidInput("--int8-keep is for int8 files: ask for them with --precision int8 or --deploy int8")


def load(
    folder: str | Path,
    dense_model: torch.nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Return the compact model, with its weights, from a folder written by `save` or `surgery shrink`.

    Args:
        folder: contains plan.json and compact.safetensors.
        dense_model: model of the dense architecture, with any weights; unchanged.
        example_inputs: as in `shrink`; None: made from the plan's input signature.
        example_kwargs: as in `shrink`; numbers, strings and flags are in the plan.

    Raises:
        PlanMismatch: there is no plan, or it was made for another architecture.
        InvalidInput: the weights are missing or do not fit.
    """
    if not isinstance(folder, (str, Path)):
        raise InvalidInput(f"the folder is of type {type(folder).__name__}; give the path that save wrote to")
    place = Path(folder) / COMPACT_WEIGHTS
    plan = Plan.load(Path(folder) / PLAN)
    compact = apply(plan, dense_model, example_inputs, example_kwargs=example_kwargs)
    try:
        compact.load_state_dict(load_file(place))
    except (OSError, SafetensorError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise InvalidInput(f"{place}: not the weights of this plan's compact model ({why}); shrink it again") from error
    return compact


def _validate_runtime(recipe: Recipe) -> None:
    """Raise InvalidInput for more threads than there are cores, or an opset that the oldest runtime cannot read."""
    Settings(batch=recipe.target.batch, threads=recipe.target.threads, seed=recipe.selection.seed)
    validate_formats(recipe.output.format)
    ExportSettings(recipe.output.opset, recipe.output.min_ort)


def _validate_images(result: Result, recipe: Recipe) -> None:
    images = images_of(result)
    if fewer_bits(recipe) and images is None:
        asked = ",".join(fewer_bits(recipe))
        raise InvalidInput(f"--precision {asked} needs images to calibrate on: give them with --data")
    if "int8" in fewer_bits(recipe) and images is not None and images.count < FEWEST:
        raise InvalidInput(
            f"too few images to calibrate int8 files on ({images.count}); give {FEWEST} or more with --data"
        )


def _described(result: Result, files: Files, recipe: Recipe, notes: list[str], clock: Clock) -> dict[str, Any]:
    """Return the report's values with sizes, times and agreement of the files."""
    timing, batch_notes = _time(files, recipe, clock)
    deployed = deployed_precision(result.report)
    notes = [*files.notes, *batch_notes, *notes, *standings.notes(files.quantised, timing, deployed)]
    sizes = {name: export.bytes for name, export in files.exports.items()}
    data = with_files(
        {**result.report, "models": _model_rows(result, files)},
        onnx_bytes=sizes,
        timing=timing,
        files_sha256={},
        notes=notes,
    )
    with clock("profile"):
        data["operators"] = _operators(timing, files.paths)
    judged = _judged(result, files, recipe, clock)
    data["models"] = standings.rows(data["models"], files.quantised, judged, timing)
    if result.recovery is not None and (found := judged.get(f"compact {deployed}")) is not None:
        data["accuracy"] = {**data["accuracy"], **verdict_on(result.recovery, found, f"compact {deployed}")}
    data["stages_s"] = {**data["stages_s"], **clock.seconds}
    return data


def _model_rows(result: Result, files: Files) -> list[dict[str, Any]]:
    """Return the float rows, with parameters and MACs of the whole model if the files contain it."""
    rows: list[dict[str, Any]] = result.report["models"]
    if not files.subject.whole:
        return rows
    counts, side = result.report["part"]["whole"], {"dense": 0, "masked": 0, "compact": 1}
    return [
        {
            **row,
            "parameters": counts["params"][side[row["name"]]],
            "macs": counts["macs"][side[row["name"]]] if counts["macs"] else None,
        }
        for row in rows
    ]


def _judged(result: Result, files: Files, recipe: Recipe, clock: Clock) -> dict[str, Agreement]:
    """Return each row's agreement; float rows use the torch models, against which the files are verified."""
    recovery = result.recovery
    found = standings.agreement_of_steps(recovery)
    reference = recovery.reference if recovery is not None else None
    images_are_whole = result.whole is not None and result.whole.example is not None
    if files.quantised and reference is not None and images_are_whole == files.subject.whole:
        with clock("judge files"):
            quantised = {name: file.path for name, file in files.quantised.items()}
            found |= standings.judge(quantised, reference, recipe.target.threads)
    return found


def _time(files: Files, recipe: Recipe, clock: Clock) -> tuple[dict[str, Any], list[str]]:
    """Return measured times as JSON values, with a note if a batch other than requested was timed."""
    batch, target = files.fixed_batch or recipe.target.batch, recipe.target
    notes = [f"timed at batch {batch}, which the model fixes"] if batch != target.batch else []
    shapes = {name: tuple(tensor.shape) for name, tensor in files.subject.tensors.items()}
    settings = Settings(batch, target.threads, recipe.selection.seed, shapes)
    limits = Limits(max_runs=recipe.output.runs)
    timing = ort.time(files.paths, settings, limits, baseline="dense", progress=clock.progress)
    return json.loads(json.dumps(timing.to_dict())), notes


def _operators(timing: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Return milliseconds by operator of each file except the masked one."""
    how = timing["settings"]
    settings = Settings.from_json({name: how[name] for name in ("batch", "threads", "seed", "shapes", "provider")})
    return {name: dict(by_operator(path, settings)) for name, path in files.items() if name != "masked"}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
