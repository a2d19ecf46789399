"""ONNX files in fewer bits: int8 by ONNX Runtime's static quantization, fp16 by its converter.

Both are compared with the float32 file before they replace an older one. Batch norms are folded first, so that a layer
and its norm are rounded once. Activations are unsigned and weights signed, with a scale per channel: x86 has fast
kernels for that combination (signed activations ran three times slower on ResNet-56), ARM for both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from exporters.session import open_session
from surgery.core import explained, quiet, replacing
from surgery.errors import CheckFailed, InvalidInput

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
"""Calibration method of activation ranges → its name in ONNX Runtime."""
FEWEST = 8  # minimum number of calibration images
FIRST, LAST = "first", "last"
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PERCENTILE = 99.999
_SUMS = ("LayerNormalization", "GroupNormalization", "InstanceNormalization")
"""Left in float32: means and variances lose digits in 16 bits, and older runtimes have no such kernels."""

LEAST = 0.5  # cosine between the outputs in float32 and in fewer bits; a file below that is refused

Batch = Mapping[str, NDArray[Any]]
_Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Int8:
    """Quantization settings; raises InvalidInput for an unknown method.

    Attributes:
        method: how an activation's range follows from the calibration images: `minmax`, `entropy` or `percentile`.
        keep: layers that stay in float32: `first`, `last`, or patterns (``*``, ``?``) of names: of the module whose
            weight it reads (``layer1.0.conv1``), of the node or of the operator.
        reduce_range: weights of 7 bits, for x86 processors without VNNI, whose sums of products can saturate.
    """

    method: str = "minmax"
    keep: tuple[str, ...] = ()
    reduce_range: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidInput(f"method '{self.method}': there are {', '.join(METHODS)}")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A written low-precision file."""

    path: Path
    bytes: int
    layers: tuple[int, int]  # in 8 bits, of how many
    cosine: float | None  # with the float file's outputs, where it is least; None where not compared
    notes: tuple[str, ...] = ()  # for the user


def to_int8(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    batches: Iterable[Batch],
    settings: Int8 | None = None,
    *,
    check: bool = True,
) -> Quantised:
    """Quantise a float32 ONNX file by calibration images and compare the two before `target` is replaced.

    `batches` are of the file's inputs by name, each (N, ...), normalised as the model expects. Without `check`, for
    files that are only timed, one that computes something else is not refused.

    Raises:
        InvalidInput: the source cannot be read, the images are missing, too few or do not fit, a pattern of
            `settings.keep` names no layer.
        CheckFailed: the int8 file does not run, or its output is unrelated to the float file's.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process  # saves start-up seconds

    how = settings or Int8()
    seen, own = _calibration(source, batches, compare=check)
    kept = _kept(onnx.load(os.fspath(source)), how.keep)
    with replacing(target) as file, quiet():
        folded = file.with_name("folded.onnx")
        with explained(f"{source} cannot be prepared for quantization"):
            quant_pre_process(os.fspath(source), folded, skip_symbolic_shape=True)  # folds batch norms
        _quantise(folded, file, seen, how, kept)
        layers = _finished(source, file)
        cosine = _agreement(own, file, seen) if check else None
    notes = []
    if not how.reduce_range and saturates():
        notes.append(
            "this processor has no VNNI: sums of 8-bit products can saturate; reduce_range (--int8-reduce-range) "
            "avoids that"
        )
    return Quantised(Path(target), Path(target).stat().st_size, layers, cosine, tuple(notes))


def to_fp16(source: str | os.PathLike[str], target: str | os.PathLike[str], batches: Iterable[Batch]) -> Quantised:
    """Convert a float32 ONNX file to float16, inputs and outputs left in float32, and compare the two on these batches.

    Smaller, not faster, on processors: ONNX Runtime's own kernels there compute most operators in float32.

    Raises:
        InvalidInput: the source cannot be read or converted, or there are no inputs to compare on.
        CheckFailed: the fp16 file does not run, or its output is unrelated to the float file's.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16  # likewise

    seen, own = _calibration(source, batches, least=1)
    with replacing(target) as file, quiet():
        with explained(f"{source} cannot be converted to fp16"):
            kept = [*DEFAULT_OP_BLOCK_LIST, *_SUMS]
            half = convert_float_to_float16(onnx.load(os.fspath(source)), keep_io_types=True, op_block_list=kept)
        origin = {p.key: p.value for p in half.metadata_props}
        onnx.helper.set_model_props(half, origin | {"precision": "fp16"})
        onnx.save(half, file)
        cosine = _agreement(own, file, seen)
    return Quantised(Path(target), Path(target).stat().st_size, (0, 0), cosine)


def _calibration(
    source: Any, batches: Iterable[Batch], *, least: int = FEWEST, compare: bool = True
) -> tuple[list[Batch], _Outputs]:
    """Return the batches as a list, and the float file's outputs, without `compare` on the first batch only."""
    seen: list[Batch] = [dict(batch) for batch in batches]
    session = open_session(source)
    names = [x.name for x in session.get_inputs()]
    for batch in seen:
        if sorted(batch) != sorted(names):
            raise InvalidInput(f"{source} takes {', '.join(names)}; a batch of images has {', '.join(batch) or 'none'}")
    count = sum(len(next(iter(batch.values()))) for batch in seen)
    if count < least:
        raise InvalidInput(f"too few images to calibrate on ({count}); give {least} or more, better a few hundred")
    with explained(f"{source} does not take these images"):
        return seen, _outputs(session, seen if compare else seen[:1])


