"""The command line as a user meets it: subprocesses only, a network of seconds, every exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import run_surgery
from rich.console import Console
from stairs import table_of

import surgery
from surgery import cli, report
from surgery.config import read_recipe
from surgery.delivery import NAMES

ROOT = Path(__file__).resolve().parents[2]

NETS = """
import time
import torch
from torch import nn

print("a user's file may print what it likes")


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.fc = nn.Linear(24, num_classes)

    def forward(self, image):
        image = torch.relu(self.bn1(self.conv1(image)))
        return self.fc(torch.relu(self.conv2(image)).mean((2, 3)))


class Branching(Net):
    def forward(self, image):
        if image.sum() > 0:
            return super().forward(image)
        return super().forward(-image)


def net(num_classes=10):
    return Net(num_classes), torch.randn(1, 3, 16, 16)


def branching():
    return Branching(), torch.randn(1, 3, 16, 16)


def not_a_number():
    model = Net()
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    return model, torch.randn(1, 3, 16, 16)


# Faults planted in the compiler itself, which runs in the same process.

def wrong_cut():
    from surgery.cutting import tracers
    rewrite = tracers.rewrite_program

    def wrong(cut):
        compact = rewrite(cut)
        weight = compact.module.conv2.weight
        weight.data = weight.data.flip(1)
        return compact

    tracers.rewrite_program = wrong
    return net()


def bug():
    from surgery.cutting import tracers
    tracers.couple = lambda program, keep=(): {}["no such key"]
    return net()


def slow():
    from surgery.cutting import tracers

    def couple(program, keep=()):
        print("in the middle", flush=True)
        time.sleep(60)

    tracers.couple = couple
    return net()
"""


HALF = ("--macs", "0.5")
BUDGETS = {"--macs", "--params", "--channels", "--latency", "--latency-ms"}


def timed_twice(folder: Path) -> subprocess.CompletedProcess[str]:
    """Plan by a latency table without corrections, then run the recipe that is left."""
    spec = importlib.util.spec_from_file_location("nets", folder / "nets.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(nets := importlib.util.module_from_spec(spec))
    program = surgery.trace(*nets.net())
    table_of(program, surgery.couple(program)).save(folder / "table.json")
    options = ("--latency", "0.7", "--latency-table", "table.json", "--no-correct", "--weights", "random")
    first = run_surgery(folder, "shrink", "nets.py:net", *options, "--runs", "3", "--quiet", "--out", "timed")
    if first.returncode:
        return first
    return run_surgery(folder, "run", "timed/recipe.toml", "--out", "timed again", "--quiet")


@dataclass(frozen=True)
class Place:
    """Two working folders with `nets.py`, and what came of the runs in them; `out` holds the first one's files."""

    folder: Path
    empty: Path
    first: subprocess.CompletedProcess[str]
    ended: dict[str, subprocess.CompletedProcess[str]]
    untouched: bool

    @property
    def out(self) -> Path:
        return self.folder / "out"


def command(*args: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "shrink.py"), *args]


