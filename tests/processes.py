"""The command line in a process of its own, forked from one that has already imported the libraries."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_PRELOADED = ["torch.onnx", "onnxruntime", "onnxscript", "PIL.Image", "surgery.api", "surgery.search", "exporters.onnx"]


def run_surgery(
    folder: Path, *args: str, env: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m surgery.cli ARGS`` in a folder, with these environment variables besides the test's own.

    A fork saves the seconds of importing torch and the exporters. On systems without it, each run is a new interpreter.
    """
    command = [sys.executable, "-m", "surgery.cli", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(env or {})}
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as outputs:
        paths = [Path(outputs, name) for name in ("out", "err")]
        child = context.Process(target=_main, args=(folder, args, environment, paths))
        child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        out, err = (path.read_text() for path in paths)
        return subprocess.CompletedProcess(command, child.exitcode or 0, out, err)


def _main(folder: Path, args: tuple[str, ...], environment: Mapping[str, str], outputs: list[Path]) -> None:
    """Become the command: take its folder, arguments, environment and outputs."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = str(folder)
    sys.argv[1:] = args
    runpy.run_module("surgery.cli", run_name="__main__", alter_sys=True)
