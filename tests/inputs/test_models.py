"""From what the user types to a module: names, the user's own files, exported programs, and what is wrong with them."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import random
import socket
import textwrap
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from surgery.errors import InvalidInput, UnsupportedModel
from surgery.inputs import import_torchvision, libraries
from surgery.inputs.models import check_runs, load_model

SMALL = {"input_shape": (1, 3, 32, 32)}
NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes=10, width=4):
            super().__init__()
            self.conv = nn.Conv2d(3, width, 3)
            self.fc = nn.Linear(width, num_classes)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)))

    def small():
        return Net().train(), torch.zeros(1, 3, 8, 8)

    def by_name():
        return Net(), {"x": torch.zeros(1, 3, 8, 8)}

    def fails():
        raise KeyError("no such thing")

    def wrong():
        return [1]

    def flat():
        return nn.Linear(5, 2)

    ready = Net()
"""


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(textwrap.dedent(NET))
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No name resolves, and no cache holds anything."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test at the first attempt to fetch anything."""
    api = import_torchvision().models._api

    def fetch(*args: Any, **kwargs: Any) -> Any:
        pytest.fail("something was downloaded")

    monkeypatch.setattr(api, "load_state_dict_from_url", fetch)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.setattr(libraries, "unreachable", fetch)
    monkeypatch.setattr(socket, "getaddrinfo", fetch)


# Libraries -----------------------------------------------------------------------------------------------------------


def test_auto_without_a_network_warns_once_and_is_random(no_network: None) -> None:
    loaded = load_model("resnet18", **SMALL)
    assert loaded.weights == "random"
    (warning,) = loaded.warnings
    assert "no pretrained weights for resnet18" in warning and "download.pytorch.org" in warning
    assert not loaded.module.training and loaded.name == "resnet18"


def test_auto_falls_back_when_the_download_breaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("connection reset")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(libraries, "unreachable", lambda url: None)
    monkeypatch.setattr(import_torchvision().models._api, "load_state_dict_from_url", broken)
    loaded = load_model("resnet18", **SMALL)
    assert loaded.weights == "random" and "connection reset" in loaded.warnings[0]


