"""Profiles here and in a bare environment, acceptances that come back from there, and plans that are repeated."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_surgery
from rich.console import Console
from torch import nn

import surgery
from surgery.config import recipe, validate
from surgery.core.kernels import Kernel
from surgery.errors import InvalidInput
from surgery.inputs import LoadedModel
from surgery.latency.cache import Given
from surgery.latency.tables import LatencyTable
from surgery.planning import profiling as profile
from surgery.planning.latency_planner import Acceptance

ROOT = Path(__file__).resolve().parents[2]

NETS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def net(width=64):
    blocks = [Block(width) for _ in range(3)]  # under a megabyte in all: its weights stay in caches
    first, last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 48, 3, stride=2)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
    return nn.Sequential(first, nn.ReLU(), *blocks, last, nn.ReLU(), *head), torch.randn(1, 3, 16, 16)
"""


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run_surgery(folder, *args)


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with `nets.py`, and a pack made of its network."""
    place = tmp_path_factory.mktemp("profile")
    (place / "nets.py").write_text(NETS)
    good(run(place, "profile", "nets.py:net", "--weights", "random", "--pack", "pack.zip"))
    return place


@pytest.fixture(scope="module")
def network(folder: Path) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """What `--weights random` makes of the network."""
    from surgery.inputs.models import load_model

    loaded = load_model(f"{folder / 'nets.py'}:net", weights="random")
    return loaded.module, loaded.example_inputs


# Here. ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(folder: Path) -> dict[str, Any]:
    """What `profile --json` printed; the table is beside it."""
    arguments = ("profile", "nets.py:net", "--weights", "random", "--out", "here.json", "--json", "--quiet")
    found: dict[str, Any] = json.loads(good(run(folder, *arguments)))
    return found


def test_a_profile_tells_the_costliest_kernels_and_the_stairs(here: dict[str, Any]) -> None:
    rows = here["kernels"]
    assert rows == sorted(rows, key=lambda row: -row["ms"])
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert sum(row["ms"] for row in rows) == pytest.approx(here["predicted_ms"])
    block = next(row for row in rows if row["title"] == "Conv 3x3 on 16x16 + Add + Relu")
    assert (block["widths"], block["count"]) == ([64, 64], 3)
    assert {"conv", "depthwise", "matmul"} <= here["stairs"].keys()
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    profile.render_terminal(here, console)
    text = console.export_text()
    assert "Conv 3x3 on 16x16 + Add + Relu" in text
    assert f"{block['share']:.1%}" in text
    assert "hardware steps in channels" in text


def test_its_table_holds_this_model_alone_and_plans_for_it(
    folder: Path, here: dict[str, Any], network: tuple[nn.Module, tuple[torch.Tensor, ...]]
) -> None:
    table = LatencyTable.load(folder / "here.json")
    asked = json.loads(zipfile.ZipFile(folder / "pack.zip").read("request.json"))
    assert table.entries.keys() == asked["kernels"].keys()
    assert dict(table.device) == here["device"]
    model, images = network
    for latency in (0.5, 0.1):  # the second one takes blocks out, and meets kernels that the whole model has not
        result = surgery.shrink(model, images, surgery.recipe(latency=latency, latency_table=folder / "here.json"))
        loop = result.report["latency"]
        assert loop["predicted_ms"] <= latency * loop["predicted_dense_ms"]
        assert loop["met"] is None
    assert result.plan.dropped


def test_a_table_of_open_widths_serves_a_model_with_fixed_ones(folder: Path, here: dict[str, Any]) -> None:
    table = LatencyTable.load(folder / "here.json")
    kernel = next(k for k in map(Kernel.from_key, table.entries) if k.title == "Conv 3x3 /2 on 16x16 + Relu")
    fixed = Kernel.from_key(kernel.key.replace('"b"', "48"))
    assert fixed != kernel
    own = table.only([(fixed, (64,))])
    assert list(own.entries) == [kernel.key]
    assert own.ms(fixed, (64,)) == table.ms(kernel, (64, 48))


def test_kernels_that_come_up_where_blocks_are_gone_are_told_from_their_relatives(
    folder: Path, here: dict[str, Any]
) -> None:
    table = LatencyTable.load(folder / "here.json")
    kernel = next(k for k in map(Kernel.from_key, table.entries) if k.title == "Conv 3x3 on 16x16 + Add + Relu")
    longer = Kernel((*kernel.steps, kernel.steps[-1], kernel.steps[-1]), kernel.operands, kernel.shape, kernel.image)
    other = Kernel(kernel.steps[:1], kernel.operands[1:], (1, "q"), image=False)
    said: list[str] = []
    given = Given(table, "here.json", warn=said.append)
    with pytest.raises(InvalidInput, match=r"lacks 1 of 1 kernels of this model .*surgery profile"):
        given.cover([(longer, (64, 64))])
    given.cover([(kernel, (64, 64))])
    ms = given.cover([(longer, (64, 64))]).ms(longer, (64, 64))
    assert ms == pytest.approx(table.ms(kernel, (64, 64)), rel=0.5)
    assert "+ Relu + Relu + Relu" in said[0]
    with pytest.raises(InvalidInput, match=r"without some of its blocks.*--no-drop-layers"):
        given.cover([(other, (64,))])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "a.json", "--pack", "b.zip"], "choose one"),
        (["--out", "absent/a.json"], "there is no folder"),
        (["--pack", "."], "is a folder"),
        (["--threads", "4096"], "threads=4096"),
    ],
)
def test_what_cannot_be_profiled_is_said_in_one_sentence(folder: Path, arguments: list[str], said: str) -> None:
    done = run(folder, "profile", "nets.py:net", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# On a device. --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """An environment that has numpy and onnxruntime alone, and a folder to work in."""

    python: Path
    folder: Path

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = [str(self.python), *args]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=600
        )


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    place = tmp_path_factory.mktemp("device")
    venv.create(place / "env", with_pip=False, symlinks=os.name != "nt")
    python = place / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    needed = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-compile", *needed]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        pytest.skip(f"no package index to install numpy and onnxruntime from: {done.stderr.strip()[-200:]}")
    (place / "work").mkdir()
    return Device(python, place / "work")


@pytest.fixture(scope="module")
def table(device: Device, folder: Path) -> LatencyTable:
    """The device's table, in few rounds."""
    done = device.run(str(folder / "pack.zip"), "--rounds", "1", "--out", "table.json")
    assert "table.json: " in good(done)
    assert "measure kernels: 100 %" in done.stderr
    assert [path.name for path in device.folder.iterdir()] == ["table.json"]
    return LatencyTable.load(device.folder / "table.json")


