"""Formats of files besides ONNX, each made from an ONNX file by a function that `register_format` registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

Convert = Callable[[Path, Path, Mapping[str, "NDArray[Any]"]], object]
"""(ONNX file, target path, example inputs by name for the comparison)."""

ONNX = "onnx"
"""The format that is always written."""


@dataclass(frozen=True, slots=True)
class Format:
    """A file format."""

    name: str  # in `--format`
    suffix: str
    precisions: tuple[str, ...]  # of the ONNX file: `fp32`, `fp16`, `int8`
    convert: Convert  # raises an error of `surgery.errors` if it fails or the file differs


FORMATS: dict[str, Format] = {}  # name → format, of those that are registered


def register_format(
    name: str, *, suffix: str, precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
) -> Callable[[Convert], Convert]:
    """Return a decorator that registers a conversion of an ONNX file; raises ValueError for a taken name or suffix."""
    if name == ONNX or name in FORMATS or suffix in (f.suffix for f in FORMATS.values()):
        raise ValueError(f"a format '{name}', or one with the suffix {suffix}, is registered already")

    def register(convert: Convert) -> Convert:
        FORMATS[name] = Format(name, suffix, precisions, convert)
        return convert

    return register


_OF_THIS_MACHINE = ["NchwcTransformer"]
_TOLERANCE = 1e-4


@register_format("ort", suffix=".ort", precisions=("fp32", "int8"))  # fp16 weights would be stored as float32
def _to_ort(source: Path, target: Path, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Convert to ONNX Runtime's own format, optimised for any processor, for its small builds for phones and boards."""
    # Imported here: ONNX Runtime takes a second, and `--help` needs the names alone.
    import numpy as np
    from onnxruntime import GraphOptimizationLevel, InferenceSession

    from exporters.session import open_session, session_options
    from surgery.core import explained, replacing

    def outputs(session: InferenceSession) -> list[NDArray[Any]]:
        with explained(f"{source} does not run on these inputs"):
            found: list[NDArray[Any]] = session.run(None, {x.name: inputs[x.name] for x in session.get_inputs()})
        return found

    with replacing(target) as file:
        options = session_options()
        options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(file)
        options.add_session_config_entry("session.save_model_format", "ORT")
        wanted = outputs(open_session(source, options, disabled_optimizers=_OF_THIS_MACHINE))
        for k, (a, b) in enumerate(zip(wanted, outputs(open_session(file)), strict=True)):
            scale = float(np.abs(a).max()) if a.size else 0.0
            if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=_TOLERANCE * max(scale, 1e-30), equal_nan=True):
                raise CheckFailed(f"{file.name}: output {k} differs from {source.name}'s; nothing was written")
