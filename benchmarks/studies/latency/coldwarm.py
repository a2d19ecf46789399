"""How long the command line takes from an empty cache of tables, and from a full one; and where that goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.studies.latency.bench import loop_of, tell
from benchmarks.studies.latency.jobs import Job
from benchmarks.studies.latency.options import Options
from surgery.core import VARIABLE
from surgery.latency import TimerFailed

_ROOT = Path(__file__).resolve().parents[3]


def profile(job: Job, options: Options, folder: Path) -> dict[str, Any]:
    """Run `scripts/shrink.py` twice with nothing in the cache, and once more with what the second left there."""
    runs = {
        "cold": _run(job.network, folder / "first", folder / "cold"),
        "cold again": _run(job.network, folder / "second", folder / "cold again"),
        "warm": _run(job.network, folder / "second", folder / "warm"),
    }
    first, second = (runs[name]["measured"] for name in ("cold", "cold again"))
    return {"runs": runs, "apart": round(abs(first / second - 1), 4)}


def _run(network: str, cache: Path, out: Path) -> dict[str, Any]:
    tell(out.name)
    command = [sys.executable, "scripts/shrink.py", network, "--weights", "random", "--out", str(out), "--quiet"]
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=_ROOT, env={**os.environ, VARIABLE: str(cache)}, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise TimerFailed(f"scripts/shrink.py ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {"seconds": round(seconds, 1), **loop_of(report), "speedup": _speedup(report)}


def _speedup(report: dict[str, Any]) -> Any:
    rows = {row["name"]: row for row in (report["timing"] or {}).get("rows", ())}
    return rows.get("compact", {}).get("speedup")
