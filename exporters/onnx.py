"""ONNX files that are known to compute what the torch model computes.

They are exported by torch, named by the model's own signature, checked by ONNX's checker, and compared with the model
in ONNX Runtime. Only then does a file take the place of an older one at the same path; whatever fails before leaves
that one whole.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from exporters.capture import capture, quiet, reason, source_line
from exporters.parity import BATCHES, TOLERANCE, OutputParity, Parity, parity, rounding
from exporters.place import move, workroom, writable
from exporters.runtimes import Reader, format_of, refuse_newer
from exporters.signature import Axes, Call, bind, check_axes, default_axes, name_outputs, with_batch
from exporters.twin import well_conditioned
from surgery.errors import CheckFailed, InvalidInput, UnsupportedModel

__all__ = ["DEFAULT_OPSET", "ExportResult", "bytes_of", "export", "parity"]

DEFAULT_OPSET = 20
"""Has Gelu and is read by every ONNX Runtime since 1.17; later sets bring no faster convolution or matrix product."""
OLDEST_OPSET = 18
TORCHSCRIPT_NEWEST_OPSET = 20

_ONE_FILE_BYTES = 2_000_000_000
_SAMPLES = 4
_TOOL = "model-surgery"
_NOT_INSTALLED = "not installed"


@dataclass(frozen=True, slots=True)
class ExportResult:
    """An ONNX file that was written.

    Attributes:
        path: of the file.
        bytes: its size, external data included.
        opset: ONNX operator set.
        dynamic: input name → what its dynamic axes are called, by axis.
        error: largest difference from the torch model in ONNX Runtime, relative to the part of the output that varies
            with the input; None where `check` was off.
        varying: share of the output that varies with the input, on the real weights; None where `check` was off.
        notes: what the user should know: a static axis, a cast to float32, a comparison on other weights.
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
    """What to export: a float32 copy in eval mode on the CPU, one call of it, and how."""

    model: torch.nn.Module
    call: Call
    outputs: tuple[str, ...]
    target: Path
    opset: int
    metadata: Mapping[str, str]
    check: bool
    dynamo: bool
    reader: Reader | None


def export(
    model: torch.nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    opset: int | None = None,
    min_ort: str | None = None,
    dynamic_axes: Mapping[str, Iterable[int]] | None = None,
    metadata: Mapping[str, str] | None = None,
    check: bool = True,
    dynamo: bool = True,
) -> ExportResult:
    """Export `model` to an ONNX file and prove, in ONNX Runtime, that it computes the same.

    The file holds the model in eval mode and float32. Inputs are called like forward's parameters, outputs `output`,
    `output_0`.. or like the keys of the dictionary that forward returns. Weights above 2 GB go to ``<path>.data``.

    Args:
        model: left unchanged, in mode, device and values.
        example_inputs: a tensor, or the tuple of positional inputs.
        path: of the file; its folder must exist.
        example_kwargs: keyword inputs.
        opset: ONNX operator set, 20 where None, or less where `min_ort` is older.
        min_ort: version of the oldest ONNX Runtime that is to read the file, such as `1.16`.
        dynamic_axes: input name → axes that may change from call to call, 2 and 3 of images ``(N, C, H, W)`` being
            called `height` and `width`; where None, axis 0 of every input, called `batch`. An axis that the model
            fixes becomes static, and a note says so.
        metadata: written into the file, with the version of this package.
        check: False skips the comparison in ONNX Runtime, not the ONNX checker.
        dynamo: False exports by the TorchScript tracer, for models that `torch.export` cannot capture: the file then
            holds the one path through the code that the example takes.

    Raises:
        InvalidInput: inputs the model does not take, an unknown axis, an operator set out of range, an unwritable path.
        UnsupportedModel: the model cannot be exported, and the message has the user's source line; or it needs an
            operator that `min_ort` does not know, which the message names.
        CheckFailed: the file is invalid or computes something else, or the comparison cannot tell.
    """
    target = writable(Path(path))
    reader = Reader.of(min_ort) if min_ort is not None else None
    number = operator_set(opset, reader, dynamo=dynamo)
    props = {"tool": _TOOL, "tool_version": _tool_version(), **{k: str(v) for k, v in (metadata or {}).items()}}
    with quiet():
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
        job = _Job(subject, call, outputs, target, number, props, check, dynamo, reader)
        return _first_that_works(job, axes, notes)


def operator_set(asked: int | None, reader: Reader | None, *, dynamo: bool = True) -> int:
    """Return the operator set that `export` writes.

    Raises:
        InvalidInput: what is asked for is out of range, or beyond what `reader` reads.
    """
    newest = onnx.defs.onnx_opset_version() if dynamo else TORCHSCRIPT_NEWEST_OPSET
    most = DEFAULT_OPSET if reader is None else min(DEFAULT_OPSET, reader.opset)
    number = most if asked is None else asked
    if reader is not None and number > reader.opset:
        raise InvalidInput(f"ONNX Runtime {reader.version} reads operator sets up to {reader.opset}, not {number}")
    if not OLDEST_OPSET <= number <= newest:
        raise InvalidInput(f"opset {number} is out of range: this exporter writes {OLDEST_OPSET} to {newest}")
    return number


