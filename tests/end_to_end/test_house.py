"""Layers, imports and packaging."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).resolve().parents[2]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

ROOMS = {path.parent.name for path in (ROOT / "surgery").glob("*/__init__.py")}

WITHOUT_TORCH = {
    "surgery",
    "surgery.errors",
    "surgery.core",
    "surgery.latency",
    "surgery.latency.ort",
    "surgery.config",
    "surgery.distributed",
    "surgery.cli",
    "benchmarks.ort",
}


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file of every module, the studies included."""
    found = {}
    for package in ("surgery", "exporters", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def run(command: list[str | Path], **options: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def rooms_entered(module: str, path: Path) -> Iterator[str]:
    """Private modules of other rooms that a file imports, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        for package, room, *private in (name.split(".") for name in names if name.count(".")):
            if package == "surgery" and room in ROOMS and private and not module.startswith(f"surgery.{room}"):
                yield ".".join((package, room, *private))


def test_only_tracers_ask_how_a_model_was_captured() -> None:
    asked = re.compile(r"graph is (not )?None|tracer (==|!=|in) ")
    allowed = {"surgery.core.ir", "surgery.cutting.tracers"}
    assert not {m for m, path in modules().items() if asked.search(path.read_text("utf-8")) and m not in allowed}


def test_rooms_are_entered_by_their_public_names() -> None:
    assert not {(m, name) for m, path in modules().items() for name in rooms_entered(m, path)}


def test_layers_hold() -> None:
    assert "0 broken" in run([LINT_IMPORTS, "--no-cache"], cwd=ROOT)


@cache
def providers(package: str) -> dict[str, str]:
    """Public name of a package → the module it is loaded from, by the package's index."""
    stub = modules()[package].with_suffix(".pyi")
    tree = ast.parse(stub.read_text(encoding="utf-8")) if stub.is_file() else ast.Module([], [])
    lines = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{package}.{node.module}" for node in lines for alias in node.names}


def imported(module: str) -> set[str]:
    """Modules of this project that are loaded when this one is: by its own lines outside functions."""
    found = set()
    for node in ast.parse(modules()[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module in modules():
            public = providers(node.module)
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in modules() else public.get(name.rpartition(".")[2], node.module) for name in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules().keys()
    return found - {module}


def test_imports_have_no_circle() -> None:
    graph = {module: imported(module) for module in modules()}
    assert "surgery.coupling.plans" in graph["surgery.cutting.verify"]  # by the index of its room
    list(graphlib.TopologicalSorter(graph).static_order())


IMPORTER = """
import importlib, sys

for module in sys.argv[1:]:
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("surgery", "exporters", "benchmarks"):
            del sys.modules[name]
    importlib.import_module(module)
    assert "torch" not in sys.modules, module + " loads torch"
"""
"""Imports each module before any other of this project."""


def test_some_modules_load_no_torch() -> None:
    assert not run([sys.executable, "-W", "ignore", "-c", IMPORTER, *sorted(WITHOUT_TORCH)], cwd=ROOT)


def test_public_names_are_loaded_on_first_use() -> None:
    code = (
        "import sys, surgery; assert not {'torch', 'surgery.capture.tracing'} & set(sys.modules); "
        "surgery.Budget(macs=0.5); assert 'torch' not in sys.modules; "
        "surgery.allocate; assert callable(surgery.allocate) and 'surgery.api' not in sys.modules"
    )
    run([sys.executable, "-c", code], cwd=ROOT)


def test_every_public_name_exists() -> None:
    assert sorted(surgery.__all__) == list(surgery.__all__) == dir(surgery)
    for name in surgery.__all__:
        assert callable(getattr(surgery, name)), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = surgery.no_such_name


# Packaging. ----------------------------------------------------------------------------------------------------------

TINY = """
import torch
from torch import nn


def tiny():
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)), torch.randn(1, 3, 16, 16)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of an environment, outside the checkout, that has the built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder / "dist"], cwd=ROOT)
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path("python").with_suffix(Path(sys.executable).suffix if os.name == "nt" else "")
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "-q",
            "--no-compile",
            "--no-deps",
            "--no-index",
            wheel,
        ]
    )
    own = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    # torch and the like come from here, behind the wheel's own files; .pth files of that folder are not read again.
    dependencies = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    Path(own, "dependencies.pth").write_text("\n".join(dependencies) + "\n", encoding="utf-8")
    return scripts


def test_the_installed_wheel_shrinks_a_network(installed: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    (tmp_path / "exporters").mkdir()
    (tmp_path / "exporters" / "__init__.py").write_text("raise RuntimeError('the own folder of a user')")
    code = "import surgery, exporters.formats; print(surgery.__file__); print(exporters.__file__)"
    for where in run([installed / "python", "-c", code], cwd=tmp_path, env=environment).split():
        assert Path(where).is_relative_to(installed.parent)
    (tmp_path / "net.py").write_text(TINY, encoding="utf-8")
    options = ("--runs", "3", "--quiet", "--macs", "0.5", "--out", "small")
    printed = run([installed / "surgery", "shrink", "net.py:tiny", *options], cwd=tmp_path, env=environment)
    assert printed.strip().lower().startswith("accuracy unknown")
    assert {"compact.onnx", "plan.json", "report.md"} <= {path.name for path in (tmp_path / "small").iterdir()}


def test_the_wheel_holds_both_packages_with_types_and_templates_and_nothing_else(installed: Path) -> None:
    (package,) = (path.parent for path in installed.parent.rglob("surgery/errors.py"))
    assert (package / "py.typed").is_file()
    assert (package / "report" / "templates" / "report.html.j2").is_file()
    assert {path.parent.name for path in package.parent.glob("*/__init__.py")} == {"surgery", "exporters"}
