"""Criteria: what a unit owns, how layers compare, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.capture.tracing import trace
from surgery.core.ir import Coupling, Group, Program, Scores, Site
from surgery.coupling.coupler import couple
from surgery.errors import InvalidInput, PlanMismatch
from surgery.importance.scoring import Evidence, score
from surgery.registry import CRITERIA

BY_WEIGHTS = [name for name in CRITERIA.names() if "images" not in CRITERIA[name].needs]


class Net(nn.Module):
    """Two convolutions with a norm after the first, and a linear layer on the flattened 2 x 2 map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(24, 5)


def singles(size: int) -> tuple[tuple[int, ...], ...]:
    return tuple((k,) for k in range(size))


def program_of(model: nn.Module) -> Program:
    return Program(graph=None, inputs=(), example_args=(), example_kwargs={}, fingerprint="f", notes=(), model=model)


def coupling_of(model: nn.Module) -> Coupling:
    """Group of conv1's outputs (a batch norm in between), group of conv2's outputs (four positions each in fc)."""
    first = [Site("conv1.weight", 0, singles(4)), Site("conv1.bias", 0, singles(4))]
    first += [Site(f"bn.{name}", 0, singles(4)) for name in ("weight", "bias", "running_mean", "running_var")]
    first += [Site("conv2.weight", 1, singles(4))]
    flat = tuple(tuple(range(4 * k, 4 * k + 4)) for k in range(6))
    second = [Site("conv2.weight", 0, singles(6)), Site("conv2.bias", 0, singles(6)), Site("fc.weight", 1, flat)]
    groups = (
        Group("conv1.weight:0", (1, 2, 3, 4), tuple(first)),
        Group("conv2.weight:0", tuple(range(5, 11)), tuple(second)),
    )
    return Coupling(groups=groups, frozen=(), shapes={k: tuple(v.shape) for k, v in model.state_dict().items()})


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.bn.weight.copy_(torch.tensor([0.5, -2.0, 1.0, 0.1]))
    return net


def owned(net: nn.Module, unit: int, group: int) -> Tensor:
    """All weights of one unit, by hand."""
    if group == 0:
        return torch.cat(
            [net.conv1.weight[unit].flatten(), net.bn.weight[unit, None], net.conv2.weight[:, unit].flatten()]
        )
    return torch.cat([net.conv2.weight[unit].flatten(), net.fc.weight[:, 4 * unit : 4 * unit + 4].flatten()])


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_norms_run_over_every_weight_that_the_unit_owns(model: nn.Module, criterion: str, order: int) -> None:
    scores = score(program_of(model), coupling_of(model), criterion)
    for index, (name, size) in enumerate([("conv1.weight:0", 4), ("conv2.weight:0", 6)]):
        norms = torch.stack([owned(model, unit, index).double().norm(order) for unit in range(size)])
        assert scores[name] == pytest.approx((norms / norms.mean()).tolist(), rel=1e-6)


def test_the_default_makes_layers_of_any_scale_compare(model: nn.Module) -> None:
    before = score(program_of(model), coupling_of(model))
    with torch.no_grad():
        model.fc.weight.mul_(0.0)
        model.conv2.weight.mul_(1000.0)
    after = score(program_of(model), coupling_of(model))
    assert before != after
    assert all(sum(values) / len(values) == pytest.approx(1.0) for values in (*before.values(), *after.values()))


def test_biases_and_statistics_do_not_count(model: nn.Module) -> None:
    names = set(BY_WEIGHTS) - {"signal"}  # which reads of the norms what passes through them
    before = {name: score(program_of(model), coupling_of(model), name) for name in names}
    with torch.no_grad():
        for tensor in (model.conv1.bias, model.bn.bias, model.bn.running_mean, model.bn.running_var, model.conv2.bias):
            tensor.add_(7.0)
    assert before == {name: score(program_of(model), coupling_of(model), name) for name in names}


def test_bn_gamma_ranks_by_the_scale_and_falls_back_to_l1(model: nn.Module) -> None:
    scores = score(program_of(model), coupling_of(model), "bn-gamma")
    assert scores["conv1.weight:0"] == pytest.approx([0.5 / 0.9, 2 / 0.9, 1 / 0.9, 0.1 / 0.9])
    assert scores["conv2.weight:0"] == score(program_of(model), coupling_of(model), "l1")["conv2.weight:0"]


def test_bn_gamma_reads_frozen_batch_norms_whose_scale_is_a_buffer(model: nn.Module) -> None:
    plain = score(program_of(model), coupling_of(model), "bn-gamma")
    gamma = model.bn.weight.detach().clone()
    del model.bn.weight
    model.bn.register_buffer("weight", gamma)
    assert score(program_of(model), coupling_of(model), "bn-gamma") == plain


