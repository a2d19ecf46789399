"""Files in fewer bits: alone, and beside the float files that `surgery shrink` writes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import surgery
from exporters import onnx as exporter, quantize
from exporters.quantize import METHODS, Int8, to_fp16, to_int8
from exporters.session import OnnxModel
from surgery.cli import main
from surgery.delivery import saving
from surgery.errors import CheckFailed, InvalidInput
from surgery.recovery.evaluation import Agreement


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.conv2 = nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 24, 1)
        self.fc = nn.Linear(24, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv1(image)))
        x = torch.nn.functional.relu6(self.conv2(self.depthwise(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(20):  # norms that are worth folding
            model(torch.randn(8, 3, 12, 12) * 2 + 1)
        model.bn.weight.uniform_(0.5, 2)
        model.bn.bias.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def source(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "net.onnx"
    exporter.export(model, torch.randn(1, 3, 12, 12), path, metadata={"model": "compact"})
    return path


def images(count: int = 64, size: int = 12) -> list[dict[str, np.ndarray[Any, Any]]]:
    drawn = np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32) * 2 + 1
    return [{"image": part} for part in np.array_split(drawn, max(1, count // 16))] if count else []


def run(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = onnxruntime.InferenceSession(str(path)).run(None, {"image": x})[0]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_int8_computes_nearly_the_same_in_a_third_of_the_bytes(source: Path, tmp_path: Path, method: str) -> None:
    how = Int8(method, reduce_range=quantize.saturates())  # or sums of products would be cut off here
    made = to_int8(source, tmp_path / "net.int8.onnx", images(), how)
    assert made.layers == (4, 4)
    assert made.bytes == made.path.stat().st_size
    assert made.cosine > 0.99
    fresh = np.random.default_rng(1).standard_normal((32, 3, 12, 12)).astype(np.float32) * 2 + 1
    wanted, found = run(source, fresh), run(made.path, fresh)
    assert np.abs(found - wanted).max() < 0.15 * np.abs(wanted - wanted.mean(0)).max()
    assert np.abs(found - wanted).max() > 0  # it is another file


def test_norms_are_folded_weights_are_signed_by_channel_and_the_metadata_stays(source: Path, tmp_path: Path) -> None:
    graph = onnx.load(to_int8(source, tmp_path / "a.onnx", images()).path)
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    weights = [x for x in graph.graph.initializer if x.data_type == onnx.TensorProto.INT8 and len(x.dims) == 4]
    assert len(weights) == 3
    scales = {x.name: onnx.numpy_helper.to_array(x) for x in graph.graph.initializer if x.name.endswith("_scale")}
    assert max(scale.size for scale in scales.values()) == 24
    told = {p.key: p.value for p in graph.metadata_props}
    assert (told["model"], told["precision"]) == ("compact", "int8")


def test_the_same_images_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first, second = (to_int8(source, tmp_path / f"{k}.onnx", images()).path.read_bytes() for k in "ab")
    assert first == second


@pytest.mark.parametrize(("keep", "left"), [(("first",), 3), (("first", "last"), 2), (("Conv",), 1), (("node_*",), 0)])
def test_layers_can_stay_in_float(source: Path, tmp_path: Path, keep: tuple[str, ...], left: int) -> None:
    assert to_int8(source, tmp_path / "a.onnx", images(), Int8(keep=keep)).layers == (left, 4)


def test_seven_bits_where_sums_saturate(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "saturates", lambda: True)
    eight = to_int8(source, tmp_path / "8.onnx", images())
    seven = to_int8(source, tmp_path / "7.onnx", images(), Int8(reduce_range=True))
    assert any("VNNI" in note for note in eight.notes)
    assert not seven.notes
    largest = {
        name: max(
            int(np.abs(onnx.numpy_helper.to_array(x).astype(int)).max())
            for x in onnx.load(made.path).graph.initializer
            if x.data_type == onnx.TensorProto.INT8 and len(x.dims) == 4
        )
        for name, made in (("8", eight), ("7", seven))
    }
    assert largest["7"] <= 64 < largest["8"] <= 127


def test_fp16_halves_the_bytes_and_keeps_its_interface(source: Path, tmp_path: Path) -> None:
    made = to_fp16(source, tmp_path / "net.fp16.onnx", images(8))
    assert made.cosine > 0.999
    graph = onnx.load(made.path).graph
    assert graph.input[0].type.tensor_type.elem_type == graph.output[0].type.tensor_type.elem_type == 1
    assert made.bytes < source.stat().st_size


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_batches_may_be_of_several_sizes(source: Path, tmp_path: Path, method: str) -> None:
    (whole,) = images(21)
    several = [{key: x[a:b] for key, x in whole.items()} for a, b in ((0, 8), (8, 16), (16, 21))]
    how = Int8(method, reduce_range=quantize.saturates())
    made = to_int8(source, tmp_path / "several.onnx", several, how)
    together = to_int8(source, tmp_path / "whole.onnx", [whole], how)
    assert made.cosine > 0.99
    assert abs(made.cosine - together.cosine) < 0.005


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, t: to_int8(s, t, images(0)), r"calibrate on \(0\)"),
        (lambda s, t: to_int8(s, t, images(5)), r"calibrate on \(5\); give 8 or more"),
        (lambda s, t: to_int8(s, t, [{"pixels": images()[0]["image"]}]), "takes image; a batch of images has pixels"),
        (lambda s, t: to_int8(s, t, [{"image": images()[0]["image"][:, :2]}]), "does not take these images"),
        (lambda s, t: to_int8(s.with_name("no.onnx"), t, images()), "cannot load"),
        (lambda s, t: to_int8(s, t.parent / "no" / "a.onnx", images()), "cannot write"),
        (lambda s, t: to_int8(s, t, images(), Int8(keep=("conv9",))), "'conv9' names no layer"),
        (lambda s, t: Int8("mean"), "there are minmax, entropy, percentile"),
    ],
)
def test_what_cannot_be_quantised_is_said_and_nothing_is_replaced(
    source: Path, tmp_path: Path, call: Callable[[Path, Path], Any], said: str
) -> None:
    target = tmp_path / "a.onnx"
    target.write_bytes(b"before")
    with pytest.raises(InvalidInput, match=said):
        call(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert target.read_bytes() == b"before"


def test_a_file_of_which_nothing_is_left_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: the quantiser writes other weights."""
    real = quantize._quantise

    def wrong(folded: Path, file: Path, *rest: Any) -> None:
        real(folded, file, *rest)
        model = onnx.load(file)
        for x in model.graph.initializer:
            if x.data_type == onnx.TensorProto.INT8 and len(x.dims) == 2:
                x.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(x), x.name))
        onnx.save(model, file)

    monkeypatch.setattr(quantize, "_quantise", wrong)
    with pytest.raises(CheckFailed, match="its output is unrelated to the float file's"):
        to_int8(source, tmp_path / "a.onnx", images())
    assert not list(tmp_path.iterdir())


