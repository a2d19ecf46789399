"""The command line on a trained network and real images, where the data folder is at hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import surgery
from benchmarks.studies import data, networks
from surgery.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root() -> Path:
    try:
        return data.find_root()
    except InvalidInput as error:
        pytest.skip(f"no trained network to cut: {error}")


@pytest.fixture(scope="module")
def images(root: Path) -> data.Images:
    return data.exact_images(root)


@pytest.fixture(scope="module")
def shrunk(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line makes of the trained ResNet-20."""
    out = tmp_path_factory.mktemp("cifar") / "resnet20"
    command = [sys.executable, "scripts/shrink.py", "benchmarks/studies/networks.py:resnet20", "--quiet"]
    command += ["--weights", str(data.checkpoint(root, "resnet20")), "--macs", "0.7", "--runs", "3", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def accuracy(predicted: torch.Tensor, images: data.Images) -> float:
    return float((predicted == images.labels).double().mean())


def test_our_definition_fits_the_trained_weights(root: Path, images: data.Images) -> None:
    dense = data.trained(root, "resnet20")
    assert accuracy(data.predictions(dense, images), images) == pytest.approx(0.916, abs=0.01)


def test_the_compact_network_still_classifies_real_images(root: Path, images: data.Images, shrunk: Path) -> None:
    compact = surgery.load(shrunk, data.trained(root, "resnet20"))
    found = accuracy(data.predictions(compact, images), images)
    assert 0.2 < found < 0.93  # chance is 0.1


def test_the_onnx_file_predicts_as_the_compact_network_does(root: Path, images: data.Images, shrunk: Path) -> None:
    compact = surgery.load(shrunk, data.trained(root, "resnet20"))
    session = onnxruntime.InferenceSession(shrunk / "compact.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = np.concatenate([session.run(None, {name: p.numpy()})[0] for p in torch.split(images.pixels, 233)])
    agreement = float((torch.from_numpy(logits).argmax(1) == data.predictions(compact, images)).double().mean())
    assert agreement > 0.998


def test_the_report_says_where_the_weights_came_from(root: Path, shrunk: Path) -> None:
    report = json.loads((shrunk / "report.json").read_text(encoding="utf-8"))
    assert "resnet20_cifar10.pt" in report["model"]["weights"]
    assert report["budget"]["kept_fraction"] <= 0.7
    assert report["models"][-1]["parameters"] < report["models"][0]["parameters"]


def test_the_shortcuts_are_cut_with_the_stages_they_join(root: Path, shrunk: Path) -> None:
    compact = surgery.load(shrunk, data.trained(root, "resnet20"))
    state = compact.state_dict()
    first, last = state["layer2.0.conv2.weight"], state["layer2.2.conv2.weight"]
    assert first.shape[0] == last.shape[0] < 32


def test_a_missing_data_folder_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="SURGERY_DATA"):
        data.find_root(tmp_path / "nowhere")


def test_block_shortcut_pads_channels_on_both_sides() -> None:
    block = networks.Block(4, 8, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the residual becomes zero
    x = torch.rand(1, 4, 6, 6)
    with torch.no_grad():
        out = block(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()
