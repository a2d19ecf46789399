"""One submodule of a larger model is shrunk, checked and put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import surgery
from surgery.errors import InvalidInput, PlanMismatch
from surgery.inputs import import_torchvision


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, image: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": self.second(self.first(image)) * scale}


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.unused = Body(), nn.Linear(8, 4), nn.Linear(2, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(image + 1, scale=torch.full((len(image), 1, 1, 1), 2.0))["features"].mean((2, 3)))


class Failing(Whole):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        super().forward(image)
        raise RuntimeError("no such operator here")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_a_part_is_shrunk_put_back_and_checked_in_the_whole_model() -> None:
    model, x = Whole().train(), torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    result = surgery.shrink(model, x, surgery.recipe(submodule="body", macs=0.5))
    assert model.training and not model.body._forward_pre_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.model.state_dict().keys() == before.keys()
    assert result.model.body.first[0].out_channels < 16
    assert result.model.body.second.out_channels == 8  # the part's interface stays
    assert torch.equal(result.model.head.weight, model.head.weight)
    assert result.model.eval()(x).shape == (2, 4)
    assert result.report["part"]["checked"] == "on its own and in the whole model"
    assert any("in the whole model" in note for note in result.check.notes)
    dense, kept = result.report["part"]["whole"]["params"]
    assert kept < dense == sum(p.numel() for p in model.parameters())
    assert any("the part's" in note for note in result.report["notes"])


def test_a_plan_for_a_part_applies_to_another_copy() -> None:
    model, x = Whole(), torch.randn(2, 3, 16, 16)
    result = surgery.shrink(model, x, surgery.recipe(submodule="body", channels=0.5))
    plan = surgery.Plan.from_json(result.plan.to_json())
    assert plan.settings["part"] == "body"
    for inputs in (x, None):
        again = surgery.apply(plan, model, inputs)
        torch.testing.assert_close(again.eval()(x), result.model.eval()(x))
    with pytest.raises((PlanMismatch, InvalidInput)):
        surgery.apply(plan, nn.Sequential(nn.Conv2d(3, 8, 3)), x)


def test_where_the_whole_model_does_not_run_the_part_is_checked_on_its_own() -> None:
    result = surgery.shrink(Failing(), torch.randn(2, 3, 16, 16), surgery.recipe(submodule="body", macs=0.5))
    assert result.report["part"]["checked"] == "on its own"
    assert any("on its own only" in note and "no such operator" in note for note in result.check.notes)


@pytest.mark.parametrize(
    ("name", "message"), [("bdy", "similar names: body"), ("unused", "never called"), ("", "names no submodule")]
)
def test_a_part_that_is_not_there_or_not_reached(name: str, message: str) -> None:
    model = Whole()
    with pytest.raises(InvalidInput, match=message):
        surgery.shrink(model, torch.randn(2, 3, 16, 16), surgery.recipe(submodule=name))


def test_the_other_tracer_shrinks_a_part_too() -> None:
    x = torch.randn(2, 3, 16, 16)
    result = surgery.shrink(Whole(), x, surgery.recipe(submodule="body", tracer="torch-pruning", params=0.6))
    assert result.model.body.first[0].out_channels < 16
    assert result.report["part"]["checked"] == "on its own and in the whole model"


def test_the_backbone_of_fcn_resnet50() -> None:
    models = import_torchvision().models
    model = models.get_model("fcn_resnet50", weights=None, weights_backbone=None)
    x = torch.randn(1, 3, 64, 64)
    result = surgery.shrink(model, x, surgery.recipe(submodule="backbone", channels=0.6))
    assert result.report["budget"]["kept_fraction"] <= 0.6
    assert result.report["part"]["checked"] == "on its own and in the whole model"
    assert result.model.state_dict().keys() == model.state_dict().keys()
    assert result.model.eval()(x)["out"].shape == (1, 21, 64, 64)


def test_the_backbone_of_a_detector() -> None:
    detection = import_torchvision().models.detection
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=96
    )
    result = surgery.shrink(model, ([torch.rand(3, 64, 96)],), surgery.recipe(submodule="backbone.body", channels=0.7))
    dense, kept = result.report["part"]["whole"]["params"]
    assert kept < dense
    assert result.report["part"]["checked"].startswith("on its own")
    assert type(result.model) is type(model)
    features = result.model.eval().backbone(torch.rand(1, 3, 64, 96))
    wanted = model.eval().backbone(torch.rand(1, 3, 64, 96))
    assert {k: v.shape for k, v in features.items()} == {k: v.shape for k, v in wanted.items()}


@pytest.mark.parametrize(("whole", "noted"), [(Whole, "the whole model"), (Failing, "the part alone")])
def test_files_hold_the_whole_model_where_it_can_be_exported(tmp_path: Path, whole: type[Whole], noted: str) -> None:
    model, x = whole(), torch.randn(2, 3, 16, 16)
    result = surgery.shrink(model, x, surgery.recipe(submodule="body", channels=0.5))

    written = surgery.save(result, tmp_path / "out", surgery.recipe(runs=3))
    assert any(noted in note for note in written.data["notes"] if note.startswith("ONNX"))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "compact.onnx", providers=["CPUExecutionProvider"])
    feeds = {"image": x.numpy(), "scale": np.full((2, 1, 1, 1), 2.0, np.float32)}
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    found = session.run(None, feeds)[0]
    subject = result.model.eval() if whole is Whole else result.compact.module.eval()
    with torch.no_grad():
        wanted = subject(x) if whole is Whole else subject(x, scale=torch.full((2, 1, 1, 1), 2.0))["features"]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-3, atol=1e-4)
    compact = surgery.load(tmp_path / "out", model)
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in compact.state_dict().items())
