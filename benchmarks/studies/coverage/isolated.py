"""One model and one tool in a process of its own, under limits of time and memory; over a limit is a result.

Processes are forked from a server that has imported everything once, and has compiled a tiny network, so that what is
timed is the work and not Python's imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.studies.coverage.models import Model

SECONDS, BYTES = 120.0, 8 * 2**30
"""What one model may take with one tool: processor time, of one thread, and resident memory."""
_PATIENCE = 6.0
"""Wall time over processor time at which a process is given up, asleep or starved."""

_STAGE = "stage: "

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["benchmarks.studies.coverage.warm"])


def limited(model: Model, tool: str, *, seconds: float = SECONDS, limit: int = BYTES) -> dict[str, Any]:
    """Return the row of one model and tool.

    Args:
        model: of the list.
        tool: one of `tools.TOOLS`.
        seconds: processor time that the process may take, so that a busy machine does not decide.
        limit: resident bytes that it may hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = _SERVER.Process(target=_work, args=(model, tool, folder), daemon=True)
        child.start()
        started = time.monotonic()
        over, peak = _watch(child, seconds, limit)
        row = _result(Path(folder), child.exitcode)
        stages = [x.removeprefix(_STAGE) for x in _said(Path(folder)) if x.startswith(_STAGE)]
    if over:
        said = f"over {seconds:.0f} s" if over == "time" else f"over {limit / 2**30:.0f} GiB"
        row = {"failed": "limit", "message": said + (f": {', '.join(stages)}" if stages else "")}
    return {**row, "process_s": round(time.monotonic() - started, 1), "peak_bytes": peak}


def tell(stage: str, fraction: float = 0.0) -> None:
    """Say, within the process, what begins, and after how much processor time."""
    if fraction == 0.0:
        print(f"{_STAGE}{stage} from {time.process_time():.0f} s", flush=True)


def _watch(child: Any, seconds: float, limit: int) -> tuple[str, int]:
    """Wait for the process, and end it at a limit; returns which limit, and the most bytes it held."""
    peak, over, deadline = 0, "", time.monotonic() + _PATIENCE * seconds
    try:
        process = psutil.Process(child.pid)
        while child.is_alive() and not over:
            peak = max(peak, process.memory_info().rss)
            used = process.cpu_times()
            late = used.user + used.system > seconds or time.monotonic() > deadline
            over = "time" if late else "memory" if peak > limit else ""
            child.join(0.2)
    except psutil.NoSuchProcess:
        pass
    if over:
        child.kill()
    child.join()
    return over, peak


def _work(model: Model, tool: str, folder: str) -> None:
    with Path(folder, "said").open("w") as said:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(said.fileno(), stream.fileno())
    import torch

    from benchmarks.studies.coverage.tools import TOOLS

    torch.set_num_threads(1)
    row = TOOLS[tool](model)
    Path(folder, "row.json").write_text(json.dumps(row))


def _result(folder: Path, code: int | None) -> dict[str, Any]:
    if (folder / "row.json").exists() and code == 0:
        row: dict[str, Any] = json.loads((folder / "row.json").read_text())
        return row
    said = _said(folder)
    return {"failed": f"exit {code}", "message": said[-1][:300] if said else ""}


def _said(folder: Path) -> list[str]:
    return (folder / "said").read_text().strip().splitlines() if (folder / "said").exists() else []
