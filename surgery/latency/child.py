"""Child processes that answer one request, each a JSON object. Python 3.8, standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Sequence

from surgery.errors import InvalidInput, SurgeryError

TIMEOUT_S = 3600.0
SERVER = ("-P", "-m", "surgery.latency.child")
"""The program that serves `answer` of a module. -P keeps the working folder off its path: it may hold packages of our
names."""


class TimerFailed(SurgeryError):
    """A measuring child process died or timed out."""


def ask(program: Sequence[str], request: Mapping[str, Any], what: str) -> Dict[str, Any]:
    """Return the answer of a new Python process that calls `serve`.

    Args:
        program: arguments of the interpreter, without the request.
        request: JSON values.
        what: description of the process, for messages.

    Raises:
        InvalidInput: the child raised it.
        TimerFailed: the child died, for instance out of memory, or timed out.
    """
    command = [sys.executable, *program, json.dumps(request)]
    how: Dict[str, Any] = {"env": environment(), "capture_output": True, "text": True, "timeout": TIMEOUT_S}
    try:
        done = subprocess.run(command, check=False, **how)
    except subprocess.TimeoutExpired as error:
        raise TimerFailed(f"{what}: the process gave no answer in {TIMEOUT_S:.0f} s") from error
    try:
        answer: Dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise TimerFailed(
            f"{what}: the process ended with code {done.returncode} ({last}); a negative code is a signal, -9 most "
            "often means out of memory"
        ) from None
    if "error" in answer:
        raise InvalidInput(str(answer["error"]))
    return answer


def serve(answer: Callable[[Dict[str, Any]], Dict[str, Any]], request: str) -> int:
    """Print the answer to a request of `ask`; returns the exit code."""
    try:
        print(json.dumps(answer(json.loads(request))))
    except InvalidInput as error:
        print(json.dumps({"error": str(error)}))
        return error.exit_code
    return 0


def environment() -> Dict[str, str]:
    """Return the environment with this package's parent folder on the child's path, whether installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root + (os.pathsep + known if known else "")}


if __name__ == "__main__":
    sys.exit(serve(import_module(sys.argv[1]).answer, sys.argv[2]))
