"""The oracle can fail: faults planted in a finished cut are seen, by each of its two answers on its own.

`relabelled` and `numbers` switch off the other answer, so that neither is covered by the other.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Cutting, cut_model
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.core import well_conditioned
from surgery.errors import CheckFailed
from surgery.inputs import import_torchvision

aten = torch.ops.aten
oracle = importlib.import_module("surgery.cutting.verify")  # `surgery.check` is also the function of that name


class Small(nn.Module):
    """Something of everything that bakes in a size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(24, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12)
        self.one, self.two = nn.Linear(12 * 9, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).relu()
        y = torch.cat([y, self.b(y), y[:, :4], self.b(y)[:, 1::2]], 1)
        y = F.max_pool2d(self.c(y), 2).flatten(2).transpose(1, 2)  # (N, 9, 8)
        q, k, v = (f(y).reshape(-1, 9, 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 9 * 12)
        return self.two(self.one(y).relu())


def calls(graph: fx.GraphModule, op: Any) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.target is op]


def swap_concatenated(graph: fx.GraphModule) -> None:
    node = calls(graph, aten.cat.default)[0]
    first, second, *rest = node.args[0]
    node.update_arg(0, [second, first, *rest])


def shift_slice(graph: fx.GraphModule) -> None:
    node = next(n for n in calls(graph, aten.slice.Tensor) if n.args[1] == 1)
    node.update_arg(2, node.args[2] + 1)
    node.update_arg(3, node.args[3] + 1)


def shift_index(graph: fx.GraphModule) -> None:
    name = next(n for n, _ in graph.named_buffers() if n.startswith("_index_"))
    graph.register_buffer(name, (getattr(graph, name) + 1) % 4, persistent=False)


def swap_channels(graph: fx.GraphModule) -> None:
    permute_input(graph, calls(graph, aten.conv2d.default)[1], 2)


def stale_view(graph: fx.GraphModule) -> None:
    node = next(n for n in reversed(calls(graph, aten.reshape.default)) if len(n.args[1]) == 2)
    node.update_arg(1, [-1, 9 * 12])


def other_rows(graph: fx.GraphModule) -> None:
    node = calls(graph, aten.reshape.default)[0]
    size = list(node.args[1])
    size[2], size[3] = size[3], size[2]
    node.update_arg(1, size)


def default_scale(graph: fx.GraphModule) -> None:
    node = calls(graph, aten.scaled_dot_product_attention.default)[0]
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "scale"}
    node.args = node.args[:5]