def bytes_of(path: str | os.PathLike[str]) -> int:
    """Return the size of an ONNX file in bytes, with the external data it refers to.

    Raises:
        InvalidInput: the file, or its external data, cannot be read.
    """
    try:
        model = ir.load(os.fspath(path))
        tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
        beside = {Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)}
        return sum(part.stat().st_size for part in {Path(path), *beside})
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error}") from error


def _first_that_works(job: _Job, axes: Axes, notes: list[str]) -> ExportResult:
    """Try the axes as asked for, then the batch alone, then fixed shapes."""
    attempts = list(_attempts(axes))
    for wanted, instead in attempts:
        try:
            return _attempt(job, wanted, notes)
        except (UnsupportedModel, CheckFailed) as error:
            # Sizes may be baked in without a word (by the TorchScript tracer, or where an adaptive pooling's windows
            # happen to be even): only the comparison finds out. A file for the batch alone has to be right.
            space = any(axis for chosen in wanted.values() for axis in chosen)
            if not instead or (job.dynamo and not space and isinstance(error, CheckFailed)):
                raise
            notes.append(f"{instead}: with more dynamic axes the export fails ({reason(error)})")
    raise AssertionError("the last attempt returns or raises")


def _attempts(axes: Axes) -> Iterator[tuple[Axes, str]]:
    """Yield axes to try, and what to say of the next attempt if these fail ('' for the last)."""
    batch = {name: tuple(a for a in chosen if a == 0) for name, chosen in axes.items()}
    if any(axes.values()) and batch != axes and any(batch.values()):
        yield axes, "only the batch is dynamic"
        yield batch, "all shapes are static"
    elif any(axes.values()):
        yield axes, "all shapes are static"
    yield dict.fromkeys(axes, ()), ""


def _attempt(job: _Job, axes: Axes, notes: list[str]) -> ExportResult:
    """Export, check and compare in a temporary folder beside the target, then move the file there."""
    with workroom(job.target) as room:
        file = room / job.target.name
        saved = _write(job, job.model, axes, file)
        error, varying, found = _verify(job, axes, file) if job.check else (None, None, ["not compared"])
        move(file, job.target)
    dynamic = _dynamic(saved)
    unused = [name for name in job.call.tensors if name not in dynamic]
    found += [f"input '{name}' is not used by the model, and not in the file" for name in unused]
    return ExportResult(
        path=job.target,
        bytes=bytes_of(job.target),
        opset=saved.opset_imports[""],
        dynamic=dynamic,
        error=error,
        varying=varying,
        notes=(*notes, *found),
    )


