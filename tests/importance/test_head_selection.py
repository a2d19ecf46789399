"""Heads and convolution groups that keep members of their own: where they may, where they must not, what is gained."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import apply_plan, random_dead, vit
from stairs import table_of
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.capture.tracing import trace
from surgery.core.ir import Arrangement, Plan
from surgery.coupling.coupler import couple
from surgery.cutting import check, cut
from surgery.errors import CheckFailed, PlanMismatch
from surgery.importance.head_selection import arrange, settled


class Grouped(nn.Module):
    """Two grouped convolutions of which nothing joins the groups but 1 x 1 convolutions."""

    def __init__(self, groups: int = 4, each: int = 6) -> None:
        super().__init__()
        wide = groups * each
        self.a, self.norm = nn.Conv2d(3, wide, 1), nn.BatchNorm2d(wide)
        self.b = nn.Conv2d(wide, 2 * wide, 3, padding=1, groups=groups)
        self.c = nn.ConvTranspose2d(2 * wide, wide, 3, padding=1, groups=groups)
        self.d = nn.Conv2d(wide, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(self.c(self.b(self.norm(self.a(x)).relu()).relu()).relu())
        return y


class Attention(nn.Module):
    """Queries, keys and values from layers of their own; `inside` is done to (N, heads, tokens, dimensions)."""

    def __init__(self, inside: Callable[[Tensor], Tensor] | nn.Module | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(12, 24)
        self.out = nn.Linear(24, 5)
        self.inside = inside or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).reshape(x.shape[0], -1, 3, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.inside(q), self.inside(k), v).transpose(1, 2).flatten(2)
        return self.out(y)


class MixesHeads(nn.Module):
    """Adds to each head a mixture of all of them, dimension by dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("gh,nhtd->ngtd", self.mix, x)


class Scaled(nn.Module):
    """One scale per head dimension, for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledApart(nn.Module):
    """A scale per head and dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1, 8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Shifted(nn.Module):
    """A bias of shape (heads, dimensions)."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None]


class MixesPairs(nn.Module):
    """Two heads of two members each, weighed by what they have in common: half of all random orders agree by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).unflatten(1, (2, 2))
        z: Tensor = self.b((y * torch.einsum("nhdxy,ngdxy->nhgxy", y, y).sum(2, keepdim=True)).flatten(1, 2))
        return z


def rotated(x: Tensor) -> Tensor:
    """Pairs up the halves of each head, as rotary positions do, by angles that do not depend on the dimension."""
    first, second = x.chunk(2, -1)
    return x * 0.8 + torch.cat([-second, first], -1) * 0.6


class Shuffled(nn.Module):
    """Channel shuffle between two grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.c, self.d = nn.Conv2d(24, 24, 3, padding=1, groups=4), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.d(self.c(F.channel_shuffle(self.b(self.a(x)).relu(), 4)))
        return y


class AddedToItself(nn.Module):
    """A grouped convolution whose result is added to what went in: its weight holds the members on two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.d = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 1, groups=4), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z: Tensor = self.d((y + self.g(y)).relu())
        return z


GROUPED = (2, 3, 8, 8)
TOKENS = (2, 7, 12)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "grouped convolutions": (Grouped, GROUPED, {"a.weight", "b.weight", "c.weight"}),
    "a residual around a grouped convolution": (AddedToItself, GROUPED, {"a.weight"}),
    "attention": (Attention, TOKENS, {"q.weight", "v.weight"}),
    "a scale of each head's own": (lambda: Attention(ScaledApart()), TOKENS, {"q.weight", "v.weight"}),
    "a bias of each head's own": (lambda: Attention(Shifted()), TOKENS, {"q.weight", "v.weight"}),
    "pairs mixed": (MixesPairs, GROUPED, set()),
    "rotated halves": (lambda: Attention(rotated), TOKENS, {"q.weight", "v.weight"}),
    "one scale for all heads": (lambda: Attention(Scaled()), TOKENS, {"v.weight"}),
    "heads mixed": (lambda: Attention(MixesHeads()), TOKENS, {"v.weight"}),
    "channels shuffled": (Shuffled, GROUPED, set()),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape, _ = CASES[name]
    return build().eval(), torch.randn(shape)


@pytest.mark.parametrize("name", sorted(CASES))
def test_members_differ_from_head_to_head_where_nothing_ties_them(name: str) -> None:
    model, x = built(name)
    program = trace(model, x)
    coupling = couple(program)
    found = arrange(program, coupling)
    owners = {site.tensor for a in found for site in coupling.group(a.group).sites[:1]}
    assert owners == CASES[name][2]
    for seed in range(3):
        plan = settled(apply_plan(program, coupling, random_dead(coupling, seed)).plan, found)
        assert bool(plan.arranged) == bool(owners)
        result = check(program, plan, cut(program, plan, coupling=coupling), coupling=coupling)
        assert result.error_float64 <= 1e-10