def validate_kept(keep: Sequence[str], layers: Collection[str], export: Callable[[], Path]) -> None:
    """Raise InvalidInput early if a pattern names no layer.

    `layers` are the modules with weights; a file is exported for patterns that may be of its nodes.
    """
    known = (FIRST, LAST, *_LAYERS, *layers)
    if others := [pattern for pattern in keep if not any(fnmatchcase(name, pattern) for name in known)]:
        _kept(onnx.load(export()), others)


def _kept(model: onnx.ModelProto, keep: Sequence[str]) -> list[str]:
    """Return the names of nodes that stay in float32."""
    layers: dict[str, tuple[str, str, str]] = {}  # node → the module whose weight it reads, its own name, its operator
    for node in model.graph.node:
        if node.op_type in _LAYERS:
            read = node.input[1] if len(node.input) > 1 else ""
            module = read.removesuffix(".weight") if read.endswith(".weight") else node.name
            layers[node.name] = module, node.name, node.op_type
    chosen = list[str]()
    ends = {FIRST: list(layers)[:1], LAST: list(layers)[-1:]}
    for pattern in keep:
        matching = [name for name, known in layers.items() if any(fnmatchcase(x, pattern) for x in known)]
        found = ends.get(pattern) or matching
        if not found:
            modules, _, ops = zip(*layers.values(), strict=True) if layers else ((), (), ())
            named = ", ".join((FIRST, LAST, *dict.fromkeys(ops), *modules[:6]))
            raise InvalidInput(f"'{pattern}' names no layer to keep in float32; there are {named} ...")
        chosen += found
    return chosen


class _CalibrationReader:
    """The batches in order, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self.set_range(0, len(batches))

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._batches[start_index:end_index])

    def get_next(self) -> Batch | None:
        return next(self._left, None)


def _quantise(folded: Path, file: Path, seen: Sequence[Batch], how: Int8, kept: Sequence[str]) -> None:
    from onnxruntime import quantization as ort  # saves start-up seconds
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry  # likewise

    ort.CalibrationDataReader.register(_CalibrationReader)
    transposed = (node for node in onnx.load(folded).graph.node if node.op_type == "ConvTranspose")
    # The quantizer cannot make a scale for each channel of transposed convolutions in groups.
    grouped = [n.name for n in transposed if any(a.name == "group" and a.i > 1 for a in n.attribute)]
    options: dict[str, Any] = {"CalibPercentile": _PERCENTILE} if how.method == "percentile" else {}
    if how.method != "minmax":
        # Histograms grow batch by batch: memory is one batch's, and batches may be of several sizes.
        options["CalibStridedMinMax"] = 1
    with explained(f"ONNX Runtime cannot quantize {folded.name}"):
        ort.quantize_static(
            folded,
            file,
            _CalibrationReader(seen),
            quant_format=ort.QuantFormat.QDQ,
            op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry}),
            per_channel=True,
            reduce_range=how.reduce_range,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=[*kept, *grouped],
            calibrate_method=getattr(ort.CalibrationMethod, METHODS[how.method]),
            extra_options=options,
        )


def _finished(source: Any, file: Path) -> tuple[int, int]:
    """Copy the source's metadata and IR version; returns the number of layers with 8-bit weights, and of all layers."""
    model, origin = onnx.load(file), onnx.load(os.fspath(source), load_external_data=False)
    del model.metadata_props[:]
    used = {node.domain for node in model.graph.node}
    imports = [x for x in model.opset_import if x.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    model.ir_version, model.producer_name = origin.ir_version, origin.producer_name
    onnx.helper.set_model_props(model, {p.key: p.value for p in origin.metadata_props} | {"precision": "int8"})
    onnx.save(model, file)
    made = {out: node.op_type for node in model.graph.node for out in node.output}
    layers = [node for node in model.graph.node if node.op_type in _LAYERS]
    in_8_bits = [n for n in layers if all(made.get(name) == "DequantizeLinear" for name in n.input[:2])]
    return len(in_8_bits), len(layers)


def _agreement(own: _Outputs, file: Path, seen: Sequence[Batch]) -> float:
    """Return the mean cosine of the two files' outputs, of the output where it is least."""
    with explained(f"{file.name} does not run", CheckFailed):
        other = _outputs(open_session(file, kind=CheckFailed), seen)
    cosines = []
    for name, wanted in own.items():
        found = other[name]
        if found.shape != wanted.shape or not np.isfinite(found).all():
            raise CheckFailed(f"{file.name}: output '{name}' is not finite, or of another shape, in fewer bits")
        a, b = (torch.from_numpy(x.reshape(len(x), -1)).double() for x in (wanted, found))
        same = torch.where(a.any(1) | b.any(1), torch.cosine_similarity(a, b), 1.0)  # of images of nothing: 1
        cosines.append(float(same.mean()))
    if min(cosines) < LEAST:
        raise CheckFailed(
            f"{file.name}: its output is unrelated to the float file's (cosine {min(cosines):.2f}); keep more layers "
            "in float32, or calibrate by another method or other images"
        )
    return min(cosines)


def _outputs(session: onnxruntime.InferenceSession, seen: Sequence[Batch]) -> _Outputs:
    """Return all floating outputs by name, each (N, ...)."""
    names = [x.name for x in session.get_outputs() if "float" in x.type]
    found = [session.run(names, dict(batch)) for batch in seen]
    return {name: np.concatenate([x[k] for x in found]) for k, name in enumerate(names)}


@cache
def saturates() -> bool:
    """Return whether this x86 processor accumulates 8-bit products in 16 bits; the first call takes a second."""
    import platform  # needed here alone

    import cpuinfo

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not {"avx512_vnni", "avx_vnni"} & set(cpuinfo.get_cpu_info().get("flags", ()))