def test_a_file_with_a_fixed_batch_is_judged_on_any_number_of_images(model: nn.Module, tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.onnx"
    exporter.export(model, torch.randn(4, 3, 12, 12), fixed, dynamic_axes={})
    x = torch.from_numpy(images(10)[0]["image"])
    with torch.no_grad():
        assert torch.allclose(OnnxModel(fixed)(x), model(x), atol=1e-4)
    assert [len(piece["image"]) for piece in OnnxModel(fixed).pieces({"image": x})] == [4, 4]


# From the command line. ----------------------------------------------------------------------------------------------

Shrink = Callable[..., tuple[int, str, str]]

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)), torch.zeros(1, 3, 16, 16)

def data():
    torch.manual_seed(1)
    return [torch.randn(32, 3, 16, 16)]

def few():
    return [torch.randn(4, 3, 16, 16)]
"""


@pytest.fixture
def shrink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shrink]:
    """Run `surgery shrink` on a network of NETS in this process; returns its exit code and what it printed."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["shrink", "nets.py:net", "--macs", "0.6", "--runs", "3", "--quiet", *arguments])
        return (code, *capsys.readouterr())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_all_files_are_written_timed_and_judged(shrink: Shrink, tmp_path: Path) -> None:
    arguments = ("--data", "nets.py:data", "--precision", "fp32,fp16,int8", "--int8-keep", "last", "--json")
    arguments = (*arguments, "--format", "onnx,ort", "--min-ort", "1.16")
    code, printed, complaint = shrink(*arguments, "--out", "out")
    assert code == 0, complaint
    data = json.loads(printed)
    rows = {row["name"]: row for row in data["models"]}
    fewer = ["dense fp16", "compact fp16", "dense int8", "compact int8"]
    assert list(rows) == ["dense", "masked", "compact", *fewer]
    assert [row["name"] for row in data["timing"]["rows"]] == list(rows)
    assert {rows[name]["precision"] for name in fewer} == {"fp16", "int8"}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name.replace(" ", ".") + ".onnx" for name in fewer} <= files
    assert rows["compact int8"]["onnx_bytes"] == (tmp_path / "out" / "compact.int8.onnx").stat().st_size
    assert set(data["files"]) >= {"dense.int8.onnx", "compact.fp16.onnx"}
    assert rows["dense"]["agreement"]["top1_match"] == 1.0
    assert all(0.5 < rows[name]["agreement"]["cosine"] <= 1.0001 for name in (*fewer, "compact"))
    assert any("compact int8: 2 of 3 layers are in 8 bits" in note for note in data["notes"])
    assert "dominated by" in (tmp_path / "out" / "report.md").read_text() or not any(
        row["dominated_by"] for row in rows.values()
    )
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    assert not (tmp_path / "out" / "compact.fp16.ort").exists()
    for name in ("compact", "compact.int8"):
        model = onnx.load(tmp_path / "out" / f"{name}.onnx")
        assert (model.ir_version, model.opset_import[0].version) == (9, 19)
        own, ort = (onnxruntime.InferenceSession(str(tmp_path / "out" / f"{name}.{end}")) for end in ("onnx", "ort"))
        given = {own.get_inputs()[0].name: x}
        assert np.allclose(own.run(None, given)[0], ort.run(None, given)[0], atol=1e-4)
    assert shrink(*arguments, "--out", "again")[0] == 0
    for name in ("dense.onnx", "compact.onnx", "dense.int8.onnx", "compact.int8.onnx", "compact.fp16.onnx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--precision", "int8"), "needs images to calibrate on: give them with --data"),
        (("--precision", "int4", "--data", "nets.py:data"), "'int4' is not accepted; give some of fp32, fp16, int8"),
        (("--format", "tflite"), "format 'tflite' is not accepted; give some of onnx, ort"),
        (("--min-ort", "0.9"), "older than 1.14"),
        (("--precision", "int8", "--data", "nets.py:few", "--recover", "none"), "calibrate int8 files on (4)"),
        (("--precision", "int8", "--data", "nets.py:data", "--int8-keep", "nothing"), "names no layer"),
    ],
)
def test_mistakes_leave_nothing_behind(shrink: Shrink, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    code, _, complaint = shrink(*arguments, "--out", "out")
    assert code == 2, complaint
    assert said in complaint
    assert "Traceback" not in complaint
    assert not (tmp_path / "out").exists()


def test_a_folder_of_too_few_photos_is_refused_before_the_work(shrink: Shrink, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for k in range(4):
        Image.fromarray(np.full((16, 16, 3), 40 * k, np.uint8)).save(tmp_path / "photos" / f"{k}.png")
    code, _, complaint = shrink("--precision", "int8", "--data", "photos", "--out", "out")
    assert (code, "calibrate int8 files on (4)" in complaint) == (2, True), complaint
    assert not list(tmp_path.glob("out*"))


# What dominates what. ------------------------------------------------------------------------------------------------


def test_a_row_is_dominated_where_another_is_no_worse_and_clearly_better_in_one() -> None:
    def at(time: float, loss: float) -> saving.Standing:
        return (time, time - 0.02, time + 0.02), (loss, loss - 1, loss + 1)

    rows = {"dense": at(1.0, 0.0), "compact": at(0.8, 2.0), "dense int8": at(0.5, 0.5), "compact int8": at(0.4, 2.2)}
    found = {name: saving.dominating(name, rows) for name in rows}
    assert found == {"dense": None, "compact": "dense int8", "dense int8": None, "compact int8": None}
    near = {**rows, "masked": at(0.99, -0.5)}  # faster and better, but by no more than noise
    assert saving.dominating("dense", near) is None
    assert saving.dominating("compact int8", {**rows, "smaller": at(0.39, 0.1)}) == "smaller"
    assert saving.dominating("compact int8", {**rows, "slower": at(0.41, 0.1)}) is None
    assert saving.dominating("unknown", rows) is None


def test_times_that_are_unreliable_put_no_row_above_another() -> None:
    named = [{"name": name, "onnx_bytes": 1} for name in ("dense", "compact")]
    losses = {"dense": (0.0, 0.0, 0.0), "compact": (9.0, 8.0, 10.0)}
    judged = {name: Agreement(100, 1.0, 0.0, accuracy=0.5, drop=lost) for name, lost in losses.items()}
    rows = [
        {"name": name, "ratio": {"value": v, "low": v, "high": v}} for name, v in (("dense", 1.0), ("compact", 1.1))
    ]

    def beaten(*, reliable: bool) -> list[str | None]:
        found = saving.with_standings(named, {}, judged, {"rows": rows, "reliable": reliable})
        return [row["dominated_by"] for row in found]

    assert beaten(reliable=True) == [None, "dense"]
    assert beaten(reliable=False) == [None, None]


def test_what_is_no_faster_is_said(source: Path, tmp_path: Path) -> None:
    made = {f"compact {p}": quantize.Quantised(source, 1, (4, 4), 1.0) for p in ("fp16", "int8")}
    rows = [("compact", 0.8), ("compact fp16", 0.82), ("compact int8", 0.4)]
    timed = [{"name": n, "ratio": {"value": v, "low": v, "high": v}} for n, v in rows]
    timing: dict[str, Any] = {"rows": timed, "reliable": True}
    notes = saving.quantised_notes(made, timing)
    assert len(notes) == 1
    assert saving.quantised_notes(made, {**timing, "reliable": False}) == [f"{notes[0]} (in times that are unreliable)"]
    timing["rows"].append({"name": "dense int8", "ratio": {"value": 0.35, "low": 0.35, "high": 0.35}})
    assert "compact int8 takes 1.14 of dense int8's time" in saving.quantised_notes(made, timing)[-1]
    assert "compact fp16 is not faster on this machine, only smaller: 1.02 of the time in fp32" in notes[0]


def test_layers_are_kept_by_their_own_names_in_every_file(source: Path, tmp_path: Path) -> None:
    batches = [{"image": np.random.default_rng(0).standard_normal((8, 3, 12, 12)).astype(np.float32)}]
    made = to_int8(source, tmp_path / "named.onnx", batches, Int8(keep=("conv2",)))
    assert made.layers == (3, 4)
    with pytest.raises(InvalidInput, match="conv1, depthwise, conv2, fc"):
        to_int8(source, tmp_path / "named.onnx", batches, Int8(keep=("nosuch",)))


def test_files_say_their_precision(source: Path, tmp_path: Path) -> None:
    batches = [{"image": np.random.default_rng(0).standard_normal((8, 3, 12, 12)).astype(np.float32)}]
    for precision, made in (
        ("fp16", to_fp16(source, tmp_path / "h.onnx", batches)),
        ("int8", to_int8(source, tmp_path / "q.onnx", batches)),
    ):
        props = {p.key: p.value for p in onnx.load(made.path).metadata_props}
        assert (props["precision"], props["model"]) == (precision, "compact")


@pytest.mark.parametrize(
    ("images", "keep", "said"),
    [
        (4, (), r"too few images to calibrate int8 files on \(4\)"),
        (16, ("nosuch",), "'nosuch' names no layer to keep in float32; there are first, last, Conv"),
        (16, ("node_*", "first", "0", "Conv"), "scored"),
    ],
)
def test_what_int8_files_cannot_be_made_with_is_told_before_units_are_scored(
    images: int, keep: tuple[str, ...], said: str
) -> None:
    def criterion(group: object, parameters: object) -> list[float]:
        raise InvalidInput("scored")

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    data = torch.zeros(images, 3, 8, 8)
    asked = surgery.recipe(macs=0.5, data=data, precision=("int8",), int8_keep=keep, criterion=criterion)
    with pytest.raises(InvalidInput, match=said):
        surgery.shrink(model, data[:1], asked)
