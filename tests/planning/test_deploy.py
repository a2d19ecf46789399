"""Plans for int8: kernels timed as the quantiser writes them, tables of their own, budgets of the int8 file's time."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from processes import run_surgery
from stairs import table_of
from torch import nn

import surgery
from exporters.quantize import to_int8
from surgery import pipeline
from surgery.capture.tracing import trace
from surgery.core.kernels import Kernel, Operand, Widths, step
from surgery.coupling.coupler import couple
from surgery.delivery.saving import deployed_recipe
from surgery.errors import InvalidInput
from surgery.inputs import LoadedModel
from surgery.latency import cache, fill, probe
from surgery.latency.fill import REFERENCE
from surgery.latency.micro import BY_RANGE, FP32, IN_8_BITS, INT8, model_bytes
from surgery.latency.probe import Conditions
from surgery.latency.tables import LatencyTable
from surgery.ops.registry import rules
from surgery.planning.decision import decide, repeat
from surgery.planning.lowering import lower
from surgery.planning.refinement import LatencyBench
from surgery.recovery.run import Step

ROOT = Path(__file__).resolve().parents[2]
MOVED = {"QuantizeLinear", "DequantizeLinear", "Transpose"}
"""What stands at a small model's ends: not compared."""
TIMED = sorted(op for op, rule in rules().items() if rule.onnx is not None)


def kernels_of(model: nn.Module, x: torch.Tensor | tuple[torch.Tensor, ...]) -> list[tuple[Kernel, Widths]]:
    program = trace(model.eval(), x)
    coupling = couple(program)
    return lower(program, coupling).points()


def executed(path: Path) -> Counter[str]:
    """Operators that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return Counter(node.op_type for node in nodes if node.op_type not in MOVED)


def ours_and_theirs(kernel: Kernel, widths: Widths, folder: Path) -> tuple[Counter[str], Counter[str]]:
    """What runs of a kernel in int8: as it is timed, and as ONNX Runtime's quantiser makes it of the float one."""
    (folder / "ours.onnx").write_bytes(model_bytes(kernel, widths, INT8))
    onnx.checker.check_model(onnx.load(folder / "ours.onnx"), full_check=True)
    whole = onnx.load_from_string(model_bytes(kernel, widths))
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in whole.graph.input}
    for value in (*whole.graph.input, *whole.graph.output):  # files have a free batch, as a rule
        for first in value.type.tensor_type.shape.dim[:1]:
            if first.dim_value == 1:
                first.dim_param = "batch"
    onnx.save(whole, folder / "float.onnx")
    rng = np.random.default_rng(0)
    batches = [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(8)]
    to_int8(folder / "float.onnx", folder / "theirs.onnx", batches, check=False)
    return executed(folder / "ours.onnx"), executed(folder / "theirs.onnx")


@pytest.mark.parametrize("op", TIMED)
def test_kernels_in_int8_run_the_operators_that_the_quantiser_leads_to(op: str, tmp_path: Path) -> None:
    model, inputs = rules()[op].example()
    for kernel, widths in kernels_of(model, inputs):
        if not kernel.shape:
            continue  # the quantiser asks for axes to put batches together along
        ours, theirs = ours_and_theirs(kernel, widths, tmp_path)
        assert ours == theirs, kernel.title


def test_kernels_of_fused_layers_do_too(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
            self.wide, self.depthwise, self.back = (
                nn.Conv2d(16, 32, 1),
                nn.Conv2d(32, 32, 3, 1, 1, groups=32),
                nn.Conv2d(32, 16, 1),
            )
            self.up, self.head = nn.ConvTranspose2d(16, 16, 2, 2), nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.bn(self.stem(x)))
            y = nn.functional.relu6(self.depthwise(nn.functional.hardswish(self.wide(x))))
            x = torch.relu(x + self.back(y))
            return self.head(nn.functional.silu(self.up(x)).mean((2, 3)))  # type: ignore[no-any-return]

    for kernel, widths in kernels_of(Net(), torch.randn(1, 3, 16, 16)):
        ours, theirs = ours_and_theirs(kernel, widths, tmp_path)
        assert ours == theirs, kernel.title


def test_the_operators_in_8_bits_are_those_of_the_quantiser() -> None:
    made = set()
    for op in TIMED:
        model, inputs = rules()[op].example()
        made |= {s.op for kernel, _ in kernels_of(model, inputs) for s in kernel.steps}
    taken = {*QDQRegistry, *QLinearOpsRegistry}
    assert (made & taken) - BY_RANGE <= IN_8_BITS <= taken
    assert taken >= BY_RANGE


