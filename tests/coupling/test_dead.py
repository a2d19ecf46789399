"""What only looks dead, or only looks replaceable: constants that depend on sizes, modules that do more than add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stairs import table_of
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.capture.tracing import trace
from surgery.coupling.blocks import dead_blocks, find_blocks
from surgery.coupling.coupler import couple
from surgery.coupling.dropping import drop
from surgery.cutting.verify import check_dropped
from surgery.inputs import import_torchvision

WIDTH = 16
IMAGE = torch.randn(2, 3, 16, 16)
LARGER = torch.randn(3, 3, 24, 32)


class Calls(nn.Module):
    """A module of some submodules and a function of them."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int = WIDTH, kernel: int = 3, *, zero: bool = False, bias: float | None = None) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, inputs if zero else WIDTH, kernel, 1, kernel // 2)
    if zero:
        nn.init.zeros_(layer.weight)
    if bias is not None:
        nn.init.constant_(layer.bias, bias)  # type: ignore[arg-type]
    return layer


def live() -> nn.Module:
    """A block that stays: a network all of whose branches are dead is one before training."""
    return Calls(lambda s, x: torch.relu(x + s.b(torch.relu(s.a(x)))), a=conv(), b=conv())


def dead(after: nn.Module | None = None, *, inputs: int = WIDTH, bias: float | None = 0.0) -> nn.Module:
    after = after or nn.Identity()
    return Calls(lambda s, x: s.after(x + s.b(x)), b=conv(inputs, zero=True, bias=bias), after=after)


def net(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 5)).eval()


def shrunk(model: nn.Module, image: Tensor = IMAGE) -> surgery.Result:
    """Without the dead blocks, and nothing else."""
    result = surgery.shrink(model, image, surgery.recipe(macs=0.992))
    assert not result.plan.dead
    return result


def apart(model: nn.Module, other: nn.Module, image: Tensor) -> float:
    with torch.no_grad():
        wanted, found = model(image.clone()), other(image.clone())
    return float((found - wanted).abs().max() / wanted.abs().max())


def over_pixels(s: Any, x: Tensor) -> Tensor:
    return x.add(s.a(x) + torch.relu(s.b(x)).sum((2, 3), keepdim=True) * 0.01)


def over_samples(s: Any, x: Tensor) -> Tensor:
    return x + (s.a(x) + torch.relu(s.b(x)).mean((2, 3), keepdim=True).sum(0, keepdim=True))


def padded(s: Any, x: Tensor) -> Tensor:
    return x + (s.a(x) + s.c(torch.relu(s.b(x))).mean((2, 3), keepdim=True))


def normalised(s: Any, x: Tensor) -> Tensor:
    return x + F.normalize(s.b(x).flatten(2), dim=-1).view_as(x)


@pytest.mark.parametrize("forward", [over_pixels, over_samples, padded, normalised])
def test_a_constant_that_depends_on_the_size_or_the_batch_is_none(forward: Callable[..., Tensor]) -> None:
    block = Calls(forward, a=conv(zero=True), b=conv(zero=True, bias=1.0), c=conv())
    nn.init.constant_(block.c.weight, 2.0**-7)  # type: ignore[arg-type, union-attr]
    program = trace(net(conv(3), block, live()), IMAGE)
    blocks = find_blocks(program)
    assert any(b.module == "1" for b in blocks)
    assert dead_blocks(program, blocks) == {}


def test_one_that_is_the_same_at_every_size_is_still_found() -> None:
    block = Calls(padded, a=conv(zero=True), b=conv(zero=True, bias=1.0), c=conv(kernel=1))
    model = net(conv(3), block, live())
    result = shrunk(model)
    assert set(result.plan.dropped) == {"1"}
    assert apart(model, result.model, LARGER) <= 1e-5


@pytest.mark.parametrize("after", [nn.Hardtanh(-50.0, 50.0), nn.ReLU6(), nn.Dropout(0.5)])
def test_what_a_module_does_after_the_sum_stays(after: nn.Module) -> None:
    """The example does not reach the bounds, and dropout shows in training alone."""
    model = net(conv(3), dead(after), live())
    result = shrunk(model)
    assert set(result.plan.dropped) == {"1"}
    assert result.kind == "graph"
    assert apart(model, result.model, 1000 * IMAGE) <= 1e-5


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_a_rectifier_stays_unless_what_it_is_given_is_rectified(bias: float) -> None:
    """An image between 0 and 1 does not show that a ReLU is missing."""
    image = torch.rand(2, 3, 16, 16)
    model = net(dead(nn.ReLU(), inputs=3, bias=bias), conv(3), live())
    result = shrunk(model, image)
    assert set(result.plan.dropped) == {"0"}
    assert result.kind == "module"
    assert apart(model, result.model, IMAGE) <= 1e-5
    again = shrunk(net(conv(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), dead(nn.ReLU()), live()))
    assert type(again.model[3]) is nn.Identity  # type: ignore[index]


