"""ONNX export: what is written is named, clean and equal to the torch model, and nothing else is written."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import exporters.onnx as onnx_export
from exporters.onnx import ExportSettings, export
from exporters.parity import TOLERANCE, OutputParity, _magnitudes, _pool, parity
from exporters.signature import bind, name_outputs
from surgery.core import conditioned_copy, file_bytes
from surgery.errors import CheckFailed, InvalidInput, UnsupportedModel

IMAGE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class ConvNet(nn.Module):
    def __init__(self, *, zero_head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(image)))
        return self.head(self.drop(x.mean((2, 3))))


class DictOut(nn.Module):
    """Output keys that are also names inside the graph, and of an input."""

    def forward(self, relu: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.relu(x) + 2 * relu
        return {"add": torch.relu(y), "relu_1": y, "x": y * 2}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self,
        x: torch.Tensor,
        pair: tuple[torch.Tensor, dict[str, torch.Tensor]],
        times: int = 1,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x) + pair[0] * pair[1]["k"] * times
        return (y if mask is None else y * mask), x - pair[0]


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 3 * 12 * 12) * 2


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if y.sum() > 0:  # the user's line
            return y + 10
        return y - 10


class NoSuchOperator(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean(1)
        return torch.linalg.svd(means)[1]  # no operator in ONNX


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x)


def line_of(text: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"{__file__}:{next(n for n, line in enumerate(lines, 1) if text in line)}"


def run(path: Path, **inputs: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def shapes(values: Iterable[onnx.ValueInfoProto]) -> dict[str, list[int | str]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, onnx_export.ExportResult]:
    model = ConvNet().train()
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    return model, export(model, IMAGE, path, metadata={"plan": "abc123"})


def test_result_tells_what_was_written(plain):
    _, result = plain
    assert result.bytes == result.path.stat().st_size == file_bytes(result.path)
    assert result.opset == onnx_export.DEFAULT_OPSET == onnx.load(result.path).opset_import[0].version
    assert result.dynamic == {"image": {0: "batch"}}
    assert result.error <= TOLERANCE and result.notes == ()
    assert [p.name for p in result.path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_equals_torch_at_every_batch(plain, batch):
    model, result = plain
    image = torch.randn(batch, 3, 12, 12)
    expected = copy.deepcopy(model).eval()(image).detach().numpy()
    np.testing.assert_allclose(run(result.path, image=image)[0], expected, atol=1e-5)


def test_names_and_axes(plain):
    graph = onnx.load(plain[1].path).graph
    assert shapes(graph.input) == {"image": ["batch", 3, 12, 12]}
    assert shapes(graph.output) == {"output": ["batch", 5]}


def test_file_says_nothing_about_the_machine(plain):
    _, result = plain
    model = onnx.load(result.path)
    held = [
        *model.graph.node,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ]
    assert not any(item.metadata_props or item.doc_string for item in (*held, model.graph, *model.functions))
    assert {p.key: p.value for p in model.metadata_props}.keys() == {"example_shapes", "plan", "tool", "tool_version"}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", result.opset)]
    content = result.path.read_bytes()
    assert not [word for word in (b"pkg.torch", b"File ", b"site-packages", b".py", b"ConvNet") if word in content]


def test_no_unused_initialisers(plain):
    graph = onnx.load(plain[1].path).graph
    used = {name for node in graph.node for name in node.input}
    assert {i.name for i in graph.initializer} <= used


def test_same_model_gives_same_bytes_quietly_and_stays_untouched(plain, tmp_path, capfd, recwarn):
    model, result = plain
    before = copy.deepcopy(model.state_dict())
    again = export(model, IMAGE, tmp_path / "again.onnx", metadata={"plan": "abc123"})
    assert again.path.read_bytes() == result.path.read_bytes()
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert model.training and model.norm.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_dictionary_outputs_and_one_tensor_for_two_inputs(tmp_path):
    result = export(DictOut(), (IMAGE, IMAGE), tmp_path / "m.onnx")
    graph = onnx.load(result.path).graph
    assert [i.name for i in graph.input] == ["relu", "x"]
    assert [o.name for o in graph.output] == ["add", "relu_1", "output_x"]
    a, b = torch.randn(2, 2, 3, 12, 12)
    for got, expected in zip(run(result.path, relu=a, x=b), DictOut()(a, b).values(), strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_nested_and_keyword_inputs(tmp_path):
    a = torch.randn(1, 4)
    result = export(
        Nested(), (a, (a, {"k": a})), tmp_path / "m.onnx", example_kwargs={"mask": torch.ones(1, 4), "times": 3}
    )
    graph = onnx.load(result.path).graph
    assert shapes(graph.input) == {n: ["batch", 4] for n in ("x", "pair_0", "pair_1_k", "mask")}
    assert list(shapes(graph.output)) == ["output_0", "output_1"]
    assert result.error <= TOLERANCE


def test_height_and_width(tmp_path):
    result = export(ConvNet(), IMAGE, tmp_path / "m.onnx", dynamic_axes={"image": (0, 2, 3)})
    assert result.dynamic == {"image": {0: "batch", 2: "height", 3: "width"}}
    assert run(result.path, image=torch.randn(3, 3, 20, 9))[0].shape == (3, 5)


def test_exported_program_module_keeps_its_input_names(tmp_path):
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(ConvNet().eval(), (IMAGE.repeat(2, 1, 1, 1),), dynamic_shapes=dynamic)
    result = export(program.module(), IMAGE, tmp_path / "m.onnx")
    assert shapes(onnx.load(result.path).graph.input) == {"image": ["batch", 3, 12, 12]}


def test_fixed_batch_falls_back_to_static_and_says_so(tmp_path):
    result = export(FixedBatch(), IMAGE.repeat(2, 1, 1, 1), tmp_path / "m.onnx")
    assert result.dynamic == {"x": {}}
    assert "static" in result.notes[0] and "x" in result.notes[0]
    assert shapes(onnx.load(result.path).graph.input) == {"x": [2, 3, 12, 12]}


def test_blind_comparison_is_repeated_on_well_conditioned_values(tmp_path):
    result = export(ConvNet(zero_head=True).double(), IMAGE.double(), tmp_path / "m.onnx")
    assert result.error <= TOLERANCE
    assert "exported as float32 (the model is float64)" in result.notes
    assert any("does not vary with the input; parity shown on a copy" in note for note in result.notes)
    graph = onnx.load(result.path).graph
    assert {i.data_type for i in graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    head = next(onnx.numpy_helper.to_array(i) for i in graph.initializer if i.name == "head.weight")
    assert not head.any()  # the user's weights are in the file, not the copy's


def test_copy_that_is_blind_too_is_refused_and_the_previous_file_stays(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"previous")
    with pytest.raises(CheckFailed, match="inconclusive"):
        export(Constant(), IMAGE, path)
    assert path.read_bytes() == b"previous"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_wrong_file_is_caught_and_not_kept(tmp_path, monkeypatch):
    genuine = onnx_export.convert

    def faulty(*args, **kwargs):
        graph = genuine(*args, **kwargs)
        weight = graph.graph.initializers["head.weight"]
        swapped = weight.const_value.numpy()[:, [1, 0, 2, 3, 4, 5, 6, 7]].copy()
        weight.const_value = onnx_export.ir.tensor(swapped, name="head.weight")
        return graph

    monkeypatch.setattr(onnx_export, "convert", faulty)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"previous")
    with pytest.raises(CheckFailed, match="1e-04"):
        export(ConvNet(), IMAGE, path)
    assert path.read_bytes() == b"previous"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_control_flow_on_data_names_the_users_line(tmp_path, capfd):
    with pytest.raises(UnsupportedModel) as caught:
        export(Branch(), torch.randn(1, 6), tmp_path / "m.onnx")
    assert line_of("if y.sum() > 0:  # the user's line") in str(caught.value)
    assert "dynamo=False" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_control_flow_on_data_exports_one_path_by_torchscript(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(1, 6) * 3
    model = Branch()
    result = export(model, inputs, tmp_path / "m.onnx", ExportSettings(dynamo=False))
    assert result.dynamic == {"x": {0: "batch"}} and result.error <= TOLERANCE
    assert any("one path" in note for note in result.notes)
    np.testing.assert_allclose(run(result.path, x=inputs)[0], model(inputs).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
def test_missing_operator_names_the_users_line(tmp_path, capfd, dynamo):
    with pytest.raises(UnsupportedModel, match="svd") as caught:
        export(NoSuchOperator(), IMAGE, tmp_path / "m.onnx", ExportSettings(dynamo=dynamo), dynamic_axes={})
    assert line_of("# no operator in ONNX") in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_torchscript_has_the_same_names_and_clean_file(tmp_path):
    result = export(ConvNet(), IMAGE, tmp_path / "m.onnx", ExportSettings(dynamo=False))
    model = onnx.load(result.path)
    assert shapes(model.graph.input) == {"image": ["batch", 3, 12, 12]}
    assert shapes(model.graph.output) == {"output": ["batch", 5]}
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert result.error <= TOLERANCE


def test_torchscript_bakes_a_batch_in_and_falls_back_to_static(tmp_path):
    class Baked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * len(list(x))  # a Python number the tracer takes for a constant

    result = export(Baked(), IMAGE, tmp_path / "m.onnx", ExportSettings(dynamo=False))
    assert result.dynamic == {"x": {}} and "static" in result.notes[0]


def test_weights_above_the_limit_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_ONE_FILE_BYTES", 100)
    result = export(ConvNet(), IMAGE, tmp_path / "m.onnx", ExportSettings(dynamo=False))
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert result.bytes == file_bytes(result.path) == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert run(result.path, image=IMAGE)[0].shape == (1, 5)


def test_resnet18(tmp_path):
    from surgery.inputs import import_torchvision

    model = import_torchvision().models.resnet18(weights=None)
    result = export(model, torch.randn(1, 3, 64, 64), tmp_path / "m.onnx")
    assert result.error <= TOLERANCE and result.dynamic == {"x": {0: "batch"}}
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(result.path).graph.node}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "missing/m.onnx"}, "no folder"),
        ({"path": "."}, "is a folder"),
        ({"dynamic_axes": {"picture": (0,)}}, "'picture', which is no input; inputs: image"),
        ({"dynamic_axes": {"image": (4,)}}, "no axis 4"),
        ({"example_inputs": torch.randn(1, 5, 12, 12)}, "does not run on the example inputs at .*test_export_onnx.py"),
        ({"example_inputs": (IMAGE, IMAGE)}, "does not take the example inputs"),
        ({"example_inputs": 3}, "no tensor among"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    given = {"example_inputs": IMAGE, "path": "m.onnx", **change}
    path = tmp_path / given.pop("path")
    with pytest.raises(InvalidInput, match=message):
        export(ConvNet(), given.pop("example_inputs"), path, **given)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_set_out_of_range_is_refused():
    with pytest.raises(InvalidInput, match="opset 9 is out of range"):
        ExportSettings(opset=9)


def test_nan_weights_are_refused(tmp_path):
    model = ConvNet()
    model.conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidInput, match=r"conv\.weight holds 1 NaN"):
        export(model, IMAGE, tmp_path / "m.onnx")


def test_parity_alone_measures_a_wrong_model(plain):
    model, result = plain
    other = copy.deepcopy(model).eval()
    assert parity(result.path, *bind(other, IMAGE)).error <= TOLERANCE
    with torch.no_grad():
        other.conv.weight[[0, 1]] = other.conv.weight[[1, 0]]
    found = parity(result.path, *bind(other, IMAGE))
    assert found.error > 100 * TOLERANCE and found.batches == (1, 2, 7)


def compare(expected: np.ndarray, got: np.ndarray) -> OutputParity:
    return _pool([_magnitudes(expected, got)])


def test_comparison_ignores_what_all_outputs_share():
    inputs = np.linspace(-1, 1, 12).reshape(3, 4)
    found = compare(1e6 + inputs, 1e6 + 1.1 * inputs)
    assert found.error == pytest.approx(0.1 * np.abs(inputs).max() / np.abs(inputs - inputs.mean(0)).max())
    assert found.blind and found.difference < TOLERANCE


def test_comparison_wants_infinities_in_the_same_places():
    masked = np.array([[1.0, -np.inf], [2.0, -np.inf]])
    assert compare(masked, masked).error == 0
    assert compare(masked, np.array([[1.0, -1e9], [2.0, -1e9]])).error == np.inf


def test_twin_is_reproducible_distinct_and_leaves_the_model_alone():
    model = ConvNet(zero_head=True)
    first, second = conditioned_copy(model), conditioned_copy(model)
    for (name, value), (_, same) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(value, same), name
        if value.is_floating_point():
            assert value.unique().numel() == value.numel() and value.abs().min() > 0, name
    assert first.norm.running_var.min() >= 0.5 and not model.head.weight.any()


def test_twin_of_a_deep_network_varies_with_the_input():
    widths = [3, *[8] * 50]
    layers = [x for i, o in pairwise(widths) for x in (nn.Conv2d(i, o, 3, 1, 1), nn.BatchNorm2d(o), nn.ReLU())]
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = conditioned_copy(nn.Sequential(*layers).eval(), lambda model: model(images))(images)
    assert float((found - found.mean(0)).abs().max() / found.abs().max()) > 0.3


def test_names_of_outputs():
    t = torch.zeros(1)
    assert list(name_outputs(t)) == list(name_outputs((t,))) == ["output"]
    assert list(name_outputs((t, None, [t, t]))) == ["output_0", "output_2_0", "output_2_1"]
    assert list(name_outputs({"out": t, "aux": [t, t]}, taken=("out",))) == ["output_out", "aux_0", "aux_1"]


def test_names_of_variable_inputs():
    class Variable(nn.Module):
        def forward(self, first: torch.Tensor, *rest: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return first + sum(rest) * scale

    t = torch.zeros(1)
    assert list(bind(Variable(), (t, t, t), {"scale": t})[1]) == ["first", "rest_0", "rest_1", "scale"]


class Windows(nn.Module):
    """Attention over windows, whose tensors have another number of axes than torch's translation knows."""

    def __init__(self, leading: tuple[int, ...], mask: str) -> None:
        super().__init__()
        self.leading, self.mask, self.qkv = leading, mask, nn.Linear(8, 24)

    def forward(self, x):
        """(N, T, 8) to (N, *leading, T / prod(leading), 8)."""
        q, k, v = (t.reshape(t.shape[0], *self.leading, -1, 8) for t in self.qkv(x).chunk(3, -1))
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        mask = {"none": None, "bool": allowed, "float": allowed * 0.5}[self.mask]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_attention_over_any_number_of_axes(tmp_path, leading, mask):
    result = export(Windows(leading, mask).eval(), (torch.randn(1, 24, 8),), tmp_path / "windows.onnx")
    assert result.error <= TOLERANCE and result.notes == ()


