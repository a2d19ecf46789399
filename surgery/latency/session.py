"""Settings of ONNX Runtime sessions, random inputs, time by operator, load time and memory."""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
import psutil
from numpy.typing import NDArray

from surgery.core import explained
from surgery.errors import InvalidInput
from surgery.latency.child import SERVER, ask
from surgery.latency.probe import PROVIDER, available_cores, open_session, profiled, random_inputs

WARM_RUNS, PROFILED_RUNS, FRESH_RUNS = 3, 20, 5


@dataclass(frozen=True, slots=True)
class Settings:
    """Session settings.

    Attributes:
        batch: length of the batch axis: axis 0 if dynamic, and any axis named `batch`.
        threads: `intra_op_num_threads`; operators run sequentially.
        seed: seed of the random inputs.
        shapes: input name → whole shape, for inputs with dynamic axes other than the batch axis.
        provider: execution provider of ONNX Runtime.

    Raises:
        InvalidInput: a value is out of range; more threads than this process has cores; a provider that this build of
            ONNX Runtime does not have.
    """

    batch: int = 1
    threads: int = 1
    seed: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    provider: str = PROVIDER

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InvalidInput(f"{name}={value!r}: give a whole number of {least} or more")
        if self.threads > available_cores():
            raise InvalidInput(
                f"threads={self.threads}: this process may use {available_cores()} cores, and threads that share one "
                "would measure waiting; ask for fewer"
            )
        if self.provider not in (known := onnxruntime.get_available_providers()):
            raise InvalidInput(
                f"provider '{self.provider}' is not in this build of ONNX Runtime, which has {', '.join(known)}; "
                "choose one of these, or install the build that has it"
            )
        for name, shape in self.shapes.items():
            if not all(isinstance(size, int) and size > 0 for size in shape):
                raise InvalidInput(f"input shape {tuple(shape)} of '{name}': every size must be a whole number above 0")

    def open(self, path: Path, profile: str = "") -> onnxruntime.InferenceSession:
        """Return a session; `profile` is the path prefix of an operator profile; errors are those of `open_session`."""
        return open_session(str(path), self.threads, provider=self.provider, profile=profile)


def inputs_of(session: onnxruntime.InferenceSession, path: Path, settings: Settings) -> dict[str, NDArray[Any]]:
    """Return one random array per input of the session; models with the same inputs get the same values.

    Raises:
        InvalidInput: an axis has no size, a shape contradicts the model, or an input is not a numeric tensor.
    """
    inputs = session.get_inputs()
    exported = session.get_modelmeta().custom_metadata_map.get("example_shapes", "{}")  # as `exporters.onnx` writes it
    examples = json.loads(exported)
    shapes = {item.name: _shape(item.name, item.shape, path, settings, examples.get(item.name)) for item in inputs}
    if inputs and settings.batch not in {shape[0] for shape in shapes.values() if shape}:
        first = inputs[0].name
        raise InvalidInput(
            f"{path}: input '{first}' has the fixed shape {shapes[first]}, so it cannot run at batch={settings.batch}; "
            "ask for its own batch or export it with a dynamic batch axis"
        )
    return random_inputs(session, str(path), shapes, settings.seed)


def run_once(session: onnxruntime.InferenceSession, inputs: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Run the session and discard the outputs; raises InvalidInput if the model rejects its inputs."""
    shapes = {name: value.shape for name, value in inputs.items()}
    with explained(f"{path} does not run on inputs of shape {shapes}"):
        session.run(None, inputs)


def by_operator(path: Path, settings: Settings) -> Mapping[str, float]:
    """Return operator type → median milliseconds per run, in descending order, from ONNX Runtime's profiler.

    Operators are those executed, after ONNX Runtime's fusions and other optimisations. Profiling adds overhead, so that
    these figures are suitable for shares only; latencies are measured by the timer.

    Raises:
        InvalidInput: the file cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        session = settings.open(path, profile=str(Path(folder) / "profile"))
        inputs = inputs_of(session, path, settings)
        for _ in range(WARM_RUNS + PROFILED_RUNS):
            run_once(session, inputs, path)
        each = [Counter[str]() for _ in range(PROFILED_RUNS)]
        for total, run in zip(each, profiled(session)[WARM_RUNS:], strict=True):
            for operator, _, microseconds in run:
                total[operator] += microseconds
    names = {name for run in each for name in run}
    found = {name: float(np.median([run[name] / 1e3 for run in each])) for name in names}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def fresh_process(path: Path, settings: Settings) -> dict[str, Any]:
    """Load and run the model in a new process, and return JSON values.

    `load_ms` is the wall time to create the session, usually with the file in the operating system's cache;
    `peak_memory_bytes` the peak resident set up to the end of a few runs, with the interpreter, NumPy and ONNX Runtime;
    `floor_memory_bytes` the resident set just before the session was created.

    Raises:
        InvalidInput: the model cannot be loaded or run.
        TimerFailed: the process died, or gave no answer.
    """
    request = {"path": str(path.resolve()), **asdict(settings)}
    return ask((*SERVER, "surgery.latency.session"), request, f"memory of {path}")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measure in this process, and return what `fresh_process` does."""
    path = Path(request.pop("path"))
    settings = Settings(**request)
    floor = int(psutil.Process().memory_info().rss)
    start = perf_counter()
    session = settings.open(path)
    load_ms = (perf_counter() - start) * 1e3
    inputs = inputs_of(session, path, settings)
    for _ in range(FRESH_RUNS):
        run_once(session, inputs, path)
    return {"load_ms": load_ms, "peak_memory_bytes": peak_bytes(), "floor_memory_bytes": floor}


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


def _shape(
    name: str, declared: list[int | str | None], path: Path, settings: Settings, example: list[int] | None
) -> tuple[int, ...]:
    given = settings.shapes.get(name)
    known = given or example or ()
    if given is not None and len(given) != len(declared):
        raise InvalidInput(
            f"{path}: input '{name}' has {len(declared)} axes {declared}, the given shape {given} has {len(given)}"
        )
    sizes: list[int] = []
    for axis, size in enumerate(declared):
        if isinstance(size, int):
            if given is not None and size != given[axis]:
                raise InvalidInput(
                    f"{path}: axis {axis} of input '{name}' is {size} in the model, {given[axis]} in the given shape"
                )
            sizes.append(size)
        elif axis == 0 or size == "batch":
            sizes.append(settings.batch)
        elif len(known) == len(declared):
            sizes.append(known[axis])
        else:
            raise InvalidInput(
                f"{path}: axis {axis} of input '{name}' is dynamic ({size or 'unnamed'}); "
                f"give shapes={{'{name}': (...)}}, or --input-shape {name}=N,C,H,W on the command line"
            )
    return tuple(sizes)