def test_a_layer_norm_is_no_batch_norm() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    sites = (Site("0.weight", 0, singles(4)), Site("1.weight", 0, singles(4)), Site("2.weight", 1, singles(4)))
    coupling = Coupling((Group("0.weight:0", (1, 2, 3, 4), sites),), (), {})
    assert score(program_of(net), coupling, "bn-gamma") == score(program_of(net), coupling, "l1")


def test_lamp_is_the_share_of_what_would_survive() -> None:
    net = nn.Linear(1, 4, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[2.0], [-1.0], [4.0], [1.0]]))
    coupling = Coupling((Group("weight:0", (1, 2, 3, 4), (Site("weight", 0, singles(4)),)),), (), {"weight": (4, 1)})
    assert score(program_of(net), coupling, "lamp")["weight:0"] == pytest.approx((4 / 20, 1 / 22, 1.0, 1 / 21))


def test_fpgm_is_low_near_the_geometric_median() -> None:
    net = nn.Linear(2, 4, bias=False)
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0], [-6.0, 8.0]])
    with torch.no_grad():
        net.weight.copy_(points)
    coupling = Coupling((Group("weight:0", (1, 2, 3, 4), (Site("weight", 0, singles(4)),)),), (), {"weight": (4, 2)})
    sums = torch.cdist(points.double(), points.double()).sum(1)
    assert score(program_of(net), coupling, "fpgm")["weight:0"] == pytest.approx((sums / sums.mean()).tolist())


def test_fpgm_measures_over_all_sites(model: nn.Module) -> None:
    rows = torch.stack([owned(model, unit, 1) for unit in range(6)]).double()
    sums = torch.cdist(rows, rows).sum(1)
    scores = score(program_of(model), coupling_of(model), "fpgm")
    assert scores["conv2.weight:0"] == pytest.approx((sums / sums.mean()).tolist(), rel=1e-6)


def test_random_depends_on_seed_and_group_alone(model: nn.Module) -> None:
    program, coupling = program_of(model), coupling_of(model)
    first = score(program, coupling, "random", seed=1)
    alone = Coupling(coupling.groups[1:], (), coupling.shapes)
    assert score(program, alone, "random", seed=1)["conv2.weight:0"] == first["conv2.weight:0"]
    assert score(program, coupling, "random", seed=2) != first
    assert first["conv1.weight:0"][0] == 0.9540543179464969  # the same on every machine and in every process
    assert all(0.0 <= value < 1.0 for values in first.values() for value in values)


@pytest.mark.parametrize("criterion", BY_WEIGHTS)
def test_every_criterion_is_finite_repeatable_and_leaves_the_model_alone(model: nn.Module, criterion: str) -> None:
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.fc.weight.zero_()  # the second group is all zero
    before = copy.deepcopy(model.state_dict())
    first, second = (score(program_of(model), coupling_of(model), criterion) for _ in range(2))
    assert first == second
    assert {name: len(values) for name, values in first.items()} == {"conv1.weight:0": 4, "conv2.weight:0": 6}
    assert all(math.isfinite(value) for values in first.values() for value in values)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_units_that_own_nothing_at_a_site_are_counted_where_they_do() -> None:
    net = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 5.0]]))
    sites = (Site("weight", 0, ((2,), (), (0, 1))),)
    coupling = Coupling((Group("weight:0", (1, 2, 3), sites),), (), {})
    assert score(program_of(net), coupling, "l1")["weight:0"] == pytest.approx((5 / 3, 0.0, 4 / 3))


def test_half_precision_weights_are_scored_in_double(model: nn.Module) -> None:
    exact = score(program_of(model), coupling_of(model))
    half = score(program_of(model.to(torch.bfloat16)), coupling_of(model))
    assert all(half[name] == pytest.approx(exact[name], rel=0.02) for name in exact)


def test_a_callable_is_a_criterion(model: nn.Module) -> None:
    def first_weight(group: Group, parameters: dict[str, Tensor]) -> Tensor:
        assert not parameters[group.sites[0].tensor].requires_grad
        return parameters[group.sites[0].tensor].flatten(1)[:, 0]

    scores = score(program_of(model), coupling_of(model), first_weight)
    assert scores["conv1.weight:0"] == tuple(model.conv1.weight[:, 0, 0, 0].tolist())
    assert score(program_of(model), coupling_of(model), lambda group, _: range(group.size))["conv2.weight:0"][5] == 5.0


