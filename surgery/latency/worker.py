"""Load time and peak memory of one model, measured in a fresh process.

`fresh_process` starts ``python -m surgery.latency.worker``, which reports:

* load time: wall time to create the session (read, parse, optimise, pack weights), usually with the file in the
operating system's cache;
* peak memory: the peak resident set of the process in bytes, up to the end of a few runs. It includes the interpreter,
NumPy and ONNX Runtime; the resident set just before the session was created is reported separately as the floor.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import psutil

from surgery.errors import InvalidInput
from surgery.latency.child import ask
from surgery.latency.session import Settings, model_file, open_session, random_inputs, run_once

RUNS = 5
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class FirstRuns:
    """Measurements of a fresh process; see the module's description."""

    load_ms: float
    peak_memory_bytes: int
    floor_memory_bytes: int


def fresh_process(path: Path, settings: Settings) -> FirstRuns:
    """Load and run the model in a new process and return the measurements.

    Raises:
        InvalidInput: the model cannot be loaded or run.
        TimerFailed: the process died, or gave no answer in 15 minutes.
    """
    request = json.dumps({"path": str(path.resolve()), **asdict(settings)})
    # -P keeps the working folder off the child's path, since it may contain folders with our packages' names.
    arguments = ["-P", "-m", "surgery.latency.worker", request]
    return FirstRuns(**ask(arguments, f"memory of {path}", timeout_s=TIMEOUT_S))


def main(request: str) -> int:
    """Serve one request, as JSON on standard output; returns the exit code."""
    fields = json.loads(request)
    path = Path(fields.pop("path"))
    try:
        print(json.dumps(asdict(_measure(path, Settings.from_json(fields)))))
    except InvalidInput as error:
        print(json.dumps({"error": str(error)}))
        return 2
    return 0


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
