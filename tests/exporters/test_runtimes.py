"""Files for old ONNX Runtimes: the operator set and the format that they read, and a run in one of them."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import surgery
from exporters import onnx as exporter
from exporters.onnx import READ, ExportSettings, export, require_readable
from exporters.quantize import Int8, saturates, to_fp16, to_int8
from surgery.delivery import validate_output
from surgery.errors import InvalidInput, UnsupportedModel

OLD = "1.16.3"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.LayerNorm(8), nn.Linear(8, 4)).eval()


def batches() -> list[dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    return [{"input": np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype(np.float32)}]


@pytest.mark.parametrize(("version", "opset", "ir_version"), [("1.14", 18, 8), ("1.16.3", 19, 9), ("1.17", 20, 9)])
def test_files_carry_what_a_runtime_reads(
    net: nn.Module, tmp_path: Path, version: str, opset: int, ir_version: int
) -> None:
    file = export(net, torch.randn(1, 3, 16, 16), tmp_path / "a.onnx", ExportSettings(min_ort=version)).path
    made = [
        file,
        to_int8(file, tmp_path / "int8.onnx", batches()).path,
        to_fp16(file, tmp_path / "h.onnx", batches()).path,
    ]
    for path in made:
        model = onnx.load(path)
        assert (model.ir_version, [(x.domain, x.version) for x in model.opset_import]) == (ir_version, [("", opset)])
        require_readable(model, version, path.name)


def test_a_newer_runtime_changes_nothing(net: nn.Module, tmp_path: Path) -> None:
    plain, newer = (
        export(net, torch.randn(1, 3, 16, 16), tmp_path / f"{v}.onnx", ExportSettings(min_ort=v)).path.read_bytes()
        for v in (None, "1.99")
    )
    assert plain == newer


def test_each_set_is_written_in_the_oldest_format_that_goes_with_it() -> None:
    for opset, ir_version in READ.values():
        assert helper.find_min_ir_version_for([helper.make_opsetid("", opset)]) <= ir_version


def test_the_operator_to_blame_is_named() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["h"], name="one"), helper.make_node("Gelu", ["h"], ["y"], name="two")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(UnsupportedModel, match=r"net.onnx: operator Gelu \('two'\) is of operator set 20, .* 1.16"):
        require_readable(model, "1.16", "net.onnx")
    require_readable(model, "1.17", "net.onnx")
    model.ir_version = 10
    with pytest.raises(UnsupportedModel, match="IR version 10"):
        require_readable(model, "1.17", "net.onnx")


def test_an_export_that_ends_up_newer_is_refused_and_the_older_file_stays(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: the exporter keeps to its own operator set."""
    real = exporter.convert
    monkeypatch.setattr(exporter, "convert", lambda *args, **given: real(*args, **{**given, "opset": 20}))
    target = tmp_path / "a.onnx"
    target.write_bytes(b"before")
    with pytest.raises(UnsupportedModel, match=r"operator Gelu .* reads sets up to 19"):
        export(net, torch.randn(1, 3, 16, 16), target, ExportSettings(min_ort="1.16"))
    assert target.read_bytes() == b"before"


class Sampled(nn.Module):
    def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return nn.functional.grid_sample(x, grid, align_corners=False)


@pytest.mark.parametrize(("axes", "version"), [(2, "1.14"), (3, "1.17"), (3, "1.16")])
def test_sampling_volumes_needs_a_newer_runtime(axes: int, version: str, tmp_path: Path) -> None:
    example = torch.rand(1, 3, *[6] * axes), torch.rand(1, *[4] * axes, axes)
    if (axes, version) != (3, "1.16"):
        assert export(Sampled(), example, tmp_path / "net.onnx", ExportSettings(min_ort=version)).path.is_file()
        return
    with pytest.raises(UnsupportedModel, match="GridSample"):
        export(Sampled(), example, tmp_path / "net.onnx", ExportSettings(min_ort=version))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("version", "said"), [("1.2", "older than 1.14"), ("new", "no version; write one such as 1.16")]
)
def test_a_version_that_is_none_is_refused_before_any_work(version: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        validate_output(surgery.recipe(min_ort=version))


def test_an_operator_set_beyond_the_runtime_is_refused(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"1\.16 reads operator sets up to 19, not 20"):
        export(net, torch.randn(1, 3, 16, 16), tmp_path / "a.onnx", ExportSettings(min_ort="1.16", opset=20))
    with pytest.raises(InvalidInput, match=r"1\.16 reads operator sets up to 19, not 20"):  # before any work
        validate_output(surgery.recipe(min_ort="1.16", opset=20))


def test_an_old_runtime_runs_the_files(net: nn.Module, tmp_path: Path) -> None:
    """In a virtual environment of its own."""
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile", "--only-binary=:all:"]
    command = [*pip, f"onnxruntime=={OLD}", "numpy<2"]
    if subprocess.run(command, capture_output=True, check=False, timeout=300).returncode:
        pytest.skip(f"onnxruntime {OLD} cannot be installed here, for Python {sys.version_info[:2]}")
    file = export(net, torch.randn(1, 3, 16, 16), tmp_path / "a.onnx", ExportSettings(min_ort="1.16")).path
    how = Int8(reduce_range=saturates())  # or sums of products would be cut off here
    made = [
        file,
        to_int8(file, tmp_path / "b.onnx", batches(), how).path,
        to_fp16(file, tmp_path / "c.onnx", batches()).path,
    ]
    x = batches()[0]["input"]
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np, onnxruntime as ort; x = np.load(sys.argv[1]); print(ort.__version__)\n"
        "for path in sys.argv[2:]: np.save(path + '.npy', ort.InferenceSession(path).run(None, {'input': x})[0])"
    )
    done = subprocess.run([python, "-c", code, tmp_path / "x.npy", *made], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == OLD
    with torch.no_grad():
        wanted = net(torch.from_numpy(x)).numpy()
    for path, tolerance in zip(made, (1e-4, 0.2, 5e-3), strict=True):
        found = np.load(f"{path}.npy")
        assert np.abs(found - wanted).max() < tolerance * np.abs(wanted - wanted.mean(0)).max()
