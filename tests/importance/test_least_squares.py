"""The fit: rows are what an operator reads, sums over batches are the whole, and the ridge is what the images allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from surgery.importance.contractions import convolution_rows, drawn, value_rows
from surgery.importance.least_squares import Moments, solve

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, padding=(2, 0), dilation=(1, 2)),
    nn.Conv2d(4, 6, (1, 4), padding="same", groups=2),
    nn.Conv2d(4, 8, 5, padding=2, groups=4),
    nn.Conv2d(4, 6, 1, stride=2),
    nn.Conv1d(4, 6, 3, padding="valid", dilation=2),
    nn.Conv3d(4, 6, (1, 2, 3), padding=1),
]


def rows_of(layer: nn.Module, x: Tensor, at: tuple[Tensor, ...] | None = None) -> Tensor:
    raw = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
    return convolution_rows(x, layer.weight.shape[2:], raw, int(layer.groups), at)  # type: ignore[arg-type, call-overload]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_rows_times_weights_are_the_convolution(layer: nn.Module) -> None:
    rank = layer.weight.dim() - 2  # type: ignore[operator, union-attr]
    x = torch.randn(2, 4, *(11, 9, 8)[:rank])
    wanted = layer(x)
    groups, outputs = int(layer.groups), 6 if wanted.shape[1] == 6 else 8  # type: ignore[call-overload]
    weight = layer.weight.reshape(groups, outputs // groups, -1)  # type: ignore[operator, union-attr]
    for at in (None, drawn(wanted.shape[2:], 5, torch.Generator().manual_seed(0))):
        found = torch.einsum("rgn,gon->rgo", rows_of(layer, x, at), weight)
        found = found + layer.bias.reshape(groups, -1)  # type: ignore[operator, union-attr]
        assert torch.allclose(found, value_rows(wanted, 1, groups, at), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5))
def test_sums_over_batches_give_what_all_rows_give(seed: int, groups: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, groups, inputs, generator=generator)
    true = torch.randn(groups, inputs, outputs, generator=generator)
    y = torch.einsum("rgn,gno->rgo", x, true) + 0.5
    folds = [Moments.none(groups, inputs, outputs) for _ in range(4)]
    for k, part in enumerate(torch.split(torch.arange(200), 30)):
        folds[k % 4].add(x[part], y[part])
    found = solve(folds, torch.zeros(groups, inputs + 1, outputs, dtype=torch.float64), shift=True)
    assert torch.allclose(found.weight[:, :-1].float(), true, atol=2e-3)
    assert torch.allclose(found.weight[:, -1].float(), torch.full((groups, outputs), 0.5), atol=2e-3)
    assert found.after < 1e-5 < found.before


def test_the_shift_stays_where_there_is_no_place_for_one() -> None:
    x = torch.randn(100, 1, 3)
    folds = [Moments.none(1, 3, 2) for _ in range(2)]
    for fold, part in zip(folds, torch.split(x, 50), strict=True):
        fold.add(part, part @ torch.ones(3, 2) + 7)
    prior = torch.zeros(1, 4, 2, dtype=torch.float64)
    assert not solve(folds, prior, shift=False).weight[:, -1].any()


def test_what_images_do_not_tell_stays_as_it_was() -> None:
    """With fewer rows than unknowns and targets that are noise, the fit stays near the weights that were there.

    Held-out rows are few as well, and now and then a wrong fit predicts them by chance.
    """
    far = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        folds = [Moments.none(1, 60, 1) for _ in range(4)]
        prior = torch.randn(1, 61, 1, generator=generator, dtype=torch.float64)
        for fold in folds:
            x = torch.randn(8, 1, 60, generator=generator)
            noise = 6 * torch.randn(8, 1, 1, generator=generator)
            fold.add(x, torch.einsum("rgn,gno->rgo", x.double(), prior[:, :-1]) + noise)
        found = solve(folds, prior, shift=True)
        far += found.ridge < 1 or float((found.weight - prior)[:, :-1].norm() / prior.norm()) > 0.5
    assert far <= 2


def test_moments_tell_mean_and_variance_of_what_weights_make() -> None:
    x = 3 + 2 * torch.randn(5000, 1, 4, generator=torch.Generator().manual_seed(0))
    moments = Moments.none(1, 4, 1)
    moments.add(x, x.sum(-1, keepdim=True))
    weight = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64).reshape(1, 4, 1)
    mean, variance = moments.moments_of(weight)
    made = torch.einsum("rgn,gno->rgo", x.double(), weight)
    assert float(mean) == pytest.approx(float(made.mean()), rel=1e-6)
    assert float(variance) == pytest.approx(float(made.var(correction=0)), rel=1e-6)
    assert float(moments.wanted_variance()) == pytest.approx(float(x.sum(-1).double().var(correction=0)), rel=1e-5)
