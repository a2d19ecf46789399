"""A module is called on flat tensors, whatever the nesting of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.core import Callee


class Nested(nn.Module):
    def forward(self, pair: dict[str, Tensor], times: int, *, shift: Tensor | None = None) -> dict[str, Any]:
        pair["a"].add_(1)  # a module may write into its inputs
        return {"sum": times * pair["a"] + pair["b"], "rest": [shift, "no tensor"]}


def test_tensors_go_where_the_example_has_them_and_constants_stay() -> None:
    pair = {"a": torch.ones(2), "b": torch.zeros(2)}
    callee = Callee(Nested(), (pair, 3), {"shift": torch.full((2,), 5.0)})
    assert [float(x[0]) for x in callee.tensors] == [1.0, 0.0, 5.0]
    found = callee(torch.full((2,), 2.0), torch.full((2,), 10.0), torch.full((2,), 7.0))
    assert [float(x[0]) for x in found] == [19.0, 7.0]
    args, kwargs = callee.arguments([torch.zeros(2), 3, torch.ones(2), torch.zeros(2)])  # constants are ignored
    assert args[1] == 3 and float(args[0]["b"][0]) == 1.0 and list(kwargs) == ["shift"]
    assert float(pair["a"][0]) == 1.0


def test_the_same_call_of_another_module() -> None:
    x = torch.randn(2, 3)
    other = nn.Linear(3, 1)
    found = Callee(nn.Identity(), (x,)).on(other)
    assert torch.equal(found(x)[0], other(x))
