"""Constants that dropped branches leave: taken up by a bias where that is exact, else one sum, in the user's class."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import surgery
from exporters import onnx as exporter
from surgery.capture.tracing import trace
from surgery.core.ir import Program
from surgery.coupling.blocks import dead_blocks, find_blocks
from surgery.coupling.dropping import Placeholder, branch_constants, drop
from surgery.cutting.verify import check_dropped
from surgery.errors import CheckFailed

WIDTH = 12
IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Dead(nn.Module):
    """x + bn(conv(x)), whose convolution is zero: its branch gives the norm's shift."""

    def __init__(self, *, rectified: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.conv, self.bn, self.rectified = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), rectified
        nn.init.zeros_(self.conv.weight)
        nn.init.normal_(self.bn.bias)
        nn.init.normal_(self.bn.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)) + x
        return torch.relu(y) if self.rectified else y


class Live(nn.Module):
    """x + conv(relu(norm(x))), as in pre-activation networks."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, bias=bias)
        nn.init.normal_(self.bn.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.bn(x)))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def sequence(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*layers, Mean(), nn.Linear(WIDTH, 5)).double().eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.3)
    return model


def without(model: nn.Module, image: Tensor = IMAGE) -> tuple[Program, Program]:
    """The program, and what is left of it without its dead blocks: checked, and the same to 1e-12."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    program = trace(model, image)
    dead = dead_blocks(program, find_blocks(program))
    assert dead
    left = drop(program, dead)
    plan = surgery.Plan({}, {}, (), program.fingerprint, program.inputs, dropped=dead)
    (told,) = check_dropped(left, plan)
    assert "dead blocks taken out" in told
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for found in (left.model, left.graph):
        assert float((found(image) - model(image)).detach().abs().max()) <= 1e-12
    return program, left


def stem(**options: bool) -> nn.Module:
    return nn.Conv2d(3, WIDTH, 3, 1, 1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "taken"),
    [
        ([stem(), Dead()], "0.bias"),
        ([stem(bias=False), nn.BatchNorm2d(WIDTH), Dead(), nn.ReLU()], "1.bias"),
        ([stem(), nn.GroupNorm(3, WIDTH), Dead(), Dead(), Dead()], "1.bias"),
        ([stem(bias=False), nn.BatchNorm2d(WIDTH), Live(bias=True), Dead(), nn.ReLU()], "2.conv.bias"),
    ],
)
def test_a_bias_takes_the_constant_up(layers: list[nn.Module], taken: str) -> None:
    model = sequence(*layers)
    _, left = without(model)
    assert type(left.model) is nn.Sequential
    assert left.model.state_dict().keys() < model.state_dict().keys()
    sums = [node for node in left.graph.graph.nodes if str(node.target) == "aten.add.Tensor"]
    assert len(sums) == sum(isinstance(m, Live) for m in layers)
    changed = [n for n, t in left.model.state_dict().items() if not torch.equal(t, model.state_dict()[n])]
    assert changed == [taken]


@pytest.mark.parametrize(
    "layers",
    [
        [stem(), nn.ReLU(), Dead(rectified=True), Dead(rectified=True)],  # a ReLU lies between
        [stem(bias=False), Dead(), Live()],  # two that read it, one of them the stream
        [stem(), Live(), Dead(), Live()],
    ],
)
def test_where_that_is_not_exact_a_sum_stays_in_the_users_class(layers: list[nn.Module]) -> None:
    model = sequence(*layers)
    _, left = without(model)
    assert type(left.model) is nn.Sequential
    held = [m for m in left.model.modules() if isinstance(m, Placeholder)]
    rectified = sum(isinstance(m, Dead) and m.rectified for m in layers)
    assert len(held) == (rectified or 1)
    assert all(m.constant is not None and m.constant.shape == (1, WIDTH, 1, 1) for m in held)
    sums = [node for node in left.graph.graph.nodes if str(node.target) == "aten.add.Tensor"]
    assert len(sums) == len(held) + sum(isinstance(m, Live) for m in layers)


def test_constants_in_a_row_add_up_into_one() -> None:
    model = sequence(stem(bias=False), Dead(), Dead(), Dead(), nn.ReLU())
    program, left = without(model)
    assert sum(str(node.target) == "aten.add.Tensor" for node in left.graph.graph.nodes) == 1
    found = branch_constants(program, dead_blocks(program, find_blocks(program)))
    assert not found.shifts
    assert len(found.added) == 1
    assert type(left.model) is nn.Sequential


def test_a_bias_that_is_read_twice_is_left_alone() -> None:
    shared = stem()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.dead = shared, Dead()

        def forward(self, x: Tensor) -> Tensor:
            return self.dead(self.first(x)) * self.first(x)

    program = trace(sequence(Twice()), IMAGE)
    found = branch_constants(program, dead_blocks(program, find_blocks(program)))
    assert not found.shifts
    assert len(found.added) == 1
    without(sequence(Twice()))


class Attention(nn.Module):
    """A transformer's block, whose attention is zero but for its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def test_constants_along_the_last_axis_are_taken_up_by_a_linear_layer() -> None:
    torch.manual_seed(0)
    live, block = Attention(), Attention()
    nn.init.zeros_(block.attention.out_proj.weight)
    nn.init.normal_(block.attention.out_proj.bias)
    model = nn.Sequential(nn.Linear(6, WIDTH), live, block, nn.Linear(WIDTH, 3)).double().eval()
    program, left = without(model, torch.randn(2, 7, 6, dtype=torch.float64))
    found = branch_constants(program, dead_blocks(program, find_blocks(program)))
    assert not found.added
    assert set(found.shifts) == {"1.mlp.2.bias"}
    assert not [n for n, _ in left.model.named_parameters() if "2.attention" in n]


def test_the_oracle_notices_a_constant_that_went_elsewhere() -> None:
    model = sequence(stem(), Dead())
    program = trace(model, IMAGE)
    dead = dead_blocks(program, find_blocks(program))
    plan = surgery.Plan({}, {}, (), program.fingerprint, program.inputs, dropped=dead)
    left = drop(program, dead)
    with torch.no_grad():
        left.model.get_parameter("0.bias").add_(1e-6)
    with pytest.raises(CheckFailed, match=r"0\.bias"):
        check_dropped(left, plan)
    with pytest.raises(CheckFailed):
        check_dropped(drop(program, dict.fromkeys(dead, ())), plan)


def test_the_whole_way_to_a_file(tmp_path: Path) -> None:
    model = sequence(stem(), nn.BatchNorm2d(WIDTH), Dead(), nn.ReLU(), Dead(rectified=True), Live()).float()
    image = IMAGE.float()
    result = surgery.shrink(model, image, surgery.recipe(macs=0.4))
    assert set(result.plan.dropped) == {"2", "4"}
    assert result.kind == "module"
    assert isinstance(result.model[4], Placeholder)  # type: ignore[index]
    exporter.export(result.model, image, tmp_path / "compact.onnx")
    kinds = [n.op_type for n in onnx.load(tmp_path / "compact.onnx").graph.node]
    assert kinds.count("Add") == 2  # the constant behind the ReLU, and the live block
    again = surgery.apply(surgery.Plan.from_json(result.plan.to_json()), model)
    assert torch.equal(again(image), result.model(image))
    result.model.train()(image).sum().backward()
    assert result.model[4].constant.grad is not None  # type: ignore[index, union-attr]
