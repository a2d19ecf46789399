"""Real architectures at small inputs: cut at random, checked, and compared with what the dense model was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from conftest import Cutting, apply_plan, cut_model, random_dead, tensors
from torch import Tensor, nn

import surgery
from surgery.capture.tracing import trace
from surgery.core.counting import count_macs, count_params
from surgery.coupling.cost import cost_functions
from surgery.coupling.coupler import couple
from surgery.errors import UnsupportedModel
from surgery.inputs import import_torchvision


def _tiny_vit(tv: Any) -> nn.Module:
    model: nn.Module = tv.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight)
    return model


def _tiny_resnext(tv: Any) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4, num_classes=10)


def _tiny_convnext(tv: Any) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 1)], layer_scale=1.0, num_classes=10)


BUILD: dict[str, tuple[Callable[[Any], nn.Module], int]] = {
    "resnet18": (lambda tv: tv.models.resnet18(num_classes=10), 32),
    "mobilenet_v3_small": (lambda tv: tv.models.mobilenet_v3_small(num_classes=10), 32),
    "shufflenet_v2": (lambda tv: tv.models.shufflenet_v2_x0_5(num_classes=10), 32),
    "squeezenet": (lambda tv: tv.models.squeezenet1_1(num_classes=10), 32),
    "vit": (_tiny_vit, 32),
    "convnext": (_tiny_convnext, 32),
    "resnext": (_tiny_resnext, 32),
}


@pytest.fixture(scope="module", params=sorted(BUILD))
def case(request: pytest.FixtureRequest) -> tuple[str, Cutting, nn.Module]:
    """Name, the cut model, and what the dense model was before."""
    torch.manual_seed(0)
    build, size = BUILD[request.param]
    dense = build(import_torchvision())
    settle_statistics(dense, size)
    dense.train()
    before = copy.deepcopy(dense)
    return request.param, cut_model(dense, torch.randn(1, 3, size, size)), before


def settle_statistics(model: nn.Module, size: int) -> None:
    """Batch norms that have seen something, so that their buffers differ from channel to channel."""
    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size))


def test_equals_the_masked_dense_model(case: tuple[str, Cutting, nn.Module]) -> None:
    _, cutting, _ = case
    result = cutting.check()
    assert result.error_float64 <= 1e-10
    assert result.replayed > 20
    assert len(cutting.plan.dead) == len(cutting.coupling.groups)


def test_the_dense_model_is_left_as_it_was(case: tuple[str, Cutting, nn.Module]) -> None:
    _, cutting, before = case
    after = cutting.program.model
    assert [m.training for m in after.modules()] == [m.training for m in before.modules()]
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    assert [p.requires_grad for p in after.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in after.parameters())
    assert vars(after).keys() == vars(before).keys()


def test_every_tensor_is_a_slice_of_the_dense_one(case: tuple[str, Cutting, nn.Module]) -> None:
    _, cutting, before = case
    dense, compact = before.state_dict(), cutting.compact.module.state_dict()
    assert list(dense) == list(compact) or set(dense) == set(compact)
    gone = {(c.tensor, c.axis): set(c.dead) for c in cutting.plan.cuts}
    for name, tensor in dense.items():
        for axis in range(tensor.dim()):
            alive = [k for k in range(tensor.shape[axis]) if k not in gone.get((name, axis), ())]
            tensor = tensor.index_select(axis, torch.tensor(alive))
        assert torch.equal(tensor, compact[name]), name


def test_macs_and_parameters_equal_fvcores(case: tuple[str, Cutting, nn.Module]) -> None:
    _, cutting, _ = case
    costs = cost_functions(cutting.program, cutting.coupling)
    inputs = cutting.program.example_args
    for dead, model in (({}, cutting.program.model), (cutting.plan.dead, cutting.compact.module)):
        assert costs["macs"](dead) == count_macs(model, inputs, batch=2)
        assert costs["params"](dead) == count_params(model)


def test_runs_at_batch_1_2_and_7(case: tuple[str, Cutting, nn.Module]) -> None:
    _, cutting, _ = case
    size = cutting.program.inputs[0].shape[-1]
    module = cutting.compact.module.eval()
    x = torch.randn(7, 3, size, size)
    with torch.no_grad():
        whole = module(x)
        for batch in (1, 2, 7):
            torch.testing.assert_close(module(x[:batch]), whole[:batch], rtol=1e-4, atol=1e-5)


def test_the_users_own_class_comes_back_where_its_forward_allows(case: tuple[str, Cutting, nn.Module]) -> None:
    name, cutting, before = case
    compact = cutting.compact
    if compact.kind == "module":
        assert type(compact.module) is type(before)
        for path, module in compact.module.named_modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.shape[0] == module.out_channels, path
                assert module.weight.shape[1] * module.groups == module.in_channels, path
            elif isinstance(module, nn.BatchNorm2d):
                assert module.num_features == module.running_mean.shape[0], path
            elif isinstance(module, nn.Linear):
                assert (module.out_features, module.in_features) == tuple(module.weight.shape), path
    else:
        assert name in ("shufflenet_v2", "vit")
        assert "new sizes" in compact.why


def test_mode_and_copies(case: tuple[str, Cutting, nn.Module]) -> None:
    _, cutting, _ = case
    compact = cutting.compact.module
    assert compact.training is False or cutting.program.model.training
    size = cutting.program.inputs[0].shape[-1]
    x = torch.randn(2, 3, size, size)
    twin = copy.deepcopy(compact).eval()
    with torch.no_grad():
        assert torch.equal(twin(x), compact.eval()(x))
        assert twin.double()(x.double()).dtype is torch.float64
    assert twin.state_dict().keys() == compact.state_dict().keys()


# -- what is cut in attention and in grouped convolutions -------------------------------------------------------------


def only(cutting_of: Callable[[Mapping[str, list[int]]], Cutting], dead: Mapping[str, list[int]]) -> Cutting:
    cutting = cutting_of(dead)
    cutting.check()
    return cutting


def test_heads_head_dimensions_and_mlp_widths_of_a_vit() -> None:
    torch.manual_seed(0)
    model = _tiny_vit(import_torchvision())
    x = torch.randn(1, 3, 32, 32)
    weight = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    program = trace(model, x)
    coupling = couple(program)
    groups = {g.name: g for g in coupling.groups}
    sizes = {n: (g.size, len(g.sites[0].index[0])) for n, g in groups.items() if n.startswith(weight)}
    heads = [n for n, (size, width) in sizes.items() if size == 4 and width % 16 == 0]
    inner = [n for n, (size, _) in sizes.items() if size == 16]
    wide = [n for n in groups if n.startswith("encoder.layers.encoder_layer_0.mlp.0.weight:0")]
    assert (len(heads), len(wide)) == (1, 1)
    assert inner
    for dead, change in (
        ({heads[0]: [1, 3]}, lambda s: s[f"{weight}"].shape[0] == 96),
        ({inner[0]: [0, 5, 6]}, lambda s: s[f"{weight}"].shape[0] < 192),
        ({wide[0]: list(range(40))}, lambda s: s["encoder.layers.encoder_layer_0.mlp.0.weight"].shape[0] == 88),
        ({heads[0]: [0], inner[0]: [2], wide[0]: [1]}, lambda s: s[f"{weight}"].shape[0] < 144),
    ):
        cutting = apply_plan(program, coupling, dead)
        assert cutting.check().error_float64 <= 1e-10
        assert change(cutting.compact.module.state_dict())


def test_whole_groups_and_widths_of_grouped_convolutions() -> None:
    torch.manual_seed(0)
    model = _tiny_resnext(import_torchvision())
    x = torch.randn(1, 3, 32, 32)
    program = trace(model, x)
    coupling = couple(program)
    whole = [g for g in coupling.groups if g.size == 32 and any(s.tensor == "layer1.0.conv2.weight" for s in g.sites)]
    assert len(whole) == 1
    cutting = apply_plan(program, coupling, {whole[0].name: list(range(0, 32, 2))})
    cutting.check()
    assert cutting.compact.kind == "module"
    layer = cutting.compact.module.layer1[0].conv2
    assert layer.groups == 16
    assert layer.in_channels == 64


def test_random_plans_leave_every_group_a_unit(case: tuple[str, Cutting, nn.Module]) -> None:
    _, cutting, _ = case
    dead = random_dead(cutting.coupling, 5)
    assert all(len(dead[g.name]) < g.size for g in cutting.coupling.groups)
    out: list[Tensor] = tensors(cutting.compact.module.eval()(*cutting.program.example_args))
    assert [t.shape for t in out] == [(2, 10)]


def test_first_layers_and_last_layers_say_what_freezes_them() -> None:
    program = cut_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), torch.randn(1, 3, 8, 8)).coupling
    reasons = {(f.tensor, f.axis): f.reason for f in program.frozen}
    assert reasons["0.weight", 1] == "network input" and reasons["1.weight", 0] == "network output"


class ReadsItsInput(nn.Module):
    """Attention whose code takes a size from its input and uses it for something else, as detectors do."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.each = heads, width // heads
        self.qkv, self.proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).view(n, self.heads, 3 * self.each, h * w).split([self.each] * 3, 2)
        mixed = v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)
        y: Tensor = self.proj(mixed.reshape(n, c, h, w))
        return x + y


