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
WARM = "benchmarks.studies.coverage.warm"
"""Imports the libraries, captures and exports once; the server that processes are forked from does so."""


def run_surgery(
    folder: Path, *args: str, env: Mapping[str, str] | None = None, timeout: float = 600, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m surgery.cli ARGS``; see `run_python`."""
    return run_python(folder, "-m", "surgery.cli", *args, env=env, timeout=timeout, processes=processes)


def run_python(
    folder: Path, *args: str, env: Mapping[str, str] | None = None, timeout: float = 600, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGS`` in a folder, with these environment variables besides the test's own.

    A fork saves the seconds of importing torch and the exporters. On systems without it, each run is a new interpreter.
    ARGS are ``-m MODULE ...``, ``-c CODE`` or ``FILE ...``. Several processes are launched as by ``torchrun
    --standalone``.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ()), *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(env or {})}
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WARM])
    with tempfile.TemporaryDirectory() as outputs:
        paths = [Path(outputs, name) for name in ("out", "err")]
        child = context.Process(target=_main, args=(folder, args, environment, paths, processes))
        child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        out, err = (path.read_text() for path in paths)
        return subprocess.CompletedProcess(command, child.exitcode or 0, out, err)


def _main(
    folder: Path, args: tuple[str, ...], environment: Mapping[str, str], outputs: list[Path], processes: int
) -> None:
    """Become the command: take its folder, arguments, environment and outputs."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = str(folder)
    if processes == 1:
        return _run(*args)
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    config = LaunchConfig(1, 1, processes, start_method="fork", max_restarts=0, monitor_interval=0.1, **where)
    elastic_launch(config, _run)(*args)


def _run(kind: str, *args: str) -> None:
    sys.argv[:] = [kind, *args] if kind not in ("-c", "-m") else [kind, *args[1:]]
    try:
        if kind == "-c":
            exec(args[0], {"__name__": "__main__"})
        elif kind == "-m":
            runpy.run_module(args[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:  # the launcher takes any as a failure
        if end.code:
            raise
