"""Plan files written by earlier versions still load and apply."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import surgery

WRITTEN = Path(__file__).with_name("view320.plan.json")


class View320(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 10, kernel_size=5), nn.Conv2d(10, 20, kernel_size=5)
        self.drop = nn.Dropout2d()
        self.fc1, self.fc2 = nn.Linear(320, 50), nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.max_pool2d(self.conv1(x), 2))
        x = torch.relu(torch.max_pool2d(self.drop(self.conv2(x)), 2))
        x = x.view(-1, 320)
        return torch.log_softmax(self.fc2(torch.relu(self.fc1(x))), dim=1)


def test_a_plan_file_of_an_earlier_version_is_applied() -> None:
    plan = surgery.Plan.load(WRITTEN)
    assert plan.to_json() == WRITTEN.read_text(encoding="utf-8")
    dense = View320().eval()
    compact = surgery.apply(plan, dense)
    assert compact.get_parameter("conv2.weight").shape == (11, 7, 5, 5)
    assert torch.equal(compact.get_parameter("conv1.weight"), dense.conv1.weight[2:9])
    assert compact(torch.randn(3, 1, 28, 28)).shape == (3, 10)
