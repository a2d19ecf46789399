"""The classic small network with `x.view(-1, 320)`: trained, cut through the view, exported, and still of use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import make_plan
from torch import Tensor, nn

from exporters.onnx import export
from surgery.capture.tracing import trace
from surgery.coupling.coupler import couple
from surgery.cutting import check, cut

CHANCE = 0.1


class Digits(nn.Module):
    """Two 5x5 convolutions, functional pooling, and sizes written out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5)
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.max_pool2d(self.conv1(x), 2))
        x = torch.relu(torch.max_pool2d(self.conv2(x), 2))
        x = x.view(-1, 320)
        x = torch.relu(self.fc1(x))
        return torch.log_softmax(self.fc2(x), dim=1)


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn at 28 x 28, mean 0, deviation 1."""
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn comes with the test extra").load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1)
    x = nn.functional.interpolate(x, size=(28, 28), mode="bilinear")
    return (x - x.mean()) / x.std(), torch.from_numpy(data.target)


@pytest.fixture(scope="module")
def trained(images: tuple[Tensor, Tensor]) -> Digits:
    torch.manual_seed(0)
    model, (x, y) = Digits(), images
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(90):
        index = torch.arange(step * 64, step * 64 + 64) % 1400
        optimizer.zero_grad()
        nn.functional.nll_loss(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()


def accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1) == y).float().mean())


def strongest(program_model: nn.Module, name: str, keep: int) -> list[int]:
    """All output channels but the `keep` largest by L1 norm."""
    weight = program_model.get_parameter(name).detach()
    return sorted(weight.abs().flatten(1).sum(1).argsort()[: weight.shape[0] - keep].tolist())


def test_cut_through_the_view_exported_and_better_than_chance(
    trained: Digits, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = images[0][1400:], images[1][1400:]
    with torch.no_grad():
        assert accuracy(trained(x), y) > 0.8
    program = trace(trained, x[:1])
    coupling = couple(program)
    assert coupling.group("conv2.weight:0").size == 20
    dead = {
        f"{n}.weight:0": strongest(trained, f"{n}.weight", k) for n, k in (("conv1", 8), ("conv2", 14), ("fc1", 40))
    }
    plan = make_plan(program, coupling, dead)
    compact = cut(program, plan, coupling=coupling)
    check(program, plan, compact, coupling=coupling)
    assert compact.module.fc1.weight.shape == (40, 14 * 16)
    assert compact.kind == "graph"
    assert "new sizes" in compact.why
    module = compact.module.eval()
    with torch.no_grad():
        scores = module(x)
    assert accuracy(scores, y) > 3 * CHANCE
    path = tmp_path / "digits.onnx"
    export(module, (x[:1],), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        got = session.run(None, {session.get_inputs()[0].name: x[:batch].numpy()})[0]
        np.testing.assert_allclose(got, scores[:batch].numpy(), rtol=1e-3, atol=1e-4)