@pytest.fixture(scope="module")
def planned(
    device: Device, folder: Path, table: LatencyTable, network: tuple[nn.Module, tuple[torch.Tensor, ...]]
) -> surgery.Result:
    """A cut planned by that table, its files in `small`."""

    model, images = network
    budget = surgery.Budget(latency=0.4)
    result = surgery.shrink(model, images, surgery.recipe(budget=budget, latency_table=device.folder / "table.json"))
    surgery.save(result, folder / "small", surgery.recipe(runs=3))
    return result


@pytest.fixture(scope="module")
def accepted(device: Device, folder: Path, planned: surgery.Result) -> dict[str, Any]:
    done = device.run(str(folder / "pack.zip"), "accept", str(folder / "small" / "compact.onnx"), "--rounds", "2")
    assert "acceptance.json: the compact model takes" in good(done)
    found: dict[str, Any] = json.loads((device.folder / "acceptance.json").read_text())
    return found


@pytest.mark.parametrize("module", ["torch", "onnx", "psutil"])
def test_the_device_has_nothing_but_the_runtime(device: Device, module: str) -> None:
    assert "ModuleNotFoundError" in device.run("-c", f"import {module}").stderr


def test_the_devices_table_holds_every_kernel_and_plans_a_cut(
    folder: Path, table: LatencyTable, planned: surgery.Result
) -> None:
    asked = json.loads(zipfile.ZipFile(folder / "pack.zip").read("request.json"))
    assert table.entries.keys() == asked["kernels"].keys()
    latency = planned.report["latency"]
    assert latency["device"] == dict(table.device)
    assert latency["predicted_ms"] <= 0.4 * latency["predicted_dense_ms"]


