"""Operators called in forms that few networks use: cut soundly all the same, or left whole with a reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from benchmarks.studies.coverage.oracle import judge
from surgery.errors import UnsupportedModel


class Between(nn.Module):
    """A function between two convolutions of 3 → 8 → 4 channels, with parameters of its own."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.function = function
        for name, tensor in parameters.items():
            setattr(self, name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 4, H, W)."""
        return self.last(self.function(self, self.first(x)))


def cut_soundly(model: nn.Module, x: Tensor) -> surgery.Result:
    torch.manual_seed(0)
    model, x = model.double().eval(), x.double()
    result = surgery.shrink(model, x, surgery.recipe(channels=0.6))
    assert judge(model, result.model, [(torch.randn_like(x),) for _ in range(2)]).sound
    return result


IMAGE = torch.randn(2, 3, 8, 8)

COMPUTED = {
    "product with a normalised matrix": (lambda m, y: (y.movedim(1, -1) @ (m.w / m.w.norm())).movedim(-1, 1), "w"),
    "product with a centred matrix": (lambda m, y: (y.movedim(1, -1) @ (m.w - m.w.mean(0))).movedim(-1, 1), "w"),
    "centred bias": (lambda m, y: F.linear(y.movedim(1, -1), m.v, m.b - m.b.mean()).movedim(-1, 1), "b"),
    "Einstein sum": (lambda m, y: torch.einsum("nchw,dc->ndhw", y, F.normalize(m.w, dim=1)), "w"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_computed_over_a_cut_axis_keeps_its_dense_values(name: str) -> None:
    function, source = COMPUTED[name]
    model = Between(function, w=torch.randn(8, 8), v=torch.randn(8, 8), b=torch.randn(8))
    result = cut_soundly(model, IMAGE)
    (weight,) = result.program.materialised
    assert weight == f"{source}_computed" and result.program.materialised[weight] == (source,)
    assert result.model.state_dict()[weight].numel() < getattr(model, source).numel()
    assert any(weight in note for note in result.program.notes)


def test_a_query_that_is_learned_and_projected_keeps_its_projection() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.norm = nn.Parameter(torch.randn(4, 8)), nn.LayerNorm(8)
            self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out((self.q(self.norm(self.query)) @ self.k(x).transpose(1, 2)).softmax(-1) @ x)

    result = cut_soundly(Pool(), torch.randn(2, 5, 6))
    assert not result.program.materialised and result.plan.dead.get("q.weight:0")


def test_an_einstein_sum_broadcasts_axes_of_length_one() -> None:
    model = Between(lambda m, y: torch.einsum("nchw,cd->ndhw", y, m.e).repeat(1, 2, 1, 1)[:, :8], e=torch.randn(1, 6))
    assert any(cut_soundly(model, IMAGE).plan.dead.values())


def test_an_in_place_sum_keeps_its_dtype() -> None:
    model = Between(lambda m, y: y.add_(m.shift.float()), shift=torch.randn(8, 1, 1)).bfloat16().eval()
    result = surgery.shrink(model, IMAGE.bfloat16(), surgery.recipe(channels=0.6))
    assert result.model(IMAGE.bfloat16()).dtype == torch.bfloat16
    assert any(result.plan.dead.values())


class Experts(nn.Module):
    """A kernel of its own for every sample: one convolution with as many groups as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.route, self.experts = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8 * 8 * 9))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 4, H - 2, W - 2)."""
        y = self.first(x)
        n, c, h, w = y.shape
        kernels = (self.route(y.mean((2, 3))).sigmoid() @ self.experts).view(n * 8, 8, 3, 3)
        return self.last(F.conv2d(y.reshape(1, n * c, h, w), kernels, padding=1, groups=n).view(n, 8, h, w))


def test_groups_by_sample_are_as_many_as_there_are_samples() -> None:
    result = cut_soundly(Experts(), IMAGE)
    assert [result.model(torch.randn(n, 3, 8, 8).double()).shape[0] for n in (1, 3, 5)] == [1, 3, 5]


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False)], ids=str)
def test_an_axis_over_which_a_norm_takes_statistics_is_left_whole(norm: nn.Module) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.wide, self.last = nn.Linear(6, 12), norm, nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.wide(self.norm(self.first(x))).relu())

    result = cut_soundly(Tokens(), torch.randn(2, 5, 6))
    assert set(result.plan.dead) == {"wide.weight:0"}
    assert any(f.tensor == "first.weight" and "normalises over this axis" in f.reason for f in result.coupling.frozen)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_uneven_pieces_of_a_grouped_convolution_change_places(times: int) -> None:
    def rotated(m: Any, y: Tensor) -> Tensor:
        y = F.conv2d(y, m.w, padding=1, groups=2)
        for _ in range(times):
            y = torch.cat([y[:, 3:], y[:, :3]], 1)
        return y

    result = cut_soundly(Between(rotated, w=torch.randn(8, 4, 3, 3)), IMAGE)
    assert len(result.plan.dead) == 2


class Wide(Between):
    """With something to cut before it."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(function)
        self.wide = nn.Conv2d(3, 16, 1)
        self.first = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 4, H, W)."""
        return super().forward(self.wide(x).relu())


class Counting(nn.Module):
    """Keeps a mean of what it has seen, in place, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.register_buffer("seen", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, 5, H - 2, W - 2)."""
        y = F.relu(self.first(x))
        self.calls += 1
        self.seen.mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3)))
        return self.last(y - self.seen[None, :, None, None])


def test_a_model_that_writes_into_buffers_comes_back_as_it_was() -> None:
    model = Counting().eval()
    result = surgery.shrink(model, IMAGE, surgery.recipe(channels=0.5))
    assert result.plan.dead
    for state in (model.state_dict(), result.model.state_dict()):
        assert int(state["calls"]) == 0
        assert not state["seen"].any()


def test_a_choice_by_a_constant_mask_has_a_size_and_one_by_values_is_refused() -> None:
    model = Wide(lambda m, y: y[:, torch.tensor([True, False] * 4)])
    model.last = nn.Conv2d(4, 4, 1)
    cut_soundly(model, IMAGE)
    with pytest.raises(UnsupportedModel, match=r"test_odd_calls\.py:\d+ returns a tensor whose size .*--submodule"):
        surgery.shrink(Kept(), IMAGE, surgery.recipe(macs=0.5))


class Kept(Between):
    """Gives only what is found."""

    def __init__(self) -> None:
        super().__init__(lambda m, y: y)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (as many as there are, 4)."""
        found = super().forward(x).permute(0, 2, 3, 1).reshape(-1, 4)
        return found[found[:, 0] > 0]


