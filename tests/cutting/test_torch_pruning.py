"""The tracer for models that torch.export cannot capture, and the stages behind it that run the user's own module."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import surgery
from surgery.capture.tracing import trace
from surgery.core.ir import Coupling
from surgery.coupling.coupler import couple
from surgery.cutting import eager
from surgery.errors import CheckFailed, UnsupportedModel
from surgery.inputs import import_torchvision

SOURCE = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.Hardswish())
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.narrow = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        if x.mean() > -1000:
            x = self.depthwise(self.wide(x))
        else:
            x = self.narrow(x)
        return self.head(x.mean((2, 3)))

class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 20, 5)
        self.fc = nn.Linear(20 * 4 * 4, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.conv(x)), 2)
        if x.sum() > 1e9:
            x = x * 2
        x = x.view(-1, 320)
        return self.fc(x)

def branching():
    torch.manual_seed(0)
    return Branching(), torch.randn(2, 3, 16, 16)
"""


@pytest.fixture
def nets(tmp_path: Path):
    file = tmp_path / "nets.py"
    file.write_text(SOURCE)
    space: dict[str, object] = {"__name__": "nets"}
    exec(compile(SOURCE, str(file), "exec"), space)
    torch.manual_seed(0)
    return space


def owned(coupling: Coupling) -> set[frozenset[tuple[str, int, tuple[int, ...]]]]:
    """Each unit as the set of (tensor, axis, positions) it owns: weights, biases, norm scales and statistics."""
    return {
        frozenset((site.tensor, site.axis, site.index[k]) for site in group.sites)
        for group in coupling.groups
        for k in range(group.size)
    }


def grouped(coupling: Coupling) -> set[frozenset[tuple[str, int]]]:
    """Each group as the set of parameter axes it touches."""
    return {frozenset((site.tensor, site.axis) for site in group.sites) for group in coupling.groups}


@pytest.mark.parametrize("name", ["resnet18", "densenet", "mobilenet_v2"])
def test_both_tracers_find_the_same_units_and_groups(name: str) -> None:
    models = import_torchvision().models
    model = models.DenseNet(32, (4, 4), 64) if name == "densenet" else models.get_model(name, weights=None)
    x = torch.randn(2, 3, 33, 33)
    ours = couple(trace(model, x))
    theirs = eager.couple(eager.trace(model, x))
    assert owned(theirs) == owned(ours)
    assert grouped(theirs) == grouped(ours)
    assert sum(group.size for group in theirs.groups) == sum(group.size for group in ours.groups) > 1000


def test_a_model_with_an_if_on_data_is_refused_by_export_and_shrunk_by_torch_pruning(nets) -> None:
    model, x = nets["branching"]()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModel, match=r"nets\.py:16"):
        surgery.shrink(model, x)
    result = surgery.shrink(model, x, surgery.recipe(tracer="torch-pruning", macs=0.5))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert type(result.model) is type(model)
    assert result.model.depthwise.groups == result.model.depthwise.out_channels < 24
    assert result.model.head.in_features == result.model.depthwise.out_channels
    assert result.report["budget"]["kept_fraction"] <= 0.5
    assert any("no label replay, one path exported" in note for note in result.check.notes)
    assert result.check.error_float64 <= 1e-10
    assert any("narrow" in note for note in result.report["notes"])  # off the path, whole, and said
    again = surgery.apply(result.plan, model, x)
    assert all(torch.equal(value, result.model.state_dict()[key]) for key, value in again.state_dict().items())


def test_a_literal_view_is_refused_with_its_line(nets) -> None:
    with pytest.raises(UnsupportedModel, match=r"nets\.py:32") as refused:
        surgery.shrink(nets["Literal"](), torch.randn(2, 1, 12, 12), surgery.recipe(tracer="torch-pruning"))
    assert "--keep" in str(refused.value)


def test_what_is_not_followed_is_frozen_with_a_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
            self.norm, self.d = nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.c(x + self.b(self.a(x)))
            return self.d(self.norm(y).softmax(1))

    coupling = eager.couple(eager.trace(Net(), torch.randn(1, 3, 8, 8)))
    assert [group.name for group in coupling.groups] == ["a.weight:0"]
    reasons = {(frozen.tensor, frozen.axis): frozen.reason for frozen in coupling.frozen}
    assert reasons["b.weight", 0] == "tied to a network input"
    assert "GroupNorm" in reasons["c.weight", 0]
    assert reasons["d.weight", 0] == "network output"


def test_swapped_channels_are_found(nets) -> None:
    model, x = nets["branching"]()
    program = eager.trace(model, x)
    coupling = eager.couple(program)
    scores = surgery.score(program, coupling)
    plan = surgery.allocate(program, coupling, scores, surgery.Budget(channels=0.5), cost=None)
    compact = surgery.cut(program, plan, coupling=coupling)
    assert surgery.check(program, plan, compact, coupling=coupling).error_float64 <= 1e-10
    with torch.no_grad():
        weight = compact.module.wide[0].weight
        weight.copy_(weight.flip(0).clone())
    with pytest.raises(CheckFailed, match="real weights"):
        surgery.check(program, plan, compact, coupling=coupling)


def test_the_command_line_writes_onnx_along_the_example_path(tmp_path: Path, nets, capsys) -> None:
    from surgery.cli import main

    out = tmp_path / "out"
    arguments = ["shrink", f"{tmp_path / 'nets.py'}:branching", "--tracer", "torch-pruning", "--channels", "0.6"]
    assert main([*arguments, "--out", str(out), "--runs", "3", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not (out / "compact.pt2").exists()
    assert any("compact.pt2" in note for note in report["notes"])
    assert any("no label replay, one path exported" in note for note in report["check"]["notes"])
    model, x = nets["branching"]()
    compact = surgery.load(out, model, x).eval()
    session = onnxruntime.InferenceSession(out / "compact.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, compact(x).detach().numpy(), rtol=1e-4, atol=1e-5)
