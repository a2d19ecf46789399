"""Models in other floating dtypes than float32, and models that cast on their way: cut and checked as they are."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.cutting import check
from surgery.delivery import save
from surgery.errors import CheckFailed

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Gated(nn.Module):
    """A gate that is computed in float32, whatever the weights are."""

    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.body, self.head = nn.Conv2d(16, 16, 3), nn.Linear(16, 5)
        self.casts = casts

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 5)."""
        x = self.norm(self.stem(x))
        gate = torch.sigmoid((x.float() if self.casts else x).mean((2, 3), keepdim=True))
        x = self.body(x * gate.type_as(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_is_cut_in_its_own_dtype_and_class(dtype: torch.dtype, casts: bool) -> None:
    model = Gated(casts).eval().to(dtype)
    result = surgery.shrink(model, torch.randn(2, 3, 12, 12, dtype=dtype), surgery.recipe(macs=0.5))
    assert result.kind == "module" and type(result.model) is Gated
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.check.error_float64 <= 1e-10
    assert result.model(torch.randn(2, 3, 12, 12, dtype=dtype)).dtype == dtype


def test_a_wrong_weight_shows_where_forward_casts() -> None:
    model = Gated(casts=True).eval()
    result = surgery.shrink(model, torch.randn(2, 3, 12, 12), surgery.recipe(macs=0.5))
    program, plan, compact, coupling = result.program, result.plan, result.compact, result.coupling
    assert compact.kind == "module"
    compact.module.casts = False  # the same at any precision: nothing to find
    check(program, plan, compact, coupling=coupling)
    compact.module.head = nn.Sequential(compact.module.head, nn.Hardtanh(-0.01, 0.01))
    with pytest.raises(CheckFailed):
        check(program, plan, compact, coupling=coupling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_files_are_float32_and_say_so(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Gated(casts=True).eval().to(dtype)
    result = surgery.shrink(model, torch.randn(1, 3, 12, 12, dtype=dtype), surgery.recipe(macs=0.5))
    report = save(result, tmp_path / "out", surgery.recipe(runs=20))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "compact.onnx", providers=["CPUExecutionProvider"])
    assert [i.type for i in session.get_inputs()] == ["tensor(float)"]
    said = f"exported as float32 (the model is {str(dtype).removeprefix('torch.')})"
    assert any(said in note for note in report.data["notes"])


class Sampling(nn.Module):
    """Makes a tensor of its own, in the default dtype, that meets what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 8, 4, 4)."""
        grid = torch.zeros(x.shape[0], 4, 4, 2) + 0.1
        return nn.functional.grid_sample(self.body(torch.relu(self.stem(x))), grid, align_corners=False)


def test_a_tensor_that_forward_makes_meets_the_others_in_any_dtype() -> None:
    result = surgery.shrink(Sampling().eval(), torch.randn(2, 3, 12, 12), surgery.recipe(macs=0.5))
    assert result.kind == "module"
    assert result.check.error_float64 <= 1e-10
