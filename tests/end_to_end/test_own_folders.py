"""A user's own folders called `benchmarks` and `exporters` beside their script break nothing."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_surgery

ROOT = Path(__file__).resolve().parents[2]

NET = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 4)), torch.randn(1, 3, 16, 16)
"""

SCRIPT = """
from pathlib import Path

import net, surgery
from surgery.latency import ratio

result = surgery.shrink(*net.net(), surgery.recipe(macs=0.5, recover="none"))
report = surgery.save(result, "by_api", surgery.recipe(runs=3))  # peak memory comes from a worker process each
assert report.data["timing"]["rows"][0]["peak_memory_bytes"] > 0
files = "by_api/dense.onnx", "by_api/compact.onnx"
assert ratio.measure(*map(Path, files), {'input': (1, 3, 16, 16)}, seeds=[0], rounds=1).value > 0
from exporters.mine import ANSWER  # what lies in the user's folder can still be imported
assert ANSWER == 42
"""


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("benchmarks", "exporters"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the own folder of a user')\n")
    (tmp_path / "exporters" / "mine.py").write_text("ANSWER = 42\n")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_a_script_and_its_workers(folder: Path) -> None:
    run(folder, sys.executable, "script.py")
    assert (folder / "by_api" / "compact.onnx").is_file()


def test_the_command_line_and_the_commands_that_it_prints(folder: Path) -> None:
    budget = ("--macs", "0.5", "--recover", "none", "--runs", "3")
    done = run_surgery(folder, "shrink", "net.py:net", *budget, "--quiet", "--json", "--out", "out")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    _, *again = shlex.split(data["command"])
    assert json.loads(run(folder, sys.executable, *again))["plan"] == data["plan"]
    _, interactive, *rest = shlex.split(data["accuracy"]["next_command"])
    assert interactive == "-i"  # which would wait for a terminal
    run(folder, sys.executable, *rest)
