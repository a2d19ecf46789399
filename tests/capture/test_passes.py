"""The passes from the captured graph to the normalised one: their claims hold, and the graph computes the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.capture import passes
from surgery.capture.passes import PASSES, Nodes, normalise
from surgery.capture.tracing import _capture
from surgery.errors import UnsupportedModel


def normalised(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    """The model's graph, the claims of every pass verified after each."""
    captured, _ = _capture(model, (x,), {})
    return normalise(captured.exported, captured.graph, checked=True)


def overlapping(y: Tensor) -> Tensor:
    y[:, :4].mul_(2)
    y[:, 2:6].add_(1)
    return y


def view_written_twice(y: Tensor) -> Tensor:
    part = y[:, :4]
    part.mul_(2)
    part.add_(1)
    return y + 1


def older_view_read_later(y: Tensor) -> Tensor:
    part, other = y[:, :4], y[:, 2:]
    part.mul_(2)
    return y[:, 2:] * other


def both_read_later(y: Tensor) -> Tensor:
    part = y[:, :4]
    part.mul_(2)
    y[:, 0].add_(3)
    return y.sum((1, 2, 3)) + part.sum((1, 2, 3))


def blocks_of_a_constant(y: Tensor) -> Tensor:
    mask = torch.zeros(8, 8)
    for row in range(3):
        for column in range(3):
            mask[row : row + 2, column : column + 2] = row * 3 + column
    return y * mask[:, 1].reshape(1, 8, 1, 1)


def through_a_reshape(y: Tensor) -> Tensor:
    y.view(y.shape[0], 2, 4, *y.shape[2:])[:, 0].mul_(3)
    return y


def slice_of_a_slice(y: Tensor) -> Tensor:
    y[:, :4][:, 1:3].mul_(2)
    y[:, :4].relu_()
    return y


def slice_of_a_slice_written_before(y: Tensor) -> Tensor:
    part = y[:, :4]
    inner = part[:, 1:]
    part.mul_(2)
    inner.add_(1)
    return y


def what_the_write_returned(y: Tensor) -> Tensor:
    part = y[:, :4].mul_(2)
    part.add_(1)
    return y * 1


def halves_into_each_other(y: Tensor) -> Tensor:
    part = y[:, :4]
    part += y[:, 4:]
    y[:, 4:] -= part
    return y


def filled(y: Tensor) -> Tensor:
    y[:, 0].fill_(2.0)
    return y[:, 0] + y[:, 1]


WRITES = [
    overlapping, view_written_twice, older_view_read_later, both_read_later, blocks_of_a_constant, through_a_reshape,
    slice_of_a_slice, slice_of_a_slice_written_before, what_the_write_returned, halves_into_each_other, filled,
]  # fmt: skip


class Writes(nn.Module):
    """A convolution whose output is written to."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.write = nn.Conv2d(3, 8, 1), write

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to whatever the function makes of (N, 8, H, W)."""
        return self.write(self.conv(x).clone())


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_in_place_writes_become_plain_operators(write: Callable[[Tensor], Tensor]) -> None:
    model, x = Writes(write).eval(), torch.randn(2, 3, 8, 8)
    graph = normalised(model, x)
    schemas = [n.target._schema for n in graph.graph.nodes if hasattr(n.target, "_schema")]
    assert schemas and not any(schema.is_mutable for schema in schemas)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))


class Everything(nn.Module):
    """Something for each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1))
        self.mix = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("strides", torch.tensor([2.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 8, H, W)."""
        with torch.autocast("cpu", enabled=False):
            y = self.conv(x)
        y.relu_()
        torch._assert_async(y.isfinite().all())
        self.conv(x).sum()  # nobody reads it
        y = torch.einsum("nchw,cd->ndhw", y, self.mix).flatten(1).reshape_as(y)
        return torch.add(y, y, alpha=self.strides[1].item())


@pytest.mark.parametrize("run, kind", PASSES, ids=lambda f: f.__name__)
def test_each_pass_has_something_to_do(run: Callable[..., None], kind: Nodes) -> None:
    model, x = Everything().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(normalised(model, x)(x), model(x))
    captured, _ = _capture(model, (x,), {})
    assert list(kind(captured.graph)) or run is passes.validate_sizes


def test_a_pass_that_breaks_its_claim_or_an_earlier_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Everything().eval(), torch.randn(2, 3, 8, 8)
    idle = [((lambda graph: None) if run is passes.decompose else run, kind) for run, kind in PASSES]
    monkeypatch.setattr(passes, "PASSES", tuple(idle))
    with pytest.raises(AssertionError, match=r"composites are left: \[einsum, reshape_as\]"):
        normalised(model, x)

    def write_in_place(graph: torch.fx.GraphModule) -> None:
        node = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.add.Tensor)
        node.target = torch.ops.aten.add_.Tensor

    monkeypatch.setattr(passes, "PASSES", (*PASSES, (write_in_place, passes.regions)))
    with pytest.raises(AssertionError, match="after write_in_place: writes are left"):
        normalised(model, x)


class Region(nn.Module):
    """Part of forward inside autocast that is off, or without gradients."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 5)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 5)."""
        x = self.one(x)
        free = torch.no_grad() if self.kind in ("no_grad", "nested") else nullcontext()
        cast = nullcontext() if self.kind == "no_grad" else torch.autocast("cpu", enabled=self.kind == "on")
        with free, cast:
            x = self.two(torch.relu(x))
        y: Tensor = self.head(x.float().mean((2, 3)))
        return y


@pytest.mark.parametrize("kind", ["off", "no_grad", "nested"])
def test_regions_are_cut_like_the_rest(kind: str) -> None:
    result = surgery.shrink(Region(kind).eval(), torch.randn(2, 3, 12, 12), surgery.recipe(macs=0.5))
    assert result.kind == "module" and result.check.error_float64 <= 1e-10
    assert result.model.two.weight.shape[1] < 16


def test_autocast_in_forward_is_refused_with_its_line() -> None:
    with pytest.raises(UnsupportedModel, match=r"autocast.*test_passes\.py:\d+"):
        surgery.shrink(Region("on").eval(), torch.randn(2, 3, 12, 12))


class Conditional(nn.Module):
    """Another way for another value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 16, H - 4, W - 4)."""
        x = self.one(x)
        y: Tensor = torch.cond(x.sum() > 0, lambda y: self.two(y), lambda y: self.two(y) * 2, (x,))
        return y


def test_a_conditional_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"'cond' at .*; write forward without it"):
        surgery.shrink(Conditional().eval(), torch.randn(2, 3, 12, 12))
