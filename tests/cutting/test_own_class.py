"""When the compact model is the user's own class."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.coupling import couple
from surgery.coupling.plans import plan_from_dead


class Constants(nn.Module):
    """Constants that float32 rounds: made from numbers, by a fill, and by a range."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu() * torch.tensor(0.1) + torch.full((1, 1, 1, 1), 1 / 3)
        return self.second(x) * torch.linspace(0.1, 1.0, 4)


def test_constants_are_rounded_as_the_model_rounds_them() -> None:
    result = surgery.shrink(Constants().eval(), torch.randn(2, 3, 8, 8), surgery.recipe(macs=0.6, recover="none"))
    assert result.kind == "module"


class Widths(nn.Module):
    """Two attributes, of which one's new value is the other's old one."""

    def __init__(self, widths: Sequence[int] = (32, 24)) -> None:
        super().__init__()
        self.one, self.two = widths
        self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu().view(-1, self.one)
        return self.c(self.b(x).relu().view(-1, self.two))  # type: ignore[no-any-return]


@pytest.mark.parametrize("left", [(24, 16), (20, 16)])
def test_each_attribute_is_changed_once(left: tuple[int, int]) -> None:
    dense, x = Widths().eval(), torch.randn(4, 12)
    program = surgery.trace(dense, x)
    dead = {"a.weight:0": range(left[0], 32), "b.weight:0": range(left[1], 24)}
    plan = plan_from_dead(program, couple(program), {name: list(units) for name, units in dead.items()})
    compact = surgery.cut(program, plan)
    assert compact.kind == "module" and (compact.module.one, compact.module.two) == left