def reads_its_input() -> nn.Module:
    wide = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), ReadsItsInput())
    return nn.Sequential(wide, nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 4, 1)).eval()


def test_own_class_keeps_whole_what_its_code_cannot_run_smaller() -> None:
    model, x = reads_its_input(), torch.randn(2, 3, 10, 10)
    assert surgery.shrink(model, x, surgery.recipe(macs=0.35)).kind == "graph"
    result = surgery.shrink(model, x, surgery.recipe(macs=0.6, own_class=True))
    assert result.kind == "module" and result.plan.settings["keep"] == ["0.3"]
    assert result.model.get_submodule("0.3").qkv.weight.shape == (48, 16, 1, 1)
    assert result.model.get_submodule("0.0").weight.shape[0] < 32
    again = surgery.apply(result.plan, reads_its_input(), x)
    assert type(again) is nn.Sequential


def test_own_class_that_holds_no_cut_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 16, 3), nn.Linear(16 * 64, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(self.one(x).view(-1, 1024))
            return y

    with pytest.raises(UnsupportedModel, match="own-class"):
        surgery.shrink(Fixed().eval(), torch.randn(2, 3, 10, 10), surgery.recipe(own_class=True, macs=0.5))


class Written(nn.Module):
    """Writes into slices, with a broadcast and by a mask, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 4, H - 4, W - 4)."""
        y = self.one(x)
        z = y.clone()
        z[:, :, 1:3] = y[:, :, 3:5]
        z[:, :, 4:6] = y[:, :, 6:7]
        z[z > 1] = 0.5
        out: Tensor = self.two(z)
        return out


def test_a_graph_with_writes_trains_like_the_masked_dense_model() -> None:
    torch.manual_seed(0)
    model, x, dead = Written(), torch.randn(2, 3, 12, 12), [1, 4, 6]
    cutting = cut_model(model, x, dead={"one.weight:0": dead})
    cutting.check()
    keep = [k for k in range(8) if k not in dead]
    graph = cutting.compact.graph
    with torch.no_grad():
        model.two.weight[:, dead] = 0
    for each in (model, graph):
        each.train()
        each(x).square().mean().backward()
    torch.testing.assert_close(graph.one.weight.grad, model.one.weight.grad[keep])
    torch.testing.assert_close(graph.two.weight.grad, model.two.weight.grad[:, keep])