def test_a_callable_that_fails_is_named_with_its_own_line(model: nn.Module) -> None:
    def mine(group: Group, parameters: dict[str, Tensor]) -> Tensor:
        return parameters["absent"]

    with pytest.raises(InvalidInput, match=r"criterion mine on group .*KeyError.*test_score\.py:\d+"):
        score(program_of(model), coupling_of(model), mine)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "expected 4 numbers, one per unit, got 1"),
        (torch.zeros(4, 2), "expected 4 numbers"),
        ([1.0, float("nan"), 1.0, 1.0], "unit 1 is nan"),
        (["a"] * 4, "expected 4 numbers"),
        (None, "expected 4 numbers, got NoneType"),
    ],
)
def test_a_callable_that_returns_something_else_is_named(model: nn.Module, returned: object, message: str) -> None:
    def mine(group: Group, parameters: object) -> object:
        return returned

    with pytest.raises(InvalidInput, match=f"criterion mine on group 'conv1.weight:0'.*{message}"):
        score(program_of(model), coupling_of(model), mine)  # type: ignore[arg-type]


@pytest.mark.parametrize("criterion", ["hessian", 3])
def test_an_unknown_criterion_lists_the_known_ones(model: nn.Module, criterion: str) -> None:
    with pytest.raises(InvalidInput, match="activation, bn-gamma, fpgm, l1, l2, lamp, random"):
        score(program_of(model), coupling_of(model), criterion)


@pytest.mark.parametrize("name", ["conv2.weight", "bn.running_var", "fc.bias"])
def test_nan_names_its_tensor(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.state_dict()[name].flatten()[1] = float("nan")
    with pytest.raises(InvalidInput, match=f"{name} holds 1 NaN"):
        score(program_of(model), coupling_of(model))


def test_infinite_weights_are_refused_and_infinite_masks_are_not(model: nn.Module) -> None:
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    assert score(program_of(model), coupling_of(model))
    with torch.no_grad():
        model.fc.weight[0, 0] = float("inf")
    with pytest.raises(InvalidInput, match=r"fc\.weight holds 1 NaN or infinite values"):
        score(program_of(model), coupling_of(model))


def test_a_coupling_of_another_model_is_refused(model: nn.Module) -> None:
    coupling = coupling_of(model)
    wider = Net()
    wider.conv1 = nn.Conv2d(3, 8, 3)
    with pytest.raises(PlanMismatch, match=r"conv1\.weight has shape \(8, 3, 3, 3\)"):
        score(program_of(wider), coupling)
    with pytest.raises(PlanMismatch, match="touches no tensor of this model"):
        score(program_of(nn.Linear(2, 2)), coupling)


def test_scores_on_images_are_kept_for_the_same_weights_and_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(16, 3)).eval()
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    images, runs = [(torch.randn(8, 3, 4, 4),)], list[float]()

    def scores(images: list[tuple[Tensor]]) -> Scores:
        program = trace(model, images[0])  # anew, as in another run
        coupling = couple(program)
        runs.clear()
        return score(program, coupling, "second-order", images=images, progress=runs.append)

    first = scores(images)
    assert runs
    assert scores(images) == first
    assert not runs
    scores([(images[0][0] + 1,)])
    assert runs
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    scores(images)
    assert runs


@pytest.fixture
def registered() -> Iterator[None]:
    """Entries that a test registers are forgotten after it."""
    built_in = CRITERIA.names()
    yield
    for name in set(CRITERIA.names()).difference(built_in):
        CRITERIA.remove(name)
    with pytest.raises(ValueError, match="built in"):
        CRITERIA.remove(CRITERIA["l1"].name)


def test_a_criterion_registered_from_outside_is_chosen_by_name(registered: None) -> None:
    @surgery.criterion("first-weight")
    def first_weight(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
        return weights[group.sites[0].tensor].flatten(1)[:, 0]

    @surgery.criterion("mean-input", needs=["images", "graph"])
    def mean_input(evidence: Evidence) -> dict[str, list[float]]:
        shift = float(torch.stack([batch[0].mean() for batch in evidence.images]).mean())
        return {group.name: [shift + k for k in range(group.size)] for group in evidence.coupling.groups}

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.ones(4, 3, 8, 8)
    program = trace(model, x)
    coupling = couple(program)
    assert {"first-weight", "mean-input"} <= set(CRITERIA.names())
    wanted = model[0].weight.detach()[:, 0, 0, 0]  # type: ignore[union-attr, index]
    assert score(program, coupling, "first-weight")["0.weight:0"] == tuple(wanted.tolist())  # type: ignore[operator]
    assert score(program, coupling, "mean-input", images=[(x,)])["0.weight:0"] == tuple(1.0 + k for k in range(8))
    with pytest.raises(InvalidInput, match="criterion mean-input uses images"):
        score(program, coupling, "mean-input")
    for name in ("first-weight", "mean-input"):
        found = surgery.shrink(model, x, surgery.recipe(channels=0.5, criterion=name, data=x, recover="none"))
        assert found.plan.settings["criterion"] == name
    assert found.plan.dead["0.weight:0"] == (0, 1, 2, 3)
    for name, needs in (("l1", []), ("first-weight", []), ("other", ["luck"])):
        with pytest.raises(ValueError, match=r"already|luck"):
            surgery.criterion(name, needs=needs)(lambda group, weights: [])
