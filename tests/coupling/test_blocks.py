"""Residual blocks that go: found, dropped exactly, dead ones recognised, and the oracle that must notice mistakes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from stairs import table_of
from torch import Tensor, nn

import surgery
from benchmarks.studies import data
from benchmarks.studies.networks import CifarResNet
from exporters import onnx as exporter
from surgery.capture.tracing import trace
from surgery.core.ir import Program
from surgery.coupling.blocks import dead_blocks, find_blocks
from surgery.coupling.coupler import couple
from surgery.coupling.dropping import drop
from surgery.cutting.verify import check_dropped
from surgery.errors import CheckFailed, InvalidInput, PlanMismatch
from surgery.inputs import import_torchvision

IMAGE = torch.randn(2, 3, 16, 16)


class Branch(nn.Module):
    """x + bn(conv(relu(conv(x)))), rectified as asked."""

    def __init__(self, width: int, *, rectified: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn, self.rectified = nn.BatchNorm2d(width), rectified

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.bn(self.conv2(torch.relu(self.conv1(x))))
        return torch.relu(y) if self.rectified else y


def net(*, width: int = 32, blocks: int = 4, rectified: bool = True) -> nn.Module:
    torch.manual_seed(0)
    body = [Branch(width, rectified=rectified) for _ in range(blocks)]
    stem = [nn.Conv2d(3, width, 3, 1, 1), nn.ReLU()]
    model = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def plan_without(program: Program, dropped: dict[str, tuple[float, ...]]) -> surgery.Plan:
    return surgery.Plan({}, {}, (), program.fingerprint, program.inputs, dropped=dropped)


NETWORKS = {
    "resnet50": (16, 0),
    "mobilenet_v2": (10, 13),
    "convnext_tiny": (18, 18),
    "efficientnet_b0": (9, 12),
    "resnet110": (54, 0),
    "vit": (8, 0),
    "swin": (10, 0),
}
"""How many branches that may go each has, and how many depthwise layers."""


VIT = {"image_size": 64, "patch_size": 16, "num_layers": 4, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
SWIN = {"patch_size": [4, 4], "embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": [7, 7]}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("VisionTransformer", VIT), "swin": ("SwinTransformer", SWIN),
}  # fmt: skip
"""torchvision's classes with fewer blocks."""


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_real_networks_are_found_and_dropped_exactly(name: str) -> None:
    if name == "resnet110":
        model, image = CifarResNet(18).eval(), torch.randn(1, 3, 32, 32)
    elif name in TRANSFORMERS:
        kind, sizes = TRANSFORMERS[name]
        model = getattr(import_torchvision().models, kind)(**sizes).eval()
        image = torch.randn(1, 3, 64, 64)
    else:
        model = import_torchvision().models.get_model(name, weights=None).eval()
        image = torch.randn(1, 3, 64, 64)
    program = trace(model, image)
    blocks = find_blocks(program)
    layers = [block for block in blocks if block.is_layer]
    assert (len(blocks) - len(layers), len(layers)) == NETWORKS[name]
    assert len(blocks) == len({block.name for block in blocks})
    gone: dict[str, tuple[float, ...]] = {block.name: () for block in blocks[1::3]}
    left = drop(program, gone, blocks)
    assert check_dropped(left, plan_without(program, gone)) == ()
    assert not {n for b in blocks[1::3] for n in b.nodes} & {node.name for node in left.graph.graph.nodes}
    kept = {n for n, _ in left.model.named_parameters()}
    assert not {t for b in blocks[1::3] for t in b.tensors} & kept
    couple(left)


def test_a_densely_connected_network_has_none() -> None:
    model = import_torchvision().models.DenseNet(8, (3, 3), 16).eval()
    assert find_blocks(trace(model, torch.randn(1, 3, 64, 64))) == ()


def test_the_users_class_comes_back_with_an_identity_where_that_is_the_same() -> None:
    model = net()
    program = trace(model, IMAGE)
    left = drop(program, {"3": ()})
    assert type(left.model) is nn.Sequential
    assert isinstance(left.model[3], nn.Identity)
    assert isinstance(model[3], Branch)