def test_members_are_sorted_by_all_that_they_own() -> None:
    model, x = built("a residual around a grouped convolution")
    program = trace(model, x)
    (found,) = arrange(program, couple(program))
    a, g, d = (getattr(model, name).weight.detach().abs()[:, :, 0, 0] for name in "agd")
    owned = (a.sum(1) + g.sum(1) + d.sum(0)).reshape(4, 6) + g.reshape(4, 6, 6).sum(1)
    assert [list(order) for order in found.orders] == owned.argsort(1, descending=True).tolist()


def magnitude(model: nn.Module) -> float:
    return float(sum(p.detach().abs().sum() for n, p in model.named_parameters() if n.endswith("weight")))


@pytest.mark.parametrize("name", ["grouped convolutions", "attention"])
def test_more_of_the_weights_is_kept_than_in_slabs(name: str) -> None:
    model, x = built(name)
    with torch.no_grad():  # each head has its own idea of which members matter
        for p in model.parameters():
            p.mul_(torch.rand(p.shape) ** 4)
    program = trace(model, x)
    coupling = couple(program)
    found = arrange(program, coupling)
    scores = surgery.score(program, coupling)
    slabs, own = {}, {}
    for a in found:
        size, ranked = len(a.orders[0]), scores[a.group]
        slabs[a.group] = sorted(sorted(range(size), key=lambda k: ranked[k])[: size // 2])
        own[a.group] = list(range(size - size // 2, size))  # arranged from the most important to the least
    kept = [apply_plan(program, coupling, dead).compact.module for dead in (slabs, own)]
    plan = settled(apply_plan(program, coupling, own).plan, found)
    mine = cut(program, plan, coupling=coupling).module
    assert [p.shape for p in mine.parameters()] == [p.shape for p in kept[0].parameters()]
    assert magnitude(mine) > 1.02 * magnitude(kept[0])


def test_each_weight_that_is_left_is_a_dense_one_in_the_row_it_was_in() -> None:
    model, x = built("grouped convolutions")
    result = surgery.shrink(model, x, surgery.recipe(macs=0.5))
    assert {a.group for a in result.plan.arranged}
    dense, compact = dict(model.named_parameters()), dict(result.model.named_parameters())
    rows = [(compact["b.bias"][:, None] == dense["b.bias"]).int().argmax(1)]
    columns = []
    for row, weights in zip(rows[0].tolist(), compact["b.weight"], strict=True):
        place = (weights[:, None] == dense["b.weight"][row]).flatten(2).all(2)
        assert place.sum(1).eq(1).all()
        columns.append(tuple(place.int().argmax(1).tolist()))
        assert list(columns[-1]) == sorted(columns[-1])
    assert len(set(columns)) > 1, "every group keeps the same members"


def test_a_plan_goes_to_another_copy_through_a_file(tmp_path: Path) -> None:
    model, x = built("attention")
    result = surgery.shrink(model, x, surgery.recipe(macs=0.5))
    assert result.plan.arranged
    assert any("other members" in note for note in result.report["plan"]["notes"])
    result.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == result.plan
    again = surgery.apply(plan, copy.deepcopy(model), x)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_plan_by_a_latency_table_notes_the_order_too() -> None:
    torch.manual_seed(0)
    model, x = vit().eval(), torch.randn(1, 3, 224, 224)
    program = trace(model, x)
    table = table_of(program, couple(program))
    plan = surgery.shrink(model, x, surgery.recipe(latency=0.6, latency_table=table, correct=False)).plan
    assert plan.arranged
    assert any("other members" in note for note in plan.notes)


def test_an_arrangement_of_what_is_tied_is_caught() -> None:
    model, x = built("heads mixed")
    program = trace(model, x)
    coupling = couple(program)
    inner = next(g for g in coupling.groups if g.sites[0].tensor == "q.weight" and g.size == 8)
    outer = next(g for g in coupling.groups if g.size == 3)
    orders = tuple(tuple((k + h) % 8 for k in range(8)) for h in range(3))
    plan = apply_plan(program, coupling, {inner.name: [6, 7]}).plan
    plan = replace(plan, arranged=(Arrangement(inner.name, outer.name, orders),))
    with pytest.raises(CheckFailed, match="another order"):
        check(program, plan, cut(program, plan, coupling=coupling), coupling=coupling)


def test_what_is_no_order_is_refused(tmp_path: Path) -> None:
    model, x = built("attention")
    plan = surgery.shrink(model, x, surgery.recipe(macs=0.5)).plan
    data = json.loads(plan.to_json())
    data["arranged"][0]["orders"][0][0] = data["arranged"][0]["orders"][0][1]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanMismatch, match="no order of its members"):
        surgery.apply(Plan.load(tmp_path / "plan.json"), model, x)


def test_a_callable_that_scores_units_gets_units() -> None:
    model, x = built("attention")
    result = surgery.shrink(
        model, x, surgery.recipe(macs=0.5, criterion=lambda group, parameters: list(range(group.size)))
    )
    assert result.plan.arranged == ()