def test_an_acceptance_says_what_was_timed(
    table: LatencyTable, planned: surgery.Result, accepted: dict[str, Any]
) -> None:
    assert len(accepted["ratios"]) == 3
    assert sorted(accepted["ratios"])[1] == accepted["ratio"]
    assert 0.05 < accepted["ratio"] < 1.5
    assert accepted["dense_ms"] > 0 < accepted["compact_ms"]
    assert accepted["device"] == dict(table.device)
    assert accepted["device"]["flush_mib"] == 0
    assert accepted["plan_sha256"] == planned.plan.digest
    latency = planned.report["latency"]
    told = latency["predicted_ms"] / latency["predicted_dense_ms"]
    assert accepted["predicted_latency_ratio"] == pytest.approx(told, abs=1e-6)


def test_the_next_plan_aims_by_it(device: Device, folder: Path, accepted: dict[str, Any]) -> None:
    # As if the device had been a good deal slower with the compact model than the table predicted.
    slower = {**accepted, "ratio": accepted["predicted_latency_ratio"] * 1.5}
    (device.folder / "slower.json").write_text(json.dumps(slower))
    given = ("--latency-table", str(device.folder / "table.json"), "--acceptance", str(device.folder / "slower.json"))
    shown = good(run(folder, "show", "nets.py:net", "--weights", "random", "--latency", "0.4", "--json", *given))
    data = json.loads(shown)
    latency = data["latency"]
    assert latency["target"] == 0.4
    assert latency["predicted_ms"] <= 0.4 / 1.5 * latency["predicted_dense_ms"] * 1.0001
    assert any("aimed at 0.2667 of the dense latency" in note for note in data["plan"]["notes"])


def test_what_a_device_cannot_do_is_said_in_one_sentence(device: Device, folder: Path) -> None:
    pack = str(folder / "pack.zip")
    for arguments, said in (
        (("accept", "absent.onnx"), "cannot load absent.onnx"),
        (("accept", str(folder / "nets.py")), "cannot load"),
        (("--threads", "4096"), "--threads 4096"),
        (("--rounds", "0"), "--rounds 0"),
        (("--out", "absent/table.json"), "--out absent/table.json"),
    ):
        done = device.run(pack, *arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.count("\n") == 1
        assert said in done.stderr


def test_without_its_two_packages_a_pack_names_them(folder: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = Device(python, tmp_path).run(str(folder / "pack.zip"))
    assert done.returncode != 0
    assert "pip install numpy onnxruntime" in done.stderr
    assert "Traceback" not in done.stderr


# Acceptances that are no good. ---------------------------------------------------------------------------------------

ACCEPTANCE = {
    "schema": 1,
    "ratio": 0.6,
    "predicted_latency_ratio": 0.5,
    "dense_ms": 3.0,
    "device": {"cpu": "one"},
    "dense_fingerprint": "f",
    "batch": 1,
}


def test_the_aim_moves_by_what_the_table_predicted_wrongly_and_stays_a_fraction(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps(ACCEPTANCE))
    read = Acceptance.load(path)
    assert read.aim(0.48) == pytest.approx(0.4)
    path.write_text(json.dumps({**ACCEPTANCE, "ratio": 0.1}))
    assert Acceptance.load(path).aim(0.9) == 0.999
    read.validate_device({"cpu": "one"}, "f", 1)
    with pytest.raises(InvalidInput, match="another device than the latency table: cpu differ"):
        read.validate_device({"cpu": "two"}, "f", 1)
    with pytest.raises(InvalidInput, match="another architecture"):
        read.validate_device({"cpu": "one"}, "g", 1)
    with pytest.raises(InvalidInput, match="a batch of 1, the plan is for --batch 4"):
        read.validate_device({"cpu": "one"}, "f", 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema": 2}, "schema 2"),
        ({"ratio": 0.0}, "must be positive"),
        ({"ratio": "fast"}, "not an acceptance"),
        ({"device": None}, "not an acceptance"),
        ({"batch": float("inf")}, "the batch must be a positive whole number"),
        ({"device": "[" * 100_000}, "not an acceptance"),
        ({"predicted_latency_ratio": None}, "surgery shrink --latency"),
    ],
)
def test_files_that_are_no_acceptance_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps({**ACCEPTANCE, **changed}).replace('"[[', "[").replace('[["', "[["))
    with pytest.raises(InvalidInput, match=said):
        Acceptance.load(path)