def permute_input(graph: fx.GraphModule, node: fx.Node, count: int, axis: int = 1) -> None:
    """Reverse the first `count` channels that `node` reads."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    size = graph.get_parameter(str(node.args[1].target)).shape[1]
    assert size >= count
    order = torch.cat([torch.arange(count).flip(0), torch.arange(count, size)])
    graph.register_buffer("_planted", order, persistent=False)
    with graph.graph.inserting_before(node):
        index = graph.graph.get_attr("_planted")
        node.update_arg(0, graph.graph.call_function(aten.index_select.default, (source, axis, index)))


WIRING = [swap_concatenated, shift_slice, shift_index, swap_channels]
ONLY_NUMBERS = [default_scale]
DOES_NOT_RUN = [stale_view, other_rows]


def planted(cutting: Cutting, fault: Callable[[fx.GraphModule], None]) -> Cutting:
    graph = copy.deepcopy(cutting.compact.graph)
    fault(graph)
    graph.graph.lint()
    graph.recompile()
    return replace(cutting, compact=replace(cutting.compact, module=graph, graph=graph, kind="graph"))


@pytest.fixture(scope="module")
def small() -> Iterator[Cutting]:
    torch.manual_seed(0)
    model = Small().eval()
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    cutting = cut_model(model, torch.randn(2, 3, 8, 8))
    cutting.check()
    yield cutting


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "replay", lambda *_: 0)


@pytest.fixture
def relabelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_compare", lambda *_: (0.0, 1.0))


@pytest.mark.parametrize("fault", WIRING)
@pytest.mark.usefixtures("relabelled")
def test_label_replay_sees_wrong_wiring(small: Cutting, fault: Callable[[fx.GraphModule], None]) -> None:
    with pytest.raises(CheckFailed, match="label replay"):
        planted(small, fault).check()


@pytest.mark.parametrize("fault", WIRING + ONLY_NUMBERS)
@pytest.mark.usefixtures("numbers")
def test_numbers_see_wrong_wiring(small: Cutting, fault: Callable[[fx.GraphModule], None]) -> None:
    with pytest.raises(CheckFailed, match="well-conditioned"):
        planted(small, fault).check()


@pytest.mark.parametrize("fault", DOES_NOT_RUN)
def test_stale_sizes_are_seen(small: Cutting, fault: Callable[[fx.GraphModule], None]) -> None:
    with pytest.raises(CheckFailed):
        planted(small, fault).check()


@pytest.mark.parametrize("name", ["a.weight", "norm.running_var", "one.bias", "two.weight"])
def test_a_tensor_that_is_not_the_planned_slice_is_seen(small: Cutting, name: str) -> None:
    def swap(graph: fx.GraphModule) -> None:
        tensor = graph.state_dict()[name]
        tensor[..., [0, 1]] = tensor[..., [1, 0]].clone()

    def swap_rows(graph: fx.GraphModule) -> None:
        tensor = graph.state_dict()[name]
        tensor[[0, 1]] = tensor[[1, 0]].clone()
        tensor[0] += 1e-3

    for fault in (swap, swap_rows):
        with pytest.raises(CheckFailed, match="is not the slice") as error:
            planted(small, fault).check()
        assert name in str(error.value)


def test_a_missing_buffer_is_seen(small: Cutting) -> None:
    def forget(graph: fx.GraphModule) -> None:
        del graph.get_submodule("norm")._buffers["num_batches_tracked"]

    with pytest.raises(CheckFailed, match="num_batches_tracked"):
        planted(small, forget).check()


def test_a_wrong_attribute_of_the_users_class_is_seen() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.slope = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), 0.1

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.leaky_relu(self.a(x), self.slope))

    cutting = cut_model(Stack(), torch.randn(2, 3, 8, 8))
    assert cutting.compact.kind == "module"
    cutting.compact.module.slope = 0.2
    with pytest.raises(CheckFailed, match="well-conditioned"):
        cutting.check()


def test_an_output_that_does_not_vary_with_the_input_cannot_be_told() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(torch.zeros_like(x))) + 1

    with pytest.raises(CheckFailed, match="inconclusive"):
        cut_model(Constant(), torch.randn(2, 4)).check()


class Chaotic(nn.Module):
    """Blows the last bit of its hidden numbers up, by about `gain` to the power of the number of its gains."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 300), nn.Linear(300, 6)
        self.gains = nn.ParameterList(nn.Parameter(torch.full((6,), gain)) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        for gain in self.gains:
            y = torch.sin(gain * y)
        return y


def test_rounding_that_real_weights_amplify_is_told_from_a_wrong_cut() -> None:
    torch.manual_seed(0)
    cutting = cut_model(Chaotic(12.0).double(), torch.randn(2, 4, dtype=torch.float64))
    result = cutting.check()
    assert result.error_float64 <= 1e-10 < (result.error_real or 0.0)
    assert "rounding is amplified on the real weights" in result.notes[0]
    with torch.no_grad():
        cutting.compact.graph.b.weight[0, 0] += 1e-3
    wrong = replace(cutting, compact=replace(cutting.compact, module=cutting.compact.graph, kind="graph"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckFailed, match="the real weights"):
        patch.setattr(oracle, "_require_slices", lambda *_: None)
        wrong.check()


def test_weights_that_amplify_rounding_to_noise_are_not_passed() -> None:
    torch.manual_seed(0)
    with pytest.raises(CheckFailed, match="the real weights"):
        cut_model(Chaotic(100.0).double(), torch.randn(2, 4, dtype=torch.float64)).check()


def test_values_to_check_with_are_distinct_in_every_parameter() -> None:
    cutting = cut_model(Small().eval(), torch.randn(2, 3, 8, 8))  # a batch norm's scale is all ones
    values = well_conditioned(cutting.program)
    for name, _ in cutting.program.model.named_parameters():
        assert values[name].unique().numel() == values[name].numel(), name


def _vit(tv: Any) -> nn.Module:
    model: nn.Module = tv.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128
    )
    return model


MODELS: dict[str, tuple[Callable[[Any], nn.Module], int]] = {
    "convnext_tiny": (lambda tv: tv.models.convnext_tiny(weights=None), 32),
    "shufflenet_v2": (lambda tv: tv.models.shufflenet_v2_x0_5(weights=None), 32),
    "vit": (_vit, 32),
}


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.usefixtures("numbers")
def test_eight_permuted_channels_are_seen_by_numbers_on_default_random_weights(name: str) -> None:
    torch.manual_seed(0)
    build, size = MODELS[name]
    cutting = cut_model(build(import_torchvision()).eval(), torch.randn(2, 3, size, size))
    graph = cutting.compact.graph

    def permute(faulty: fx.GraphModule) -> None:
        op = aten.linear.default if name == "vit" else aten.conv2d.default
        dense_enough = [n for n in calls(faulty, op) if _inputs(faulty, n) >= 8 and n.args[6:7] in ((), (1,))]
        node = dense_enough[len(dense_enough) // 2]
        permute_input(faulty, node, 8, axis=len(node.args[0].meta["val"].shape) - 1 if name == "vit" else 1)

    for node in graph.graph.nodes:
        node.meta.setdefault("val", torch.empty(0, 0, 0))
    with pytest.raises(CheckFailed, match="well-conditioned"):
        planted(cutting, permute).check()


def _inputs(graph: fx.GraphModule, node: fx.Node) -> int:
    return int(graph.get_parameter(str(node.args[1].target)).shape[1])
