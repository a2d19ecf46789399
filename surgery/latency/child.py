"""Child processes that run one measurement and print a line of JSON. Python 3.8, standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Sequence

from surgery.errors import InvalidInput, SurgeryError


class TimerFailed(SurgeryError):
    """A measuring child process died or timed out."""


def ask(arguments: Sequence[str], what: str, *, timeout_s: float) -> Dict[str, Any]:
    """Run Python in a new process and return the JSON object on the last line of its output.

    Args:
        arguments: arguments of the interpreter.
        what: description of the process, for messages.
        timeout_s: timeout in seconds.

    Raises:
        InvalidInput: the process printed ``{"error": ...}``.
        TimerFailed: the process died, for instance out of memory, or timed out.
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
    """Return the environment with this package's parent folder on the child's path, whether installed or not."""
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
