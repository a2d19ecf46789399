"""MACs and parameters: fvcore's figures, the same for a module and for its exported program."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.core.counting import count_by_operator, count_macs, count_params
from surgery.errors import InvalidInput, UnsupportedModel
from surgery.inputs import import_torchvision

torchvision = import_torchvision()


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def tiny_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=16, mlp_dim=24, num_classes=5
    )


def plain_fvcore(module: nn.Module, x: Tensor) -> int:
    analysis = FlopCountAnalysis(module.eval(), x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return int(analysis.total())


def exported(module: nn.Module, x: Tensor) -> nn.Module:
    return torch.export.export(module.eval(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_a_model_without_attention_counts_as_in_fvcore_and_so_does_its_exported_program(name: str) -> None:
    module, x = getattr(torchvision.models, name)(weights=None), torch.randn(2, 3, 64, 64)
    macs = count_macs(module, (x,))
    assert macs == plain_fvcore(module, x)
    assert macs == count_macs(exported(module, x), (x,))


def test_attention_is_counted_alike_in_the_module_and_in_its_exported_program() -> None:
    module, x = tiny_vit(), torch.randn(2, 3, 32, 32)
    eager, graph = count_by_operator(module, (x,)), count_by_operator(exported(module, x), (x,))
    tokens = 17
    assert eager["scaled_dot_product_attention"] == 2 * 2 * (2 * tokens * tokens * 16)  # layers x batch x two products
    assert eager["linear"] == 2 * 2 * tokens * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 16 * 5
    assert eager == graph


@pytest.mark.parametrize("need_weights", [True, False])
def test_both_ways_through_multihead_attention_count_the_same(need_weights: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    macs = count_macs(attention, (x, x, x), {"need_weights": need_weights})
    assert macs == 3 * 5 * 8 * 8 * 4 + 3 * 2 * (5 * 5 * 4) * 2


def test_attention_with_narrow_values_and_shared_keys() -> None:
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(1, 1, 7, 4), torch.randn(1, 1, 7, 6)
    assert count_macs(Apply(F.scaled_dot_product_attention), (q, k, v)) == 2 * 3 * 5 * 7 * (4 + 6)


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


@pytest.mark.parametrize(
    ("function", "inputs", "macs"),
    [
        (lambda x, w: F.conv2d(x, w, padding="same"), (r(2, 8, 6, 6), r(4, 8, 3, 3)), 2 * 36 * 4 * 8 * 9),
        (lambda x, w: F.conv2d(x, w, padding="same", groups=4), (r(2, 8, 6, 6), r(4, 2, 3, 3)), 2 * 36 * 4 * 2 * 9),
        (torch.baddbmm, (r(2, 5, 7), r(2, 5, 6), r(2, 6, 7)), 2 * 5 * 6 * 7),
        (torch.addbmm, (r(5, 7), r(2, 5, 6), r(2, 6, 7)), 2 * 5 * 6 * 7),
        (torch.matmul, (r(2, 5, 6), r(6)), 2 * 5 * 6),
        (torch.matmul, (r(2, 5, 6), r(2, 6, 7)), 2 * 5 * 6 * 7),
        (torch.mv, (r(5, 6), r(6)), 30),
        (torch.addmv, (r(5), r(5, 6), r(6)), 30),
        (torch.dot, (r(6), r(6)), 6),
        (torch.inner, (r(5, 6), r(4, 6)), 5 * 4 * 6),
        (lambda a, b: torch.tensordot(a, b, dims=([-1], [0])), (r(2, 5, 6), r(6, 7)), 2 * 5 * 6 * 7),
        (F.bilinear, (r(4, 6), r(4, 7), r(3, 6, 7)), 4 * 6 * 7 * 3 + 4 * 3 * 7),
        (lambda a, b: torch.einsum("bij,bjk->bik", a, b), (r(2, 5, 6), r(2, 6, 7)), 2 * 5 * 6 * 7),
        (lambda x: F.layer_norm(x, (6,)), (r(1, 1, 2, 3, 4, 6),), 144 * 4),
        (lambda x: F.avg_pool2d(x, 2), (r(1, 2, 4, 4),), 0),
    ],
)
def test_an_operator_has_its_multiply_adds(function: Callable[..., Any], inputs: tuple[Tensor, ...], macs: int) -> None:
    assert count_macs(Apply(function), inputs) == macs


def test_operators_of_decomposed_programs_count_like_the_originals() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(3), nn.LayerNorm(3)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    decomposed = torch.export.export(net, (x,)).run_decompositions().module()
    assert count_macs(decomposed, (x,)) == count_macs(net, (x,)) == plain_fvcore(net, x)


def test_programs_that_fill_in_place_can_be_counted() -> None:
    def net(x: Tensor) -> Tensor:
        mask = x.new_zeros(4, 4)
        mask[:2, :2] = 1.0
        mask[2:].zero_()
        return (x + mask) @ x

    x = torch.randn(4, 4)
    functional = torch.export.export(Apply(net), (x,)).run_decompositions({}).module()
    assert count_macs(functional, (x,)) == count_macs(Apply(net), (x,)) == 64


def test_per_sample_figures_do_not_depend_on_the_batch() -> None:
    module = torchvision.models.resnet18(weights=None)
    one, three = torch.randn(1, 3, 32, 32), torch.randn(3, 3, 32, 32)
    assert count_macs(module, (one,)) == count_macs(module, (three,), batch=3)


def test_outputs_may_be_dictionaries_and_arguments_plain_values() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, batch: dict[str, Tensor], twice: bool, *, scale: float) -> dict[str, Any]:
            y = self.conv(batch["image"])
            return {"out": y * scale + self.conv(batch["image"]) if twice else y * scale, "name": "net"}

    x = torch.randn(1, 3, 5, 5)
    once = count_macs(Net(), ({"image": x}, False), {"scale": 2.0})
    assert once == 9 * 4 * 27
    assert count_macs(Net(), ({"image": x}, True), {"scale": 2.0}) == 2 * once


def test_counting_leaves_the_module_as_it_was(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    module = torchvision.models.resnet18(weights=None).train()
    module.layer1.eval()
    module.fc.weight.requires_grad_(False)
    before, flags = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    with caplog.at_level(logging.DEBUG):
        count_macs(module, (torch.randn(2, 3, 32, 32),))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert [m.training for m in module.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert module.conv1.weight.requires_grad and not module.fc.weight.requires_grad
    assert torch.backends.mha.get_fastpath_enabled()
    assert not caplog.records and not recwarn.list


def test_a_forward_that_fails_is_reported_and_leaves_no_hooks() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 6))
    with pytest.raises(UnsupportedModel, match="cannot count the MACs of Sequential"):
        count_macs(module, (torch.randn(2, 3),))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_arguments_that_cannot_be_counted() -> None:
    with pytest.raises(InvalidInput, match="no tensor"):
        count_macs(nn.Identity(), (3,))


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    assert count_params(nn.Sequential(first, second)) == 40
    second.weight = first.weight
    assert count_params(nn.Sequential(first, second)) == 24
