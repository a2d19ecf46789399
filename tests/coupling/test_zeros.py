"""What is called exact is exact: the cut model computes what the dense one does with the removed weights at zero."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from benchmarks.studies.coverage.oracle import judge
from surgery.errors import BudgetUnreachable


class Attention(nn.Module):
    """Linear attention: products of activations, with a feature map before them."""

    def __init__(self, feature: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.feature = feature
        self.embed = nn.Conv2d(3, 8, 3)
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels of (N, 3, H, W)."""
        y = self.embed(x).flatten(2).transpose(1, 2)
        q, k = self.feature(self.q(y)), self.feature(self.k(y))
        total = (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True) + 0.1
        return self.out(q @ (k.transpose(1, 2) @ self.v(y)) / total).mean(1)


class Between(nn.Module):
    """A function over channels between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 4, H - 4, W - 4)."""
        return self.last(self.function(self.first(x)))


def twice(y: Tensor) -> Tensor:
    z = y + y.sum(1, keepdim=True)
    return z + z.sum(1, keepdim=True)


NOTHING_OF_ZERO: dict[str, nn.Module] = {
    "rectified attention": Attention(F.relu),
    "sum": Between(lambda y: y * y.sum(1, keepdim=True)),
    "norm": Between(lambda y: y * y.norm(dim=1, keepdim=True)),
    "largest": Between(lambda y: y * y.norm(p=float("inf"), dim=1, keepdim=True)),
    "gate": Between(lambda y: y * (y * y.sigmoid()).sum(1, keepdim=True)),
}

SOMETHING_OF_ZERO: dict[str, tuple[nn.Module, str]] = {
    "shifted attention": (Attention(lambda t: F.elu(t) + 1), "sum"),
    "softmax by hand": (Between(lambda y: y.exp() / y.exp().sum(1, keepdim=True)), "sum"),
    "count": (Between(lambda y: y * (y <= 0).sum(1, keepdim=True)), "sum"),
    "norm of gates": (Between(lambda y: y * y.sigmoid().norm(dim=1, keepdim=True)), "norm"),
    "largest of what is shifted": (Between(lambda y: F.normalize(y + 1, p=float("inf"), dim=1)), "norm"),
    "least value": (Between(lambda y: y * (1 + F.relu(y).clamp(min=0.5).sum(1, True))), "sum"),
    "rarely open": (Between(lambda y: y * (1 + F.relu(y + y.sum((1, 2, 3), True) - 900).sum(1, True))), "sum"),
    "sum of what was summed": (Between(twice), "sum"),
    "sum with a shared map": (Between(lambda y: y * (y + y.sum((1, 2, 3), keepdim=True)).sum(1, keepdim=True)), "sum"),
}


def in_double(model: nn.Module) -> tuple[nn.Module, list[tuple[Tensor]]]:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval(), [(torch.randn(2, 3, 8, 8, dtype=torch.float64),) for _ in range(2)]


@pytest.mark.parametrize("name", NOTHING_OF_ZERO)
def test_removed_units_are_zeros_where_nothing_is_made_of_zero(name: str) -> None:
    model, batches = in_double(NOTHING_OF_ZERO[name])
    result = surgery.shrink(model, batches[0][0], surgery.recipe(channels=0.6, inexact="never"))
    assert any(result.plan.dead.values()) and not any(group.inexact for group in result.coupling.groups)
    assert judge(model, result.model, batches).sound


@pytest.mark.parametrize("name", SOMETHING_OF_ZERO)
def test_a_sum_in_which_zeros_would_count_makes_its_group_inexact(name: str) -> None:
    model, operator = SOMETHING_OF_ZERO[name]
    model, batches = in_double(model)
    result = surgery.shrink(model, batches[0][0], surgery.recipe(channels=0.5, scope="uniform", inexact="always"))
    said = [group.inexact for group in result.coupling.groups if group.inexact and result.plan.dead.get(group.name)]
    assert any(operator in x and "test_zeros.py" in x and "goes over the survivors" in x for x in said)
    assert "sums over the survivors" in result.check.reference
    try:
        exact = surgery.shrink(model, batches[0][0], surgery.recipe(channels=0.6, inexact="never"))
    except BudgetUnreachable:
        return
    assert judge(model, exact.model, batches).sound