def test_changes_of_layout_and_the_context_do_not_count() -> None:
    def event(op: str, name: str, us: int) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": {"op_name": op}}

    run = [
        *(event("QuantizeLinear", "context_x0_in_quantise", 1), event("Transpose", "Transpose", 2)),
        *(event("QLinearConv", "context_x0_conv", 4), event("Transpose", "Transpose_token_1", 8)),
        *(event("DequantizeLinear", "kernel_x0_dequantise", 16), event("Conv", "kernel_s0", 32)),
        *(event("Transpose", "kernel_s1", 64), event("NhwcMaxPool", "context_out", 128)),
        *(event("Transpose", "Transpose_token_2", 256), event("DequantizeLinear", "context_out_dequantise", 512)),
        {"cat": "Session", "name": "model_run"},
    ]
    assert [probe.own_ms(x) for x in probe.operators_by_run(run)] == pytest.approx([(8 + 16 + 32 + 64) / 1e3])


def test_kernels_are_timed_in_the_precision_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[bytes] = []
    monkeypatch.setattr(probe, "kernel_ms", lambda model, threads, flushed: timed.append(model) or 1.0)
    for precision, eight in ((FP32, False), (INT8, True)):
        timed.clear()
        times = fill.Timer(Conditions(1, 0, precision), rounds=1).measure([REFERENCE])
        assert times == {(REFERENCE[0].key, REFERENCE[1]): 1.0}
        assert timed
        assert all((b"QuantizeLinear" in model) is eight for model in timed)


def test_each_precision_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    paths = {cache.Measured(Conditions(1, 4, precision)).path for precision in (FP32, INT8)}
    assert len(paths) == 2
    assert cache.Measured(Conditions(1, 4, INT8)).device["precision"] == INT8


# Plans. --------------------------------------------------------------------------------------------------------------

IMAGE = torch.randn(2, 3, 16, 16)


