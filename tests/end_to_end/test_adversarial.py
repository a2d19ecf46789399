"""Networks built to break the compiler: each is cut soundly, or left whole with a reason; never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Cutting, cut_model, sound
from torch import Tensor, nn

import surgery
from surgery.errors import CheckFailed, UnsupportedModel


class Net(nn.Module):
    """Layers by name, and a function that says how they are wired."""

    def __init__(self, wiring: Callable[[Any, Any], Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            elif isinstance(layer, Tensor):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.wiring = wiring

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


def conv(i: int, o: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **kwargs)


def three(wiring: Callable[[Any, Any], Any], middle: int = 8, **layers: Any) -> Net:
    """Two convolutions to 8 channels, one from `middle` channels, and what else the wiring needs."""
    return Net(wiring, a=conv(3, 8), b=conv(8, 8), z=conv(middle, 4), **layers)


def swapped(m: Any, x: Tensor) -> Any:
    left, right = m.a(x).chunk(2, 1)
    return m.z(torch.cat([right, left], 1))


def uneven(m: Any, x: Tensor) -> Any:
    one, two, rest = torch.split(m.a(x), [1, 2, 5], 1)
    return m.z(torch.cat([rest, one, two.relu()], 1))


def gated(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.z(y * torch.sigmoid(m.b(y).mean((2, 3), keepdim=True)))


def shuffled(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    n, c, h, w = y.shape
    return m.z(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def shuffled_back(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    n, c, h, w = y.shape
    y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    return m.z(y.view(n, c // 2, 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def in_place_view(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y[:, :4].mul_(2.0)
    return m.z(y)


def in_place_slice(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y[:, 2:5] = y[:, 2:5].relu()
    return m.z(y)


def grouped_after_flip(m: Any, x: Tensor) -> Any:
    return m.z(m.g(m.a(x).flip(1)))


def tokens(m: Any, x: Tensor) -> Any:
    y = m.a(x).flatten(2)
    return m.z((y + m.mix(y)).reshape(x.shape[0], 8, 6, 6))


def gram(m: Any, x: Tensor) -> Any:
    y = m.a(x).flatten(2)
    return m.z(((y @ y.transpose(1, 2)) @ m.b(m.a(x)).flatten(2)).reshape(x.shape[0], 8, 6, 6))


def dense_block(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y = torch.cat([y, m.b(y)], 1)
    return m.z(torch.cat([y, y.relu()], 1))


def pixel(m: Any, x: Tensor) -> Any:
    return m.z(F.pixel_shuffle(m.a(x), 2))


def weight_from_parameter(m: Any, x: Tensor) -> Any:
    return m.z(F.conv2d(m.a(x), m.raw, padding=1))


def standardised(m: Any, x: Tensor) -> Any:
    w = m.b.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    return m.z(F.conv2d(m.a(x), w, m.b.bias, padding=1))


def broadcast_channels(m: Any, x: Tensor) -> Any:
    return m.z(m.a(x) * m.one(x))


def outer_sum(m: Any, x: Tensor) -> Any:
    y, z = m.a(x).mean((2, 3)), m.b(m.a(x)).mean((2, 3))
    return m.line((y.unsqueeze(1) + z.unsqueeze(2)).flatten(1))


def merged_with_batch(m: Any, x: Tensor) -> Any:
    n, c, h, w = (y := m.a(x)).shape
    return m.z(F.conv2d(y.reshape(n * c, 1, h, w), m.k, padding=1).reshape(n, c, h, w))


def joined_on_batch(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.z(torch.cat([y, m.b(y)], 0))[: x.shape[0]]


def attention_by_hand(m: Any, x: Tensor) -> Any:
    y = m.a(x).flatten(2).transpose(1, 2)
    q, k, v = m.qkv(y).reshape(y.shape[0], 36, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
    return m.out((weights @ v).transpose(1, 2).reshape(y.shape[0], 36, 12))


def torch_attention(m: Any, x: Tensor) -> Any:
    y = m.a(x).flatten(2).transpose(1, 2)
    return m.out(m.attention(y, y, y)[0])


def windows(m: Any, x: Tensor) -> Any:
    n, c, h, w = (y := m.a(x)).shape
    y = m.line(y.view(n, c, 2, 3, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, c))
    y = y.reshape(n, 2, 2, 3, 3, 8).permute(0, 5, 1, 3, 2, 4).reshape(n, 8, h, w)
    return m.z(y.roll((1, 1), (2, 3)))


def split_attention(m: Any, x: Tensor) -> Any:
    n, c, h, w = (y := m.g(m.a(x))).shape
    y = y.view(n, 2, c // 2, h, w)
    gate = m.f(y.sum(1).mean((2, 3), keepdim=True)).view(n, 2, c // 2, 1, 1).softmax(1)
    return m.z((gate * y).sum(1))


def slices_added(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.z(sum(y[:, i : i + 2] for i in range(0, 8, 2)))


def half_the_weight(m: Any, x: Tensor) -> Any:
    return m.y(F.conv2d(x, m.a.weight[:4], padding=1)) + m.z(m.a(x))


def unused_layer(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    m.b(y)
    return m.z(y)


def asks_for_its_width(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.z(y / y.shape[1] if y.shape[1] == 8 else y)


def sliced_in_batch(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    rows = y.reshape(-1, 2, *y.shape[2:])[:, :, 1:-1]
    return m.z(F.pad(rows.reshape(-1, 8, y.shape[2] - 2, y.shape[3]), (0, 0, 1, 1)))


def halved_in_batch(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    rows = y.reshape(-1, 2, *y.shape[2:])
    half = y.shape[0] * 2
    return m.z(torch.cat([rows[:half], rows[half:]]).reshape(-1, 8, *y.shape[2:]))


def mixed_in_batch(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    n, _, h, w = y.shape
    return m.z(y.reshape(n * 4, 2, h, w).view(4, n, 2, h, w).transpose(0, 1).reshape(n, 8, h, w))


def sized_in_space(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    n, _, h, w = y.shape
    q = y.reshape(-1, 8, h * w)
    return m.z((q * q.sigmoid()).reshape(n, -1, h, w))


def in_place_on_the_input(m: Any, x: Tensor) -> Any:
    x.sub_(0.5).div_(0.25)
    return m.z(m.a(x).relu())


def counting(m: Any, x: Tensor) -> Any:
    m.n += 1
    return m.z(m.a(x))


def gate_of_two(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.z(y * F.glu(m.t(y), 1))


def gated_in_batch(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    n, _, h, w = y.shape
    q = y.reshape(n * 4, 2, h, w)
    return m.z((q * q.flatten(1).sum(1)[:, None, None, None]).reshape(n, 8, h, w))


def normed_in_batch(m: Any, x: Tensor) -> Any:
    y = m.g(m.a(x))
    n, _, h, w = y.shape
    return m.z(F.group_norm(y.reshape(n * 4, 2, h, w), 2).reshape(n, 8, h, w))


def halves_interleaved(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.z(torch.cat([y[:, ::2], y[:, 1::2]], 1) + y)


CUT = {
    "channels merged with the batch": three(merged_with_batch, k=nn.Parameter(torch.randn(1, 1, 3, 3))),
    "joined on the batch": three(joined_on_batch),
    "attention by hand": three(attention_by_hand, qkv=nn.Linear(8, 36), out=nn.Linear(12, 4)),
    "torch's attention": three(
        torch_attention, attention=nn.MultiheadAttention(8, 2, batch_first=True), out=nn.Linear(8, 4)
    ),
    "windows": three(windows, line=nn.Linear(8, 8)),
    "split attention": three(split_attention, 4, g=conv(8, 8, groups=2), f=nn.Conv2d(4, 8, 1)),
    "slices added": three(slices_added, 2),
    "half the weight": three(half_the_weight, y=conv(4, 4)),
    "unused layer": three(unused_layer),
    "asks for its width": three(asks_for_its_width),
    "halves interleaved": three(halves_interleaved),
    "circular padding": three(lambda m, x: m.z(F.pad(m.a(x), (1, 1, 1, 1), "circular"))),
    "centred": three(lambda m, x: m.z(m.a(x) - m.a(x).mean(1, keepdim=True))),
    "called twice": three(lambda m, x: m.z(m.b(m.b(m.a(x))))),
    "called twice on two widths of one input": three(lambda m, x: m.z(m.b(m.a(x)) + m.b(m.a(x.flip(3))))),
    "tied by flip": three(lambda m, x: m.z(m.a(x) + m.a(x).flip(1))),
    "tied by roll": three(lambda m, x: m.z(m.a(x) + m.b(m.a(x)).roll(2, 1))),
    "one tensor twice": three(lambda m, x: m.z(torch.cat([m.a(x), m.a(x)], 1)), 16),
    "same value concatenated": three(lambda m, x: (lambda y: m.z(torch.cat([y, y], 1)))(m.a(x)), 16),
    "dense block": three(dense_block, 32),
    "swapped chunks": three(swapped),
    "uneven pieces": three(uneven),
    "gate": three(gated),
    "shuffle": three(shuffled),
    "shuffle undone": three(shuffled_back),
    "group norm": three(lambda m, x: m.z(m.n(m.a(x))), n=nn.GroupNorm(4, 8)),
    "group norm of one group": three(lambda m, x: m.z(m.n(m.a(x))), n=nn.GroupNorm(1, 8)),
    "group norm of single channels": three(lambda m, x: m.z(m.n(m.a(x))), n=nn.GroupNorm(8, 8)),
    "group norm then grouped convolution": three(
        lambda m, x: m.z(m.g(m.n(m.a(x)))), n=nn.GroupNorm(4, 8), g=conv(8, 8, groups=2)
    ),
    "grouped after flip": three(grouped_after_flip, g=conv(8, 8, groups=4)),
    "depthwise multiplier": three(lambda m, x: m.z(m.g(m.a(x))), 16, g=conv(8, 16, groups=8)),
    "grouped twice, unlike": three(lambda m, x: m.z(m.h(m.g(m.a(x)))), g=conv(8, 8, groups=2), h=conv(8, 8, groups=4)),
    "stepped slice": three(lambda m, x: m.z(m.a(x)[:, 1::2]), 4),
    "two slices that overlap": three(lambda m, x: m.z(m.a(x)[:, :5] + m.a(x)[:, 3:]), 5),
    "all but the last": three(lambda m, x: m.z(m.a(x)[:, :-2]), 6),
    "from the end to the end": three(lambda m, x: m.z(m.a(x)[:, -5:-1]), 4),
    "negative slice": three(lambda m, x: m.z(m.a(x)[:, -3:]), 3),
    "expand": three(lambda m, x: m.z(m.a(x) + m.s.expand(-1, 8, -1, -1)), s=torch.ones(1, 1, 1, 1)),
    "mean over channels": three(lambda m, x: m.z(m.a(x) * m.a(x).mean(1, keepdim=True))),
    "tokens mixed": three(tokens, mix=nn.Linear(36, 36)),
    "gram matrix": three(gram),
    "buffer as scale": three(lambda m, x: m.z(m.a(x) * m.s), s=torch.rand(8, 1, 1) + 0.5),
    "raw parameter": three(weight_from_parameter, raw=nn.Parameter(torch.randn(8, 8, 3, 3))),
    "standardised weights": three(standardised),
    "broadcast over channels": three(broadcast_channels, one=conv(3, 1)),
    "outer sum": three(outer_sum, line=nn.Linear(64, 3)),
    "pixel shuffle": three(pixel, 2),
    "per-channel slopes": three(lambda m, x: m.z(m.p(m.a(x))), p=nn.PReLU(8)),
    "double padding of channels": three(lambda m, x: m.z(F.pad(F.pad(m.a(x), (0, 0, 0, 0, 1, 2)), [0] * 5 + [1])), 12),
    "padded shortcut": three(
        lambda m, x: m.z(m.w(x) + F.pad(m.a(x)[:, :, ::1], (0, 0, 0, 0, 2, 2))), 12, w=conv(3, 12)
    ),
    "transposed convolution": three(lambda m, x: m.z(m.t(m.a(x))), 6, t=nn.ConvTranspose2d(8, 6, 2, 2, groups=2)),
    "bilinear gate": three(
        lambda m, x: m.z(F.interpolate(m.a(x), scale_factor=2) * F.interpolate(m.b(m.a(x)), scale_factor=2))
    ),
    "maximum of branches": three(lambda m, x: m.z(torch.maximum(m.a(x), m.b(m.a(x))))),
    "batch norm without statistics": three(
        lambda m, x: m.z(m.n(m.a(x))), n=nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "max out of two halves": three(lambda m, x: m.z(torch.maximum(*m.a(x).chunk(2, 1))), 4),
    "gated linear unit": three(lambda m, x: m.z(F.glu(m.a(x), 1)), 4),
    "interleaved repeat": three(lambda m, x: m.z(m.a(x).repeat_interleave(2, 1)), 16),
    "index buffer": three(lambda m, x: m.z(m.a(x).index_select(1, m.i)), 5, i=torch.tensor([7, 0, 0, 3, 5])),
    "stacked": three(lambda m, x: m.z(torch.stack([m.a(x), m.b(m.a(x))], 2).flatten(1, 2)), 16),
    "stack and sum": three(lambda m, x: m.z(torch.stack([m.a(x), m.b(m.a(x))]).sum(0))),
    "unflattened": three(lambda m, x: m.z(m.a(x).unflatten(1, (4, 2)).flip(2).flatten(1, 2))),
    "layer norm over channels": three(
        lambda m, x: m.z(F.layer_norm(m.a(x).permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2))
    ),
    "affine layer norm over all": three(lambda m, x: m.z(m.n(m.a(x))), n=nn.LayerNorm((8, 6, 6))),
    "squeeze of a pooled map": three(
        lambda m, x: m.line(m.a(x).mean((2, 3), keepdim=True).squeeze()), line=nn.Linear(8, 3)
    ),
    "einsum": three(lambda m, x: m.z(torch.einsum("nchw,cd->ndhw", m.a(x), m.e)), 6, e=nn.Parameter(torch.randn(8, 6))),
    "einsum of three": three(
        lambda m, x: m.z(torch.einsum("nchw,ndhw,...d->nchw", m.a(x), m.b(m.a(x)), m.e)), e=nn.Parameter(torch.randn(8))
    ),
    "weight norm": three(lambda m, x: m.z(m.w(m.a(x))), w=nn.utils.parametrizations.weight_norm(conv(8, 8))),
    "spectral norm": three(lambda m, x: m.z(m.w(m.a(x))), w=nn.utils.parametrizations.spectral_norm(conv(8, 8))),
    "two weights of one parameter": three(
        lambda m, x: m.z(
            F.conv2d(m.a(x), m.r / m.r.norm(), padding=1) + F.conv2d(m.a(x), m.r.flip(0) - m.r.mean(), padding=1)
        ),
        r=nn.Parameter(torch.randn(8, 8, 3, 3)),
    ),
    "weight of a buffer": three(
        lambda m, x: m.z(F.conv2d(m.a(x), m.k / m.k.sum(), padding=1)), k=torch.rand(8, 8, 3, 3)
    ),
    "weight norm, called twice": three(
        lambda m, x: m.z(m.w(m.w(m.a(x)))), w=nn.utils.parametrizations.weight_norm(conv(8, 8))
    ),
    "concatenated rectifiers": three(lambda m, x: m.z(torch.cat([m.a(x).relu(), (-m.a(x)).relu()], 1)), 16),
    "indexed by a buffer": three(lambda m, x: m.z(m.a(x)[:, m.i]), 5, i=torch.tensor([7, 0, 0, 3, 5])),
    "constant of a literal width": three(lambda m, x: m.z(m.a(x) + torch.ones(1, 8, 1, 1))),
    "channels last, flattened": three(
        lambda m, x: m.line(m.a(x).permute(0, 2, 3, 1).flatten(1)), line=nn.Linear(288, 3)
    ),
    "pixels there and back": three(lambda m, x: m.z(F.pixel_unshuffle(F.pixel_shuffle(m.a(x), 2) * 2, 2))),
    "reshaped like another": three(lambda m, x: m.z(m.b(m.a(x)).flatten(2).reshape_as(m.a(x)) + m.a(x))),
    "uneven chunks swapped": three(lambda m, x: m.z(torch.cat(m.a(x).chunk(3, 1)[::-1], 1))),
    "in place on a view": three(in_place_view),
    "in place on a slice": three(in_place_slice),
    "sliced with heads in the batch": three(sliced_in_batch),
    "halved with heads in the batch": three(halved_in_batch),
    "in place on the input": three(in_place_on_the_input),
    "gate of two channels": three(gate_of_two, t=conv(8, 2)),
    "a literal width with free batch": three(sized_in_space),
    "gated with heads in the batch": three(gated_in_batch),
    "group norm with heads in the batch": three(normed_in_batch, g=conv(8, 8, groups=4)),
    "normalised over channels": three(lambda m, x: m.z(F.normalize(m.a(x), dim=1))),
    "largest of channels as a norm": three(lambda m, x: m.z(m.a(x) / m.a(x).norm(float("inf"), 1, keepdim=True))),
    "divided by a table of deviations": three(
        lambda m, x: m.z(m.a(x) / m.v.sqrt()[..., None]), v=nn.Buffer(torch.rand(8, 6) + 0.1)
    ),
    "scalar gate": three(lambda m, x: m.z(m.a(x) * m.alpha), alpha=nn.Parameter(torch.tensor([0.7]))),
}

WHOLE = {
    "product of channels": (three(lambda m, x: m.z(m.a(x) * m.a(x).prod(1, keepdim=True))), "a.weight"),
    "norm of negative order": (three(lambda m, x: m.z(m.a(x) / m.a(x).norm(-1.0, 1, keepdim=True))), "a.weight"),
    "picked by a list": (three(lambda m, x: m.z(m.a(x)[:, [3, 1, 1, 0]]), 4), "a.weight"),
    "residual into the input": (Net(lambda m, x: x + m.a(x), a=conv(3, 3)), "a.weight"),
    "softmax over channels": (three(lambda m, x: m.z(m.a(x).softmax(1))), "a.weight"),
    "sort of channels": (three(lambda m, x: m.z(m.a(x).sort(1)[0])), "a.weight"),
    "running sum of channels": (three(lambda m, x: m.z(m.a(x).cumsum(1))), "a.weight"),
    "single channels": (
        three(lambda m, x: m.z(torch.cat([m.a(x)[:, 3:4], m.a(x)[:, 0].unsqueeze(1)], 1)), 2),
        "a.weight",
    ),
    "local response norm": (three(lambda m, x: m.z(F.local_response_norm(m.a(x), 3))), "a.weight"),
    "pooling over channels": (three(lambda m, x: m.z(F.max_pool3d(m.a(x), (2, 1, 1))), 4), "a.weight"),
    "mask of the first channels": (
        three(lambda m, x: m.z(m.a(x) * (torch.arange(8) < 5).to(x.dtype).reshape(1, 8, 1, 1))),
        "a.weight",
    ),
    "fast Fourier transform": (three(lambda m, x: m.z(torch.fft.fft(m.a(x), dim=1).real)), "a.weight"),
}


@pytest.mark.parametrize("name", sorted(CUT))
def test_cut_soundly(name: str) -> None:
    cutting = sound(CUT[name], torch.randn(2, 3, 6, 6), plans=2)
    assert cutting.plan.dead, "nothing to cut"
    assert outputs_as_before(cutting)


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_left_whole_with_a_reason(name: str) -> None:
    model, tensor = WHOLE[name]
    cutting = sound(model, torch.randn(2, 3, 6, 6))
    assert not any(site.tensor == tensor and site.axis == 0 for g in cutting.coupling.groups for site in g.sites)
    assert [f.reason for f in cutting.coupling.frozen if f.tensor == tensor and f.axis == 0 and f.reason]


def test_slices_to_before_the_end_when_all_behind_it_is_gone() -> None:
    summed = three(lambda m, x: (lambda y: m.z(y * y[:, :-2].sum(1, keepdim=True)))(m.a(x)))
    cutting = cut_model(summed, torch.randn(2, 3, 6, 6), dead={"a.weight:0": [6, 7]})
    assert cutting.check().error_float64 <= 1e-10
    assert cutting.compact.module.a.weight.shape[0] == 6


@pytest.mark.parametrize(
    "mixed",
    [
        mixed_in_batch,
        lambda m, x: (mixed_in_batch(m, x), x.mean()),
        lambda m, x: m.z(m.a(x).reshape(-1, 2, 6, 6).roll(x.shape[0], 0).reshape(-1, 8, 6, 6)),
    ],
)
def test_heads_that_mix_with_the_batch_are_never_cut_wrong(mixed: Any) -> None:
    """Samples mix: what holds for the batch of two that is traced does not for three."""
    model, x = three(mixed), torch.randn(2, 3, 6, 6)
    with pytest.raises(CheckFailed, match="batch of 3"):
        surgery.shrink(model, x, surgery.recipe(macs=0.75))


def test_without_a_floating_output_nothing_is_shown() -> None:
    with pytest.raises(CheckFailed, match="no floating-point tensor"):
        surgery.shrink(three(lambda m, x: m.z(m.a(x)).argmax(1)), torch.randn(2, 3, 6, 6), surgery.recipe(macs=0.5))


def outputs_as_before(cutting: Cutting) -> bool:
    """The compact module takes the dense one's inputs at other batches, and returns tensors of the same shape."""
    for batch in (1, 3):
        x = torch.randn(batch, 3, 6, 6)
        with torch.no_grad():
            dense, compact = cutting.program.model.eval()(x), cutting.compact.module.eval()(x)
        if dense.shape != compact.shape:
            return False
    return True


