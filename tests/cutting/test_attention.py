"""Attention modules with other inner widths than torch's: the user's class stays, and computes what torch's does."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.cutting.attention import SlicedAttention

WIDTH, HEADS, TOKENS = 24, 4, 5


def as_sliced(module: nn.MultiheadAttention) -> SlicedAttention:
    """The same module with the forward of the sliced class, at full size."""
    made = SlicedAttention.__new__(SlicedAttention)
    made.__dict__.update(module.__dict__)
    made.value_dim, made.scale = module.head_dim, 1 / sqrt(module.head_dim)
    return made


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "causal": {"attn_mask": torch.ones(TOKENS, TOKENS).triu(1).bool()},
    "added": {"attn_mask": torch.randn(TOKENS, TOKENS)},
    "for each head": {"attn_mask": torch.randn(2 * HEADS, TOKENS, TOKENS)},
    "padding": {"key_padding_mask": torch.arange(TOKENS).expand(2, -1) > 2},
    "both": {
        "attn_mask": torch.ones(TOKENS, TOKENS).triu(1).bool(),
        "key_padding_mask": torch.arange(TOKENS).expand(2, -1) > 2,
    },
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [None, True, False])
def test_it_computes_what_torch_does(masks: str, batch_first: bool, weights: bool | None) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, kdim=10, vdim=7, batch_first=batch_first).eval()
    q, k, v = (torch.randn(2, TOKENS, size) for size in (WIDTH, 10, 7))
    given = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
    how: dict[str, Any] = {"need_weights": weights is not None, "average_attn_weights": bool(weights), **MASKS[masks]}
    wanted, shares = module(*given, **how)
    got, found = as_sliced(module)(*given, **how)
    torch.testing.assert_close(got, wanted)
    assert (found is None) == (shares is None)
    if shares is not None:
        torch.testing.assert_close(found, shares)


def test_it_takes_inputs_without_a_batch() -> None:
    module, x = nn.MultiheadAttention(WIDTH, HEADS, bias=False).eval(), torch.randn(TOKENS, WIDTH)
    for wanted, got in zip(module(x, x, x), as_sliced(module)(x, x, x), strict=True):
        torch.testing.assert_close(got, wanted)


class Encoder(nn.Module):
    """Image tokens through torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.stem(x).flatten(2).mT).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("keep", [("stem", "head"), ()], ids=["inner widths", "all widths"])
def test_the_users_class_stays_and_trains_as_the_program_does(keep: tuple[str, ...]) -> None:
    dense, x = Encoder().eval(), torch.randn(2, 3, 16, 16)
    result = surgery.shrink(dense, x, surgery.recipe(macs=0.6, recover="none", keep=keep))
    model, graph = result.model, result.compact.graph
    assert type(model) is Encoder and isinstance(model.layer.self_attn, nn.MultiheadAttention)
    assert type(model.layer.self_attn) is SlicedAttention and model.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(model(x), graph(x))
    grads = []
    for module in (model, graph):
        names, parameters = zip(*module.named_parameters(), strict=True)
        found = torch.autograd.grad(module.train()(x).square().sum(), parameters)
        grads.append(dict(zip(names, found, strict=True)))
    torch.testing.assert_close(grads[0], grads[1])