def net() -> nn.Module:
    torch.manual_seed(0)
    widths = [(3, 64), (64, 64), (64, 64)]
    layers = [x for i, o in widths for x in (nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    program = trace(net(), IMAGE)
    found = table_of(program, couple(program))
    return replace(found, device={**found.device, "precision": INT8})


def test_a_plan_says_what_it_is_for_and_is_made_by_a_table_of_that(table: LatencyTable) -> None:
    half = surgery.Budget(latency=0.5)
    result = surgery.shrink(net(), IMAGE, surgery.recipe(budget=half, latency_table=table, deploy="int8"))
    assert result.plan.settings["deploy"] == "int8"
    assert result.report["latency"]["device"]["precision"] == "int8"
    assert result.check.error_float64 <= 1e-10
    with pytest.raises(InvalidInput, match=r"table.json is of int8, and the plan is for fp32: give --deploy int8"):
        surgery.shrink(net(), IMAGE, surgery.recipe(budget=half, latency_table=table))
    with pytest.raises(InvalidInput, match="give one of fp32, int8"):
        surgery.shrink(net(), IMAGE, surgery.recipe(budget=half, latency_table=table, deploy="int4"))
    with pytest.raises(InvalidInput, match="--deploy int8 is for budgets of time"):
        surgery.shrink(net(), IMAGE, surgery.recipe(macs=0.5, deploy="int8"))


def test_the_timed_files_are_in_int8(tmp_path: Path) -> None:
    program = trace(net(), IMAGE)
    (tmp_path / "a").mkdir()
    for deploy, expected in (("fp32", False), ("int8", True)):
        bench = LatencyBench(program, tmp_path / "a", surgery.recipe(deploy=deploy))
        ops = {node.op_type for node in onnx.load(bench.dense).graph.node}
        assert ("QuantizeLinear" in ops) is expected
        assert list(bench.shapes.values()) == [(1, 3, 16, 16)]


def test_the_drop_is_that_of_the_int8_file(
    table: LatencyTable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images, classes = torch.randn(64, 3, 16, 16), torch.arange(64) % 10
    val = {"val": (images, classes), "allow_chance": True}
    asked = surgery.recipe(latency=0.9, latency_table=table, data=images, deploy="int8", **val)
    decision = decide(LoadedModel(net(), IMAGE), asked)
    judged: list[str] = []
    lost_by = pipeline.lost_by

    def noted(steps: tuple[Step, ...]) -> tuple[float, float, str]:
        judged.append(steps[-1].name)
        return lost_by(steps)

    monkeypatch.setattr(pipeline, "lost_by", noted)
    monkeypatch.setattr(LatencyBench, "ratio", lambda *given, **named: type("R", (), {"value": 0.5})())
    monkeypatch.setattr(pipeline, "MOST", 1)
    result = pipeline.fastest(replace(decision, recipe=decision.recipe.but(max_drop=99.9)), None)
    assert judged[0] == "int8"
    assert "of the dense int8 latency" in result.report["latency"]["verdict"]


def test_files_are_made_as_the_plan_was_timed(table: LatencyTable, tmp_path: Path) -> None:
    images = torch.randn(16, 3, 16, 16)
    asked = {"data": images, "recover": "none", "latency_table": table, "deploy": "int8"}
    result = surgery.shrink(net(), IMAGE, surgery.recipe(latency=0.5, int8_keep=("last",), **asked))  # type: ignore[arg-type]
    assert result.plan.settings["int8"]["keep"] == ["last"]
    data = surgery.save(result, tmp_path / "out", surgery.recipe(runs=12)).data
    assert any("3 of 4 layers are in 8 bits" in note for note in data["notes"])
    assert "compact int8: " in data["accuracy"]["verdict"]
    without_images = pipeline.realise(repeat(result.plan, LoadedModel(net(), IMAGE)))
    _, (note,) = deployed_recipe(without_images, surgery.recipe())
    assert note.startswith("the widths were chosen for int8")
    damaged = replace(result.plan, settings={**result.plan.settings, "int8": {"keep": ["last"], "bits": 4}})
    with pytest.raises(InvalidInput, match="the plan's setting int8="):
        surgery.save(replace(result, plan=damaged), tmp_path / "out", surgery.recipe(runs=12))


def test_a_drop_of_int8_files_needs_images_to_make_them_by() -> None:
    with pytest.raises(InvalidInput, match="--max-drop evaluates files in int8"):
        surgery.shrink(net(), IMAGE, surgery.recipe(max_drop=5.0, deploy="int8", metric=lambda model: {"top1": 0.5}))


# The command line. ---------------------------------------------------------------------------------------------------

NETS = """
import torch
from torch import nn


def net():
    widths = [(3, 64), (64, 64), (64, 64)]
    layers = [x for i, o in widths for x in (nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*layers, *head), torch.randn(1, 3, 16, 16)
"""


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run_surgery(folder, *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("deploy")
    (place / "nets.py").write_text(NETS)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 16, 16, 3), dtype=np.uint8)
    np.savez(place / "images.npz", images=pixels)
    return place


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    """The folder with a pack for int8, and the table that it wrote."""
    done = run(folder, "profile", "nets.py:net", "--weights", "random", "--deploy", "int8", "--pack", "pack.zip")
    assert done.returncode == 0, done.stderr
    filled = subprocess.run(
        [sys.executable, "pack.zip", "--rounds", "1", "--out", "table.json"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert filled.returncode == 0, filled.stderr
    return folder


def test_a_budget_for_int8_is_of_the_int8_files(packed: Path) -> None:
    asked = ("--weights", "random", "--data", "images.npz", "--latency", "0.7", "--deploy", "int8", "--out", "out")
    asked = (*asked, "--latency-table", "table.json", "--runs", "50", "--json", "--quiet")
    done = run(packed, "shrink", "nets.py:net", *asked)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["latency"]["device"]["precision"] == "int8"
    assert data["latency"]["predicted_ms"] <= 0.7 * data["latency"]["predicted_dense_ms"]
    assert {"dense int8", "compact int8"} <= {model["name"] for model in data["models"]}
    assert (packed / "out" / "compact.int8.onnx").is_file()
    page = (packed / "out" / "report.html").read_text()
    assert "compact int8 against dense int8" in page


def test_a_profile_and_a_pack_for_int8(packed: Path) -> None:
    with zipfile.ZipFile(packed / "pack.zip") as pack:
        assert json.loads(pack.read("request.json"))["precision"] == "int8"
        pack.extract("dense.onnx", packed)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(packed / "dense.onnx").graph.node}
    assert LatencyTable.load(packed / "table.json").device["precision"] == "int8"
    other = run(packed, "show", "nets.py:net", "--weights", "random", "--latency-table", "table.json")
    assert (other.returncode, "--deploy int8" in other.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--deploy", "int8"), "--deploy int8 needs images to calibrate on: give them with --data"),
        (("--deploy", "int8", "--macs", "0.5", "--data", "images.npz"), "--deploy int8 is for budgets of time"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    done = run(folder, "shrink", "nets.py:net", "--weights", "random", "--out", "never", *arguments)
    assert (done.returncode, told in done.stderr) == (2, True), done.stderr
    assert not (folder / "never").exists()


def test_a_bias_is_added_in_the_products_scale() -> None:
    kernel = Kernel(
        (step("Gemm", "x0", "w1", "w2", transB=1),),
        (Operand("x0", (1, "a"), "value"), Operand("w1", ("b", "a"), "weight"), Operand("w2", ("b",), "weight")),
        (1, "b"),
        False,
    )
    weights = {
        w.name: onnx.numpy_helper.to_array(w)
        for w in onnx.load_from_string(model_bytes(kernel, (8, 4), INT8)).graph.initializer
    }
    assert weights["w1_bits"].dtype == np.int8 and weights["w2_bits"].dtype == np.int32
    np.testing.assert_allclose(weights["w2_scale"], weights["x0_scale"] * weights["w1_scale"])