def _write(job: _Job, model: torch.nn.Module, axes: Axes, file: Path) -> ir.Model:
    """Export `model`, which may be a twin of the job's, to `file`, and run ONNX's checker on it."""
    batched = any(0 in chosen for chosen in axes.values())
    rows = min((t.shape[0] for name, t in job.call.tensors.items() if 0 in axes[name]), default=1)
    # torch.export takes a batch of 1 for a constant.
    call = job.call.with_tensors(with_batch(job.call.tensors, axes, 2)) if batched and rows == 1 else job.call
    graph = capture(copy.deepcopy(model), call, axes=axes, outputs=job.outputs, opset=job.opset, dynamo=job.dynamo)
    graph.ir_version = format_of(graph.opset_imports[""])
    if job.reader is not None:
        refuse_newer(ir.to_proto(graph), job.reader, job.target.name)
    if graph.opset_imports[""] != job.opset:
        raise InvalidInput(
            f"{job.target.name} cannot be written at opset {job.opset}: torch made {graph.opset_imports['']} of it; "
            "ask for that one"
        )
    graph.metadata_props.update(sorted(job.metadata.items()))
    size = sum(v.const_value.nbytes for g in graph.graphs() for v in g.initializers.values() if v.const_value)
    external = f"{file.name}.data" if size > _ONE_FILE_BYTES else None
    try:
        ir.save(graph, file, external_data=external)
    except OSError as error:
        raise InvalidInput(f"cannot write {job.target}: {error}") from error
    try:
        onnx.checker.check_model(os.fspath(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"{job.target.name}: torch's export is not valid ONNX: {error}") from error
    return graph


def _verify(job: _Job, axes: Axes, file: Path) -> tuple[float, float, list[str]]:
    """Return (error, varying share, notes); raises CheckFailed where the file differs or nothing can be told."""
    real, near = _compare(job, job.model, file, near=False)
    notes = ["one path exported: compared near the example only, away from it the torch model differs"] if near else []
    if any(0 in chosen for chosen in axes.values()):
        if len(real.batches) == 1:
            raise UnsupportedModel(f"the torch model itself runs at batch {real.batches[0]} only")
        refused = [batch for batch in BATCHES if batch not in real.batches]
        notes += [f"the torch model itself does not run at batch {batch}" for batch in refused]
    notes += (explained := _rounded(job, job.model, file, real, near=near)).values()
    for name, found in real.outputs.items():
        if name not in explained:
            _accept(job, name, found)
    unclear = [name for name, found in real.outputs.items() if found.unclear and name not in explained]
    if not unclear:
        return real.error or 0.0, real.varying, notes
    twin = _twin(job, axes, near=near)
    clear = [found for name, found in real.outputs.items() if name not in unclear]
    if all(found.blind for found in twin.outputs.values()) and not clear:
        raise CheckFailed(
            f"{job.target.name}: cannot tell whether it computes what the torch model computes: the output does not "
            "vary with the input, neither with the model's weights nor with well-conditioned ones"
        )
    notes += [_unclear_note(job, name, real.outputs[name], twin.outputs[name]) for name in unclear]
    trusted = [*clear, *(twin.outputs[name] for name in unclear if not twin.outputs[name].blind)]
    return max(found.error for found in trusted), real.varying, notes


def _rounded(job: _Job, model: torch.nn.Module, file: Path, parity: Parity, *, near: bool) -> dict[str, str]:
    """What to say of outputs that differ more than usual, and yet by no more than torch's own rounding does."""
    seen = {name: found for name, found in parity.outputs.items() if found.error > TOLERANCE and not found.blind}
    args, kwargs = job.call.arguments(job.call.tensors)
    own = rounding(file, model, args, kwargs, near_example=near) if seen else {}
    return {
        name: f"output '{name}' differs by {found.error:.1e} of what varies with the input, torch's float32 from its "
        f"float64 by {own[name].error:.1e}: rounding"
        for name, found in seen.items()
        if name in own and found.is_rounding(own[name])
    }


def _compare(job: _Job, model: torch.nn.Module, file: Path, *, near: bool) -> tuple[Parity, bool]:
    """Compare on random inputs, or (TorchScript only) near the example where random inputs lead another way."""
    args, kwargs = job.call.arguments(job.call.tensors)
    if not near:
        try:
            found = parity(file, model, args, kwargs)
            if job.dynamo or all(o.unclear or o.error <= TOLERANCE for o in found.outputs.values()):
                return found, False
        except CheckFailed:
            if job.dynamo:
                raise
    return parity(file, model, args, kwargs, near_example=True), True


def _accept(job: _Job, name: str, found: OutputParity) -> None:
    if found.difference > TOLERANCE or (found.error > TOLERANCE and not found.unclear):
        raise CheckFailed(
            f"{job.target.name}: output '{name}' differs in ONNX Runtime from the torch model by "
            f"{found.error:.1e} of the part that varies with the input, tolerance {TOLERANCE:.0e}; "
            "nothing was written. Try another opset, or report the model"
        )


def _twin(job: _Job, axes: Axes, *, near: bool) -> Parity:
    """Export and compare the same program with well-conditioned values."""
    drawn = _several(job.call, axes)

    def settle(model: torch.nn.Module) -> None:
        with contextlib.suppress(InvalidInput):  # a model may take no noise; the comparison draws like its example
            _run(model, drawn)

    twin = well_conditioned(job.model, run=settle)
    with workroom(job.target) as room:
        _write(job, twin, axes, room / job.target.name)
        found, _ = _compare(job, twin, room / job.target.name, near=near)
        explained = _rounded(job, twin, room / job.target.name, found, near=near)
    for name, output in found.outputs.items():
        if not output.blind and name not in explained:
            _accept(job, name, output)
    return found


def _several(call: Call, axes: Axes) -> Call:
    """The call with a few random samples in the place of the example, where it takes several."""
    generator = torch.Generator().manual_seed(0)
    tensors = with_batch(call.tensors, axes, _SAMPLES) if any(0 in chosen for chosen in axes.values()) else call.tensors
    noise = {n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t for n, t in tensors.items()}
    return call.with_tensors(noise)


def _unclear_note(job: _Job, name: str, real: OutputParity, twin: OutputParity) -> str:
    whose = "the real weights' output" if len(job.outputs) == 1 else f"the real weights' output '{name}'"
    if twin.blind:
        return f"output '{name}' does not vary with the input, with any weights; its values agree"
    if real.blind:
        return f"{whose} does not vary with the input; parity shown on a twin with well-conditioned values"
    return (
        f"only {real.varying:.1e} of {whose} varies with the input, where float32 rounding hides differences; "
        "parity shown on a twin with well-conditioned values"
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
    except Exception as error:  # whatever a line of the model raises
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