class Decoder(nn.Module):
    """Attention whose keys come from elsewhere: it takes its own weight apart."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.query = nn.Linear(6, 16), nn.Linear(6, 16)
        self.attention, self.last = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(N, T, 6) and (N, S, 6) → (N, S, 3)."""
        memory = self.memory(x)
        return self.last(self.attention(self.query(y), memory, memory, need_weights=False)[0])


def test_a_weight_that_is_taken_apart_is_not_computed() -> None:
    torch.manual_seed(0)
    model, inputs = Decoder().double().eval(), (torch.randn(2, 5, 6).double(), torch.randn(2, 4, 6).double())
    nn.init.normal_(model.attention.in_proj_bias)
    nn.init.normal_(model.attention.out_proj.bias)
    result = surgery.shrink(model, inputs, surgery.recipe(channels=0.5))
    assert not result.program.materialised
    assert result.model.state_dict()["attention.in_proj_weight"].shape[0] < 48
    assert judge(model, result.model, [inputs, tuple(torch.randn_like(x) for x in inputs)]).sound


GAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalised": lambda g: F.normalize(g, dim=0),
    "shares": lambda g: g / g.sum(),
    "centred": lambda g: g - g.mean(),
    "softmax": lambda g: g.softmax(0),
    "layer norm": lambda g: F.layer_norm(g, (8,)),
}


@pytest.mark.parametrize("name", GAINS)
def test_a_gain_computed_over_the_channels_keeps_its_dense_values(name: str) -> None:
    gain = GAINS[name]
    model = Between(lambda m, y: y * gain(m.g)[:, None, None], g=torch.rand(8) + 0.5)
    result = surgery.shrink(model.eval(), IMAGE, surgery.recipe(channels=0.6, inexact="never"))
    kept = result.model.state_dict()["g_computed"]
    assert set(kept.flatten().tolist()) < set(gain(model.g).tolist())


@pytest.mark.parametrize("seed", range(4))
def test_one_unit_that_is_left_may_be_dead_on_some_values(seed: int) -> None:
    class Darkest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x)).amin((2, 3)))

    torch.manual_seed(0)
    result = surgery.shrink(Darkest().eval(), IMAGE, surgery.recipe(channels=0.13, seed=seed))
    assert [len(units) for units in result.plan.dead.values()] == [7]
