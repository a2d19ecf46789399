"""How much of the signal units and blocks carry: moments against sampling, and the output relevance of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import vit
from torch import Tensor, nn

from surgery.capture.tracing import trace
from surgery.core.ir import Program
from surgery.coupling.blocks import find_blocks
from surgery.coupling.coupler import couple
from surgery.importance.scoring import score, weights_of
from surgery.importance.signal import Signal, loss_of, moments_of, signal_of
from surgery.inputs.models import load_model
from surgery.ops.moments import Moments


def traced(model: nn.Module, *shape: int) -> Program:
    torch.manual_seed(0)
    return trace(model.eval(), (torch.randn(*shape),))


def signal(program: Program) -> Signal:
    coupling = couple(program)
    return signal_of(program, coupling, weights_of(program, coupling), find_blocks(program))


def last(program: Program) -> Moments:
    output = next(n for n in program.graph.graph.nodes if n.op == "output")
    found = moments_of(program)[output.all_input_nodes[0].name]
    assert isinstance(found, Moments)
    return found


class Apply(nn.Module):
    """A batch norm says what comes in; then a function with weights of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6, affine=True)
        self.layer = layer or nn.Identity()
        self.function = function
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(0.2, 2.0, 6))
            self.norm.bias.copy_(torch.linspace(-1.0, 1.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(self.norm(x)))


def grouped() -> nn.Module:
    return nn.Conv2d(6, 4, 1, groups=2)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], nn.Module]]] = {
    "norm": (lambda x: x * 1.0, nn.Identity),
    "relu": (torch.relu, nn.Identity),
    "clamped": (lambda x: torch.clamp(x, 0.0, 1.5), nn.Identity),
    "silu": (nn.functional.silu, nn.Identity),
    "convolution": (lambda x: x, lambda: nn.Conv2d(6, 5, 1)),
    "grouped": (lambda x: x, grouped),
    "transposed": (lambda x: x, lambda: nn.ConvTranspose2d(6, 4, 1, groups=2)),
    "depthwise": (torch.relu, lambda: nn.Conv2d(6, 6, 1, groups=6)),
    "product": (lambda x: x[:, :3] * x[:, 3:], nn.Identity),
    "sum": (lambda x: 2 * x[:, :3] + x[:, 3:], nn.Identity),
    "concatenation": (lambda x: torch.cat([torch.relu(x), x[:, :2]], 1), nn.Identity),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), lambda: nn.Conv2d(6, 5, 1)),
    "shuffle": (lambda x: x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2), nn.Identity),
    "padding": (lambda x: nn.functional.pad(x, (0, 0, 0, 0, 1, 2)), nn.Identity),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_moments_are_those_of_samples(name: str) -> None:
    function, layer = FUNCTIONS[name]
    torch.manual_seed(1)
    model = Apply(function, layer())
    told = last(traced(model, 2, 6, 4, 4))
    with torch.no_grad():
        drawn = model(torch.randn(20000, 6, 4, 4))
    for found, wanted in ((told.mean, drawn.mean(0)), (told.var, drawn.var(0))):
        assert torch.allclose(found.expand(told.shape)[0].float(), wanted, atol=0.05, rtol=0.05)


def test_a_norm_tells_whatever_came_before() -> None:
    told = last(traced(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), 2, 3, 8, 8))
    assert torch.allclose(told.var, torch.ones((), dtype=torch.float64), atol=1e-4)


class Residual(nn.Module):
    """A stream, and one branch whose last scale is `gain`."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.outer, self.outer_norm = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1)
        nn.init.constant_(self.outer_norm.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem_norm(self.stem(x))
        return self.head(y + self.outer_norm(self.outer(torch.relu(self.inner_norm(self.inner(y))))))


@pytest.mark.parametrize("gain", [0.1, 1.0, 3.0])
def test_a_branch_is_as_relevant_as_its_share_of_the_sum(gain: float) -> None:
    known = signal(traced(Residual(gain), 2, 3, 8, 8))
    share = gain**2 / (1 + gain**2)
    block = next(iter(known.blocks))
    assert known.blocks[block] == pytest.approx(-math.log(1 - share), rel=1e-2)
    (inner,) = known.consumers["inner.weight:0"]
    assert (inner.name, inner.relevance) == ("outer.weight", pytest.approx(share, rel=1e-3))
    stream = {consumer.name: consumer.relevance for consumer in known.consumers["stem.weight:0"]}
    assert stream == {"inner.weight": pytest.approx(share, rel=1e-3), "head.weight": 1.0}


def test_units_that_nobody_reads_lose_nothing() -> None:
    model = Residual(1.0)
    with torch.no_grad():
        model.outer.weight[:, 2:4] = 0.0
    program = traced(model, 2, 3, 8, 8)
    scores = score(program, couple(program), "signal")["inner.weight:0"]
    assert scores[2:4] == (0.0, 0.0) and min(scores[:2] + scores[4:]) > 0.0


def test_a_layer_cannot_lose_more_than_all() -> None:
    assert loss_of(1.0, 0.0) == 0.0
    assert loss_of(0.5, 0.75) == pytest.approx(0.5 * math.log(4))
    assert math.isfinite(loss_of(1.0, 1.0)) and loss_of(1.0, 1.0) > 20 * loss_of(1.0, 0.5)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "vit"])
def test_every_group_has_consumers_whose_shares_are_shares(name: str) -> None:
    if name == "vit":
        program = trace(vit().eval(), torch.randn(1, 3, 224, 224))
    else:
        loaded = load_model(name, weights="random", input_shape=(1, 3, 64, 64))
        program = trace(loaded.module, loaded.example_inputs, loaded.example_kwargs)
    known = signal(program)
    for group in couple(program).groups:
        consumers = known.consumers[group.name]
        assert consumers, group.name
        for consumer in consumers:
            assert len(consumer.shares) == group.size and all(0.0 <= share <= 1.0 for share in consumer.shares)
            assert 0.0 <= consumer.relevance <= 1.0 and sum(consumer.shares) <= 1.0 + 1e-9
    assert all(0.0 <= lost < 25.0 for lost in known.blocks.values())
