"""What blocks are worth, seen on calibration images: what is missing without them, in turn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from stairs import table_of
from torch import Tensor, nn

import surgery
from surgery.capture.tracing import trace
from surgery.coupling.blocks import find_blocks
from surgery.coupling.coupler import couple
from surgery.coupling.dropping import drop
from surgery.importance.block_ablation import BlockAblation, block_losses, first
from surgery.importance.scoring import weights_of
from surgery.importance.signal import signal_of

IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES[:16],), (IMAGES[16:],)]


class Branch(nn.Module):
    """x + scale * bn(conv(relu(x)))."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        nn.init.constant_(self.bn.weight, scale)
        nn.init.normal_(self.bn.bias, std=0.1 * scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(torch.relu(x)))


def net(*scales: float, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    body = (Branch(width, scale) for scale in scales)
    model = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*model, nn.Linear(width, 10)).eval()


@pytest.mark.parametrize("gone", [("1",), ("2", "4")])
def test_what_is_missing_is_the_error_over_the_variance(gone: tuple[str, ...]) -> None:
    model = net(1.0, 0.3, 2.0, 0.5)
    program = trace(model, IMAGES[:2])
    blocks = find_blocks(program)
    dense, without = (m(IMAGES).detach().double() for m in (model, drop(program, dict.fromkeys(gone, ())).model))
    wanted = (dense - without).square().sum() / (dense - dense.mean(0)).square().sum()
    assert BlockAblation(program, blocks, BATCHES).error(gone) == pytest.approx(float(wanted), rel=1e-4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), net(1.0, 0.3, 2.0, 0.5).state_dict().values(), strict=True)
    )


def test_blocks_go_in_turn_and_are_worth_what_each_adds() -> None:
    program = trace(net(1.0, 0.1, 2.0, 0.2), IMAGES[:2])
    blocks = find_blocks(program)
    ablation = BlockAblation(program, blocks, BATCHES)
    order = list(ablation.in_turn(float("inf")))
    assert [name for name, _ in order][:2] == ["2", "4"]
    for count in range(1, 5):
        gone = [name for name, _ in order[:count]]
        assert order[count - 1][1] == pytest.approx(ablation.error(gone), rel=1e-6)
    worth = block_losses(program, blocks, BATCHES)
    assert list(worth) == ["1", "2", "3", "4"]
    assert worth["2"] <= worth["4"] <= min(worth["1"], worth["3"])
    assert worth["2"] + worth["4"] == pytest.approx(float(np.log1p(order[1][1])), rel=1e-3)


def test_two_blocks_that_undo_each_other_are_told_apart_from_two_that_do_nothing() -> None:
    """One by one each of a pair matters; together they do nothing."""
    model = net(1.0, 1.0)
    with torch.no_grad():
        for module in (model[1], model[2]):  # type: ignore[index]
            module.conv.weight.zero_()
            module.conv.bias.zero_()  # type: ignore[union-attr]
        model[1].bn.bias.copy_(torch.linspace(-1, 1, 32))  # type: ignore[index, union-attr]
        model[2].bn.bias.copy_(-torch.linspace(-1, 1, 32))  # type: ignore[index, union-attr]
    program = trace(model, IMAGES[:2])
    ablation = BlockAblation(program, find_blocks(program), BATCHES)
    assert min(ablation.alone.values()) > 0.01
    assert ablation.error(("1", "2")) == pytest.approx(0, abs=1e-9)


def test_large_networks_run_on_fewer_images() -> None:
    assert [len(x) for (x,) in first(BATCHES, None)] == [16, 8]
    assert [len(x) for (x,) in first(BATCHES, 24)] == [16, 8]
    assert [len(x) for (x,) in first(BATCHES, 23)] == [16]
    assert [len(x) for (x,) in first(BATCHES, 8)] == [16]
    program = trace(net(1.0, 0.5), IMAGES[:2])
    few = block_losses(program, find_blocks(program), BATCHES, macs=10**15)
    assert few == block_losses(program, find_blocks(program), BATCHES[:1])


def test_a_plan_goes_by_what_the_images_show() -> None:
    """The branch with the large scale gives nearly nothing on these images: its input there is never positive."""
    model = net(1.0, 3.0, 1.0, 1.0)
    with torch.no_grad():
        model[2].bn.running_mean.zero_()  # type: ignore[index, union-attr]
        model[2].bn.bias.zero_()  # type: ignore[index, union-attr]
        model[2].conv.bias.zero_()  # type: ignore[index, union-attr]
        model[2].bn.running_var.fill_(1e6)  # type: ignore[index, union-attr]
    program = trace(model, IMAGES[:2])
    blocks = find_blocks(program)
    coupling = couple(program)
    by_weights = signal_of(program, coupling, weights_of(program, coupling), blocks).blocks
    assert max(by_weights, key=by_weights.__getitem__) == "2"
    given = table_of(program, coupling)
    asked = {"budget": surgery.Budget(latency=0.8), "latency_table": given}
    first_run, again = (surgery.shrink(model, IMAGES[:2], surgery.recipe(data=IMAGES, **asked)) for _ in range(2))  # type: ignore[arg-type]
    assert set(first_run.plan.dropped) == {"2"}
    assert first_run.plan.to_json() == again.plan.to_json()
    assert first_run.plan.settings["data"]["images"] == 24
    assert first_run.report["settings"]["data"] == first_run.plan.settings["data"]
    other = surgery.shrink(model, IMAGES[:2], surgery.recipe(data=IMAGES.flip(0), **asked))  # type: ignore[arg-type]
    assert other.plan.settings != first_run.plan.settings
    assert "2" not in surgery.shrink(model, IMAGES[:2], surgery.recipe(**asked)).plan.dropped  # type: ignore[arg-type]


NETWORK = """
import torch
from torch import nn

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32)

    def forward(self, x):
        return x + self.bn(self.conv(torch.relu(x)))

def network():
    body = [Branch() for _ in range(3)]
    layers = nn.Conv2d(3, 32, 3, 1, 1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)
    return nn.Sequential(*layers), torch.zeros(1, 3, 8, 8)
"""


def test_the_command_line_reads_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from surgery.cli import main
    from surgery.inputs.models import load_model

    (tmp_path / "net.py").write_text(NETWORK)
    source = f"{tmp_path / 'net.py'}:network"
    loaded = load_model(source)
    program = trace(loaded.module, loaded.example_inputs)
    table_of(program, couple(program)).save(tmp_path / "table.json")
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    command = ["show", source, "--latency", "0.7", "--latency-table", str(tmp_path / "table.json"), "--json", "--quiet"]
    calibrate = ["--data", str(tmp_path / "a.npz"), "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"]
    assert main([*command, *calibrate, "--criterion", "signal"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["data"]["images"] == 20
    assert told["dropped"]
    assert main([*command, *calibrate, "--mean", "0.5"]) == 2
    assert "--mean" in capsys.readouterr().err
    assert main([*command, "--data", str(tmp_path / "none.npz")]) == 2
    assert main([*command, *calibrate, "--std", "a"]) == 2