class Shared(nn.Module):
    """An output layer whose weight is an inner layer's transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.middle = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(12, 12)
        self.middle.weight = nn.Parameter(torch.randn(12, 12))
        self.twin = nn.Linear(12, 12)
        self.twin.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.twin(self.middle(self.inner(x)).relu())
        return F.linear(self.outer(y), self.inner.weight)


def test_tied_weights_stay_tied() -> None:
    cutting = sound(Shared(), torch.randn(2, 6))
    module = cutting.compact.module
    assert module.twin.weight is module.middle.weight
    assert module.twin.weight.shape[0] < 12 or module.inner.weight.shape == (12, 6)


class ManyWays(nn.Module):
    """Several inputs, outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 8), conv(2, 8)
        self.low, self.high = conv(8, 4), conv(8, 6)

    def forward(self, x: Tensor, other: Tensor, *, scale: Tensor | None = None) -> dict[str, Any]:
        y = self.left(x) + self.right(other)
        if scale is not None:
            y = y * scale.reshape(-1, 1, 1, 1)
        return {"low": self.low(y), "both": (self.high(y.relu()), x)}


def test_several_inputs_and_outputs() -> None:
    inputs = (torch.randn(2, 3, 6, 6), torch.randn(2, 2, 6, 6))
    cutting = sound(ManyWays(), inputs, kwargs={"scale": torch.tensor([0.5, 2.0])})
    assert cutting.plan.dead
    out = cutting.compact.module(*inputs, scale=torch.tensor([1.0, 1.0]))
    assert set(out) == {"low", "both"}
    assert out["both"][0].shape == (2, 6, 6, 6)


