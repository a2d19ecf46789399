"""The coverage study: its oracle tells right from wrong, and a slice of its list is cut soundly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from benchmarks.studies.coverage.__main__ import wanted
from benchmarks.studies.coverage.conditioned import condition
from benchmarks.studies.coverage.isolated import limited
from benchmarks.studies.coverage.models import CI_SLICE, models
from benchmarks.studies.coverage.oracle import TOLERANCE, judge
from benchmarks.studies.coverage.table import outcome, render
from benchmarks.studies.coverage.tools import PARITY


class Net(nn.Module):
    """A residual block with a norm over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 1), nn.Conv2d(16, 12, 1)
        self.norm, self.bn, self.fc = nn.GroupNorm(1, 12), nn.BatchNorm2d(16), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 5)."""
        x = self.stem(x)
        x = x + self.two(torch.sigmoid(self.bn(self.one(self.norm(x)))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return condition(Net(), (torch.randn(2, 3, 8, 8, dtype=torch.float64),))


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor]]:
    return [(torch.randn(2, 3, 8, 8, dtype=torch.float64),) for _ in range(2)]


@pytest.mark.parametrize("inexact", ["never", "always"])
def test_the_oracle_accepts_what_is_right(dense: nn.Module, batches: list[tuple[Tensor]], inexact: str) -> None:
    result = surgery.shrink(dense, batches[0][0], surgery.recipe(channels=0.6, inexact=inexact))
    verdict = judge(dense, result.model, batches)
    assert verdict.sound is True, verdict
    assert verdict.meaning == {"never": "zeroed", "always": "survivors"}[inexact]
    assert verdict.gradients is not None and verdict.gradients <= TOLERANCE


class OwnGradient(torch.autograd.Function):
    """The identity; its gradient is twice too large, or missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, missing: bool) -> Tensor:
        """Return a copy."""
        ctx.missing = missing
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return twice the gradient."""
        if ctx.missing:
            raise NotImplementedError("no derivative")
        return 2 * grad, None


@pytest.mark.parametrize("missing", [False, True])
def test_the_oracle_tells_models_that_train_wrongly(
    dense: nn.Module, batches: list[tuple[Tensor]], missing: bool
) -> None:
    cut = cut_by_hand(dense, consumers=[14, 15])
    cut.bn.register_forward_hook(lambda _, args, out: OwnGradient.apply(out, missing))
    verdict = judge(dense, cut, batches)
    assert verdict.sound is True
    assert verdict.untrainable == ("NotImplementedError: no derivative" if missing else "")
    assert verdict.gradients is None if missing else verdict.gradients == pytest.approx(1, rel=0.5)


def cut_by_hand(dense: nn.Module, *, consumers: list[int]) -> nn.Module:
    """Remove the last hidden channels, and from the consumer these."""
    cut = copy.deepcopy(dense)
    keep = [c for c in range(16) if c not in consumers]
    for layer, size in ((cut.one, 14), (cut.bn, 14)):
        for name in ("weight", "bias"):
            setattr(layer, name, nn.Parameter(getattr(layer, name)[:size].clone()))
    cut.bn.running_mean, cut.bn.running_var = cut.bn.running_mean[:14].clone(), cut.bn.running_var[:14].clone()
    cut.two.weight = nn.Parameter(cut.two.weight[:, keep].clone())
    return cut


def test_the_oracle_rejects_what_is_wrong(dense: nn.Module, batches: list[tuple[Tensor]]) -> None:
    assert judge(dense, cut_by_hand(dense, consumers=[14, 15]), batches).sound is True
    assert judge(dense, cut_by_hand(dense, consumers=[0, 15]), batches).sound is False
    swapped = cut_by_hand(dense, consumers=[14, 15])
    with torch.no_grad():
        swapped.two.weight.copy_(swapped.two.weight[:, [1, 0, *range(2, 14)]])
    assert judge(dense, swapped, batches).sound is False
    changed = cut_by_hand(dense, consumers=[14, 15])
    with torch.no_grad():
        changed.fc.weight[0, 0] += 1e-3
    assert judge(dense, changed, batches).sound is False
    assert judge(dense, nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten(1)).double(), batches).sound is False


@pytest.mark.parametrize("name", CI_SLICE)
def test_a_slice_of_the_list_is_cut_soundly(name: str) -> None:
    (model,) = wanted([name], models())
    row = limited(model, "surgery", seconds=300)
    assert outcome(row) == "sound", row
    assert row["gradients"] is not None and row["gradients"] <= TOLERANCE, row
    explained = any("rounding" in note for note in row["onnx_notes"])  # by torch's own float32, on the same inputs
    assert row["stage"] == "done" and (row["onnx_error"] <= PARITY or explained), row


def test_a_model_over_the_limit_is_a_result() -> None:
    (model,) = wanted(["alexnet"], models())
    row = limited(model, "surgery", seconds=0.5)
    assert outcome(row) == "limit"
    assert row["message"].startswith("over")


def test_every_model_of_the_list_has_a_name_of_its_own() -> None:
    names = [model.name for model in models()]
    assert len(set(names)) == len(names)
    assert set(CI_SLICE) <= set(names) and len(CI_SLICE) <= 8


def test_the_table_counts_every_outcome() -> None:
    sound = {
        "sound": True, "macs_kept": 0.49, "parameters_kept": 0.5, "seconds": 1.0, "groups_cut": 1, "groups_inexact": 0,
        "kind": "module", "frozen_share": 0.0, "error": 1e-15, "why": "", "gradients": 1e-12,
    }  # fmt: skip
    refused = {"failed": "UnsupportedModel", "message": "torch.export cannot capture this model, at net.py:3"}
    machine = {
        "cpu": "a processor", "cores": 2, "instruction_sets": [], "threads": 1, "onnxruntime": "1", "python": "3",
        "versions": {"torch": "2"},
    }  # fmt: skip
    chosen = [m for m in models() if m.name in ("alexnet", "resnet18", "resnet34")]
    rows = {"surgery": {"alexnet": sound, "resnet18": refused}, "torch-pruning": {"alexnet": {**sound, "sound": False}}}
    text = render({"machine": machine, "rows": rows}, chosen)
    assert "| surgery | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "| torch-pruning | 0 | 0 | 1 |" in text
    assert "| 1e-15 | yes |" in text and "of 1 models that this was\nmeasured on, 1 do" in text
    assert "**resnet18** (refused): torch.export cannot capture this model" in text
