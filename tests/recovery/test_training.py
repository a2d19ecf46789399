"""A compact model trains like any other: a plain loop, as trainers have it, lowers the loss."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from conftest import Cutting, apply_plan, cut_model, random_dead
from torch import Tensor, nn

from surgery.capture.tracing import trace
from surgery.coupling.coupler import couple
from surgery.inputs.libraries import import_timm

STEPS = 20
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet18": ("resnet18", 32, {}),
    "mobilenetv3_small": ("mobilenetv3_small_050", 32, {}),
    "vit": ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def cutting(request: pytest.FixtureRequest) -> Cutting:
    name, size, extra = MODELS[request.param]
    torch.manual_seed(0)
    model = import_timm().create_model(name, num_classes=4, **extra)
    program = trace(model, torch.randn(1, 3, size, size))
    coupling = couple(program)
    dead = random_dead(coupling, 0)
    for group in coupling.groups:  # fewer head dimensions would change the scale that timm's forward leaves to torch
        if group.size == 64 and any("qkv" in site.tensor for site in group.sites):
            dead.pop(group.name)
    return apply_plan(program, coupling, dead)


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Four textures, two of each, the same at every step."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, size, size, generator=generator), torch.arange(8) % 4


def test_twenty_steps_of_a_plain_loop_lower_the_loss(cutting: Cutting) -> None:
    cutting.check()
    model = cutting.compact.module
    assert isinstance(model, type(cutting.program.model)), cutting.compact.why
    frozen_before = {k: v.clone() for k, v in cutting.program.model.state_dict().items()}
    x, y = batch(32)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(v, frozen_before[k]) for k, v in cutting.program.model.state_dict().items())


def test_methods_of_the_users_class_go_on_working(cutting: Cutting) -> None:
    model = cutting.compact.module.eval()
    x, _ = batch(32)
    with torch.no_grad():
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.get_classifier().out_features == 4


def test_statistics_move_in_training_and_rest_in_evaluation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.drop, self.b = (
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                nn.Dropout(0.5),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.drop(self.norm(self.a(x)).reshape(-1, 8, 36).mean(2)))

    cutting = cut_model(Net(), torch.randn(1, 3, 8, 8))
    x, graph = torch.randn(4, 3, 8, 8), cutting.compact.graph
    mean = graph.get_buffer("norm.running_mean")
    rest = mean.clone()
    graph.eval()(x)
    assert torch.equal(mean, rest)
    graph.train()
    assert not torch.equal(graph(x), graph(x))
    assert not torch.equal(mean, rest)
    graph.eval()
    assert torch.equal(graph(x), graph(x))


def test_a_graph_is_copied_and_saved_with_all_that_it_holds() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(4, 2, 1)
            self.scale: Tensor
            self.register_buffer("scale", torch.tensor([0.5]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.norm(self.a(x))[:, ::2])
            return y * self.scale

    cutting = cut_model(Net(), torch.randn(1, 3, 8, 8))
    compact, x = cutting.compact, torch.randn(3, 3, 8, 8)
    assert compact.kind == "graph"
    assert compact.module.state_dict().keys() == cutting.program.model.state_dict().keys()
    stream = io.BytesIO()
    torch.save(compact.module, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    wanted = compact.module.eval()(x)
    for twin in (loaded, copy.deepcopy(compact.module)):
        assert twin.state_dict().keys() == compact.module.state_dict().keys()
        assert torch.equal(twin.eval()(x), wanted)
        assert twin.train().training
    exported = torch.export.export(compact.module.eval(), (x,))
    assert torch.equal(exported.module()(x), wanted)


class Noisy(nn.Module):
    """Noise in training; a size in forward that the user's class cannot have smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Conv2d(3, 16, 3), nn.Conv1d(16, 4, 1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 4, positions)."""
        y = torch.relu(self.first(x))
        if self.training:
            y = y + torch.randn_like(y)
        y = self.second(y.view(len(y), 16, -1))
        return self.drop(y) if self.training else y


def test_a_graph_tells_what_forward_does_in_training_only() -> None:
    compact = cut_model(Noisy().eval(), torch.randn(2, 3, 8, 8)).compact
    assert compact.kind == "graph"
    assert "what forward of 'Noisy' does only where self.training is set" in compact.lost_in_training
    assert "Dropout 'drop'" in compact.lost_in_training
