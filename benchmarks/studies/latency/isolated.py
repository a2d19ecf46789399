"""One row in a process of its own, under a limit of wall time: a crash, or a limit, is a row too."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.studies.latency.jobs import Job
from surgery.latency import environment


def limited(job: Job, options: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
    """Return the row of a job; what the process says goes to stderr.

    Args:
        job: of `jobs.every_job`.
        options: keyword arguments of `worker.Options`.
        seconds: after which the process, and all that it started, are ended.
    """
    with tempfile.TemporaryDirectory(prefix="latency-") as folder:
        answer = Path(folder, "row.json")
        request = json.dumps({"job": asdict(job), "options": dict(options), "answer": str(answer)})
        command = [sys.executable, "-P", "-m", "benchmarks.studies.latency.worker", request]
        own = {"TMPDIR": folder}  # what the process leaves behind goes with it
        child = subprocess.Popen(command, env={**environment(), **own}, stdout=sys.stderr, start_new_session=True)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"failed": "limit", "message": f"over {seconds:.0f} s"}
        finally:
            _end(child)
        if code == 0 and answer.exists():
            row: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return row
        return {"failed": f"exit {code}", "message": "the process died; its last words are on stderr"}


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started, where any of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