def test_auto_takes_the_librarys_weights_when_they_can_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = import_torchvision().models
    donor = models.resnet18(weights=None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(libraries, "unreachable", lambda url: None)
    monkeypatch.setattr(models._api, "load_state_dict_from_url", lambda *a, **k: donor.state_dict())
    loaded = load_model("resnet18")
    assert loaded.weights == "IMAGENET1K_V1 (torchvision)" and loaded.warnings == ()
    assert torch.equal(loaded.module.fc.weight, donor.fc.weight)
    assert loaded.example_inputs[0].shape == (1, 3, 224, 224)


def test_a_damaged_cache_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = import_torchvision().models.ResNet18_Weights.DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / Path(url).name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(InvalidInput, match=rf"{cached.name}; delete it"):
        load_model("resnet18", **SMALL)


@pytest.mark.parametrize("spec", ["resnet18", "googlenet", "fcn_resnet50", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_random_downloads_nothing(spec: str, no_downloads: None) -> None:
    loaded = load_model(spec, weights="random", input_shape=(1, 3, 64, 64))
    assert loaded.weights == "random" and loaded.warnings == ()


def test_random_is_the_same_for_the_same_seed_and_leaves_the_generators_alone() -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    one, two, other = (
        load_model("squeezenet1_1", weights="random", seed=s, input_shape=(1, 3, 64, 64)) for s in (3, 3, 4)
    )
    assert states() == before
    weights = [m.module.state_dict()["classifier.1.weight"] for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(one.example_inputs[0], two.example_inputs[0])


def test_a_detector_builds_and_gets_a_list_of_images() -> None:
    loaded = load_model("fasterrcnn_mobilenet_v3_large_320_fpn", weights="random")
    (images,) = loaded.example_inputs
    assert [image.shape for image in images] == [(3, 256, 256)]
    assert loaded.module.backbone(images[0][None])
    assert "--submodule" in loaded.notes[0]


def test_video_models_get_a_clip() -> None:
    source = libraries.torchvision_source("r3d_18")
    assert source.shape is not None
    assert source.shape(nn.Identity(), {}) == (1, 3, 16, 112, 112)


def test_timm_names(no_network: None) -> None:
    pytest.importorskip("timm")
    loaded = load_model("timm:resnet18", model_args={"in_chans": 1}, input_shape=(1, 1, 64, 64))
    assert loaded.weights == "random" and loaded.name == "timm_resnet18"
    assert "no pretrained weights for timm:resnet18" in loaded.warnings[0]


def test_timm_random_downloads_nothing(no_downloads: None) -> None:
    pytest.importorskip("timm")
    loaded = load_model("timm:mobilenetv3_small_050", weights="random")
    assert loaded.example_inputs[0].shape == (1, 3, 224, 224)


@pytest.mark.parametrize(("package", "said"), [("timm", r"model-surgery\[timm\]"), ("torchvision", "pip install")])
def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, package: str, said: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(InvalidInput, match=f"{package} is not installed.*{said}"):
        load_model("timm:resnet18" if package == "timm" else "resnet18")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnt18", "did you mean resnet18"),
        ("timm:resnt18", "did you mean timm:resnet18"),
        ("mobilenetv3_small_050", "did you mean timm:mobilenetv3_small_050"),
        ("weights.pth", "--weights weights.pth"),
        ("gone.pt2", "no such file"),
        ("gone.py:make", "no such file"),
        ("no.such.module:make", "cannot import no.such.module.*No module named 'no'"),
    ],
)
def test_unknown_names_get_near_ones(spec: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        load_model(spec)


def test_quantised_models_are_refused() -> None:
    names = libraries.torchvision_names()
    assert "resnet18" in names and not any("quantized" in name for name in names)
    with pytest.raises(UnsupportedModel, match="shrink the float model resnet18"):
        load_model("quantized_resnet18")


def test_bad_builder_arguments_and_shapes() -> None:
    with pytest.raises(InvalidInput, match=r"cannot build resnet18: .*wdth.*--model-arg"):
        load_model("resnet18", weights="random", model_args={"wdth": 2})
    with pytest.raises(InvalidInput, match=r"input 1x4x32x32 at .*resnet\.py:\d+: .*--input-shape"):
        load_model("resnet18", weights="random", input_shape=(1, 4, 32, 32))
    with pytest.raises(InvalidInput, match="positive"):
        load_model("resnet18", input_shape=(1, 3, 0, 32))


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_the_class_count_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    donor = import_torchvision().models.resnet18(weights=None, num_classes=7)
    torch.save({"state_dict": {f"module.{k}": v for k, v in donor.state_dict().items()}}, tmp_path / "r.pth")
    loaded = load_model("resnet18", weights=str(tmp_path / "r.pth"), **SMALL)
    assert loaded.module.fc.out_features == 7 and loaded.weights == "checkpoint r.pth"
    assert torch.equal(loaded.module.fc.weight, donor.fc.weight)


def test_a_segmentation_checkpoint_brings_its_auxiliary_head(tmp_path: Path) -> None:
    models = import_torchvision().models
    donor = models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=5)
    torch.save(donor.state_dict(), tmp_path / "l.pth")
    loaded = load_model("lraspp_mobilenet_v3_large", weights=str(tmp_path / "l.pth"), input_shape=(1, 3, 64, 64))
    assert loaded.module(loaded.example_inputs[0])["out"].shape[1] == 5
    donor = models.get_model("fcn_resnet50", weights=None, weights_backbone=None, aux_loss=True, num_classes=3)
    torch.save(donor.state_dict(), tmp_path / "f.pth")
    loaded = load_model("fcn_resnet50", weights=str(tmp_path / "f.pth"), input_shape=(1, 3, 64, 64))
    assert set(loaded.module(loaded.example_inputs[0])) == {"out", "aux"}


def test_a_contradicting_class_count_is_an_error(tmp_path: Path, net_file: Path) -> None:
    module = load_model(f"{net_file}:Net", model_args={"num_classes": 7}).module
    torch.save(module.state_dict(), tmp_path / "n.pth")
    assert load_model(f"{net_file}:Net", weights=str(tmp_path / "n.pth")).module.fc.out_features == 7
    with pytest.raises(InvalidInput, match=r"fc\.weight: expected \(9, 4\), found \(7, 4\)"):
        load_model(f"{net_file}:Net", weights=str(tmp_path / "n.pth"), model_args={"num_classes": 9})


def test_nan_weights_of_the_users_own_making(tmp_path: Path) -> None:
    path = tmp_path / "nan.py"
    path.write_text(
        "import torch\ndef make():\n    m = torch.nn.Conv2d(3, 3, 1)\n    m.bias.data[0] = float('nan')\n    return m\n"
    )
    with pytest.raises(InvalidInput, match="bias holds 1 NaN"):
        load_model(f"{path}:make")


# The user's own code -------------------------------------------------------------------------------------------------


def test_a_callable_of_a_file(net_file: Path) -> None:
    loaded = load_model(f"{net_file}:small")
    assert not loaded.module.training and loaded.name == "net_small"
    assert loaded.example_inputs[0].shape == (1, 3, 8, 8)
    again = pickle.loads(pickle.dumps(loaded.module))
    assert type(again) is type(loaded.module) and type(again).__name__ == "Net"


def test_other_things_a_file_may_hold(net_file: Path) -> None:
    assert load_model(f"{net_file}:by_name").example_kwargs["x"].shape == (1, 3, 8, 8)
    assert load_model(f"{net_file}:ready").example_inputs[0].shape == (1, 3, 224, 224)
    assert load_model(f"{net_file}:Net", model_args={"width": 6}).module.conv.out_channels == 6
    assert load_model(f"{net_file}:small", input_shape=(2, 3, 9, 9)).example_inputs[0].shape == (2, 3, 9, 9)


def test_a_callable_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, net_file: Path) -> None:
    (tmp_path / "mypackage_of_nets").mkdir()
    (tmp_path / "mypackage_of_nets" / "zoo.py").write_text(net_file.read_text())
    monkeypatch.chdir(tmp_path)
    assert load_model("mypackage_of_nets.zoo:small").name == "zoo_small"


def test_files_of_the_same_name_do_not_mix(tmp_path: Path) -> None:
    for folder, width in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper.py").write_text("")
        (tmp_path / folder / "net.py").write_text(f"import torch\ndef make(): return torch.nn.Conv2d(3, {width}, 1)\n")
    assert [load_model(f"{tmp_path / f / 'net.py'}:make").module.out_channels for f in "ab"] == [2, 3]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smal", "has no 'smal'; did you mean small"),
        ("zzz", "has no 'zzz'; it defines Net, small, by_name"),
        ("fails", r"fails failed at .*net\.py:\d+: KeyError: 'no such thing'"),
        ("wrong", "returned list; it must return an nn.Module"),
        ("flat", "Linear does not run on input 1x3x224x224.*--input-shape"),
        ("__name__", "is a str, not something that returns a module"),
    ],
)
def test_what_can_be_wrong_with_a_callable(net_file: Path, name: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        load_model(f"{net_file}:{name}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def make(:\n", r"bad\.py:1: "),
        ("import torch\n1 / 0\n", r"bad\.py:2: ZeroDivisionError"),
        ("import sys\nsys.exit('usage')\n", r"bad\.py:2: SystemExit: usage"),
        ("import surely_not_installed\n", r"bad\.py:1: ModuleNotFoundError.*surely_not_installed"),
    ],
)
def test_what_can_be_wrong_with_a_file(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(InvalidInput, match=said):
        load_model(f"{tmp_path / 'bad.py'}:make")


def test_a_file_without_a_callable_says_what_is_missing(net_file: Path) -> None:
    with pytest.raises(InvalidInput, match=r"net\.py:CALLABLE"):
        load_model(str(net_file))


def test_check_runs_names_the_users_line(net_file: Path) -> None:
    module = load_model(f"{net_file}:small").module
    with pytest.raises(InvalidInput, match=r"Net does not run on input 1x5x8x8 at .*net\.py:12: "):
        check_runs(module, (torch.zeros(1, 5, 8, 8),))
    check_runs(module, (), {"x": torch.zeros(1, 3, 8, 8)})


# Exported programs ---------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.conv(x).flatten(1)
        return {"out": torch.einsum("bc,bc->b", out, out) * y.shape[0], "size": out[:, : out.shape[1] // 2]}


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "my net.pt2"
    dynamic = {0: torch.export.Dim.DYNAMIC}
    inputs = (torch.ones(2, 3, 8, 8), torch.ones(2))
    torch.export.save(torch.export.export(Scaled().eval(), inputs, dynamic_shapes=(dynamic, dynamic)), path)
    return path


def rewritten(source: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """Copy an archive, each record as `change` returns it."""
    reader, target = PT2ArchiveReader(str(source)), source.with_name("crafted.pt2")
    with PT2ArchiveWriter(str(target)) as writer:
        for record in reader.get_file_names():
            if not record.startswith((".data", "byteorder")):
                writer.write_bytes(record, change(record, reader.read_bytes(record)))
    return target


def with_graph(source: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Copy an archive with its program's JSON edited."""

    def change(record: str, data: bytes) -> bytes:
        if not record.startswith("models/"):
            return data
        model = json.loads(data)
        edit(model)
        return json.dumps(model).encode()

    return rewritten(source, change)


class Marker:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


def test_a_plain_program_loads_without_trust(program: Path) -> None:
    loaded = load_model(str(program))
    assert loaded.name == "my_net" and loaded.weights == "of my net.pt2"
    images, factors = loaded.example_inputs
    assert images.shape == (2, 3, 8, 8)
    module = copy.deepcopy(loaded.module).train().eval()
    assert module(images[:1].repeat(5, 1, 1, 1), factors[:1].repeat(5))["out"].shape == (5,)
    assert set(module.state_dict()) == {"conv.weight", "conv.bias"}


def test_an_untouched_copy_still_loads(program: Path) -> None:
    assert load_model(str(rewritten(program, lambda record, data: data))).name == "crafted"


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_malicious_pickle_in_a_program_runs_nothing(program: Path, tmp_path: Path, writer: str) -> None:
    marker, payload = tmp_path / "ran", tmp_path / "payload"
    if writer == "torch":
        torch.save(((Marker(marker),), {}), payload)
    else:
        payload.write_bytes(pickle.dumps(((Marker(marker),), {})))
    crafted = rewritten(program, lambda r, d: payload.read_bytes() if r.startswith("data/sample_inputs") else d)
    with pytest.raises(InvalidInput, match=r"pickled payload \(data/sample_inputs.*nothing was loaded.*--trust"):
        load_model(str(crafted))
    assert not marker.exists()


def test_the_malicious_program_is_one(program: Path, tmp_path: Path) -> None:
    marker, payload = tmp_path / "ran", tmp_path / "payload"
    torch.save(((Marker(marker),), {}), payload)
    crafted = rewritten(program, lambda r, d: payload.read_bytes() if r.startswith("data/sample_inputs") else d)
    with pytest.raises(InvalidInput):  # what was pickled is no input, which is found out too late
        load_model(str(crafted), trust=True)
    assert marker.exists()


def test_the_malicious_symbol_is_one(program: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    def symbol(model: dict[str, Any]) -> None:
        size = model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]
        size["as_expr"]["expr_str"] = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    with pytest.raises(InvalidInput, match="cannot load exported program"):
        load_model(str(with_graph(program, symbol)), trust=True)
    assert marker.exists()


@pytest.mark.parametrize(("folder", "prefix"), [("weights", "weight_0"), ("constants", "opaque_obj_0")])
def test_pickled_weights_and_objects_run_nothing(program: Path, tmp_path: Path, folder: str, prefix: str) -> None:
    marker = tmp_path / "ran"

    def change(record: str, data: bytes) -> bytes:
        if record.endswith(f"model_{folder}_config.json"):
            config = json.loads(data)
            meta = {"path_name": prefix, "is_param": True, "use_pickle": True, "tensor_meta": None}
            config["config"]["conv.weight"] = meta
            return json.dumps(config).encode()
        return pickle.dumps(Marker(marker)) if record == f"data/{folder}/{prefix}" else data

    with pytest.raises(InvalidInput, match=rf"a pickled (payload|object) \(data/{folder}/{prefix}\)"):
        load_model(str(rewritten(program, change)))
    assert not marker.exists()


def test_code_in_a_programs_text_runs_nothing(program: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def operator(model: dict[str, Any]) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"

    def symbol(model: dict[str, Any]) -> None:
        sizes = model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = code

    def placeholder(model: dict[str, Any]) -> None:
        model["graph_module"]["graph"]["inputs"][0]["as_tensor"]["name"] = f"x={code}"

    def hidden(model: dict[str, Any]) -> None:
        values = model["graph_module"]["graph"]["tensor_values"]
        values["metadata"] = copy.deepcopy(values["x"])
        values["metadata"]["sizes"][0]["as_expr"]["expr_str"] = code

    def tree(model: dict[str, Any]) -> None:
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = signature["out_spec"].replace("out", f"x={code}")

    for edit in (operator, symbol, placeholder, hidden, tree):
        with pytest.raises(InvalidInput, match=r"text that is not plain data .*--trust"):
            load_model(str(with_graph(program, edit)))
        assert not marker.exists(), edit.__name__


class Checked(nn.Module):
    """Operators that torch.export adds checks for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[0] < 9)
        return x.to(torch.float64).sort(stable=True)[0]


def test_the_checks_that_torch_adds_to_a_program_are_allowed(tmp_path: Path) -> None:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(Checked(), (torch.ones(4, 3),), dynamic_shapes=dynamic)
    assert any("_assert" in str(node.target) for node in exported.graph.nodes)
    torch.export.save(exported, tmp_path / "checked.pt2")
    assert load_model(str(tmp_path / "checked.pt2")).name == "checked"


class Writes(nn.Module):
    """Writes its input into a new tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(4).copy_(x) + 1


def test_a_program_whose_operators_write_files_writes_none(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Writes(), (torch.ones(4),)), tmp_path / "plain.pt2")
    assert load_model(str(tmp_path / "plain.pt2")).name == "plain"
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious" * 2)

    def into_the_file(model: dict[str, Any]) -> None:
        node = model["graph_module"]["graph"]["nodes"][0]
        values = {"filename": {"as_string": str(victim)}, "shared": {"as_bool": True}, "size": {"as_int": 4}}
        node["target"] = "torch.ops.aten.from_file.default"
        node["inputs"] = [{"name": name, "arg": arg, "kind": 1} for name, arg in values.items()]

    crafted = with_graph(tmp_path / "plain.pt2", into_the_file)
    with pytest.raises(InvalidInput, match=r"the operator torch\.ops\.aten\.from_file\.default .*--trust"):
        load_model(str(crafted))
    assert victim.read_bytes() == b"precious" * 2
    load_model(str(crafted), trust=True).module(torch.ones(4))
    assert victim.read_bytes() != b"precious" * 2  # so that the file is known to be harmful


@pytest.mark.parametrize(
    "name",
    [
        "torchvision.nms.default",
        "image.read_file.default",
        "higher_order.cond",
        "aten._print.default",
        "mine.op.default",
        "aten.add.__init__",
        "aten.__class__.__call__",
    ],
)
def test_operators_that_may_do_more_than_compute_are_refused_by_name(program: Path, name: str) -> None:
    def edit(model: dict[str, Any]) -> None:
        model["graph_module"]["graph"]["nodes"][0]["target"] = f"torch.ops.{name}"

    with pytest.raises(InvalidInput, match=rf"the operator torch\.ops\.{name}"):
        load_model(str(with_graph(program, edit)))


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "swin_t"])
def test_programs_of_real_networks_load_without_trust(name: str, tmp_path: Path) -> None:
    model = getattr(import_torchvision().models, name)().eval()
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 224, 224),)), tmp_path / "net.pt2")
    assert load_model(str(tmp_path / "net.pt2")).name == "net"


def test_guards_in_a_program_are_never_executed(program: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    guard = f"__import__('pathlib').Path({str(marker)!r}).touch() is None"
    load_model(str(with_graph(program, lambda model: model["guards_code"].append(guard))))
    assert not marker.exists()


def test_truncated_and_foreign_programs(program: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.pt2"
    half.write_bytes(program.read_bytes()[:2000])
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt2")
    for path in (half, tmp_path / "other.pt2"):
        with pytest.raises(InvalidInput, match="not an exported program, or is truncated"):
            load_model(str(path))


def test_a_program_has_its_weights_and_takes_no_arguments(program: Path) -> None:
    with pytest.raises(InvalidInput, match="comes with its weights"):
        load_model(str(program), weights="random")
    with pytest.raises(InvalidInput, match="already built"):
        load_model(str(program), model_args={"width": 2})
    with pytest.raises(InvalidInput, match="takes 2 inputs"):
        load_model(str(program), input_shape=(1, 3, 8, 8))
