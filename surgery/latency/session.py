"""Settings of ONNX Runtime sessions, random inputs, time by operator, load time, memory, and the machine."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import cpuinfo
import numpy as np
import onnxruntime
import psutil
from numpy.typing import NDArray

from surgery.core import explained, scratch_folder
from surgery.errors import InvalidInput
from surgery.latency.probe import (
    PROVIDER,
    available_cores,
    open_session,
    processor,
    profiled,
    random_inputs,
    require_cores,
    session_options,
)
from surgery.latency.ratio import SERVER, ask

WARM_RUNS, PROFILED_RUNS, FRESH_RUNS = 3, 20, 5


@dataclass(frozen=True, slots=True)
class Settings:
    """Session settings.

    Raises:
        InvalidInput: a value is out of range; more threads than this process has cores; a provider that this build of
            ONNX Runtime does not have.
    """

    batch: int = 1  # length of the batch axis: axis 0 if dynamic, and any axis named `batch`
    threads: int = 1  # intra-op; operators run sequentially
    seed: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # for dynamic axes other than the batch
    provider: str = PROVIDER

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InvalidInput(f"{name}={value!r}: give a whole number of {least} or more")
        require_cores(self.threads, f"threads={self.threads}")
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


def inputs_of(
    session: onnxruntime.InferenceSession, path: Path, settings: Settings, runs: int = 1
) -> dict[str, NDArray[Any]]:
    """Return random inputs on which the session has run; models with the same inputs get the same values.

    Raises:
        InvalidInput: the session does not run; an axis has no size, a shape contradicts the model, or an input is not
            a numeric tensor.
    """
    shapes = _shapes(session, path, settings)
    inputs = random_inputs(session, str(path), shapes, settings.seed)
    with explained(f"{path} does not run on inputs of shape {shapes}"):
        for _ in range(runs):
            session.run(None, inputs)
    return inputs


def _shapes(session: onnxruntime.InferenceSession, path: Path, settings: Settings) -> dict[str, tuple[int, ...]]:
    inputs = session.get_inputs()
    examples = _example_shapes(session.get_modelmeta().custom_metadata_map.get("example_shapes", "{}"))
    shapes = {item.name: _shape(item.name, item.shape, path, settings, examples.get(item.name)) for item in inputs}
    if inputs and settings.batch not in {shape[0] for shape in shapes.values() if shape}:
        first = inputs[0].name
        raise InvalidInput(
            f"{path}: input '{first}' has the fixed shape {shapes[first]}, so it cannot run at batch={settings.batch}; "
            "ask for its own batch or export it with a dynamic batch axis"
        )
    return shapes


def _example_shapes(text: str) -> dict[str, list[int]]:
    """Return the shapes that `exporters.onnx` wrote into a file; none if they are damaged."""
    with suppress(ValueError, AttributeError, RecursionError):
        found = json.loads(text).items()
        return {name: shape for name, shape in found if all(type(size) is int and size > 0 for size in shape)}
    return {}


def by_operator(path: Path, settings: Settings) -> Mapping[str, float]:
    """Return operator type → median milliseconds per run, in descending order, from ONNX Runtime's profiler.

    Operators are those executed, after ONNX Runtime's optimisations. Profiling adds overhead, so that these figures are
    suitable for shares only. Errors are those of `inputs_of`.
    """
    with scratch_folder() as folder:
        session = settings.open(path, profile=str(folder / "profile"))
        inputs_of(session, path, settings, WARM_RUNS + PROFILED_RUNS)
        each = [Counter[str]() for _ in range(PROFILED_RUNS)]
        for total, run in zip(each, profiled(session)[WARM_RUNS:], strict=True):
            for operator, _, microseconds in run:
                total[operator] += microseconds
    names = {name for run in each for name in run}
    found = {name: float(np.median([run[name] / 1e3 for run in each])) for name in names}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def fresh_process(path: Path, settings: Settings) -> dict[str, Any]:
    """Load and run the model a few times in a new process, and return the last three fields of a row.

    The file is usually in the operating system's cache. Errors are those of `inputs_of` and `ask`.
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
    inputs_of(session, path, settings, FRESH_RUNS)
    return {"load_ms": load_ms, "peak_memory_bytes": peak_bytes(), "floor_memory_bytes": floor}


def peak_bytes() -> int:
    """Return this process's largest resident set so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its maximum survives exec, so the child of a large process would report its parent's.
        found = re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="ascii", errors="replace"))
        if found:
            return int(found[1]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)  # Windows
    import resource  # absent on Windows

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


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
        where = f"{path}: axis {axis} of input '{name}' is"
        if isinstance(size, int):
            if given is not None and size != given[axis]:
                raise InvalidInput(f"{where} {size} in the model, {given[axis]} in the given shape")
            sizes.append(size)
        elif axis == 0 or size == "batch":
            sizes.append(settings.batch)
        elif len(known) == len(declared):
            sizes.append(known[axis])
        else:
            instead = f"give shapes={{'{name}': (...)}}, or --input-shape {name}=N,C,H,W on the command line"
            raise InvalidInput(f"{where} dynamic ({size or 'unnamed'}); {instead}")
    return tuple(sizes)


# The machine. --------------------------------------------------------------------------------------------------------

# Instruction sets that select ONNX Runtime kernels, by their names in processors and operating systems.
_X86 = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
_MATRIX = ("amx_int8", "amx_bf16", "i8mm", "bf16", "sve", "sve2", "neon")
_ALIASES = {"avx512vnni": "avx512_vnni", "asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16", "fphp": "fp16"}
_INSTRUCTION_SETS = {**{name: name for name in (*_X86, *_MATRIX)}, **_ALIASES}


def describe(threads: int, provider: str = PROVIDER) -> dict[str, Any]:
    """Return runtime, provider, session options, CPU model, instruction sets and cores, as plain JSON values."""
    brand, flags = _processor()
    names = ("intra_op_num_threads", "inter_op_num_threads", "execution_mode", "graph_optimization_level")
    options = {name: getattr(session_options(threads), name) for name in names}
    runtime = {"onnxruntime": onnxruntime.__version__, "provider": provider, "threads": threads}
    sets = list(dict.fromkeys(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags))
    return {
        **runtime,
        "session_options": {name: getattr(value, "name", value) for name, value in options.items()},
        **{"cpu": brand, "architecture": platform.machine(), "instruction_sets": sets, "cores": available_cores()},
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": int(psutil.virtual_memory().total),
        **{"system": f"{platform.system()} {platform.release()}", "python": platform.python_version()},
    }


@cache
def _processor() -> tuple[str, frozenset[str]]:
    """Return the processor's name and instruction sets: from the system, else by py-cpuinfo, which takes a second."""
    brand, flags = processor()  # Linux on ARM reports instruction sets and no name
    if not flags or brand in ("unknown", platform.processor()):
        found = cpuinfo.get_cpu_info()
        brand, flags = found.get("brand_raw") or brand, found.get("flags") or flags
    return brand, frozenset(flags)


def clocks() -> tuple[float, float]:
    """Return wall time and the processor time used so far by all processes but this one, in seconds."""
    times, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    # `guest` time is already contained in `user`.
    busy = sum(times.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    return perf_counter(), busy - own.user - own.system


def share_of_others(before: tuple[float, float]) -> float:
    """Return the share of the machine that other processes have used since `clocks` returned `before`, from 0 to 1."""
    elapsed_s, used_s = (now - then for now, then in zip(clocks(), before, strict=True))
    return min(1.0, max(0.0, used_s / (max(elapsed_s, 1e-9) * (psutil.cpu_count() or 1))))
