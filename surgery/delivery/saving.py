"""Save and load results: `save` exports, times and writes the files, `load` reads the compact model back.

Plan and weights are byte-identical for the same model, seed and arguments. The output folder is replaced as a whole by
a hidden sibling, ``.NAME.partial-XXXX``: if the run ends before that, the previous set is unchanged. A run locks its
sibling, so that the next run can distinguish remains of killed runs, which it removes, from running ones.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

import torch
from onnx import load as load_onnx
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save as to_safetensors
from torch import Tensor
from torch.utils import _pytree as pytree

from exporters import onnx
from exporters.formats import FORMATS, ONNX
from exporters.quantize import Int8, Quantised, to_fp16, to_int8
from exporters.session import OnnxModel, feeds
from exporters.signature import bind
from surgery.capture import evaluating
from surgery.config import Recipe, to_toml
from surgery.core import Callee, Clock, Plan, Progress, locked_folder, quiet, remove_abandoned, scratch_folder
from surgery.errors import BudgetUnreachable, CheckFailed, InvalidInput, UnsupportedModel
from surgery.inputs import Calibration, validate_kinds
from surgery.latency import Limits, Settings, by_operator, ort
from surgery.pipeline import Result, apply
from surgery.planning import HIGHEST, int8_of
from surgery.recovery import Agreement, Evaluate, Subject, evaluated_again, open_metric, verdict_on, with_recovery
from surgery.report import REPORT_FILES, Report, deployed_precision

DENSE_ONNX = "dense.onnx"
COMPACT_ONNX = "compact.onnx"
COMPACT_PT2 = "compact.pt2"
COMPACT_WEIGHTS = "compact.safetensors"
PLAN = "plan.json"
RECIPE = "recipe.toml"
NAMES = (DENSE_ONNX, COMPACT_ONNX, COMPACT_PT2, COMPACT_WEIGHTS, PLAN, RECIPE, *REPORT_FILES[:3])
"""Files of a complete set; models above 2 GB have an additional ``.data`` file."""

FEWER_BITS = tuple(f"{name}.{precision}.onnx" for name in ("dense", "compact") for precision in ("fp16", "int8"))
"""Files written on request."""
_OURS = {*NAMES, *FEWER_BITS, *REPORT_FILES, f"{DENSE_ONNX}.data", f"{COMPACT_ONNX}.data"}
_USERS_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EBUSY}
_PREVIOUS, _PLAN_DIGEST = ".previous", "plan_sha256"


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
        BudgetUnreachable: the compact file does not meet the latency budget; the files are in a folder `OUT.unmet`.
    """
    if not isinstance(result, Result):
        raise InvalidInput(f"save takes what surgery.shrink returned, not an object of type {type(result).__name__}")
    asked = recipe or result.recipe
    _validate_runtime(asked)
    result = _evaluated(result)
    how, notes = deployed_recipe(result, asked)
    clock = Clock(progress)
    with output_set(out) as folder, scratch_folder() as scratch:
        files = _Files(result, how, folder, scratch, clock)
        (folder / RECIPE).write_text(to_toml(replace(result.recipe, output=asked.output)), encoding="utf-8")
        data = files.described(notes)
        data["files"] = {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
        if evaluate is not None:
            with clock("evaluate"):
                models = {name: path for name, path in files.paths.items() if name != "masked"}
                data["evaluation"] = {n: evaluate(OnnxModel(p, threads=how.target.threads)) for n, p in models.items()}
        report = Report(data).write(folder)
        if (latency := data["latency"]) and latency["met"] is False and not asked.target.best_effort:
            unmet = Path(f"{Path(out)}.unmet")
            with output_set(unmet) as other:
                shutil.copytree(folder, other, dirs_exist_ok=True)
            target, final = latency["target"], latency["final"]
            raise BudgetUnreachable(
                f"the compact model takes {final:.4f} of the dense latency, and the budget is {target:.4f}: its files "
                f"are in {unmet}; accept them with --best-effort, or leave room by --latency {target**2 / final:.3f}",
                {"target": target, "measured": final, "aim": target**2 / final},
            )
        return report


def _evaluated(result: Result) -> Result:
    """Return the result with figures of the weights that it has now."""
    if (before := result.recovery) is None:
        return result
    asked, subject = result.recipe.data.metric, Subject.of(result.cut, result.compact, result.model, result.whole)
    found = evaluated_again(before, subject, open_metric(asked) if asked is not None else None)
    if found is before:
        return result
    notes = [note for note in result.report["notes"] if note not in found.notes]
    return replace(result, recovery=found, report=with_recovery({**result.report, "notes": notes}, found))


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
    """Return the compact model, in eval mode, with its weights, from a folder of `save` or `surgery shrink`.

    Args:
        folder: contains plan.json and compact.safetensors.
        dense_model: model of the dense architecture, with any weights; unchanged.
        example_inputs: as in `shrink`; None: made from the plan's input signature.
        example_kwargs: as in `shrink`; numbers, strings and flags are in the plan.

    Raises:
        PlanMismatch: there is no plan, or it was made for another architecture.
        InvalidInput: the weights are missing or do not fit.
    """
    place = Path(folder) / COMPACT_WEIGHTS
    plan = Plan.load(Path(folder) / PLAN)
    compact = apply(plan, dense_model, example_inputs, example_kwargs=example_kwargs)
    try:
        with safe_open(place, "pt") as file:
            made_for = (file.metadata() or {}).get(_PLAN_DIGEST, plan.digest)
        if made_for != plan.digest:
            raise InvalidInput(f"{place} has the weights of another plan than {PLAN} beside it; take both from one run")
        _warn_if_replaced(place)
        tensors = load_file(place)
        validate_kinds(tensors, compact.state_dict(), str(place))
        compact.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise InvalidInput(f"{place}: not the weights of this plan's compact model ({why}); shrink it again") from error
    return compact.eval()


def _warn_if_replaced(weights: Path) -> None:
    """Warn if a report beside the weights is of other ones."""
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # no report
        reported = json.loads((weights.parent / REPORT_FILES[0]).read_text("utf-8"))["files"][weights.name]
        if reported != sha256(weights.read_bytes()).hexdigest():
            message = f"{weights} was changed after {REPORT_FILES[0]} beside it, whose figures are of other weights"
            warnings.warn(message, stacklevel=3)


def _validate_runtime(recipe: Recipe) -> None:
    """Raise InvalidInput for more threads than there are cores, or an opset that the oldest runtime cannot read."""
    Settings(batch=recipe.target.batch, threads=recipe.target.threads, seed=recipe.selection.seed)
    known = (ONNX, *sorted(FORMATS))
    if unknown := [name for name in recipe.output.format if name not in known]:
        raise InvalidInput(f"format '{unknown[0]}' is not accepted; give some of {', '.join(known)}")
    onnx.ExportSettings(recipe.output.opset, recipe.output.min_ort)


# Files. --------------------------------------------------------------------------------------------------------------


def weights_bytes(module: torch.nn.Module, plan: Plan | None = None) -> bytes:
    """Return the state dict in safetensors format, with its plan's digest; deterministic, tied tensors duplicated."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    return bytes(to_safetensors(state, None if plan is None else {_PLAN_DIGEST: plan.digest}))


def fewer_bits(recipe: Recipe) -> tuple[str, ...]:
    """Return the precisions below float32 in which files are written."""
    return tuple(name for name in ("fp16", "int8") if name in recipe.precisions)


@dataclass(frozen=True, slots=True, eq=False)
class ModelInFile:
    """The model in the ONNX files: the pruned model, or the whole model around a pruned submodule."""

    dense: Callee  # the example call of the dense model
    around: Callable[[torch.nn.Module], torch.nn.Module]  # compact or masked submodule → the model in the file
    dynamic: tuple[tuple[int, ...], ...] | None  # axes of each tensor input; None if unknown: axis 0 may be the batch
    whole: bool = False  # whether only a submodule was pruned

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Input name → example tensor, in float32 as in the files."""
        given = bind(self.dense.module, *self.dense.example)[1]
        return {name: x.float() if x.is_floating_point() else x for name, x in given.items()}


class _Files:
    """Writes plan, weights and models to `folder`, and the masked model, which is only timed, to `scratch`.

    Raises InvalidInput, UnsupportedModel or CheckFailed if a file cannot be written, or fails verification.
    """

    def __init__(self, result: Result, recipe: Recipe, folder: Path, scratch: Path, clock: Clock) -> None:
        self._result, self._recipe, self._folder, self._scratch, self._clock = result, recipe, folder, scratch, clock
        result.plan.save(folder / PLAN)
        (folder / COMPACT_WEIGHTS).write_bytes(weights_bytes(result.model, result.plan))
        with clock("save"):
            self.notes = _save_program(result, folder / COMPACT_PT2)
        self.subject, self.exports = self._exported()
        self.quantised = self._quantised()
        about: dict[str, list[str]] = {}
        for name, export in self.exports.items():
            for note in export.notes:
                about.setdefault(note, []).append(name)
        self.notes += [*(f"ONNX ({', '.join(names)}): {note}" for note, names in about.items()), *self._fixed_sizes()]
        inputs = {name: tensor.numpy(force=True) for name, tensor in self.subject.tensors.items()}
        compact = {name.partition(" ")[2] or "fp32": path for name, path in self.paths.items() if "compact" in name}
        for form in (FORMATS[name] for name in dict.fromkeys(recipe.output.format) if name != ONNX):
            with clock(f"{form.name} format"):
                for precision in form.precisions:
                    if precision in compact:
                        form.convert(compact[precision], compact[precision].with_suffix(form.suffix), inputs)

    @property
    def paths(self) -> dict[str, Path]:
        """Name of a row of the report → its ONNX file."""
        files: Mapping[str, onnx.ExportResult | Quantised] = {**self.exports, **self.quantised}
        return {name: file.path for name, file in files.items()}

    @property
    def fixed_batch(self) -> int | None:
        """The static batch size of a file; None if dynamic in all files."""
        if all(any(0 in axes for axes in export.dynamic.values()) for export in self.exports.values()):
            return None
        first = self.subject.dense.tensors[0]
        return first.shape[0] if first.dim() else 1

    def _exported(self) -> tuple[ModelInFile, dict[str, onnx.ExportResult]]:
        """Export the models, with the whole model around a submodule if possible."""
        program, whole = self._result.program, self._result.whole
        if whole is not None:
            try:
                if whole.example is None:
                    raise InvalidInput("its inputs are not known")
                subject = ModelInFile(whole.example, whole.around, None, whole=True)
                exports = self._export(subject)
                self.notes.append(f"ONNX and times: the whole model around part '{whole.name}'")
                return subject, exports
            except (UnsupportedModel, InvalidInput, CheckFailed) as error:
                alone = f"the part alone, '{whole.name}'; the whole model cannot be exported"
                self.notes.append(f"ONNX and times: {alone}: {error}")
        dynamic = tuple(spec.dynamic for spec in program.inputs)
        subject = ModelInFile(Callee.of(program, program.dense.model), lambda module: module, dynamic)
        return subject, self._export(subject)

    def _export(self, subject: ModelInFile) -> dict[str, onnx.ExportResult]:
        result, program, plan = self._result, self._result.program, self._result.plan
        models: dict[str, tuple[Callable[[], Any], Path]] = {
            "dense": (lambda: subject.dense.module, self._folder / DENSE_ONNX),
            "compact": (lambda: subject.around(result.compact.module), self._folder / COMPACT_ONNX),
        }
        origin = {
            "budget": f"{plan.budget.kind} {plan.budget.amount:g}" if plan.budget else "none",
            _PLAN_DIGEST: plan.digest,
            "dense_fingerprint": program.fingerprint,
        }
        if (predicted := plan.settings.get("predicted_latency_ratio")) is not None:
            origin["predicted_latency_ratio"] = f"{predicted:.6f}"  # a device's measurement is compared with it
        args, kwargs = subject.dense.example
        axes = None if subject.dynamic is None else dict(zip(subject.tensors, subject.dynamic, strict=True))
        output, more = self._recipe.output, {"example_kwargs": kwargs, "dynamic_axes": axes}
        settings = onnx.ExportSettings(output.opset, output.min_ort, dynamo=program.has_graph)
        exports = {}
        for name, (model, path) in models.items():
            with self._clock(f"export {name}"):
                metadata = {**origin, "model": name}
                exports[name] = onnx.export(model(), args, path, settings, metadata=metadata, **more)
        inside = f"{result.whole.name}." if subject.whole and result.whole is not None else ""
        left, dense = dict(program.model.named_parameters()), dict(program.dense.model.named_parameters())
        gone = [(name, 0, range(len(dense[name]))) for name in dense.keys() - left if dense[name].dim()]
        zeros = [*((c.tensor, c.axis, c.dead) for c in plan.cuts), *gone]
        zeros = [(inside + name, axis, indices) for name, axis, indices in zeros]
        masked = onnx.with_zeros(exports["dense"], self._scratch / "masked.onnx", zeros)
        return {"dense": exports["dense"], "masked": masked, "compact": exports["compact"]}

    def _fixed_sizes(self) -> list[str]:
        """Return notes on static height and width that the program's notes do not mention."""
        if self.subject.dynamic is not None and self._result.program.has_graph:
            return []
        free = self.exports["compact"].dynamic
        images = [n for n, t in self.subject.tensors.items() if t.dim() == 4 and not {2, 3} & set(free.get(n, {}))]
        return [f"ONNX: height and width of input '{name}' are fixed at the example's" for name in images]

    def _quantised(self) -> dict[str, Quantised]:
        """Write the dense and the compact file in the precisions below float32."""
        precisions, images = fewer_bits(self._recipe), images_of(self._result)
        if not precisions:
            return {}
        if images is None:
            asked = ",".join(precisions)
            raise InvalidInput(f"--precision {asked} needs images to calibrate on: give them with --data")
        given, min_ort, found = images.given if self.subject.whole else images.batches, self._recipe.output.min_ort, {}
        with self._clock("quantise"):
            for precision, name in product(precisions, ("dense", "compact")):
                source = self.exports[name].path
                target, batches = source.with_name(f"{name}.{precision}.onnx"), list(feeds(source, given))
                if precision == "fp16":
                    file = to_fp16(source, target, batches)
                else:
                    file = to_int8(source, target, batches, int8_of(self._recipe))
                if min_ort is not None:
                    onnx.require_readable(load_onnx(file.path, load_external_data=False), min_ort, file.path.name)
                found[f"{name} {precision}"] = file
        return found

    def described(self, notes: list[str]) -> dict[str, Any]:
        """Return the report's values with sizes, times and agreement of the files."""
        result, recipe, clock = self._result, self._recipe, self._clock
        target, batch = recipe.target, self.fixed_batch or recipe.target.batch
        shapes = {name: tuple(tensor.shape) for name, tensor in self.subject.tensors.items()}
        settings = Settings(batch, target.threads, recipe.selection.seed, shapes)
        limits = Limits(max_runs=recipe.output.runs)
        with clock("time"):
            timing = ort.time(self.paths, settings, limits, baseline="dense", progress=clock.progress).to_dict()
        if batch != target.batch:
            notes = [f"timed at batch {batch}, which the model fixes", *notes]
        deployed = deployed_precision(result.report)
        with clock("time by operator"):
            shown = {name: path for name, path in self.paths.items() if name != "masked"}
            operators = {name: dict(by_operator(path, settings)) for name, path in shown.items()}
        judged, accuracy = self._judged(), result.report["accuracy"]
        if result.recovery is not None and (found := judged.get(f"compact {deployed}")) is not None:
            accuracy = {**accuracy, **verdict_on(result.recovery, found, f"compact {deployed}")}
        notes = [*self.notes, *notes, *quantised_notes(self.quantised, timing, deployed)]
        return {
            **result.report,
            "latency": _decided(result.report, timing),
            "models": with_standings(self._model_rows(), self.quantised, judged, timing),
            "timing": timing,
            "operators": operators,
            "accuracy": accuracy,
            "notes": [*result.report["notes"], *notes],
            "stages_s": {**result.report["stages_s"], **clock.seconds},
        }

    def _model_rows(self) -> list[dict[str, Any]]:
        """Return the float rows, with parameters and MACs of the whole model if the files contain it."""
        models: list[dict[str, Any]] = self._result.report["models"]
        rows = [{**row, "onnx_bytes": self.exports[row["name"]].bytes} for row in models]
        if not self.subject.whole:
            return rows
        counts = self._result.report["part"]["whole"]
        params, macs = counts["params"], counts["macs"] or (None, None)
        sides = [(row, row["name"] == "compact") for row in rows]
        return [{**row, "parameters": params[side], "macs": macs[side]} for row, side in sides]

    def _judged(self) -> dict[str, Agreement]:
        """Return each row's agreement; float rows use the torch models, against which the files are verified."""
        recovery, whole = self._result.recovery, self._result.whole
        if recovery is None:
            return {}
        known = {step.name: step.agreement for step in recovery.steps}
        last = recovery.steps[-1].agreement if recovery.steps else None
        float_rows = {"dense": known.get("dense"), "masked": known.get("cut"), "compact": last}
        found = {row: agreement for row, agreement in float_rows.items() if agreement is not None}
        images_are_whole = whole is not None and whole.example is not None
        if self.quantised and recovery.reference is not None and images_are_whole == self.subject.whole:
            with self._clock("judge files"):
                for row, file in self.quantised.items():
                    model = OnnxModel(file.path, threads=self._recipe.target.threads)
                    run = lambda inputs, model=model: model(*inputs)  # noqa: E731
                    found[row] = recovery.reference.judge(run)
        return found


def images_of(result: Result) -> Calibration | None:
    """Return the calibration images of files in lower precision."""
    return result.recovery.seen if result.recovery is not None else None


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
    module = result.compact.module
    shapes = dict(inspect.signature(module.forward).bind(*by_argument, **by_keyword).arguments)
    with evaluating(module), quiet(), torch.no_grad():
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
        for node in exported.graph.nodes:  # they contain local file names
            node.meta.pop("stack_trace", None)
        torch.export.save(exported, path)
    return [f"{path.name} holds the part '{result.whole.name}' alone"] if result.whole else []


def deployed_recipe(result: Result, recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe with the plan's precision, if there are calibration images, and notes."""
    deploy, int8 = (result.plan.settings.get(key) for key in ("deploy", "int8"))
    wanted = recipe
    if deploy and deploy not in recipe.precisions:
        wanted = recipe.but(precision=(*recipe.output.precision, deploy))
    if int8 is not None and int8_of(recipe) == Int8():  # made as it was timed, unless asked otherwise
        try:
            made = {f"int8_{name}": int8[name] for name in ("method", "keep", "reduce_range")}
        except (TypeError, KeyError) as error:
            raise InvalidInput(f"the plan's setting int8={int8!r} is not one that `surgery shrink` writes") from error
        wanted = wanted.but(**made)
    if deploy in (None, "fp32", *recipe.output.precision) or images_of(result) is not None:
        return wanted, []
    note = f"the widths were chosen for {deploy}; without --data there is nothing to calibrate such files on"
    return recipe.but(deploy="fp32"), [note]


# Latency and accuracy of each file. -----------------------------------------------------------------------------------

FASTER = 0.97  # a low-precision file is called faster if the upper end of its ratio's interval is below this

Estimate = tuple[float, float, float]  # value, lower end and upper end of its interval

Standing = tuple[Estimate, Estimate]  # a row's relative time, and its loss


def with_standings(
    models: Sequence[Mapping[str, Any]],
    quantised: Mapping[str, Quantised],
    judged: Mapping[str, Agreement],
    timing: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the report's rows, with their agreement and the row that dominates them."""
    float_rows = {row["name"]: row for row in models}
    listed: list[dict[str, Any]] = [{**row, "precision": "fp32"} for row in models]
    for name, file in quantised.items():
        of, _, precision = name.rpartition(" ")
        listed.append({**float_rows[of], "name": name, "precision": precision, "onnx_bytes": file.bytes})
    times = _times(timing) if timing["reliable"] else {}
    standings: dict[str, Standing] = {}
    for row in listed:
        name = row["name"]
        row["agreement"] = asdict(judged[name]) if name in judged else None
        if row["agreement"] and name in times:
            standings[name] = times[name], _lost(row["agreement"])
    for row in listed:
        row["dominated_by"] = dominating(row["name"], standings)
    return listed


def _decided(report: Mapping[str, Any], timing: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the report on a latency budget whose plan was timed, decided by the final times if they are reliable."""
    latency, times = report["latency"], _times(timing)
    if latency is None or latency["taken"] < 0 or "within" in report:
        return latency  # type: ignore[no-any-return]
    dense, compact = (f"{name} {deployed_precision(report)}".removesuffix(" fp32") for name in ("dense", "compact"))
    final = latency["rounds"][latency["taken"]]["measured"]
    if timing["reliable"] and {dense, compact} <= times.keys():
        final = times[compact][0] / times[dense][0]
    return {**latency, "final": final, "met": final <= HIGHEST * latency["target"]}


def _times(timing: Mapping[str, Any]) -> dict[str, Estimate]:
    return {row["name"]: tuple(row["ratio"][key] for key in ("value", "low", "high")) for row in timing["rows"]}


def _lost(agreement: Mapping[str, Any]) -> Estimate:
    """Return a row's loss: in accuracy, or else agreement, or else cosine, whose uncertainty is unknown."""
    for key in ("drop", "differs"):
        if agreement[key] is not None:
            value, low, high = (float(x) for x in agreement[key])
            return value, low, high
    return 100.0 * (1.0 - float(agreement["cosine"])), -inf, inf


def dominating(name: str, standings: Mapping[str, Standing]) -> str | None:
    """Return the fastest row that is no worse in time and loss, and better in one of them with disjoint intervals."""
    if name not in standings:
        return None

    def beats(row: str) -> bool:
        pairs = list(zip(standings[row], standings[name], strict=True))
        return all(a[0] <= b[0] for a, b in pairs) and any(a[2] < b[1] for a, b in pairs)

    return min(filter(beats, standings), key=lambda row: standings[row][0], default=None)


def quantised_notes(quantised: Mapping[str, Quantised], timing: Mapping[str, Any], deployed: str = "fp32") -> list[str]:
    """Return notes on low-precision files: caveats, and files that are not faster."""
    found = list(dict.fromkeys(f"int8: {note}" for file in quantised.values() for note in file.notes))
    times = _times(timing)
    unsure = "" if timing["reliable"] else " (in times that are unreliable)"
    for name, file in quantised.items():
        of, _, precision = name.rpartition(" ")
        if file.layers[0] < file.layers[1]:
            found.append(f"{name}: {file.layers[0]} of {file.layers[1]} layers are in 8 bits")
        if name in times and of in times and times[name][2] / times[of][0] >= FASTER:
            also = ", only smaller" if precision == "fp16" else ""
            share = times[name][0] / times[of][0]
            found.append(f"{name} is not faster on this machine{also}: {share:.2f} of the time in fp32{unsure}")
    if {"dense int8", "compact int8"} <= times.keys():
        share = times["compact int8"][0] / times["dense int8"][0]
        if share >= FASTER:
            why = "" if deployed == "int8" else ": the widths were not chosen for int8 (--latency with --deploy int8)"
            found.append(f"compact int8 takes {share:.2f} of dense int8's time{unsure}{why}")
    return found


# The output folder. --------------------------------------------------------------------------------------------------


def prepare(out: str | Path) -> Path:
    """Return the absolute output folder, after an early check that it can be written; its parents need not exist.

    A set that a killed run had moved aside is restored. Raises InvalidInput if the folder cannot be written, or
    contains files that replacing it would remove.
    """
    try:
        target = Path(out).expanduser().resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_replaceable(target)
        remove_abandoned(target.parent, _partial(target), lambda folder: _restore(folder / _PREVIOUS, target))
        with locked_folder(target.parent, _partial(target)):
            pass
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last by a loop of links
        raise InvalidInput(_cannot_write(out, error)) from error
    return target


@contextmanager
def output_set(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `out` if the block succeeds; errors are those of `prepare`."""
    target = prepare(out)
    try:
        with locked_folder(target.parent, _partial(target)) as partial:
            made = partial / target.name
            made.mkdir()
            yield made
            _replace(target, made, partial / _PREVIOUS)
    except OSError as error:
        if error.errno in _USERS_FAULT:
            raise InvalidInput(_cannot_write(target, error)) from error
        raise


def _require_replaceable(target: Path) -> None:
    """Raise InvalidInput if replacing the folder would remove the user's files."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InvalidInput(f"--out {target}: is a file, not a folder; name a folder")
    if target == Path.cwd() or os.path.ismount(target):
        raise InvalidInput(f"--out {target}: cannot be replaced as a whole here; name a folder inside it")
    converted = {f"compact{bits}{form.suffix}" for form in FORMATS.values() for bits in ("", ".fp16", ".int8")}
    ours = _OURS | converted
    foreign = sorted(entry.name for entry in target.iterdir() if entry.name not in ours or entry.is_dir())
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InvalidInput(
            f"--out {target}: holds {shown}, which replacing the folder would remove; move them or name another folder"
        )


def _partial(target: Path) -> str:
    return f".{target.name}.partial-"


def _replace(target: Path, made: Path, aside: Path) -> None:
    """Move `made` to `target`, and what is there to `aside`."""
    try:
        if target.exists():
            target.rename(aside)
        made.rename(target)
    finally:  # Ctrl-C between the two steps must not lose both sets
        _restore(aside, target)


def _restore(aside: Path, target: Path) -> None:
    if aside.exists() and not target.exists():
        aside.rename(target)


def _cannot_write(target: str | Path, error: Exception) -> str:
    above = [f"{folder} is a file" for folder in Path(target).absolute().parents if folder.is_file()]
    why = above[0] if above else getattr(error, "strerror", None) or error
    return f"--out {target}: cannot be written ({why}); name a folder that can, with room to spare"
