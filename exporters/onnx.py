"""Export ONNX files, verified against the torch model.

They are exported by torch, named by the model's own signature, checked by ONNX's checker, and compared with the model
in ONNX Runtime. Only then does a file replace an older one at the same path.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from exporters.conversion import convert, place_of, reason
from exporters.parity import BATCHES, TOLERANCE, OutputParity, Parity, parity
from exporters.signature import Axes, Tensors, bind, check_axes, default_axes, name_outputs, with_batch
from surgery import __version__
from surgery.core import Callee, conditioned_copy, explained, file_bytes, quiet, replacing, require_finite
from surgery.errors import CheckFailed, InvalidInput, UnsupportedModel

DEFAULT_OPSET = 20
"""Has Gelu and is read by every ONNX Runtime since 1.17; later sets bring no faster convolution or matrix product."""
OLDEST_OPSET = 18
TORCHSCRIPT_NEWEST_OPSET = 20

_ONE_FILE_BYTES = 2_000_000_000
_SAMPLES = 4
_TOOL = "model-surgery"


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """Export settings; raises InvalidInput for an operator set out of range, or beyond what `min_ort` reads."""

    opset: int | None = None  # ONNX operator set; None: 20, or less if `min_ort` is older
    min_ort: str | None = None  # oldest ONNX Runtime version that must read the file, such as `1.16`
    check: bool = True  # False skips the comparison in ONNX Runtime, not the ONNX checker
    dynamo: bool = True  # False: by the TorchScript tracer, which writes only the example's path through the code

    def __post_init__(self) -> None:
        readable = newest_read(self.min_ort)[0] if self.min_ort is not None else DEFAULT_OPSET
        opset = self.operator_set
        if self.min_ort is not None and opset > readable:
            raise InvalidInput(f"ONNX Runtime {self.min_ort} reads operator sets up to {readable}, not {opset}")
        newest = onnx.defs.onnx_opset_version() if self.dynamo else TORCHSCRIPT_NEWEST_OPSET
        if not OLDEST_OPSET <= opset <= newest:
            raise InvalidInput(f"opset {opset} is out of range: this exporter writes {OLDEST_OPSET} to {newest}")

    @property
    def operator_set(self) -> int:
        """The operator set that is written."""
        if self.opset is not None:
            return self.opset
        return DEFAULT_OPSET if self.min_ort is None else min(DEFAULT_OPSET, newest_read(self.min_ort)[0])


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A written ONNX file."""

    path: Path
    bytes: int  # including external data
    opset: int
    dynamic: Mapping[str, Mapping[int, str]]  # input → axis → name
    error: float | None  # relative to the part of the output that varies; None where not compared
    notes: tuple[str, ...] = ()  # for the user


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """An export: the call of a float32 copy in eval mode on the CPU, its tensors by name, and the output file."""

    call: Callee
    tensors: Tensors
    outputs: tuple[str, ...]
    file: Path  # in a temporary folder
    name: str  # of the output file, for messages
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
    `output_0`.. or like the keys of the dictionary that it returns. Weights above 2 GB go to ``<path>.data``.

    Args:
        model: unchanged, including mode and device.
        example_inputs: a tensor, or the tuple of positional inputs.
        path: output path; its folder must exist.
        settings: operator set, exporter and check.
        example_kwargs: keyword inputs.
        dynamic_axes: input name → axes that may change from call to call; where None, axis 0 of every input. An axis
            that the model fixes becomes static, and a note says so.
        metadata: written into the file, with the version of this package.

    Raises:
        InvalidInput: inputs the model does not take, an unknown axis, an unwritable path.
        UnsupportedModel: the model cannot be exported, or needs an operator that `min_ort` does not know.
        CheckFailed: the file is invalid or differs, or the comparison is inconclusive.
    """
    settings = settings or ExportSettings()
    target = Path(path)
    props = {"tool": _TOOL, "tool_version": __version__, **{k: str(v) for k, v in (metadata or {}).items()}}
    with quiet(), replacing(target) as file:
        subject, notes = _copy(model)
        call, given = bind(subject, example_inputs, example_kwargs)
        tensors = {name: (t.float() if t.is_floating_point() else t).detach().cpu() for name, t in given.items()}
        if not notes and any(tensors[name].dtype != t.dtype for name, t in given.items()):
            notes.append("floating-point inputs are exported as float32")
        outputs = tuple(name_outputs(_run(call, tensors), tuple(tensors)))
        if not outputs:
            raise UnsupportedModel(f"{type(model).__name__} returns no tensor; an exported model needs an output")
        axes = check_axes(tensors, default_axes(tensors) if dynamic_axes is None else dynamic_axes)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        props["example_shapes"] = json.dumps(shapes, sort_keys=True)
        job = _Job(call, tensors, outputs, file, target.name, props, settings)
        found = _first_that_works(job, axes, notes)
    return replace(found, path=target)


def _first_that_works(job: _Job, axes: Axes, notes: list[str]) -> ExportResult:
    """Try the axes as asked for, then the batch alone, then fixed shapes."""
    batch = {name: tuple(a for a in chosen if a == 0) for name, chosen in axes.items()}
    attempts = [(axes, "")]
    if batch != axes and any(batch.values()):
        attempts.append((batch, "only the batch is dynamic"))
    if any(axes.values()):
        attempts.append((dict.fromkeys(axes, ()), "all shapes are static"))
    for (wanted, _), (_, instead) in pairwise([*attempts, (axes, "")]):
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


def _attempt(job: _Job, axes: Axes, notes: list[str]) -> ExportResult:
    saved = _write(job, job.call, axes, job.file)
    error, found = _verify(job, axes) if job.settings.check else (None, ["not compared"])
    dynamic = {
        str(x.name): {k: d.value for k, d in enumerate(x.shape or ()) if isinstance(d, ir.SymbolicDim) and d.value}
        for x in saved.graph.inputs
    }
    unused = [name for name in job.tensors if name not in dynamic]
    found += [f"input '{name}' is not used by the model, and not in the file" for name in unused]
    opset, size = saved.opset_imports[""], file_bytes(job.file)
    return ExportResult(job.file, size, opset, dynamic, error, notes=(*notes, *found))


def _write(job: _Job, call: Callee, axes: Axes, file: Path) -> ir.Model:
    """Export the job's call, or that of a copy with other values, to `file`, and run ONNX's checker on it."""
    rows = min((t.shape[0] for name, t in job.tensors.items() if 0 in axes[name]), default=0)
    # torch.export takes a batch of 1 for a constant.
    tensors = with_batch(job.tensors, axes, 2) if rows == 1 else job.tensors
    dynamo, opset = job.settings.dynamo, job.settings.operator_set
    own = call.on(copy.deepcopy(call.module))
    graph = convert(own, tensors, axes=axes, outputs=job.outputs, opset=opset, dynamo=dynamo)
    graph.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", graph.opset_imports[""])])
    if job.settings.min_ort is not None:
        require_readable(ir.to_proto(graph), job.settings.min_ort, job.name)
    if graph.opset_imports[""] != opset:
        raise InvalidInput(
            f"{job.name} cannot be written at opset {opset}: torch made {graph.opset_imports['']} of it; "
            "ask for that one"
        )
    graph.metadata_props.update(sorted(job.metadata.items()))
    _save(graph, file)
    with explained(f"{job.name}: torch's export is not valid ONNX", CheckFailed):
        onnx.checker.check_model(os.fspath(file), full_check=True)
    return graph


def _save(graph: ir.Model, file: Path) -> None:
    size = sum(v.const_value.nbytes for g in graph.graphs() for v in g.initializers.values() if v.const_value)
    ir.save(graph, file, external_data=f"{file.name}.data" if size > _ONE_FILE_BYTES else None)


def with_zeros(source: ExportResult, path: Path, slices: Iterable[tuple[str, int, Sequence[int]]]) -> ExportResult:
    """Write an exported file again with slices of its weights set to zero, as masking does: (name, axis, indices).

    Weights that the export has merged or transposed keep their values: zeros do not change the time a file takes.
    """
    graph = ir.load(source.path)
    for name, axis, indices in slices:
        value = graph.graph.initializers.get(name)
        if value is not None and value.const_value is not None and axis < len(value.const_value.shape):
            zeroed = value.const_value.numpy().copy()
            if zeroed.shape[axis] > max(indices):
                zeroed.swapaxes(0, axis)[list(indices)] = 0
                value.const_value = ir.tensor(zeroed, name=name)
    graph.metadata_props["model"] = "masked"
    _save(graph, path)
    return replace(source, path=path, error=None, notes=())


def _verify(job: _Job, axes: Axes) -> tuple[float, list[str]]:
    """Return (error, notes); raises CheckFailed if it differs or is inconclusive."""
    real, near = _compare(job, job.call, job.file, near=False)
    notes = ["one path exported: compared near the example only, away from it the torch model differs"] if near else []
    if any(0 in chosen for chosen in axes.values()):
        if len(real.batches) == 1:
            raise UnsupportedModel(f"the torch model itself runs at batch {real.batches[0]} only")
        refused = [batch for batch in BATCHES if batch not in real.batches]
        notes += [f"the torch model itself does not run at batch {batch}" for batch in refused]
    notes += [
        f"output '{name}' differs by {output.error:.1e} of what varies with the input, torch's float32 from its "
        f"float64 by {output.rounding:.1e}: rounding"
        for name, output in real.outputs.items()
        if output.rounding is not None
    ]
    _accept(job, real)
    unclear = [name for name, found in real.outputs.items() if found.unclear]
    if not unclear:
        return real.error or 0.0, notes
    conditioned = _conditioned(job, axes, near=near)
    clear = [found for name, found in real.outputs.items() if name not in unclear]
    if all(found.blind for found in conditioned.outputs.values()) and not clear:
        raise CheckFailed(
            f"{job.name}: the comparison with the torch model is inconclusive: the output does not vary with the "
            "input, neither with the model's weights nor with well-conditioned ones"
        )
    notes += [_unclear_note(name, real.outputs[name], conditioned.outputs[name]) for name in unclear]
    trusted = [*clear, *(conditioned.outputs[name] for name in unclear if not conditioned.outputs[name].blind)]
    return max(found.error for found in trusted), notes


def _compare(job: _Job, call: Callee, file: Path, *, near: bool) -> tuple[Parity, bool]:
    """Compare on random inputs, or (TorchScript only) near the example where random inputs take another path."""
    if not near:
        try:
            found = parity(file, call, job.tensors)
            if job.settings.dynamo or not any(output.wrong for output in found.outputs.values()):
                return found, False
        except CheckFailed:
            if job.settings.dynamo:
                raise
    return parity(file, call, job.tensors, near_example=True), True


def _accept(job: _Job, found: Parity) -> None:
    """Raise CheckFailed if an output differs."""
    for name, output in found.outputs.items():
        if output.wrong:
            raise CheckFailed(
                f"{job.name}: output '{name}' differs in ONNX Runtime from the torch model by "
                f"{output.error:.1e} of the part that varies with the input, tolerance {TOLERANCE:.0e}; "
                "nothing was written. Try another opset, or report the model"
            )


def _conditioned(job: _Job, axes: Axes, *, near: bool) -> Parity:
    """Export and compare the same program with well-conditioned values."""
    generator = torch.Generator().manual_seed(0)
    several = any(0 in chosen for chosen in axes.values())
    tensors = with_batch(job.tensors, axes, _SAMPLES) if several else job.tensors
    drawn = {n: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t for n, t in tensors.items()}

    def settle(model: torch.nn.Module) -> None:
        with contextlib.suppress(InvalidInput):  # a model may take no noise; the comparison draws like its example
            _run(job.call.on(model), drawn)

    conditioned = job.call.on(conditioned_copy(job.call.module, settle))
    file = job.file.with_name("well_conditioned.onnx")
    _write(job, conditioned, axes, file)
    found, _ = _compare(job, conditioned, file, near=near)
    _accept(job, found)
    return found


def _unclear_note(name: str, real: OutputParity, conditioned: OutputParity) -> str:
    if conditioned.blind:
        return f"output '{name}' does not vary with the input, with any weights; its values agree"
    little = "does not vary with the input"
    if not real.blind:
        little = f"varies by {real.varying:.1e} with the input, where float32 rounding hides differences"
    return f"the real weights' output '{name}' {little}; parity shown on a copy with well-conditioned values"


def _copy(model: torch.nn.Module) -> tuple[torch.nn.Module, list[str]]:
    """Return a float32 copy in eval mode on the CPU, and a note where that changed the precision."""
    floating = {n: v for n, v in (*model.named_parameters(), *model.named_buffers()) if v.is_floating_point()}
    others = sorted({str(v.dtype).removeprefix("torch.") for v in floating.values()} - {"float32"})
    require_finite(floating, type(model).__name__)
    try:
        subject = copy.deepcopy(model).cpu().float()
    except Exception as error:  # deepcopy runs code of the user's own classes
        raise UnsupportedModel(f"{type(model).__name__} cannot be copied for export: {reason(error)}") from error
    with contextlib.suppress(NotImplementedError):  # programs made by torch.export keep the mode of their capture
        subject.eval()
    return subject, [f"exported as float32 (the model is {', '.join(others)})"] if others else []


def _run(call: Callee, tensors: Tensors) -> Any:
    args, kwargs = call.arguments(list(tensors.values()))
    try:
        with torch.no_grad():
            return call.module(*args, **kwargs)
    except Exception as error:  # any exception the model raises
        raise InvalidInput(
            f"{type(call.module).__name__} does not run on the example inputs{place_of(error)}: {reason(error)}; "
            "check their shapes and types"
        ) from error


READ = {(1, 14): (18, 8), (1, 15): (19, 9), (1, 17): (20, 9), (1, 18): (21, 10), (1, 21): (22, 10), (1, 23): (23, 11)}
READ[1, 24] = 25, 13
"""Release of ONNX Runtime → operator set and IR version from then on, by its release notes; tried from 1.15 on."""


def newest_read(version: str) -> tuple[int, int]:
    """Return the newest operator set and IR version that a release loads; one after the last known reads the same."""
    found = re.fullmatch(r"(\d+)\.(\d+)(?:\.\d+)*", str(version))
    if found is None:
        raise InvalidInput(f"ONNX Runtime '{version}' is no version; write one such as 1.16")
    release, oldest = (int(found[1]), int(found[2])), min(READ)
    if release < oldest:
        known = ".".join(map(str, oldest))
        raise InvalidInput(f"ONNX Runtime {version} is older than {known}, the oldest that files are written for")
    return READ[max(known for known in READ if known <= release)]


def require_readable(model: onnx.ModelProto, version: str, name: str) -> None:
    """Raise UnsupportedModel, with the operator's name, where a release does not load a model's operators or format."""
    newest, ir_version = newest_read(version)
    opset = next((x.version for x in model.opset_import if x.domain in _OWN_DOMAINS), 0)
    for node in model.graph.node:
        if node.domain in _OWN_DOMAINS:
            needed = onnx.defs.get_schema(node.op_type, opset, node.domain).since_version
            if node.op_type == "GridSample" and _samples_volumes(model, node):
                needed = max(needed, 20)  # newer libraries read them in files of older sets too
            if needed > newest:
                raise UnsupportedModel(
                    f"{name}: operator {node.op_type} ('{node.name}') is of operator set {needed}, and ONNX Runtime "
                    f"{version} reads sets up to {newest}; ask for a newer one, or replace what makes it"
                )
    if opset > newest or model.ir_version > ir_version:
        raise UnsupportedModel(
            f"{name}: operator set {opset} in IR version {model.ir_version}, and ONNX Runtime {version} reads "
            f"sets up to {newest} in IR versions up to {ir_version}"
        )


def _samples_volumes(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Return whether a GridSample takes (N, C, D, H, W), as far as shapes can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = (*graph.input, *graph.value_info, *graph.initializer)
    ranks = {x.name: len(x.dims if hasattr(x, "dims") else x.type.tensor_type.shape.dim) for x in known}
    return 5 in (ranks.get(name) for name in node.input)


_OWN_DOMAINS = ("", "ai.onnx")
