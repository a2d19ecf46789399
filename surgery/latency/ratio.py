"""The latency of one ONNX file relative to another's, measured in fresh processes, here and on devices.

Times depend on the memory layout of the process, so that they vary more between processes than between blocks of one. A
budget is therefore compared with the median of several processes, each of which times blocks of both files in shuffled
order. A process answers one request; both are JSON objects. Python 3.8, numpy and onnxruntime.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from surgery.core import explained
from surgery.errors import InvalidInput, SurgeryError
from surgery.latency.fill import Progress
from surgery.latency.probe import BLOCK_MS, MIN_BLOCK_RUNS, block_ms, open_session, random_inputs

PROCESSES = 3
ROUNDS, FEWEST_ROUNDS, LONGEST_S = 12, 3, 20.0
"""Blocks of each file in one process; fewer if they take longer than that."""
TIMEOUT_S = 3600.0
SERVER = ("-P", "-m", "surgery.latency.ratio")
"""The program that serves `answer` of a module. -P keeps the working folder off its path: it may hold packages of our
names."""
PROGRAM = (*SERVER, "surgery.latency.ratio")


@dataclass(frozen=True)
class Ratio:
    """Measurements of several processes: (compact latency / dense latency, dense ms, compact ms) of each."""

    processes: Tuple[Tuple[float, float, float], ...]

    @property
    def ratios(self) -> Tuple[float, ...]:
        """The ratio of each process."""
        return tuple(ratio for ratio, _, _ in self.processes)

    @property
    def value(self) -> float:
        """Median of the ratios."""
        return median(self.ratios)

    @property
    def dense_ms(self) -> float:
        """Median latency of the dense file."""
        return median(ms for _, ms, _ in self.processes)

    @property
    def compact_ms(self) -> float:
        """Median latency of the compact file."""
        return median(ms for _, _, ms in self.processes)


def measure(
    dense: Path,
    compact: Path,
    shapes: Mapping[str, Sequence[int]],
    *,
    threads: int = 1,
    seeds: Sequence[int] = range(PROCESSES),
    rounds: int = ROUNDS,
    program: Sequence[str] = PROGRAM,
    progress: Optional[Progress] = None,
) -> Ratio:
    """Return the latency of `compact` relative to `dense`, two ONNX files with inputs of these shapes.

    There is one process per seed, which determines the order of its blocks. `program` are the interpreter's arguments
    for a process that serves `answer`. Errors are those of `ask`.
    """
    found = []
    files = [str(dense.resolve()), str(compact.resolve())]
    for k, seed in enumerate(seeds):
        if progress is not None:
            progress("time compact against dense", k / len(seeds))
        request = {"files": files, "threads": threads, "shapes": dict(shapes), "rounds": rounds, "seed": seed}
        times = ask(program, request, f"latency of {compact}")
        found.append((times["ratio"], times["dense_ms"], times["compact_ms"]))
    return Ratio(tuple(found))


def answer(request: Dict[str, Any]) -> Dict[str, Any]:
    """Time blocks of both files in shuffled order, with one session alive at a time."""
    files, threads, shapes = request["files"], request["threads"], request["shapes"]
    runs = [max(MIN_BLOCK_RUNS, math.ceil(BLOCK_MS / _block(f, threads, shapes, MIN_BLOCK_RUNS))) for f in files]
    rng = np.random.default_rng(request["seed"])
    times: List[List[float]] = [[], []]
    end = perf_counter() + LONGEST_S
    for done in range(request["rounds"]):
        if done >= FEWEST_ROUNDS and perf_counter() > end:
            break
        for k in rng.permutation(2):
            times[k].append(_block(files[k], threads, shapes, runs[k]))
    dense, compact = times
    ratio = median(c / d for c, d in zip(compact, dense))
    return {"ratio": ratio, "dense_ms": median(dense), "compact_ms": median(compact)}


def _block(path: str, threads: int, shapes: Mapping[str, Sequence[int]], runs: int) -> float:
    """Return the median milliseconds of some runs, in a temporary session."""
    session = open_session(path, threads)
    inputs = random_inputs(session, path, shapes)
    with explained(f"{path} does not run"):
        return float(np.median(block_ms(session, inputs, runs)))


# Processes. ----------------------------------------------------------------------------------------------------------


class TimerFailed(SurgeryError):
    """A measuring child process died or timed out."""


def ask(program: Sequence[str], request: Mapping[str, Any], what: str) -> Dict[str, Any]:
    """Return the answer of a new Python process that calls `serve`; `what` describes it in messages.

    Raises:
        InvalidInput: the child raised it, for instance for a file that cannot be loaded or run.
        TimerFailed: the child died, for instance out of memory, or timed out.
    """
    command = [sys.executable, *program, json.dumps(request)]
    try:
        done = subprocess.run(
            command, check=False, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
        )
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
