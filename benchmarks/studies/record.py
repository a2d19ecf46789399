"""Results files of the studies: the figures, the command that wrote them, and the machine they hold for."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from surgery.latency import describe

RESULTS = Path(__file__).with_name("results")
_LIBRARIES = ("torch", "torchvision", "onnx", "onnxruntime")


def command(module: str, arguments: Sequence[str] | None = None) -> str:
    """Return the command line that runs this study again."""
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", "-m", module, *given])


def machine(threads: int) -> dict[str, Any]:
    """Return processor, memory, versions and how busy the machine was over the last minute."""
    return {
        **describe(threads),
        "versions": {name: version(name) for name in _LIBRARIES},
        "load_average_1min": round(psutil.getloadavg()[0], 2),
    }


def write(name: str, data: Mapping[str, Any]) -> Path:
    """Write `results/NAME.json` in place of an earlier one; returns its path."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read(name: str) -> dict[str, Any]:
    """Return what `write` wrote."""
    data: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return data


def sentence(described: Mapping[str, Any]) -> str:
    """Return the machine in one line, for readers."""
    sets = [name for name in ("avx512f", "avx2", "neon") if name in described["instruction_sets"]]
    threads = described["threads"]
    return (
        f"{described['cpu']}, {described['cores']} cores, {sets[0] if sets else platform.machine()}, "
        f"ONNX Runtime {described['onnxruntime']} with {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {described['versions']['torch']}, Python {described['python']}"
    )