def digest(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sentence(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what went wrong."""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("surgery: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


MISHAPS = {
    "unknown model": (["no_such_model"], 2, "no_such_model"),
    "missing checkpoint": (["nets.py:net", "--weights", "absent.safetensors"], 2, "absent.safetensors"),
    "wrong input shape": (["nets.py:net", "--input-shape", "1,4,16,16"], 2, "--input-shape"),
    "weights that are not numbers": (["nets.py:not_a_number"], 2, "conv1.weight"),
    "a pattern that matches nothing": (["nets.py:net", "--keep", "conv3"], 2, "conv2"),
    "a folder that cannot be": (["nets.py:net", "--out", "nets.py/out"], 2, "nets.py"),
    "control flow on data": (["nets.py:branching"], 3, "nets.py:"),
    "a wrong cut": (["nets.py:wrong_cut"], 4, ""),
    "an unreachable budget": (["nets.py:net", "--macs", "0.001"], 5, "0.1 %"),
    "nothing left to cut": (["nets.py:net", "--keep", "*"], 5, "keep fewer layers with --keep"),
    "a batch beyond all memory": (["nets.py:net", "--batch", "1000000000000"], 2, "GiB"),
    "a folder below a file": (["nets.py:net", "--out", "nets.py/deep/out"], 2, "nets.py is a file"),
    "a bug": (["nets.py:bug"], 1, "please report it"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One good run, then all others at once on as many cores as there are: each spends its time importing torch."""
    folder, empty = tmp_path_factory.mktemp("cli"), tmp_path_factory.mktemp("show")
    for place in (folder, empty):
        (place / "nets.py").write_text(NETS)
    good = ["nets.py:net", "--weights", "random", "--runs", "3", *HALF]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    first = subprocess.run(
        command(*good, "--out", "out"), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    before = digest(folder / "out")
    calls = {
        "rerun": lambda: run_surgery(folder, "run", "out/recipe.toml", "--out", "rerun", "--quiet"),
        "timed again": lambda: timed_twice(folder),
        "show": lambda: run_surgery(empty, "show", "nets.py:net", "--weights", "random", *HALF, "--keep", "fc"),
        "again": lambda: run_surgery(folder, "shrink", *good, "--out", "again", "--json", "--quiet"),
        "debug": lambda: run_surgery(folder, "shrink", "nets.py:bug", "--debug", "--out", "out"),
        **{
            name: partial(
                run_surgery, folder, "shrink", "--quiet", "--out", "out", *args, *(() if BUDGETS & set(args) else HALF)
            )
            for name, (args, _, _) in MISHAPS.items()
        },
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {name: pool.submit(call) for name, call in calls.items()}
    ended = {name: future.result() for name, future in running.items()}
    return Place(folder, empty, first, ended, untouched=digest(folder / "out") == before)


def test_a_run_writes_the_whole_set_and_nothing_else(place: Place) -> None:
    assert place.first.returncode == 0, place.first.stderr
    assert {path.name for path in place.out.iterdir()} == set(NAMES)
    left = {path.name for path in place.folder.iterdir() if path.name != "__pycache__"}
    assert left == {"nets.py", "out", "again", "rerun", "table.json", "timed", "timed again"}


def test_the_first_line_is_the_verdict_and_its_command_works_as_typed(place: Place) -> None:
    first = place.first.stdout.splitlines()[0]
    assert first.startswith(
        "accuracy unknown: recovered without images; not fit to deploy before it is evaluated; next: "
    )
    verdict, _, typed = first.partition("next: ")
    assert (place.out / "report.md").read_text().splitlines()[0] == f"{verdict}next: `{typed}`"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ask = "print(type(dense).__name__, type(compact).__name__, compact.conv1.weight.shape[0])\n"
    answer = subprocess.run(
        typed, shell=True, cwd=place.folder, env=environment, input=ask, capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 0, answer.stderr
    dense, compact, channels = answer.stdout.split()[-3:]
    assert (dense, compact) == ("Net", "Net")
    assert 0 < int(channels) <= 16


def test_progress_and_what_the_users_file_prints_stay_off_standard_output(place: Place) -> None:
    assert "a user's file may print what it likes" not in place.first.stdout
    assert "trace" in place.first.stderr
    assert "16 → " in place.first.stdout
    assert "masked" in place.first.stdout


def test_the_report_holds_sizes_times_and_the_kept_fraction(place: Place) -> None:
    data = json.loads((place.out / "report.json").read_text())
    dense, masked, compact = data["models"]
    assert data["budget"]["kept_fraction"] <= 0.5
    assert compact["macs"] <= 0.5 * dense["macs"]
    assert compact["parameters"] < dense["parameters"] == masked["parameters"]
    assert compact["onnx_bytes"] == (place.out / "compact.onnx").stat().st_size < dense["onnx_bytes"]
    assert [row["name"] for row in data["timing"]["rows"]] == ["dense", "masked", "compact"]
    assert all(row["p50_ms"] > 0 and row["peak_memory_bytes"] > 0 for row in data["timing"]["rows"])
    assert "seed 0" in data["model"]["weights"]
    assert data["check"]["error_float64"] <= 1e-10


def test_json_is_all_of_standard_output_and_the_second_run_gives_the_same_bytes(place: Place) -> None:
    again = place.ended["again"]
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads((place.folder / "again" / "report.json").read_text())
    assert "trace" not in again.stderr
    first, second = digest(place.out), digest(place.folder / "again")
    for name in ("plan.json", "compact.safetensors"):
        assert first[name] == second[name]


@pytest.mark.parametrize(("first", "second"), [("out", "rerun"), ("timed", "timed again")])
def test_the_recipe_that_a_run_leaves_gives_the_same_plan(place: Place, first: str, second: str) -> None:
    assert place.ended[second].returncode == 0, place.ended[second].stderr
    plans = [(place.folder / name / "plan.json").read_bytes() for name in (first, second)]
    assert plans[0] == plans[1]
    recipes = [surgery.recipe(**read_recipe(place.folder / name / "recipe.toml")[0]) for name in (first, second)]
    assert recipes[0].but(out=None) == recipes[1].but(out=None)


def test_the_onnx_files_know_where_they_come_from(place: Place) -> None:
    onnx = pytest.importorskip("onnx")
    from surgery import Plan

    plan = Plan.load(place.out / "plan.json")
    properties = {p.key: p.value for p in onnx.load(place.out / "compact.onnx").metadata_props}
    assert plan.digest in properties.values()
    assert plan.fingerprint in properties.values()


def test_show_says_what_would_be_cut_and_writes_nothing(place: Place) -> None:
    result = place.ended["show"]
    assert result.returncode == 0, result.stderr
    assert "conv1.weight:0" in result.stdout
    assert "conv2.weight:0" not in result.stdout.split("Left untouched, and why")[0]
    assert "shrink nets.py:net --weights random --macs 0.5 --keep fc" in result.stdout.splitlines()[0]
    assert sorted(path.name for path in place.empty.iterdir() if path.name != "__pycache__") == ["nets.py"]


def test_help_lists_every_exit_code_and_does_not_load_torch() -> None:
    code = "import sys; from surgery.cli import main; main(['shrink', '--help-all']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
    listed = {line.split()[0] for line in result.stdout.splitlines() if line.strip() and line.split()[0].isdigit()}
    assert listed == {"0", "1", "2", "3", "4", "5", "130", "143"}


def test_the_version_is_the_packages() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in run_surgery(ROOT, "--version").stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nets.py:net", "--macs", "0.5", "--params", "0.5"], "--macs and --params"),
        (["nets.py:net", "--macs", "1.0"], "--macs"),
        (["nets.py:net", "--channels", "0"], "--channels"),
        (["nets.py:net", "--input-shape", "1,3,x"], "--input-shape"),
        (["nets.py:net", "--model-arg", "classes"], "NAME=VALUE"),
        (["nets.py:net", "--round-to", "0"], "--round-to"),
        ([], "MODEL"),
        (["show", "nets.py:net"], "surgery show nets.py:net"),
    ],
)
def test_mistyped_options_are_usage_errors(place: Place, args: list[str], said: str) -> None:
    result = run_surgery(place.folder, "shrink", *args)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", MISHAPS)
def test_what_goes_wrong_is_one_sentence_and_an_exit_code(place: Place, name: str) -> None:
    _, code, said = MISHAPS[name]
    result = place.ended[name]
    assert result.returncode == code, result.stderr
    assert said in sentence(result)
    assert result.stdout == ""


def test_no_failing_run_touches_the_files_of_an_earlier_one(place: Place) -> None:
    assert place.untouched


def test_debug_shows_the_traceback(place: Place) -> None:
    result = place.ended["debug"]
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "no such key" in result.stderr


def test_a_long_stage_gets_a_line_now_and_then(capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(cli, "HEARTBEAT_S", 0.05)
    with cli.work(cli.Session()) as progress:
        progress("score", 0.0)
        progress("score", 0.5)
        time.sleep(0.2)
    time.sleep(0.1)
    first, *lines = capfd.readouterr().err.splitlines()
    assert first == "score"
    assert 1 <= len(lines) <= 4
    assert all(re.fullmatch(r"score: 50% after \d s, about \d s left", line) for line in lines), lines


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_the_earlier_set_whole(place: Place, signum: signal.Signals, code: int) -> None:
    before = digest(place.out)
    child = subprocess.Popen(
        command("nets.py:slow", "--quiet", "--out", "out"), cwd=place.folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stderr is not None
    while "in the middle" not in (line := child.stderr.readline()):
        assert line, "the run ended before it was interrupted"
    child.send_signal(signum)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in stderr
    assert digest(place.out) == before


def test_public_names_are_the_functions_whatever_was_imported_before() -> None:
    code = (
        "import surgery.api, surgery.delivery.saving, surgery, types; "
        "values = {name: getattr(surgery, name) for name in surgery.__all__}; "
        "print([name for name, value in values.items() if isinstance(value, types.ModuleType) or not callable(value)])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n", result.stderr


def test_importing_the_package_is_light_and_lists_its_names() -> None:
    code = "import sys, surgery; print('torch' in sys.modules, set(surgery.__all__) <= set(dir(surgery)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "False True\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_names_in_progress_messages_and_tables_are_no_markup_and_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    evil = "a[/b][red]\x1b[2J\nx.onnx"
    monkeypatch.setattr(Console, "is_terminal", is_terminal)
    with cli.work(cli.Session()) as progress:
        progress(f"loading {evil}", 0.5)
    cli.say(f"error: no {evil}")
    report.print_parts([evil, report.Table(("file",), [(evil,)])], Console(file=sys.stderr, color_system=None))
    found = capsys.readouterr().err
    assert "\x1b[2J" not in found
    assert found.count("a[/b][red]\\x1b[2J x.onnx") >= 3
