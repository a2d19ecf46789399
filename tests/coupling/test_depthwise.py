"""Depthwise layers that go: found, judged, dropped exactly, and the oracle that must notice mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
import torch
from stairs import table_of
from torch import nn

import surgery
from exporters import onnx as exporter
from surgery.capture.tracing import trace
from surgery.core.ir import Block, Program
from surgery.coupling.blocks import dead_blocks, find_blocks
from surgery.coupling.coupler import couple
from surgery.coupling.dropping import drop
from surgery.cutting.verify import check_dropped
from surgery.errors import CheckFailed
from surgery.importance.block_ablation import BlockAblation
from surgery.importance.scoring import weights_of
from surgery.importance.signal import signal_of
from surgery.planning.latency_search import ImportanceLoss, State

IMAGE = torch.randn(2, 3, 16, 16)


def layer(width: int, *, near: float | None = None, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A depthwise convolution with norm and activation; `near` an identity, so far away from it."""
    conv = nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False)
    if near is not None:
        with torch.no_grad():
            conv.weight.mul_(near)
            conv.weight[:, 0, kernel // 2, kernel // 2] += 1.0
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def net(*layers: nn.Module, width: int = 32) -> nn.Module:
    stem = [nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*stem, *layers, *head).eval()


def layers_of(program: Program) -> dict[str, Block]:
    return {block.name: block for block in find_blocks(program) if block.is_layer}


def plan_without(program: Program, *names: str) -> surgery.Plan:
    gone: dict[str, tuple[float, ...]] = dict.fromkeys(names, ())
    return surgery.Plan({}, {}, (), program.fingerprint, program.inputs, dropped=gone)


def test_only_what_keeps_its_shape_and_ties_its_channels_is_one() -> None:
    torch.manual_seed(0)
    grouped, wide = nn.Conv2d(32, 32, 3, 1, 1, groups=8), nn.Conv2d(32, 32, 3, 1, 1)
    program = trace(net(layer(32), layer(32, stride=2), layer(32, kernel=5), grouped, wide), IMAGE)
    found = layers_of(program)
    assert list(found) == ["3", "5"]
    assert set(found["3"].tensors) >= {"3.0.weight", "3.1.weight", "3.1.running_mean"}
    assert len(found["3"].nodes) == 2


def test_the_users_class_comes_back_with_an_identity_and_the_same_outputs() -> None:
    torch.manual_seed(0)
    model = net(layer(32), layer(32))
    program = trace(model, IMAGE)
    left = drop(program, {"4": ()})
    assert type(left.model) is nn.Sequential
    assert isinstance(left.model[4], nn.Identity)
    model[4] = nn.Identity()
    assert torch.equal(left.model(IMAGE), model(IMAGE))
    assert check_dropped(left, plan_without(program, "4")) == ()


def test_the_oracle_notices_a_layer_that_is_still_there_and_one_too_many() -> None:
    torch.manual_seed(0)
    program = trace(net(layer(32), layer(32)), IMAGE)
    with pytest.raises(CheckFailed):
        check_dropped(drop(program, {"3": ()}), plan_without(program, "3", "4"))
    with pytest.raises(CheckFailed):
        check_dropped(drop(program, {"3": (), "4": ()}), plan_without(program, "3"))


def worth_of_blocks(program: Program) -> Mapping[str, float]:
    coupling = couple(program)
    return signal_of(program, coupling, weights_of(program, coupling), find_blocks(program)).blocks


def test_a_layer_without_weights_is_not_taken_for_a_dead_branch() -> None:
    """Nothing flows through it; if it went, something would."""
    model = net(layer(32))
    nn.init.zeros_(model[3][0].weight)  # type: ignore[index, arg-type]
    program = trace(model, IMAGE)
    assert dead_blocks(program, find_blocks(program)) == {}
    assert worth_of_blocks(program)["3"] > 10


@pytest.mark.parametrize("kernel", [3, 5])
def test_the_nearer_to_an_identity_the_less_is_lost(kernel: int) -> None:
    torch.manual_seed(0)
    model = net(*(layer(32, near=near, kernel=kernel) for near in (0.0, 0.3, 1.0)))
    program = trace(model, IMAGE)
    worth = worth_of_blocks(program)
    assert worth["3"] == pytest.approx(0.0, abs=1e-9)
    assert worth["3"] < worth["4"] < worth["5"]


def test_near_identities_go_for_time_and_may_be_forbidden_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net(layer(64, near=0.01), layer(64), layer(64, near=0.01), layer(64), width=64)
    program = trace(model, IMAGE)
    given, budget = table_of(program, couple(program)), surgery.Budget(latency=0.7)
    result = surgery.shrink(model, IMAGE, surgery.recipe(budget=budget, latency_table=given))
    assert set(result.plan.dropped) == {"3", "5"}
    assert result.kind == "module"
    assert not surgery.shrink(
        model, IMAGE, surgery.recipe(budget=budget, latency_table=given, drop_layers=False)
    ).plan.dropped
    path = tmp_path / "compact.onnx"
    exporter.export(result.model, IMAGE, path)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("Conv") == 3


def test_a_layer_within_a_branch_goes_with_it_once() -> None:
    loss = ImportanceLoss(((0.0, 1.0),), (3.0, 2.0), (frozenset(), frozenset()), (frozenset(), frozenset({0})))
    inner = State((0,), frozenset({0}))
    both = loss.without(inner, 1)
    assert both == State((0,), frozenset({1}))
    assert loss.of(both) == 2.0
    assert loss.without(both, 0) is None


class Inverted(nn.Module):
    """x + a branch with a depthwise layer in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, 64, 1), layer(64), nn.Conv2d(64, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def test_a_branch_goes_with_the_layer_in_it() -> None:
    torch.manual_seed(0)
    program = trace(net(Inverted(32), Inverted(32)), IMAGE)
    assert list(layers_of(program)) == ["3.body.1", "4.body.1"]
    for gone in (("3.body.1",), ("3", "4.body.1"), ("3", "3.body.1")):
        left = drop(program, dict.fromkeys(gone, ()))
        assert check_dropped(left, plan_without(program, *gone)) == ()


class Alone(nn.Module):
    """x + a depthwise layer: the one is the other's branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*layer(width)[:2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.layer(x))


def test_a_layer_may_be_all_of_a_branch() -> None:
    torch.manual_seed(0)
    program = trace(net(Alone(32)), IMAGE)
    assert [block.name for block in find_blocks(program)] == ["3.layer", "3"]
    for gone in (("3.layer",), ("3",), ("3", "3.layer")):
        left = drop(program, dict.fromkeys(gone, ()))
        assert check_dropped(left, plan_without(program, *gone)) == ()


def test_what_is_missing_without_a_layer_is_seen_on_images() -> None:
    torch.manual_seed(0)
    model, images = net(layer(32, near=0.05), layer(32)), torch.randn(8, 3, 16, 16)
    program = trace(model, images)
    ablation = BlockAblation(program, find_blocks(program), [(images,)])
    left = drop(program, {"4": ()}).model
    dense, without = (m(images).detach().double() for m in (model, left))
    wanted = (dense - without).square().sum() / (dense - dense.mean(0)).square().sum()
    assert ablation.error(("4",)) == pytest.approx(float(wanted), rel=1e-4)
    assert ablation.alone["3"] < ablation.alone["4"]
