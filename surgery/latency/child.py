"""Child processes that do one measurement and answer with a line of JSON: Python 3.8, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Sequence

from surgery.errors import InvalidInput, SurgeryError


class TimerFailed(SurgeryError):
    """A child process that measures died or did not answer."""


def ask(arguments: Sequence[str], what: str, *, timeout_s: float) -> Dict[str, Any]:
    """Run Python in a process of its own and return the JSON object on the last line that it prints.

    Args:
        arguments: of the interpreter.
        what: the process does, for messages.
        timeout_s: seconds to wait for an answer.

    Raises:
        InvalidInput: the answer is an ``{"error": ...}``.
        TimerFailed: the process died, out of memory for instance, or gave no answer in time.
    """
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimerFailed(f"{what}: the process gave no answer in {timeout_s:.0f} s") from error
    answer = _answer(done.stdout)
    if "error" in answer:
        raise InvalidInput(str(answer["error"]))
    if done.returncode != 0 or not answer:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise TimerFailed(
            f"{what}: the process ended with code {done.returncode} ({last}); a negative code is a signal, -9 most "
            "often means out of memory"
        )
    return answer


def environment() -> Dict[str, str]:
    """Return the environment with the folder that holds this package on the child's path, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root + (os.pathsep + known if known else "")}


def _answer(stdout: str) -> Dict[str, Any]:
    lines = stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