def test_double_precision_model() -> None:
    cutting = sound(three(gated).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    result = cutting.check()
    assert result.error_real is not None
    assert result.error_real < 1e-10


@pytest.mark.parametrize("training", [True, False])
def test_mode_carries_over_and_the_dense_model_keeps_its_own(training: bool) -> None:
    model = three(lambda m, x: m.z(m.n(m.a(x))), n=nn.BatchNorm2d(8)).train(training)
    model.b.eval()
    cutting = sound(model, torch.randn(2, 3, 6, 6))
    assert model.training is training
    assert not model.b.training
    assert cutting.compact.module.training is training


def test_frozen_parameters_stay_frozen() -> None:
    model = three(lambda m, x: m.z(m.b(m.a(x))))
    model.a.requires_grad_(False)
    module = sound(model, torch.randn(2, 3, 6, 6)).compact.module
    assert not module.a.weight.requires_grad
    assert module.b.weight.requires_grad


def test_control_flow_on_data_is_refused() -> None:
    def branching(m: Any, x: Tensor) -> Any:
        return m.z(m.a(x)) if x.sum() > 0 else m.z(m.b(m.a(x)))

    with pytest.raises(UnsupportedModel, match=r"test_adversarial\.py"):
        cut_model(three(branching), torch.randn(2, 3, 6, 6))
