"""Batch, height and width that may differ from call to call: where the report says so, the result is right there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import cut_model
from torch import Tensor, nn
from torch._subclasses import fake_impls
from torch.export import Dim

import exporters.onnx
import surgery
from surgery.capture import tracing
from surgery.capture.tracing import trace
from surgery.core.torch_speed import LongSizes, lean


class Net(nn.Module):
    """Two convolutions, something that looks at sizes between them, and a classifier over the mean."""

    def __init__(self, middle: Callable[[Tensor], Tensor], literal: bool = True) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 5)
        self.middle, self.literal = middle, literal

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 5); the literal width makes the result a graph."""
        y = torch.relu(self.one(x))
        y = y.view(-1, 16, y.shape[2], y.shape[3]) if self.literal else y
        z: Tensor = self.fc(torch.relu(self.two(self.middle(y))).mean((2, 3)))
        return z


def to_a_multiple(x: Tensor) -> Tensor:
    below, right = -x.shape[2] % 4, -x.shape[3] % 4
    return F.pad(x, (0, right, 0, below)) if below or right else x


def by_width(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2) * 3 if x.shape[-1] > 64 else x


def by_batch(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 4 else x


def by_single(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] == 1 else x


def of_one_size(x: Tensor) -> Tensor:
    return x.view(-1, 16, 28 * 28).mean(-1, keepdim=True).unsqueeze(-1) * x


def sides_swapped(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], 16, x.shape[3], x.shape[2])


def rolled_over_the_batch(x: Tensor) -> Tensor:
    return torch.roll(x, (3, -1), (1, 0))


def halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


PATHS = {
    "padded to a multiple": (to_a_multiple, (0,)),
    "branch on the width": (by_width, (0,)),
    "branch on the batch": (by_batch, ()),
    "branch on a batch of one": (by_single, ()),
    "literal area": (of_one_size, (0,)),
    "sides swapped": (sides_swapped, (0,)),
    "rolled": (rolled_over_the_batch, (0, 2, 3)),
    "pooled": (halved, (0, 2, 3)),
}


def masked_dense(cutting: Any) -> nn.Module:
    """The dense model without its dead channels' contributions, by nothing but their positions in the plan."""
    dense: nn.Module = cutting.program.model
    with torch.no_grad():
        for c in cutting.plan.cuts:
            dict(dense.named_parameters())[c.tensor].index_fill_(c.axis, torch.tensor(c.dead), 0.0)
    return dense