class WrongTurn(nn.Module):
    """A block whose sum is not all that its module does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.conv(x))


def test_the_rewritten_program_comes_back_where_an_identity_is_not_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), WrongTurn(), WrongTurn(), nn.Flatten(), nn.Linear(8 * 256, 4)).eval()
    program = trace(model, IMAGE)
    gone: dict[str, tuple[float, ...]] = {"1": ()}
    left = drop(program, gone)
    assert isinstance(left.model, torch.fx.GraphModule)
    assert check_dropped(left, plan_without(program, gone)) == ()


def test_the_oracle_notices_a_block_dropped_wrongly() -> None:
    program = trace(net(), IMAGE)
    gone: dict[str, tuple[float, ...]] = {"3": ()}
    left = drop(program, gone)
    for faulty in (replace(drop(program, {"4": ()}), whole=program), drop(program, {**gone, "4": ()})):
        with pytest.raises(CheckFailed):
            check_dropped(faulty, plan_without(program, gone))
    with pytest.raises(CheckFailed):
        check_dropped(left, plan_without(program, {"3": (0.5,) * 32}))


def kill(model: nn.Module, index: int, *, left: bool) -> None:
    """Zero a block's last convolution; its batch norm goes on giving a constant, or nothing."""
    block = model[index]  # type: ignore[index]
    with torch.no_grad():
        block.conv2.weight.zero_()
        if not left:
            block.bn.bias.zero_()
            block.bn.running_mean.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", [False, True])
