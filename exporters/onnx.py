"""Export ONNX files, verified against the torch model.

They are exported by torch, named by the model's own signature, checked by ONNX's checker, and compared with the model
in ONNX Runtime. Only then does a file replace an older one at the same path.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from exporters.conversion import convert, reason, source_line
from exporters.parity import BATCHES, TOLERANCE, OutputParity, Parity, parity, rounding, well_conditioned
from exporters.runtimes import Reader, format_of, require_readable
from exporters.signature import Axes, Call, bind, check_axes, default_axes, name_outputs, with_batch
from surgery.core import explained, quiet, replacing
from surgery.errors import CheckFailed, InvalidInput, UnsupportedModel

__all__ = ["DEFAULT_OPSET", "ExportResult", "ExportSettings", "bytes_of", "export", "parity"]

DEFAULT_OPSET = 20
"""Has Gelu and is read by every ONNX Runtime since 1.17; later sets bring no faster convolution or matrix product."""
OLDEST_OPSET = 18
TORCHSCRIPT_NEWEST_OPSET = 20

_ONE_FILE_BYTES = 2_000_000_000
_SAMPLES = 4
_TOOL = "model-surgery"
_NOT_INSTALLED = "not installed"


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """Export settings.

    Attributes:
        opset: ONNX operator set; None: 20, or less if `min_ort` is older.
        min_ort: oldest ONNX Runtime version that must read the file, such as `1.16`.
        check: False skips the comparison in ONNX Runtime, not the ONNX checker.
        dynamo: False exports by the TorchScript tracer, for models that `torch.export` cannot capture: the file then
            holds the one path through the code that the example takes.

    Raises:
        InvalidInput: the operator set is out of range, or beyond what `min_ort` reads.
    """

    opset: int | None = None
    min_ort: str | None = None
    check: bool = True
    dynamo: bool = True

    def __post_init__(self) -> None:
        newest = onnx.defs.onnx_opset_version() if self.dynamo else TORCHSCRIPT_NEWEST_OPSET
        if self.reader is not None and self.operator_set > self.reader.opset:
            raise InvalidInput(
                f"ONNX Runtime {self.min_ort} reads operator sets up to {self.reader.opset}, not {self.operator_set}"
            )
        if not OLDEST_OPSET <= self.operator_set <= newest:
            raise InvalidInput(
                f"opset {self.operator_set} is out of range: this exporter writes {OLDEST_OPSET} to {newest}"
            )

    @property
    def reader(self) -> Reader | None:
        """The oldest ONNX Runtime that must read the file."""
        return None if self.min_ort is None else Reader.of(self.min_ort)

    @property
    def operator_set(self) -> int:
        """The operator set that is written."""
        if self.opset is not None:
            return self.opset
        return DEFAULT_OPSET if self.reader is None else min(DEFAULT_OPSET, self.reader.opset)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A written ONNX file.

    Attributes:
        path: path of the file.
        bytes: its size, including external data.
        opset: ONNX operator set.
        dynamic: input name → names of its dynamic axes, by axis.
        error: largest difference from the torch model in ONNX Runtime, relative to the part of the output that varies
            with the input; None where `check` was off.
        varying: share of the output that varies with the input, on the real weights; None where `check` was off.
        notes: notes for the user, such as a static axis, a cast to float32, or a comparison on other weights.
    """

    path: Path
    bytes: int
    opset: int
    dynamic: Mapping[str, Mapping[int, str]]
    error: float | None
    varying: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """An export job: a float32 copy in eval mode on the CPU, an example call, and the output file.

    Attributes:
        file: in a temporary folder.
        name: name of the output file, for messages.
    """

    model: torch.nn.Module
    call: Call
    outputs: tuple[str, ...]
    file: Path
    name: str
    metadata: Mapping[str, str]
    settings: ExportSettings


