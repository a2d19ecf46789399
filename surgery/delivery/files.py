"""Write the model files of a result: ONNX in each precision and format, an exported program, and weights.

If a submodule was pruned, ONNX files contain the whole model if it can be exported, else the submodule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from onnx import load as load_onnx
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.utils import _pytree as pytree

from exporters import onnx
from exporters.formats import FORMATS, ONNX, Format
from exporters.quantize import Int8, Quantised, to_fp16, to_int8
from exporters.runtimes import Reader, require_readable
from exporters.session import feeds
from exporters.signature import bind
from surgery import __version__
from surgery.capture import evaluating
from surgery.config import Recipe
from surgery.core import Clock, quiet
from surgery.cutting import masked
from surgery.delivery.artifacts import COMPACT_ONNX, COMPACT_PT2, COMPACT_WEIGHTS, DENSE_ONNX, PLAN
from surgery.errors import CheckFailed, InvalidInput, UnsupportedModel
from surgery.inputs import Calibration
from surgery.pipeline import Result
from surgery.planning import int8_of


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The model in the ONNX files: the pruned model, or the whole model around a pruned submodule.

    Attributes:
        dense: the dense model.
        around: compact or masked submodule → the model in the file.
        args: example inputs.
        kwargs: example keyword inputs.
        dynamic: dynamic axes of each tensor input; None if unknown, when axis 0 may be the batch.
        whole: whether only a submodule was pruned.
    """

    dense: torch.nn.Module
    around: Callable[[torch.nn.Module], torch.nn.Module]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic: tuple[tuple[int, ...], ...] | None
    whole: bool = False

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Input name → example tensor."""
        return bind(self.dense, self.args, self.kwargs).tensors

    @property
    def batch(self) -> int:
        """Batch size of the example inputs."""
        first = next(iter(self.tensors.values()), None)
        return first.shape[0] if first is not None and first.dim() else 1


@dataclass(frozen=True, slots=True)
class Files:
    """The written model files.

    Attributes:
        exports: `dense`, `masked` and `compact` → float32 file.
        quantised: name such as `dense int8` → file.
        subject: the model in the files.
        notes: notes for the user.
    """

    exports: Mapping[str, onnx.ExportResult]
    quantised: Mapping[str, Quantised]
    subject: Subject
    notes: tuple[str, ...]

    @property
    def paths(self) -> dict[str, Path]:
        """Name of a row of the report → its ONNX file."""
        files: Mapping[str, onnx.ExportResult | Quantised] = {**self.exports, **self.quantised}
        return {name: file.path for name, file in files.items()}

    @property
    def fixed_batch(self) -> int | None:
        """The static batch size of a file; None if dynamic in all files."""
        open_batch = all(any(0 in axes for axes in export.dynamic.values()) for export in self.exports.values())
        return None if open_batch else self.subject.batch


def write_files(result: Result, recipe: Recipe, folder: Path, scratch: Path, clock: Clock) -> Files:
    """Write plan, weights and models to `folder`, and the masked model, which is only timed, to `scratch`.

    Raises:
        InvalidInput, UnsupportedModel, CheckFailed: a file cannot be written, or fails verification.
    """
    result.plan.save(folder / PLAN)
    (folder / COMPACT_WEIGHTS).write_bytes(weights_bytes(result.model))
    with clock("save"):
        notes = _save_program(result, folder / COMPACT_PT2)
    exports, subject, where = _export_around(result, recipe, folder, scratch, clock)
    quantised = _quantise(result, recipe, exports, subject, clock)
    notes += [*where, *_export_notes(exports), *_fixed_sizes(result, subject, exports["compact"])]
    files = Files(exports, quantised, subject, tuple(notes))
    for name in dict.fromkeys(recipe.output.format):
        if name != ONNX:
            with clock(f"{name} format"):
                _convert(FORMATS[name], files)
    return files


def weights_bytes(module: torch.nn.Module) -> bytes:
    """Return the state dict in safetensors format, deterministic and with tied tensors duplicated."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    return bytes(to_safetensors(state))