def test_the_callers_input_is_not_written_to() -> None:
    model = net(dead(inputs=3), nn.ReLU(inplace=True), conv(3), live())
    result = shrunk(model)
    image = IMAGE.clone()
    assert apart(model, result.model, IMAGE) <= 1e-5
    result.model(image)
    assert torch.equal(image, IMAGE)


def test_outputs_that_were_different_tensors_stay_so() -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = s.a(x)
        after = s.b(before)
        return before, after, s.c(after).mean((2, 3))

    model = Calls(forward, a=conv(3), b=dead(), c=live()).eval()
    result = shrunk(model)
    assert set(result.plan.dropped) == {"b"}
    before, after, last = result.model(IMAGE)
    before.zero_()
    assert torch.equal(after, model(IMAGE)[1])
    assert last.shape == (2, WIDTH)


def test_equal_constants_go_along_the_axis_whose_size_is_fixed() -> None:
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
            nn.init.zeros_(self.down.weight)
            nn.init.constant_(self.down.bias, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            return (x + self.down(torch.relu(self.up(x)))).permute(0, 3, 1, 2)

    for size in (WIDTH, 20):
        image = torch.randn(2, 3, size, size)
        model = net(conv(3), nn.ReLU(), Permuted(), nn.ReLU(), live())
        result = shrunk(model, image)
        assert [len(left) for left in result.plan.dropped.values()] == [WIDTH]
        assert apart(model, result.model, LARGER) <= 1e-5


@pytest.mark.parametrize("twice", [False, True])
def test_a_value_that_is_added_to_itself_takes_a_constant_up_once(twice: bool) -> None:
    double = Calls(lambda s, x: (lambda z: z + (z if twice else x))(s.a(x)), a=conv())
    model = net(conv(3), nn.ReLU(), double, dead(bias=None), nn.ReLU(), live())
    result = shrunk(model)
    assert "3" in result.plan.dropped
    assert apart(model, result.model, IMAGE) <= 1e-5


def test_computed_weights_before_a_constant() -> None:
    layer = nn.utils.parametrizations.weight_norm(conv(3))
    model = net(layer, dead(bias=None), nn.ReLU(), live())
    result = shrunk(model)
    assert set(result.plan.dropped) == {"1"}
    assert apart(model, result.model, IMAGE) <= 1e-5


def test_a_sum_of_two_dtypes_is_no_block() -> None:
    """Without the branch the stream would have another dtype."""
    mixed = Calls(lambda s, x: x.bfloat16().add(s.b(x.bfloat16().float())), b=conv(zero=True, bias=0.0))
    program = trace(net(conv(3), mixed, conv(), live()), IMAGE)
    assert {block.module for block in find_blocks(program)} == {"3"}


def test_of_parallel_branches_each_may_go_and_the_stream_never() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return x + s.a(torch.relu(x)) + s.b(x)

    model = net(conv(3), Calls(forward, a=conv(), b=conv(zero=True, bias=0.0)), nn.ReLU(), live())
    program = trace(model, IMAGE)
    branches = [set(block.tensors) for block in find_blocks(program) if block.module == "1"]
    assert branches == [{"1.a.weight", "1.a.bias"}, {"1.b.weight", "1.b.bias"}]
    result = shrunk(model)
    assert len(result.plan.dropped) == 1
    assert apart(model, result.model, IMAGE) <= 1e-5


def test_a_depthwise_layer_in_a_dead_branch_goes_with_it_for_a_latency() -> None:
    torch.manual_seed(0)
    model = import_torchvision().models.MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 3, 2]]).eval()
    nn.init.zeros_(model.features[3].conv[3].weight)
    image = torch.randn(1, 3, 64, 64)
    program = trace(model, image)
    given = table_of(program, couple(program))
    result = surgery.shrink(model, image, surgery.recipe(latency=0.7, latency_table=given, correct=False))
    assert "features.3" in result.plan.dropped


def test_a_depthwise_layer_that_is_all_of_a_dead_branch() -> None:
    layer = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
    nn.init.zeros_(layer.weight)
    program = trace(net(conv(3), Calls(lambda s, x: x + s.d(x), d=layer), nn.ReLU(), live()), IMAGE)
    blocks = find_blocks(program)
    gone = {block.name: dead_blocks(program, blocks).get(block.name, ()) for block in blocks if "1" in block.module}
    assert len(gone) == 2
    plan = surgery.Plan({}, {}, (), program.fingerprint, program.inputs, dropped=gone)
    assert check_dropped(drop(program, gone, blocks), plan)