def test_a_dead_block_vanishes_and_its_constant_stays(dtype: torch.dtype, left: bool, tmp_path: Path) -> None:
    model = net().to(dtype)
    kill(model, 3, left=left)
    image = IMAGE.to(dtype)
    result = surgery.shrink(model, image, surgery.recipe(macs=0.9))
    assert set(result.plan.dropped) == {"3"}
    assert bool(result.plan.dropped["3"]) == left
    assert any("dead" in note and "test_blocks.py" in note for note in result.plan.notes)
    assert not result.plan.dead  # a quarter of the network was dead: nothing else has to go
    error = float((result.model(image) - model(image)).detach().abs().max())
    assert error <= (1e-10 if dtype == torch.float64 else 1e-5)
    exporter.export(result.model, image, tmp_path / "compact.onnx")
    convolutions = [n for n in onnx.load(tmp_path / "compact.onnx").graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 7
    again = surgery.apply(surgery.Plan.from_json(result.plan.to_json()), model)
    assert torch.equal(again(image), result.model(image))


def test_a_dead_block_stays_where_layers_may_not_be_dropped_or_are_kept() -> None:
    model = net()
    kill(model, 3, left=False)
    half = surgery.Budget(macs=0.5)
    assert not surgery.shrink(model, IMAGE, surgery.recipe(budget=half, drop_layers=False)).plan.dropped
    assert not surgery.shrink(model, IMAGE, surgery.recipe(budget=half, keep=("3.conv1",))).plan.dropped


def test_a_network_whose_branches_all_end_in_zero_is_one_before_training() -> None:
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
    program = trace(model, IMAGE)
    assert len(dead_blocks(program, find_blocks(program))) == 4
    result = surgery.shrink(model, IMAGE, surgery.recipe(macs=0.5))
    assert not result.plan.dropped
    assert any("before training" in note for note in result.plan.notes)


def test_a_constant_that_is_not_the_same_everywhere_is_not_taken_for_one() -> None:
    """A convolution of a constant sees the padding at the border."""
    model = net()
    with torch.no_grad():
        model[3].conv1.weight.zero_()
        model[3].conv1.bias.fill_(1.0)
    program = trace(model, IMAGE)
    assert dead_blocks(program, find_blocks(program)) == {}


def test_blocks_go_for_time_and_may_be_forbidden_to() -> None:
    model = net(blocks=8)
    for index in (4, 6):  # their last scales are small: they matter least
        nn.init.constant_(model[index].bn.weight, 1e-3)  # type: ignore[union-attr, arg-type]
    program = trace(model, IMAGE)
    given = table_of(program, couple(program))
    budget = surgery.Budget(latency=0.7)
    dropped = surgery.shrink(model, IMAGE, surgery.recipe(budget=budget, latency_table=given))
    assert {"4", "6"} <= set(dropped.plan.dropped)
    assert "importance" in dropped.plan.reasons["4"]
    assert dropped.kind == "module"
    kept = surgery.shrink(model, IMAGE, surgery.recipe(budget=budget, latency_table=given, drop_layers=False))
    assert not kept.plan.dropped
    assert kept.plan.dead


def test_a_plan_with_blocks_of_another_network_is_refused() -> None:
    with pytest.raises(PlanMismatch, match="no block 'layer9'"):
        drop(trace(net(), IMAGE), {"layer9": ()})


@pytest.fixture(scope="module")
def half_dead() -> nn.Module:
    """ResNet-20 of the Distiller project, regularised until five of its convolutions were all zero."""
    try:
        path = data.find_root() / "cifar10_weights" / "distiller_resnet20_4Dreg.pt"
    except InvalidInput as error:
        pytest.skip(str(error))
    if not path.is_file():
        pytest.skip(f"no checkpoint at {path}")
    from benchmarks.studies.networks import projected_resnet

    return projected_resnet(torch.load(path, map_location="cpu", weights_only=True)).eval()


def test_the_dead_branches_of_a_trained_network_disappear(half_dead: nn.Module) -> None:
    model = half_dead.double()
    zero = [n for n, p in model.named_parameters() if p.dim() == 4 and not p.any()]
    assert len(zero) == 5
    image = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    result = surgery.shrink(model, image, surgery.recipe(macs=0.95))
    assert set(result.plan.dropped) == {"layer1.0", "layer1.1", "layer2.2"}
    assert result.kind == "module"
    assert type(result.model) is type(model)
    assert max(abs(x) for left in result.plan.dropped.values() for x in left) > 0.6
    assert not {n.rpartition(".")[0] for n in zero} & {n for n, _ in result.model.named_modules()}
    assert float((result.model(image) - model(image)).detach().abs().max()) <= 1e-10


@pytest.mark.parametrize("left", [False, True])
def test_a_projected_shortcut_stays_in_the_users_class(left: bool) -> None:
    torch.manual_seed(0)
    model = import_torchvision().models.resnet18(weights=None).eval()
    nn.init.zeros_(model.layer3[0].bn2.weight)
    if left:
        nn.init.normal_(model.layer3[0].bn2.bias)
    image = torch.randn(2, 3, 64, 64)
    result = surgery.shrink(model, image, surgery.recipe(macs=0.8))
    assert list(result.plan.dropped) == ["layer3.0"]
    assert result.kind == "module"
    assert type(result.model) is type(model)
    assert {"layer3.0.downsample.0.weight", "layer3.0.downsample.1.bias"} <= result.model.state_dict().keys()
    assert not any("layer3.0.conv" in name for name in result.model.state_dict())
    assert "layer3.0.conv1.weight" in model.state_dict()
    again = surgery.apply(result.plan, model)
    assert torch.equal(again(image), result.model(image))


class OfBoth(nn.Module):
    """relu(conv(x) + branch(x)): with the branch dead, what stays beside it is another value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.branch = nn.Conv2d(width, width, 3, 1, 1), Branch(width, rectified=False)
        nn.init.zeros_(self.branch.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + self.branch(x))


class Functional(nn.Module):
    """Two dead branches in one module: no placeholder module computes what is left of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        nn.init.zeros_(self.one.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.conv(x) * 0.5) + torch.sigmoid(x + self.one(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("functional", [False, True])
def test_models_in_training_mode_lose_blocks_as_well(functional: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = net(blocks=4)
    model[3] = OfBoth(32)  # type: ignore[operator]
    if functional:  # a constant behind a ReLU that is no module: the rewritten program comes back
        model[4] = Functional(32)  # type: ignore[operator]
    program = trace(model.eval(), IMAGE)
    by_time = {"budget": surgery.Budget(latency=0.5), "latency_table": table_of(program, couple(program))}
    asked: dict[str, Any] = {"budget": surgery.Budget(macs=0.8)} if functional else by_time
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = surgery.shrink(model, IMAGE, surgery.recipe(**asked))
    assert "3.branch" in result.plan.dropped
    assert result.kind == ("graph" if functional else "module")
    assert result.model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = surgery.apply(result.plan, model)
    assert again.training == training
    assert torch.equal(again.eval()(IMAGE), result.model.eval()(IMAGE))