def fewer_bits(recipe: Recipe) -> tuple[str, ...]:
    """Return the precisions below float32 in which files are written."""
    return tuple(name for name in ("fp16", "int8") if name in recipe.precisions)


def images_of(result: Result) -> Calibration | None:
    """Return the calibration images of files in lower precision."""
    return result.recovery.seen if result.recovery is not None else None


# Float32. ------------------------------------------------------------------------------------------------------------


def _subject_of(result: Result, *, whole: bool) -> Subject:
    program = result.program
    if whole and result.whole is not None:
        args, kwargs = result.whole.example.example if result.whole.example is not None else ((), {})
        return Subject(result.whole.model, result.whole.around, args, kwargs, None, whole=True)
    dynamic = tuple(spec.dynamic for spec in program.inputs)
    dense, example = program.dense.model, program.example_args
    return Subject(dense, lambda module: module, example, program.example_kwargs, dynamic)


def _export_around(
    result: Result, recipe: Recipe, folder: Path, scratch: Path, clock: Clock
) -> tuple[dict[str, onnx.ExportResult], Subject, list[str]]:
    """Export the three models, with the whole model around a submodule if possible."""
    notes = []
    if result.whole is not None:
        name = result.whole.name
        try:
            subject = _subject_of(result, whole=True)
            exports = _export(result, recipe, subject, folder, scratch, clock)
            return exports, subject, [f"ONNX and times: the whole model around part '{name}'"]
        except (UnsupportedModel, InvalidInput, CheckFailed) as error:
            notes = [f"ONNX and times: the part alone, '{name}'; the whole model cannot be exported: {error}"]
    subject = _subject_of(result, whole=False)
    return _export(result, recipe, subject, folder, scratch, clock), subject, notes


def _export(
    result: Result, recipe: Recipe, subject: Subject, folder: Path, scratch: Path, clock: Clock
) -> dict[str, onnx.ExportResult]:
    program, plan = result.program, result.plan
    models: dict[str, tuple[Callable[[], Any], Path]] = {
        "dense": (lambda: subject.dense, folder / DENSE_ONNX),
        "masked": (lambda: subject.around(masked(result.cut)), scratch / "masked.onnx"),
        "compact": (lambda: subject.around(result.compact.module), folder / COMPACT_ONNX),
    }
    origin = {
        "tool_version": __version__,
        "budget": f"{plan.budget.kind} {plan.budget.amount:g}" if plan.budget else "none",
        "plan_sha256": plan.digest,
        "dense_fingerprint": program.fingerprint,
    }
    if (predicted := plan.settings.get("predicted_latency_ratio")) is not None:
        origin["predicted_latency_ratio"] = f"{predicted:.6f}"  # a device's measurement is compared with it
    axes = None if subject.dynamic is None else dict(zip(subject.tensors, subject.dynamic, strict=True))
    settings = onnx.ExportSettings(recipe.output.opset, recipe.output.min_ort, dynamo=program.has_graph)
    exports = {}
    for name, (model, path) in models.items():
        with clock(f"export {name}"):
            exports[name] = onnx.export(
                model(),
                subject.args,
                path,
                settings,
                example_kwargs=subject.kwargs,
                dynamic_axes=axes,
                metadata={**origin, "model": name},
            )
    return exports


def _export_notes(exports: Mapping[str, onnx.ExportResult]) -> list[str]:
    """Return each note once, with its models."""
    about: dict[str, list[str]] = {}
    for name, export in exports.items():
        for note in export.notes:
            about.setdefault(note, []).append(name)
    return [f"ONNX ({', '.join(names)}): {note}" for note, names in about.items()]


def _fixed_sizes(result: Result, subject: Subject, export: onnx.ExportResult) -> list[str]:
    """Return notes on static height and width that the program's notes do not mention."""
    if subject.dynamic is not None and result.program.has_graph:
        return []
    images = [n for n, t in subject.tensors.items() if t.dim() == 4 and not {2, 3} & set(export.dynamic.get(n, {}))]
    return [f"ONNX: height and width of input '{name}' are fixed at the example's" for name in images]


