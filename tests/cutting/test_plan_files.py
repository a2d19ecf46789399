"""Plan files written by earlier versions still load and apply."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import PlanMismatch

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


def edited(**changes: Any) -> str:
    """The plan file with entries replaced; a name ``a.b`` reaches into a dictionary or a list."""
    data = json.loads(WRITTEN.read_text(encoding="utf-8"))
    for path, value in changes.items():
        *outer, last = (int(key) if key.isdigit() else key for key in path.split("__"))
        place = data
        for key in outer:
            place = place[key]
        place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs__0__shape": [10**12, 1, 28, 28]}, "at `$.inputs[0].shape[0]`"),
        ({"inputs__0__shape": [2, -1, 28, 28]}, "at `$.inputs[0].shape[1]`"),
        ({"inputs__0__shape": [2**31 - 1, 1, 28, 28]}, "takes 6,272 GiB and this machine has"),
        ({"inputs__0__dtype": "no_type"}, "the type 'no_type', which torch does not have"),
        ({"inputs__0__dtype": "nn"}, "the type 'nn', which torch does not have"),
        ({"inputs__0__dtype": 7}, "at `$.inputs[0].dtype`"),
        ({"inputs": {}}, "at `$.inputs`"),
        ({"dead": [[0]]}, "at `$.dead`"),
        ({"dead__fc1.weight:0": [0.5]}, "at `$.dead[...][0]`"),
        ({"cuts__0__tensor": 3}, "at `$.cuts[0].tensor`"),
        ({"cuts__0__dead": [0]}, "do not follow from its dead units"),
        ({"sizes__fc1.weight:0": 51}, "has 51 units, this model's has 50"),
        ({"fingerprint": 1}, "at `$.fingerprint`"),
        ({"settings__keep": 5}, "at `$.keep`"),
        ({"settings__part": 5}, "at `$.part`"),
        ({"settings__tracer": "magic"}, "at `$.tracer`"),
        ({"settings__arguments": [1]}, "at `$.arguments`"),
        ({"budget__macs": 7.0}, "give a number above 0 and below 1"),
        ({"schema": "3"}, "at `$.schema`"),
    ],
    ids=str,
)
def test_an_edited_plan_file_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanMismatch, match=re.escape(said)):
        surgery.apply(surgery.Plan.from_json(edited(**changes)), View320().eval())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema":' * 100_000, "", "null", "[]", '{"schema": 3}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanMismatch, match="not a plan file"):
        surgery.Plan.from_json(text)


def test_an_infinite_argument_of_forward_survives_a_file() -> None:
    plan = replace(surgery.Plan.load(WRITTEN), settings={"arguments": {"limit": float("inf")}})
    assert surgery.Plan.from_json(plan.to_json()) == plan


def test_a_whole_number_of_milliseconds_survives_a_file() -> None:
    plan = replace(surgery.Plan.load(WRITTEN), budget=surgery.recipe(latency_ms=5).budget)
    assert surgery.Plan.from_json(plan.to_json()).digest == plan.digest
