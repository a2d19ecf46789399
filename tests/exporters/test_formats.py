"""Formats besides ONNX: one is added from outside the package, and its files are written like those of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from exporters.formats import FORMATS, register_format
from surgery.errors import InvalidInput
from surgery.pipeline import Result


@pytest.fixture
def sizes_format() -> Iterator[str]:
    """A format whose files hold the size of the ONNX file and the names of its inputs."""

    @register_format("sizes", suffix=".sizes", precisions=("fp32",))
    def to_sizes(source: Path, target: Path, inputs: Mapping[str, Any]) -> None:
        target.write_text(f"{source.stat().st_size} {' '.join(inputs)}")

    yield "sizes"
    del FORMATS["sizes"]


@pytest.fixture(scope="module")
def result() -> Result:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(16, 4)).eval()
    return surgery.shrink(model, torch.randn(1, 3, 16, 16), surgery.recipe(macs=0.5))


def test_a_format_from_outside_is_written_beside_the_others(result: Result, sizes_format: str, tmp_path: Path) -> None:
    recipe = surgery.recipe(runs=3, format=f"onnx,ort,{sizes_format}")
    for _ in range(2):  # the second run replaces the folder, whose files it knows for its own
        surgery.save(result, tmp_path / "out", recipe)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"compact.onnx", "compact.ort", "compact.sizes"} <= files
    size = (tmp_path / "out" / "compact.onnx").stat().st_size
    assert (tmp_path / "out" / "compact.sizes").read_text() == f"{size} input"


def test_a_format_that_is_not_registered_is_refused(result: Result, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'tflite' is not accepted; give some of onnx, ort"):
        surgery.save(result, tmp_path / "out", surgery.recipe(format="tflite"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "suffix"), [("onnx", ".new"), ("ort", ".new"), ("new", ".ort")])
def test_a_name_or_suffix_is_registered_once(name: str, suffix: str) -> None:
    before = dict(FORMATS)
    with pytest.raises(ValueError, match="registered already"):
        register_format(name, suffix=suffix)
    assert before == FORMATS