def export(
    model: torch.nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    settings: ExportSettings | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_axes: Mapping[str, Iterable[int]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportResult:
    """Export `model` to an ONNX file and verify, in ONNX Runtime, that it computes the same.

    The file holds the model in eval mode and float32. Inputs are called like forward's parameters, outputs `output`,
    `output_0`.. or like the keys of the dictionary that forward returns. Weights above 2 GB go to ``<path>.data``.

    Args:
        model: unchanged, including mode and device.
        example_inputs: a tensor, or the tuple of positional inputs.
        path: output path; its folder must exist.
        settings: operator set, exporter and check.
        example_kwargs: keyword inputs.
        dynamic_axes: input name → axes that may change from call to call, 2 and 3 of images ``(N, C, H, W)`` being
            called `height` and `width`; where None, axis 0 of every input, called `batch`. An axis that the model
            fixes becomes static, and a note says so.
        metadata: written into the file, with the version of this package.

    Raises:
        InvalidInput: inputs the model does not take, an unknown axis, an unwritable path.
        UnsupportedModel: the model cannot be exported, and the message has the user's source line; or it needs an
            operator that `min_ort` does not know, which the message names.
        CheckFailed: the file is invalid or differs, or the comparison is inconclusive.
    """
    settings = settings or ExportSettings()
    target = Path(path)
    props = {"tool": _TOOL, "tool_version": _tool_version(), **{k: str(v) for k, v in (metadata or {}).items()}}
    with quiet(), replacing(target) as file:
        subject, notes = _copy(model)
        call, cast = _bind(subject, example_inputs, example_kwargs)
        if cast and not notes:
            notes.append("floating-point inputs are exported as float32")
        outputs = tuple(name_outputs(_run(subject, call), tuple(call.tensors)))
        if not outputs:
            raise UnsupportedModel(f"{type(model).__name__} returns no tensor; an exported model needs an output")
        axes = check_axes(call.tensors, default_axes(call.tensors) if dynamic_axes is None else dynamic_axes)
        shapes = {name: list(tensor.shape) for name, tensor in call.tensors.items()}
        props["example_shapes"] = json.dumps(shapes, sort_keys=True)
        found = _first_that_works(_Job(subject, call, outputs, file, target.name, props, settings), axes, notes)
    return replace(found, path=target)


def bytes_of(path: str | os.PathLike[str]) -> int:
    """Return the size of an ONNX file in bytes, with the weights in ``<path>.data`` beside it."""
    return sum(part.stat().st_size for part in (Path(path), Path(f"{os.fspath(path)}.data")) if part.exists())


def _first_that_works(job: _Job, axes: Axes, notes: list[str]) -> ExportResult:
    """Try the axes as asked for, then the batch alone, then fixed shapes."""
    attempts = list(_attempts(axes))
    for wanted, instead in attempts:
        try:
            return _attempt(job, wanted, notes)
        except (UnsupportedModel, CheckFailed) as error:
            # Sizes may be fixed silently (by the TorchScript tracer, or where the windows of an adaptive pooling happen
            # to be even): only the comparison finds out. A file for the batch alone has to be right.
            space = any(axis for chosen in wanted.values() for axis in chosen)
            if not instead or (job.settings.dynamo and not space and isinstance(error, CheckFailed)):
                raise
            notes.append(f"{instead}: with more dynamic axes the export fails ({reason(error)})")
    raise AssertionError("the last attempt returns or raises")


def _attempts(axes: Axes) -> Iterator[tuple[Axes, str]]:
    """Yield axes to try, and the note on the next attempt if these fail ('' for the last)."""
    batch = {name: tuple(a for a in chosen if a == 0) for name, chosen in axes.items()}
    if any(axes.values()) and batch != axes and any(batch.values()):
        yield axes, "only the batch is dynamic"
        yield batch, "all shapes are static"
    elif any(axes.values()):
        yield axes, "all shapes are static"
    yield dict.fromkeys(axes, ()), ""


def _attempt(job: _Job, axes: Axes, notes: list[str]) -> ExportResult:
    saved = _write(job, job.model, axes, job.file)
    error, varying, found = _verify(job, axes) if job.settings.check else (None, None, ["not compared"])
    dynamic = _dynamic(saved)
    unused = [name for name in job.call.tensors if name not in dynamic]
    found += [f"input '{name}' is not used by the model, and not in the file" for name in unused]
    return ExportResult(
        path=job.file,
        bytes=bytes_of(job.file),
        opset=saved.opset_imports[""],
        dynamic=dynamic,
        error=error,
        varying=varying,
        notes=(*notes, *found),
    )


def _write(job: _Job, model: torch.nn.Module, axes: Axes, file: Path) -> ir.Model:
    """Export `model`, which may be a copy of the job's with other values, to `file`, and run ONNX's checker on it."""
    batched = any(0 in chosen for chosen in axes.values())
    rows = min((t.shape[0] for name, t in job.call.tensors.items() if 0 in axes[name]), default=1)
    # torch.export takes a batch of 1 for a constant.
    call = job.call.with_tensors(with_batch(job.call.tensors, axes, 2)) if batched and rows == 1 else job.call
    how, opset = job.settings, job.settings.operator_set
    graph = convert(copy.deepcopy(model), call, axes=axes, outputs=job.outputs, opset=opset, dynamo=how.dynamo)
    graph.ir_version = format_of(graph.opset_imports[""])
    if how.reader is not None:
        require_readable(ir.to_proto(graph), how.reader, job.name)
    if graph.opset_imports[""] != opset:
        raise InvalidInput(
            f"{job.name} cannot be written at opset {opset}: torch made {graph.opset_imports['']} of it; "
            "ask for that one"
        )
    graph.metadata_props.update(sorted(job.metadata.items()))
    size = sum(v.const_value.nbytes for g in graph.graphs() for v in g.initializers.values() if v.const_value)
    external = f"{file.name}.data" if size > _ONE_FILE_BYTES else None
    ir.save(graph, file, external_data=external)
    with explained(f"{job.name}: torch's export is not valid ONNX", CheckFailed):
        onnx.checker.check_model(os.fspath(file), full_check=True)
    return graph


def _verify(job: _Job, axes: Axes) -> tuple[float, float, list[str]]:
    """Return (error, varying share, notes); raises CheckFailed if it differs or is inconclusive."""
    real, near = _compare(job, job.model, job.file, near=False)
    notes = ["one path exported: compared near the example only, away from it the torch model differs"] if near else []
    if any(0 in chosen for chosen in axes.values()):
        if len(real.batches) == 1:
            raise UnsupportedModel(f"the torch model itself runs at batch {real.batches[0]} only")
        refused = [batch for batch in BATCHES if batch not in real.batches]
        notes += [f"the torch model itself does not run at batch {batch}" for batch in refused]
    notes += (explained := _rounded(job, job.model, job.file, real, near=near)).values()
    for name, found in real.outputs.items():
        if name not in explained:
            _accept(job, name, found)
    unclear = [name for name, found in real.outputs.items() if found.unclear and name not in explained]
    if not unclear:
        return real.error or 0.0, real.varying, notes
    conditioned = _conditioned(job, axes, near=near)
    clear = [found for name, found in real.outputs.items() if name not in unclear]
    if all(found.blind for found in conditioned.outputs.values()) and not clear:
        raise CheckFailed(
            f"{job.name}: cannot tell whether it computes what the torch model computes: the output does not "
            "vary with the input, neither with the model's weights nor with well-conditioned ones"
        )
    notes += [_unclear_note(job, name, real.outputs[name], conditioned.outputs[name]) for name in unclear]
    trusted = [*clear, *(conditioned.outputs[name] for name in unclear if not conditioned.outputs[name].blind)]
    return max(found.error for found in trusted), real.varying, notes


def _rounded(job: _Job, model: torch.nn.Module, file: Path, parity: Parity, *, near: bool) -> dict[str, str]:
    """Notes on outputs that differ more than usual, but no more than torch's own rounding explains."""
    seen = {name: found for name, found in parity.outputs.items() if found.error > TOLERANCE and not found.blind}
    own = rounding(file, model, job.call, near_example=near) if seen else {}
    return {
        name: f"output '{name}' differs by {found.error:.1e} of what varies with the input, torch's float32 from its "
        f"float64 by {own[name].error:.1e}: rounding"
        for name, found in seen.items()
        if name in own and found.is_rounding(own[name])
    }


def _compare(job: _Job, model: torch.nn.Module, file: Path, *, near: bool) -> tuple[Parity, bool]:
    """Compare on random inputs, or (TorchScript only) near the example where random inputs take another path."""
    if not near:
        try:
            found = parity(file, model, job.call)
            if job.settings.dynamo or all(o.unclear or o.error <= TOLERANCE for o in found.outputs.values()):
                return found, False
        except CheckFailed:
            if job.settings.dynamo:
                raise
    return parity(file, model, job.call, near_example=True), True


def _accept(job: _Job, name: str, found: OutputParity) -> None:
    if found.difference > TOLERANCE or (found.error > TOLERANCE and not found.unclear):
        raise CheckFailed(
            f"{job.name}: output '{name}' differs in ONNX Runtime from the torch model by "
            f"{found.error:.1e} of the part that varies with the input, tolerance {TOLERANCE:.0e}; "
            "nothing was written. Try another opset, or report the model"
        )


def _conditioned(job: _Job, axes: Axes, *, near: bool) -> Parity:
    """Export and compare the same program with well-conditioned values."""
    drawn = _several(job.call, axes)

    def settle(model: torch.nn.Module) -> None:
        with contextlib.suppress(InvalidInput):  # a model may take no noise; the comparison draws like its example
            _run(model, drawn)

    conditioned = well_conditioned(job.model, run=settle)
    file = job.file.with_name("well_conditioned.onnx")
    _write(job, conditioned, axes, file)
    found, _ = _compare(job, conditioned, file, near=near)
    explained = _rounded(job, conditioned, file, found, near=near)
    for name, output in found.outputs.items():
        if not output.blind and name not in explained:
            _accept(job, name, output)
    return found


def _several(call: Call, axes: Axes) -> Call:
    """The call with a few random samples instead of the example, where it takes several."""
    generator = torch.Generator().manual_seed(0)
    tensors = with_batch(call.tensors, axes, _SAMPLES) if any(0 in chosen for chosen in axes.values()) else call.tensors
    noise = {n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t for n, t in tensors.items()}
    return call.with_tensors(noise)


def _unclear_note(job: _Job, name: str, real: OutputParity, conditioned: OutputParity) -> str:
    whose = "the real weights' output" if len(job.outputs) == 1 else f"the real weights' output '{name}'"
    if conditioned.blind:
        return f"output '{name}' does not vary with the input, with any weights; its values agree"
    if real.blind:
        return f"{whose} does not vary with the input; parity shown on a copy with well-conditioned values"
    return (
        f"only {real.varying:.1e} of {whose} varies with the input, where float32 rounding hides differences; "
        "parity shown on a copy with well-conditioned values"
    )


def _copy(model: torch.nn.Module) -> tuple[torch.nn.Module, list[str]]:
    """Return a float32 copy in eval mode on the CPU, and a note where that changed the precision."""
    floating = {n: v for n, v in (*model.named_parameters(), *model.named_buffers()) if v.is_floating_point()}
    others = sorted({str(v.dtype).removeprefix("torch.") for v in floating.values()} - {"float32"})
    spoilt = next((name for name, value in floating.items() if bool(torch.isnan(value).any())), None)
    if spoilt:
        raise InvalidInput(f"{type(model).__name__} has NaN in '{spoilt}'; export it from intact weights")
    try:
        subject = copy.deepcopy(model).cpu().float()
    except Exception as error:  # deepcopy runs code of the user's own classes
        raise UnsupportedModel(f"{type(model).__name__} cannot be copied for export: {reason(error)}") from error
    with contextlib.suppress(NotImplementedError):  # programs made by torch.export keep the mode of their capture
        subject.eval()
    return subject, [f"exported as float32 (the model is {', '.join(others)})"] if others else []


def _bind(model: torch.nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[Call, bool]:
    """Return the example call on the CPU in float32, and whether that took a cast."""
    call = bind(model, inputs, kwargs)
    ready = {name: (t.float() if t.is_floating_point() else t).detach().cpu() for name, t in call.tensors.items()}
    cast = any(ready[name].dtype != t.dtype for name, t in call.tensors.items())
    return call.with_tensors(ready), cast


def _run(model: torch.nn.Module, call: Call) -> Any:
    args, kwargs = call.arguments({name: tensor.clone() for name, tensor in call.tensors.items()})
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:  # any exception the model raises
        place = f" at {line}" if (line := source_line(error)) else ""
        raise InvalidInput(
            f"{type(model).__name__} does not run on the example inputs{place}: {reason(error)}; "
            "check their shapes and types"
        ) from error


def _dynamic(model: ir.Model) -> dict[str, dict[int, str]]:
    return {
        str(value.name): {
            k: d.value for k, d in enumerate(value.shape or ()) if isinstance(d, ir.SymbolicDim) and d.value
        }
        for value in model.graph.inputs
    }


def _tool_version() -> str:
    try:
        return packages.version(_TOOL)
    except packages.PackageNotFoundError:
        return _NOT_INSTALLED
