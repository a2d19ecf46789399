"""`surgery bench`: ONNX files timed against each other, from the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from onnx import load, save
from torch import nn

from exporters import onnx

ROOT = Path(__file__).resolve().parents[2]


def net(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 4)).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "other").mkdir()
    for name, width, size in (("wide", 48, 24), ("narrow", 8, 24), ("small", 8, 16), ("other/wide", 48, 24)):
        onnx.export(net(width), torch.randn(1, 3, size, size), folder / f"{name}.onnx")
    onnx.export(net(8), torch.randn(1, 3, 24, 24), folder / "open.onnx", dynamic_axes={"input": (0, 2, 3)})
    bare = load(folder / "open.onnx")
    del bare.metadata_props[:]
    save(bare, folder / "bare.onnx")
    onnx.export(net(8), torch.randn(1, 3, 24, 24), folder / "fixed.onnx", dynamic_axes={})
    (folder / "text.onnx").write_text("not a model")
    return folder


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that cannot import torch."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['torch'] = None; import surgery.cli as c; "
    command = [sys.executable, "-c", code + "sys.exit(c.main(['bench', *sys.argv[1:]]))", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_files_are_timed_without_torch(files: Path) -> None:
    done = bench(files, "wide.onnx", "narrow.onnx", "open.onnx", "--seconds", "2", "--input-shape", "input=1,3,24,24")
    assert done.returncode == 0, done.stderr
    assert "wide.onnx, again" in done.stdout
    assert "peak" in done.stdout


def test_json_has_intervals_and_names_the_files(files: Path) -> None:
    done = bench(files, "wide.onnx", "narrow.onnx", "--baseline", "narrow.onnx", "--seconds", "2", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    rows = {row["file"]: row for row in found["rows"]}
    assert found["baseline"] == "narrow.onnx"
    assert rows["narrow.onnx"]["ratio"]["value"] == 1.0
    wide = rows["wide.onnx"]
    assert 1.0 < wide["ratio"]["low"] <= wide["ratio"]["value"] <= wide["ratio"]["high"]
    assert wide["load_ms"] > 0
    assert wide["peak_memory_bytes"] > wide["floor_memory_bytes"] > 0
    assert found["settings"]["provider"] == found["environment"]["provider"] == "CPUExecutionProvider"
    assert found["aa"]["low"] <= found["aa"]["high"]


def test_files_of_one_name_are_told_apart(files: Path) -> None:
    done = bench(files, "wide.onnx", "other/wide.onnx", "--seconds", "1", "--json")
    assert [row["name"] for row in json.loads(done.stdout)["rows"]] == ["wide.onnx", "other/wide.onnx"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["wide.onnx", "small.onnx"], "only files with the same inputs can be compared"),
        (["wide.onnx", "--provider", "cuda"], "has .*CPUExecutionProvider; choose one of these"),
        (["text.onnx"], "cannot load text.onnx"),
        (["absent.onnx"], "cannot load absent.onnx"),
        (["bare.onnx"], "axis 2 of input 'input' is dynamic .* --input-shape input=N,C,H,W"),
        (["open.onnx", "--input-shape", "3,24,24"], "is not accepted; give NAME=SHAPE"),
        (["fixed.onnx", "--batch", "2"], "cannot run at batch=2"),
        (["wide.onnx", "wide.onnx"], "given twice"),
        (["wide.onnx", "--baseline", "small.onnx"], "none of the files"),
        (["wide.onnx", "--threads", "1000"], "this process may use"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_timed_is_said_in_one_sentence(files: Path, arguments: list[str], said: str) -> None:
    done = bench(files, *arguments, "--quiet")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert re.search(said, done.stderr)


def test_open_sizes_are_those_that_a_file_was_exported_with(files: Path) -> None:
    done = bench(files, "open.onnx", "--seconds", "1", "--runs", "12", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    shaped = bench(files, "open.onnx", "--input-shape", "input=4,3,24,24", "--seconds", "1", "--runs", "12", "--json")
    assert json.loads(shaped.stdout)["settings"]["batch"] == 4
    done = bench(files, "open.onnx", "--input-shape", "input=4,3,24,24", "--batch", "2")
    assert (done.returncode, "a batch of 4, and --batch is 2" in done.stderr) == (2, True)
