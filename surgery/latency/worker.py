"""Load time and peak memory of one model, from a fresh process that does nothing else.

`fresh_process` starts ``python -m surgery.latency.worker`` and reads one line of JSON from it. What is reported:

* load time: wall time to create the session (read, parse, optimise, pack weights), the file being wherever the
  operating system has it, usually in its cache;
* peak memory: the process's own largest resident set, in bytes, up to the end of a few runs. It contains the
  interpreter, NumPy and ONNX Runtime; nothing is subtracted. Their share is reported beside it as the floor: what was
  resident just before the session was created.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from surgery.errors import InvalidInput, SurgeryError
from surgery.latency.session import Settings, model_file, open_session, random_inputs, run_once

RUNS = 5
TIMEOUT_S = 900.0


class TimerFailed(SurgeryError):
    """The child process that loads a model died or did not answer."""


@dataclass(frozen=True, slots=True)
class FirstRuns:
    """What a fresh process saw: see the module's description for what each figure is."""

    load_ms: float
    peak_memory_bytes: int
    floor_memory_bytes: int


def fresh_process(path: Path, settings: Settings) -> FirstRuns:
    """Load and run the model in a new process and return what that took.

    Raises:
        InvalidInput: the model cannot be loaded or run.
        TimerFailed: the process died, out of memory for instance, or gave no answer in 15 minutes.
    """
    request = json.dumps({"path": str(path.resolve()), **asdict(settings)})
    # -P keeps the working folder off the child's path: users have `benchmarks` folders of their own.
    command = [sys.executable, "-P", "-m", "surgery.latency.worker", request]
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimerFailed(f"{path}: the process measuring its memory gave no answer in {TIMEOUT_S:.0f} s") from error
    answer = answer_of(done.stdout)
    if "error" in answer:
        raise InvalidInput(str(answer["error"]))
    if done.returncode != 0 or "load_ms" not in answer:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise TimerFailed(
            f"{path}: the process measuring its memory ended with code {done.returncode} ({last}); "
            "a negative code is a signal, -9 most often means out of memory"
        )
    return FirstRuns(**answer)


def main(request: str) -> int:
    """Serve one request, as JSON on standard output; returns the exit code."""
    fields = json.loads(request)
    path = Path(fields.pop("path"))
    shapes = {name: tuple(shape) for name, shape in fields.pop("shapes").items()}
    try:
        answer: dict[str, object] = asdict(_measure(path, Settings(shapes=shapes, **fields)))
    except InvalidInput as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
    return 2 if "error" in answer else 0


def _measure(path: Path, settings: Settings) -> FirstRuns:
    model_file(path)
    floor = int(psutil.Process().memory_info().rss)
    start = perf_counter()
    session = open_session(path, settings)
    load_ms = (perf_counter() - start) * 1e3
    inputs = random_inputs(session, path, settings)
    for _ in range(RUNS):
        run_once(session, inputs, path)
    return FirstRuns(load_ms, peak_bytes(), floor)


def peak_bytes() -> int:
    """Return this process's largest resident set so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its maximum survives exec, so the child of a large process would report its parent's.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)  # Windows
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def environment() -> dict[str, str]:
    """Return the environment with the folder that holds this package on the child's path, installed or not."""
    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root + (os.pathsep + known if known else "")}


def answer_of(stdout: str) -> dict[str, Any]:
    """Return the JSON object on the last line that a process printed; empty where there is none."""
    lines = stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
