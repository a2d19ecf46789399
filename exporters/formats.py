"""Formats of files besides ONNX, each made from an ONNX file. To add one, register a function that converts a file.

    @register_format("ort", suffix=".ort", precisions=("fp32", "int8"))
    def to_ort(source, target, inputs): ...

`surgery shrink --format onnx,ort` and `surgery.save` then write `compact.ort` beside `compact.onnx`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from surgery.errors import InvalidInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

Convert = Callable[[Path, Path, Mapping[str, "NDArray[Any]"]], object]
"""(ONNX file, target path, example inputs by name for the comparison)."""

ONNX = "onnx"
"""The format that is always written."""


@dataclass(frozen=True, slots=True)
class Format:
    """A file format.

    Attributes:
        name: name in `--format`.
        suffix: file suffix.
        precisions: supported precisions of the ONNX file: `fp32`, `fp16`, `int8`.
        convert: writes a file; raises an error of `surgery.errors` if it fails, or if the file differs.
    """

    name: str
    suffix: str
    precisions: tuple[str, ...]
    convert: Convert


_FORMATS: dict[str, Format] = {}
FORMATS: Mapping[str, Format] = MappingProxyType(_FORMATS)
"""Name → format, of those that are registered."""


def register_format(
    name: str, *, suffix: str, precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
) -> Callable[[Convert], Convert]:
    """Return a decorator that registers a conversion from an ONNX file to another format.

    Raises:
        ValueError: the name or suffix is already registered.
    """
    if name == ONNX or name in FORMATS or suffix in (f.suffix for f in FORMATS.values()):
        raise ValueError(f"a format '{name}', or one with the suffix {suffix}, is registered already")

    def register(convert: Convert) -> Convert:
        _FORMATS[name] = Format(name, suffix, precisions, convert)
        return convert

    return register


def validate_formats(names: tuple[str, ...]) -> None:
    """Raise InvalidInput if a name is neither `onnx` nor a registered format."""
    known = (ONNX, *sorted(FORMATS))
    if unknown := [name for name in names if name not in known]:
        raise InvalidInput(f"format '{unknown[0]}' is not accepted; give some of {', '.join(known)}")


@register_format("ort", suffix=".ort", precisions=("fp32", "int8"))  # fp16 weights would be stored as float32
def _to_ort(source: Path, target: Path, inputs: Mapping[str, NDArray[Any]]) -> None:
    from exporters.ort_format import to_ort  # here: ONNX Runtime takes a second, and `--help` needs the names alone

    to_ort(source, target, inputs)