@pytest.mark.parametrize("name", PATHS)
def test_an_axis_is_dynamic_only_where_the_users_code_takes_one_path(name: str) -> None:
    middle, dynamic = PATHS[name]
    torch.manual_seed(0)
    cutting = cut_model(Net(middle).eval(), torch.randn(1, 3, 28, 28))
    assert cutting.program.inputs[0].dynamic == dynamic
    compact, dense = cutting.compact.module.eval(), masked_dense(cutting).eval()
    compared = 0
    for batch in (1, 2, 7) if 0 in dynamic else (1,):
        for height, width in ((28, 28), (14, 14), (29, 31), (56, 40), (80, 80)) if 2 in dynamic else ((28, 28),):
            x = torch.randn(batch, 3, height, width)
            with torch.no_grad():
                torch.testing.assert_close(compact(x), dense(x), rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared >= 1


def test_a_graph_refuses_the_sizes_it_was_not_traced_for() -> None:
    cutting = cut_model(Net(of_one_size).eval(), torch.randn(1, 3, 28, 28))
    assert cutting.compact.kind == "graph"
    with pytest.raises(ValueError, match="axis 2"):
        cutting.compact.module(torch.randn(1, 3, 56, 56))


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2)])
def test_even_adaptive_pools_are_exported_at_the_sizes_where_the_file_is_right(pool: nn.Module, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), pool, nn.Flatten(1), nn.Linear(32, 5)).eval()
    done = exporters.onnx.export(net, torch.randn(1, 3, 28, 28), tmp_path / "m.onnx", dynamic_axes={"input": (0, 2, 3)})
    assert done.dynamic["input"][0] == "batch"
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    sizes = [(28, 28)] if 2 not in done.dynamic["input"] else [(28, 28), (30, 41)]
    for height, width in sizes:
        x = torch.randn(3, 3, height, width)
        (found,) = session.run(None, {"input": x.numpy()})
        np.testing.assert_allclose(found, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_tracing_leaves_nothing_behind_in_the_users_caches() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.bias = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Parameter(torch.randn(4, 8))
            self.register_buffer("index", torch.tensor([1, 3, 0, 2, 1, 1, 0, 3]))
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias[self.index].mean(1)
            y: Tensor = self.two(self.one(x) * self.cache["bias"].reshape(1, 8, 1, 1))
            return y

    model, x = Cached().eval(), torch.randn(2, 3, 8, 8)
    trace(model, x)
    assert model.cache == {}
    with torch.no_grad():
        before = model(x)
    cutting = cut_model(model, x)
    cutting.check()
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
        assert cutting.compact.module.eval()(x).shape == before.shape


class _LiteralView(nn.Module):
    """A view whose literal width holds at one image size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 5), nn.Linear(8 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) to (N, 10); a larger image runs over into the batch."""
        y: Tensor = self.head(torch.max_pool2d(self.conv(x), 2).view(-1, 8 * 4))
        return y


def test_sizes_that_run_over_into_other_axes_are_fixed() -> None:
    cutting = cut_model(_LiteralView(), torch.randn(1, 1, 8, 8))
    cutting.check()
    assert cutting.program.inputs[0].dynamic == (0,)
    assert "fixed at 8 x 8" in cutting.program.notes[0]


class _PaddedToTheStride(nn.Module):
    """Strided convolutions that pad as TensorFlow does."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(3, 3, 3, stride=2) for _ in range(stages))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.stages:
            spare = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
            x = conv(F.pad(x, [spare[1] // 2, spare[1] - spare[1] // 2, spare[0] // 2, spare[0] - spare[0] // 2]))
        return x


def test_sizes_that_take_minutes_to_solve_for_are_given_up_early() -> None:
    sizes = {"x": {0: Dim.DYNAMIC, 2: Dim.AUTO, 3: Dim.AUTO}}
    with lean(), pytest.raises(LongSizes):
        torch.export.export(_PaddedToTheStride(7), (torch.randn(2, 3, 192, 192),), dynamic_shapes=sizes, strict=False)
    assert trace(_PaddedToTheStride(7).eval(), torch.randn(1, 3, 192, 192)).inputs[0].dynamic == (0,)


def test_an_attempt_at_dynamic_sizes_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 16, 16)
    assert trace(model, x).inputs[0].dynamic == (0, 2, 3)
    fixed = trace(model, x, fixed_size=True)
    assert fixed.inputs[0].dynamic == (0,) and any("16 x 16, in the ONNX files too: as asked" in n for n in fixed.notes)
    monkeypatch.setattr(tracing, "SPACE_CPU_S", 0.0)
    assert trace(model, x).inputs[0].dynamic == (0,)


IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "hardtanh_": lambda x: F.hardtanh(x, -0.2, 0.3, inplace=True),
    "hardswish_": lambda x: F.hardswish(x, inplace=True),
    "hardsigmoid_": lambda x: F.hardsigmoid(x, inplace=True),
    "relu_": lambda x: x.relu_(),
    "silu_": lambda x: F.silu(x, inplace=True),
    "leaky_relu_": lambda x: F.leaky_relu(x, 0.2, inplace=True),
    "gelu_": lambda x: torch.ops.aten.gelu_(x),
    "elu_": lambda x: F.elu(x, inplace=True),
    "mish_": lambda x: F.mish(x, inplace=True),
}


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "hardtanh": lambda x: F.hardtanh(x, -0.2, 0.3),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "elu": F.elu,
    "mish": F.mish,
    "batch norm": lambda x: F.batch_norm(x, torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16), eps=1e-3),
    "batch norm of tokens": lambda x: F.batch_norm(x.flatten(2), torch.zeros(16), torch.full((16,), 2.0)).view(x.shape),
    "relu of whole numbers": lambda x: x + torch.relu((4 * x).int()),
}


class Each(nn.Module):
    """Functions of the output of one convolution, each an output of its own."""

    def __init__(self, functions: dict[str, Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.functions = nn.Conv2d(3, 16, 3, padding=1), functions

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) to (N, 16, H, W) for each function."""
        y = self.one(x) - 0.1
        return {name.replace(" ", "_"): function(y) for name, function in self.functions.items()}


def in_both_orders(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x) + function(x.transpose(2, 3)).transpose(2, 3)


def in_place(write: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        seen = x * 1.0
        write(seen)
        write(seen[:, ::2].transpose(2, 3))  # through a view that is neither whole nor in order
        return seen + x

    return function


FUNCTIONS = {
    "plain": {name: in_both_orders(function) for name, function in PLAIN.items()},
    "in place": {name: in_place(write) for name, write in IN_PLACE.items()},
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_activations_and_norms_are_right_at_other_sizes(tmp_path: Path, kind: str) -> None:
    model, example = Each(FUNCTIONS[kind]).eval(), torch.randn(1, 3, 20, 24)
    assert kind == "plain" or trace(model, example).inputs[0].dynamic == (0, 2, 3)  # tokens are views of one size
    file = exporters.onnx.export(model, example, tmp_path / "net.onnx", dynamic_axes={"x": (0, 2, 3)})
    assert {axis for axes in file.dynamic.values() for axis in axes} >= {0, 2, 3}
    other = torch.randn(3, 3, 31, 17)
    session = onnxruntime.InferenceSession(file.path)
    found = dict(zip((x.name for x in session.get_outputs()), session.run(None, {"x": other.numpy()}), strict=True))
    wanted = model(other)
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values.detach().numpy(), atol=1e-5, err_msg=name)


def test_a_lean_capture_leaves_torch_as_it_was() -> None:
    operators = [getattr(torch.ops.aten, name).default for name in IN_PLACE]
    before, known = [dict(op.py_kernels) for op in operators], dict(fake_impls.get_fast_op_impls())
    with lean(), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert [op.py_kernels for op in operators] == before
    assert fake_impls.get_fast_op_impls() == known
    x = torch.randn(2, 3)
    with lean():
        assert torch.equal(F.hardtanh(x.clone(), -0.2, 0.3, inplace=True), x.clamp(-0.2, 0.3))


class _SplitStage(nn.Module):
    """A stage as in YOLO's: the halves of one convolution go different ways and meet again in a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 5, H, W)."""
        left, right = self.one(x).chunk(2, 1)
        y: Tensor = self.out(torch.cat([left, right, torch.relu(self.two(right.sigmoid() * left))], 1))
        return y


def test_pieces_of_a_chunk_stay_alike_so_that_the_users_class_goes_on_fitting() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        result = surgery.shrink(_SplitStage().eval(), torch.randn(1, 3, 12, 12), surgery.recipe(macs=0.5))
        assert result.kind == "module"
        assert result.model.one.out_channels % 2 == 0 and result.model.one.out_channels < 16


def test_a_plan_of_ours_leaves_something_of_every_piece() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.out = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = torch.relu(self.one(x)).chunk(3, 1)
            y: Tensor = self.out(torch.cat([c, a * 1.5, b], 1))
            return y

    for seed in range(4):
        torch.manual_seed(seed)
        result = surgery.shrink(Uneven().eval(), torch.randn(1, 3, 12, 12), surgery.recipe(channels=0.25))
        (dead,) = result.plan.dead.values()
        assert all(set(piece) - set(dead) for piece in (range(6), range(6, 12), range(12, 16)))