def _save_program(result: Result, path: Path) -> list[str]:
    """Write the compact model as an exported program with a dynamic batch; returns notes."""
    program = result.program
    if not program.has_graph:
        return [f"no {path.name}: torch.export cannot capture this model"]
    args, kwargs = program.example_args, dict(program.example_kwargs)
    specs = iter(program.inputs)

    def axes(leaf: object) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        dims = next(specs).dynamic
        return {axis: torch.export.Dim.DYNAMIC if axis == 0 else torch.export.Dim.AUTO for axis in dims}

    by_argument, by_keyword = pytree.tree_map(axes, (args, kwargs))
    shapes = (*by_argument, *by_keyword.values())
    module = result.compact.module
    with evaluating(module), quiet(), torch.no_grad():
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        for node in exported.graph.nodes:  # they contain local file names
            node.meta.pop("stack_trace", None)
        torch.export.save(exported, path)
    return [f"{path.name} holds the part '{result.whole.name}' alone"] if result.whole else []


# Fewer bits and other formats. ---------------------------------------------------------------------------------------


def _quantise(
    result: Result, recipe: Recipe, exports: Mapping[str, onnx.ExportResult], subject: Subject, clock: Clock
) -> dict[str, Quantised]:
    """Write the dense and the compact file in the precisions below float32."""
    precisions, images = fewer_bits(recipe), images_of(result)
    if not precisions:
        return {}
    if images is None:
        raise InvalidInput(f"--precision {','.join(precisions)} needs images to calibrate on: give them with --data")
    if subject.whole and not images.given:
        raise InvalidInput(
            "--precision: the whole model's own inputs are not known; leave --submodule or --precision out"
        )
    given = images.given if subject.whole else images.batches
    found = {}
    with clock("fewer bits"):
        for precision, name in product(precisions, ("dense", "compact")):
            source = exports[name].path
            target, batches = source.with_name(f"{name}.{precision}.onnx"), list(feeds(source, given))
            if precision == "fp16":
                file = to_fp16(source, target, batches)
            else:
                file = to_int8(source, target, batches, int8_of(recipe))
            found[f"{name} {precision}"] = file
    if recipe.output.min_ort is not None:
        for file in found.values():
            model = load_onnx(file.path, load_external_data=False)
            require_readable(model, Reader.of(recipe.output.min_ort), file.path.name)
    return found


def _convert(form: Format, files: Files) -> None:
    """Also write the compact files in other formats, in their supported precisions."""
    inputs = {name: tensor.numpy(force=True) for name, tensor in files.subject.tensors.items()}
    for name, path in files.paths.items():
        model, _, precision = name.partition(" ")
        if model == "compact" and (precision or "fp32") in form.precisions:
            form.convert(path, path.with_suffix(form.suffix), inputs)


def deployed_recipe(result: Result, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with the plan's precision, if there are calibration images, and notes."""
    deploy, int8 = (result.plan.settings.get(key) for key in ("deploy", "int8"))
    wanted = recipe
    if deploy and deploy not in recipe.precisions:
        wanted = recipe.but(precision=(*recipe.output.precision, deploy))
    if int8 is not None and int8_of(recipe) == Int8():  # made as it was timed, unless asked otherwise
        wanted = replace(wanted, output=replace(wanted.output, **_int8_options(int8)))
    if deploy in (None, "fp32", *recipe.output.precision) or images_of(result) is not None:
        return wanted, []
    note = f"the widths were chosen for {deploy}; without --data there is nothing to calibrate such files on"
    return recipe.but(deploy="fp32"), [note]


def _int8_options(made: Any) -> dict[str, Any]:
    try:
        return {
            "int8_method": made["method"],
            "int8_keep": tuple(made["keep"]),
            "int8_reduce_range": made["reduce_range"],
        }
    except (TypeError, KeyError) as error:
        raise InvalidInput(f"the plan's setting int8={made!r} is not one that `surgery shrink` writes") from error