class Offset(nn.Module):
    """What varies of its output is a hundredth of it or less: float32 keeps few digits of that."""

    def __init__(self, offset):
        super().__init__()
        self.one, self.two, self.offset = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 4, 3), offset

    def forward(self, x):
        return (self.offset + self.two(self.one(x).sigmoid())).mean((2, 3))


def test_rounding_is_measured_against_float64(tmp_path):
    torch.manual_seed(0)
    result = export(Offset(20.0).eval(), (torch.randn(1, 3, 12, 12),), tmp_path / "offset.onnx")
    assert result.error > TOLERANCE
    assert any("rounding" in note for note in result.notes)


def parities(*errors):
    return OutputParity(error=max(errors), varying=1.0, difference=max(errors), errors=errors)


def test_one_ill_conditioned_input_neither_fails_an_export_nor_excuses_the_others():
    own = parities(1e-6, 1e-6, 1e-6, 2e-3)
    assert parities(2e-6, 1e-6, 1e-5, 7e-4).is_rounding(own)
    assert not parities(2e-6, 1e-6, 2e-4, 7e-4).is_rounding(own)
    assert not parities(2e-6, 1e-6, 1e-6, 1e-1).is_rounding(own)
    assert not parities(2e-3, 1e-6, 1e-6, 2e-3).is_rounding(parities(2e-3, 1e-6, 1e-6, 2e-3)), (
        "half of them prove nothing"
    )
    assert not parities(1e-6, 1e-6, 1e-6, float("inf")).is_rounding(parities(1e-6, 1e-6, 1e-6, float("inf")))


class PaddedMaxima(nn.Module):
    """Zeros around numbers that are all below zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_pool2d(nn.functional.pad(-x.abs() - 1, (1, 1, 1, 1)), 3, stride=2)


@pytest.mark.parametrize("dynamo", [True, False])
def test_zeros_take_part_in_a_maximum(tmp_path, dynamo):
    result = export(PaddedMaxima(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", ExportSettings(dynamo=dynamo))
    assert result.error < 1e-5


def test_a_file_with_zeros_is_the_masked_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 5)
    model = nn.Sequential(*layers).eval()
    dense = export(model, IMAGE, tmp_path / "dense.onnx")
    dead = [1, 4, 6]
    zeros = [("0.weight", 0, dead), ("3.weight", 1, dead), ("not in the file", 0, [0])]
    masked = onnx_export.with_zeros(dense, tmp_path / "masked.onnx", zeros)
    with torch.no_grad():
        layers[3].weight[:, dead] = 0
    session = onnxruntime.InferenceSession(masked.path)
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGE.numpy()})
    np.testing.assert_allclose(found, model(IMAGE).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["model"] == "masked"