def test_an_acceptance_needs_its_devices_table_and_a_budget_of_latency(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--latency-table"):
        validate(recipe(latency=0.5, acceptance="acceptance.json"))
    with pytest.raises(InvalidInput, match="--acceptance is for budgets of time"):
        surgery.shrink(nn.Conv2d(3, 8, 1), torch.zeros(1, 3, 8, 8), surgery.recipe(macs=0.5, acceptance="a.json"))
    with pytest.raises(InvalidInput, match="cannot read acceptance"):
        Acceptance.load(tmp_path / "absent.json")
    with pytest.raises(InvalidInput, match="acceptance=3"):
        recipe(latency_table="table.json", acceptance=3)


# Python 3.8. ---------------------------------------------------------------------------------------------------------

GENERICS = {"list", "dict", "tuple", "set", "frozenset", "type", "Mapping", "Sequence", "Iterable", "Iterator"}
NEWER = {"removeprefix", "removesuffix", "bit_count", "is_relative_to", "with_stem", "hardlink_to", "pairwise", "lcm"}


def evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that Python evaluates as it runs: all but annotations, which stay text."""
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from evaluated(child)


def faults(text: str) -> list[str]:
    """What Python 3.8 would stumble over, as far as the text tells."""
    try:
        tree = ast.parse(text, feature_version=(3, 8))
    except SyntaxError as error:
        return [str(error)]
    found = []
    annotated = any(isinstance(n, ast.AnnAssign) or getattr(n, "returns", None) is not None for n in ast.walk(tree))
    if annotated and "from __future__ import annotations" not in text:
        found.append("annotations are evaluated")
    for node in evaluated(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in GENERICS:
            found.append(f"{ast.unparse(node)} is evaluated")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = [ast.unparse(side) for side in (node.left, node.right)]
            if {"None", "int", "str", "float", "bytes"} & set(sides) or any("{" in side for side in sides):
                found.append(f"{ast.unparse(node)} is evaluated")
        if isinstance(node, ast.keyword) and node.arg in ("strict", "slots", "kw_only"):
            found.append(f"{node.arg}= is newer")
        if isinstance(node, ast.Attribute) and node.attr in NEWER:
            found.append(f".{node.attr} is newer")
        if isinstance(node, ast.ImportFrom) and node.module == "functools" and {a.name for a in node.names} & {"cache"}:
            found.append("functools.cache is newer")
    return found


def device_texts() -> dict[str, str]:
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in profile.DEVICE_FILES}
    return {**texts, **profile.PACK_TEXTS}


@pytest.mark.parametrize("name", [*profile.DEVICE_FILES, "__main__.py"])
def test_what_goes_to_devices_is_python_3_8(name: str) -> None:
    assert faults(device_texts()[name]) == []


@pytest.mark.parametrize(
    "text",
    [
        "Widths = tuple[int, ...]",
        "Size = int | str",
        "both = {} | {}",
        "for a, b in zip(x, y, strict=True): pass",
        "match x:\n    case 1: pass",
        "with (open(a) as f, open(b) as g): pass",
        "def f(x: list[int]) -> None: pass",
        "name.removeprefix('x')",
        "@dataclass(slots=True)\nclass A: pass",
        "from functools import cache",
    ],
)
def test_that_test_can_fail(text: str) -> None:
    assert faults(text)


@pytest.mark.parametrize("name", [*profile.DEVICE_FILES, "__main__.py"])
def test_what_goes_to_devices_imports_nothing_that_is_not_there(name: str) -> None:
    carried = {file[: -len(".py")].removesuffix("/__init__").replace("/", ".") for file in device_texts()}
    for node in ast.walk(ast.parse(device_texts()[name])):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = sorted(inner & carried) or [str(node.module)]
        else:
            continue
        for module in modules:
            top = module.partition(".")[0]
            assert module in carried or top in {"numpy", "onnxruntime"} or top in sys.stdlib_module_names, module


def test_a_pack_holds_the_files_as_they_stand(folder: Path) -> None:
    archive = zipfile.ZipFile(folder / "pack.zip")
    for name, text in device_texts().items():
        assert archive.read(name).decode() == text
    others = {"request.json", "dense.onnx"}
    assert set(archive.namelist()) == device_texts().keys() | others
    assert all(info.date_time == (1980, 1, 1, 0, 0, 0) for info in archive.infolist())


# Plans repeated. -----------------------------------------------------------------------------------------------------


def test_a_plan_is_repeated_from_the_command_line(folder: Path) -> None:
    model = ("nets.py:net", "--weights", "random", "--model-arg", "width=16", "--runs", "3", "--quiet")
    good(run(folder, "shrink", *model, "--macs", "0.5", "--seed", "3", "--recover", "none", "--out", "first"))
    done = run(folder, "apply", "first/plan.json", *model, "--recover", "none", "--out", "again", "--json")
    data = json.loads(good(done))
    assert {path.name for path in (folder / "first").iterdir()} == {path.name for path in (folder / "again").iterdir()}
    for name in ("plan.json", "compact.safetensors"):
        assert (folder / "first" / name).read_bytes() == (folder / "again" / name).read_bytes()
    before = json.loads((folder / "first" / "report.json").read_text())
    assert [row["parameters"] for row in data["models"]] == [row["parameters"] for row in before["models"]]
    assert data["budget"] == before["budget"]
    assert data["check"]["error_float64"] <= 1e-10
    assert data["timing"]["rows"]
    other = run(folder, "apply", "first/plan.json", "nets.py:net", "--model-arg", "width=32", "--out", "again")
    assert other.returncode == 2
    assert "another architecture" in other.stderr
    missing = run(folder, "apply", "absent.json", "nets.py:net", "--out", "again")
    assert missing.returncode == 2
    assert "cannot read plan absent.json" in missing.stderr


def test_a_plan_that_drops_blocks_is_repeated_with_the_same_figures(
    folder: Path, here: dict[str, Any], network: tuple[nn.Module, tuple[torch.Tensor, ...]]
) -> None:
    from surgery import pipeline
    from surgery.planning.decision import repeat

    model, images = network
    first = surgery.shrink(model, images, surgery.recipe(latency=0.1, latency_table=folder / "here.json"))
    plan = surgery.Plan.from_json(first.plan.to_json())
    assert plan.dropped
    again = pipeline.realise(repeat(plan, LoadedModel(model, images)))
    assert again.plan.digest == first.plan.digest
    assert torch.equal(again.model(*images), first.model(*images))
    for key in ("models", "groups", "dropped", "settings"):
        assert again.report[key] == first.report[key]
