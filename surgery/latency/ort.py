"""Latency in ONNX Runtime, measured as in serving: warm, with one model at a time. Needs no torch.

A block creates a session, warms it up, times some runs and destroys it. A round is one block of each model, in shuffled
order; it gives one ratio of block medians per model. Rounds disturbed by other processes are excluded, if enough others
remain. The baseline's file is timed a second time: if its ratio differs from 1, the figures are called unreliable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from surgery.core import file_bytes
from surgery.errors import InvalidInput
from surgery.latency.fill import Progress
from surgery.latency.probe import BLOCK_MS, MIN_BLOCK_RUNS, block_ms
from surgery.latency.session import Settings, clocks, describe, fresh_process, inputs_of, share_of_others
from surgery.report import Table, figure, print_parts, ratio, size

if TYPE_CHECKING:
    from rich.console import Console

AA_TOLERANCE = 0.02
MIN_ROUNDS = 12  # too few rounds for a bootstrap otherwise
TOLERATED_SHARE = 0.1
P99_RUNS = 1000
RESAMPLES = 2000
CONTROL = "the baseline again"


@dataclass(frozen=True, slots=True)
class Limits:
    """Stopping rule of a measurement, and length of a block.

    Rounds end when every ratio's 95 % interval is narrower than `width` (relative to the ratio) and the A/A ratio is
    within 1.00 ± 0.02, or at `max_runs` of any model, or after `max_seconds`. At least twelve rounds are run, even if
    they take up to four times as long, since fewer give no reliable interval. A block takes `block_ms` after warm-up,
    and at least three runs. Raises InvalidInput for a value out of range.
    """

    max_runs: int = 2000
    max_seconds: float = 45.0
    block_ms: float = BLOCK_MS
    width: float = 0.03

    def __post_init__(self) -> None:
        if not isinstance(self.max_runs, int) or self.max_runs < MIN_BLOCK_RUNS:
            raise InvalidInput(f"max_runs={self.max_runs!r}: give a whole number of {MIN_BLOCK_RUNS} or more")
        for name in ("max_seconds", "block_ms", "width"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name}={getattr(self, name)!r}: give a number above 0")


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One model's figures; those of a fresh process are None if not requested."""

    name: str
    p50_ms: float  # of all timed runs
    p90_ms: float
    p99_ms: float | None  # None under 1000 runs
    quantiles_ms: tuple[float, ...]  # from the shortest run to the longest in steps of five hundredths
    throughput_per_s: float  # batch items per second, from the mean latency
    runs: int
    ratio: Interval  # latency relative to the baseline's, below 1 is faster
    speedup: Interval
    file_bytes: int  # including external weights
    load_ms: float | None = None  # time to create the session in a fresh process
    peak_memory_bytes: int | None = None  # peak resident set of that process, including interpreter and runtime
    floor_memory_bytes: int | None = None  # resident set before the model was loaded


@dataclass(frozen=True, slots=True)
class Timing:
    """Result of `time`.

    Attributes:
        rows: one per model, in the order given.
        aa: the baseline against its own copy in separate sessions; None if not requested.
        reliable: whether `aa` lies within 1.00 ± 0.02, on enough rounds; `why` is the reason.
        rounds: number of rounds used, each with one block of every model.
        stopped: the rule that ended the measurement.
        environment: runtime, processor, session options; `other_processes`, the share of the machine used by other
            processes in these rounds; `disturbed_rounds`, the number of rounds in which it was above a tenth.
        settings: batch, seed and limits as given.
    """

    rows: tuple[Row, ...]
    baseline: str
    aa: Interval | None
    reliable: bool
    why: str
    rounds: int
    stopped: str
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]

    def row(self, name: str) -> Row:
        """Return the row called `name`; raises KeyError if there is none."""
        return {row.name: row for row in self.rows}[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


def time(
    models: Mapping[str, str | Path],
    settings: Settings | None = None,
    limits: Limits | None = None,
    *,
    baseline: str | None = None,
    aa: bool = True,
    fresh: bool = True,
    progress: Progress | None = None,
) -> Timing:
    """Time ONNX models against each other.

    Args:
        models: name → ONNX file.
        settings: batch, threads, provider, seed and input shapes; by default batch 1 on one thread of the CPU.
        limits: limits on runs, seconds and interval widths.
        baseline: the model ratios refer to; the first by default.
        aa: also time a copy of the baseline, as a test of the timer.
        fresh: measure load time and peak memory, in one child process per model.
        progress: called with the current stage and the completed fraction (0 to 1). It must not leave work running in
            other threads, which would disturb the measurement.

    Raises:
        InvalidInput: a file cannot be read, loaded or run, or there is no such baseline.
        TimerFailed: a child process died.
    """
    settings, limits, report = settings or Settings(), limits or Limits(), progress or (lambda stage, fraction: None)
    if not models:
        raise InvalidInput("no models to time: give at least one name and ONNX file")
    base = next(iter(models)) if baseline is None else baseline
    if base not in models:
        raise InvalidInput(f"baseline '{base}' is none of the models: {', '.join(models)}")
    timed = {name: _pilot(Path(path), settings, limits) for name, path in models.items()}
    known = {name for model in timed.values() for name in model.inputs}
    if unknown := sorted(settings.shapes.keys() - known):
        raise InvalidInput(f"shapes name {', '.join(unknown)}, but the inputs are {', '.join(sorted(known))}")
    firsts: dict[str, dict[str, Any]] = {}
    for name in models if fresh else ():
        report(f"loading {name}", 0.0)
        firsts[name] = fresh_process(timed[name].path, settings)
    if aa:
        timed[CONTROL] = replace(timed[base], blocks=[])
    found = _Measurement(timed, base, settings, limits)
    stopped = found.run(report)
    rows = tuple(_row(name, found, firsts.get(name, {})) for name in models)
    control, asked = found.ratio(CONTROL) if aa else None, {**asdict(settings), **asdict(limits)}
    others = {"other_processes": round(found.others, 3), "disturbed_rounds": len(found.shares) - len(found.undisturbed)}
    environment = {**describe(settings.threads, settings.provider), **others}
    return Timing(rows, base, control, *_verdict(found), len(found.used), stopped, environment, asked)


@dataclass(slots=True)
class _Model:
    """A file, its inputs, and its blocks of run times in milliseconds so far, each (block_runs,)."""

    path: Path
    inputs: dict[str, NDArray[Any]]
    block_runs: int
    blocks: list[NDArray[np.float64]] = field(default_factory=list)


def _pilot(path: Path, settings: Settings, limits: Limits) -> _Model:
    """Create a model's inputs and determine the runs per block."""
    session = settings.open(path)
    inputs = inputs_of(session, path, settings)
    runs = math.ceil(limits.block_ms / float(np.median(block_ms(session, inputs, MIN_BLOCK_RUNS))))
    most = limits.max_runs // 100  # so that there are at least 100 blocks
    return _Model(path, inputs, max(MIN_BLOCK_RUNS, min(most, runs)))


@dataclass(slots=True)
class _Measurement:
    """Rounds of blocks of all models, the control's last, and in each the share of the machine that others used."""

    models: Mapping[str, _Model]
    base: str
    settings: Settings
    limits: Limits
    shares: list[float] = field(default_factory=list)

    @property
    def undisturbed(self) -> list[int]:
        """Rounds in which other processes, which share caches and memory, used a tenth of the machine at most."""
        return [i for i, share in enumerate(self.shares) if share <= TOLERATED_SHARE]

    @property
    def used(self) -> list[int]:
        """Rounds to use: the undisturbed ones, or all if those are too few."""
        return self.undisturbed if len(self.undisturbed) >= MIN_ROUNDS else list(range(len(self.shares)))

    @property
    def others(self) -> float:
        """Mean share of the machine used by other processes."""
        return float(np.mean([self.shares[i] for i in self.used]))

    def ratio(self, name: str) -> Interval:
        """Return a model's latency relative to the baseline's."""
        if name == self.base:
            return Interval(1.0, 1.0, 1.0)
        ours, theirs = ([np.median(self.models[k].blocks[i]) for i in self.used] for k in (name, self.base))
        return paired_ratio(ours, theirs, seed=self.settings.seed)

    def run(self, report: Progress) -> str:
        """Run rounds until a stopping rule applies; returns its description."""
        start, stop = perf_counter(), ""
        models = list(self.models.values())
        for order in block_order(len(models), self.settings.seed):
            before = clocks()
            for model in (models[k] for k in order):
                model.blocks.append(block_ms(self.settings.open(model.path), model.inputs, model.block_runs))
            self.shares.append(share_of_others(before))
            elapsed_s, done = perf_counter() - start, len(self.shares)
            runs = max(done * model.block_runs for model in models) / self.limits.max_runs
            report("timing", min(0.99, max(runs, min(elapsed_s / self.limits.max_seconds, done / MIN_ROUNDS))))
            if stop := self._stop(done, elapsed_s):
                break
        report("timing", 1.0)
        return stop

    def _stop(self, done: int, elapsed_s: float) -> str:
        limits = self.limits
        # The bootstrap becomes slower and its result more stable with more rounds, so check less and less often.
        if done >= MIN_ROUNDS and done % (1 + done // 24) == 0:
            ratios = {name: self.ratio(name) for name in self.models}
            # Narrow but biased: more rounds may average a disturbance out.
            biased = CONTROL in ratios and abs(ratios[CONTROL].value - 1.0) > AA_TOLERANCE
            if not biased and all((r.high - r.low) / r.value <= limits.width for r in ratios.values()):
                return f"every interval under {limits.width:.1%}"
        if any((done + 1) * model.block_runs > limits.max_runs for model in self.models.values()):
            return f"{limits.max_runs} runs of a model"
        late = elapsed_s > limits.max_seconds and done >= MIN_ROUNDS
        if late or (elapsed_s > 4 * limits.max_seconds and done >= 3):
            return f"{limits.max_seconds:g} s of measuring"
        return ""


def block_order(models: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of the models for each round, indefinitely; determined by the seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield rng.permutation(models).tolist()


def paired_ratio(model_ms: Sequence[float], baseline_ms: Sequence[float], *, seed: int) -> Interval:
    """Return the model's latency relative to the baseline's, from block medians of the same rounds, each (R,).

    Each round gives one ratio, so that slowdowns of a whole round cancel. The estimate is the interquartile mean of the
    log ratios: robust to a quarter of disturbed rounds on either side, and smoother under resampling than a median. The
    interval is a percentile bootstrap over rounds.
    """
    logs = np.log(np.asarray(model_ms, float)) - np.log(np.asarray(baseline_ms, float))  # (R,)
    picks = np.random.default_rng(seed).integers(0, logs.size, (RESAMPLES, logs.size))
    low, high = np.percentile(_interquartile_mean(logs[picks]), [2.5, 97.5])
    return Interval(*(float(np.exp(x)) for x in (_interquartile_mean(logs), low, high)))


def _interquartile_mean(values: NDArray[np.float64]) -> Any:
    length = values.shape[-1]
    return np.sort(values, axis=-1)[..., length // 4 : length - length // 4].mean(axis=-1)


def _row(name: str, found: _Measurement, first: Mapping[str, Any]) -> Row:
    model = found.models[name]
    runs_ms = np.concatenate([model.blocks[i] for i in found.used])
    ratio = found.ratio(name)
    p50, p90, p99 = (float(p) for p in np.percentile(runs_ms, [50, 90, 99]))
    quantiles = tuple(float(q) for q in np.percentile(runs_ms, np.arange(0, 101, 5)))
    tail, rate = p99 if runs_ms.size >= P99_RUNS else None, found.settings.batch * 1e3 / float(runs_ms.mean())
    speedup = Interval(1.0 / ratio.value, 1.0 / ratio.high, 1.0 / ratio.low)
    figures = (p50, p90, tail, quantiles, rate, int(runs_ms.size), ratio, speedup, file_bytes(model.path))
    return Row(name, *figures, **first)


def _verdict(found: _Measurement) -> tuple[bool, str]:
    if CONTROL not in found.models:
        return False, "the timer was not tested against a copy of the baseline (aa=False)"
    aa, rounds = found.ratio(CONTROL), len(found.used)
    came_out = f"A/A ratio (the baseline against its own copy) {aa.value:.3f} [{aa.low:.3f}, {aa.high:.3f}]"
    others = f"; other processes used {found.others:.0%} of the machine" if found.others > 0.02 else ""
    if rounds < MIN_ROUNDS:
        return False, f"only {rounds} of the {MIN_ROUNDS} required rounds were run: allow more runs or time{others}"
    if abs(aa.value - 1.0) > AA_TOLERANCE:
        return False, f"{came_out}, outside 1.00 ± {AA_TOLERANCE}{others}"
    if max(aa.high - 1.0, 1.0 - aa.low) > 2 * AA_TOLERANCE:
        return False, f"{came_out}, an interval too wide to judge by{others}: allow more runs or more time"
    return True, f"{came_out}{others}"


# `surgery bench`. ----------------------------------------------------------------------------------------------------

COLUMNS = (
    *("file", "p50 ms", "p90 ms", "p99 ms", "items /s", "time, relative", "95% interval"),
    *("load ms", "peak memory", "size"),
)
_SUFFIX = "executionprovider"


def settings_of(
    shapes: Mapping[str, tuple[int, ...]], *, batch: int = 1, threads: int = 1, seed: int = 0, provider: str = "cpu"
) -> Settings:
    """Return settings from command-line values: a `batch` of 1 is that of the shapes.

    The provider's name is case-insensitive, with or without `ExecutionProvider`.
    """
    given = {shape[0]: name for name, shape in shapes.items() if shape}
    if len(given) == 1 and batch == 1:
        (batch,) = given
    if wrong := given.keys() - {batch}:
        other = wrong.pop()
        raise InvalidInput(f"input '{given[other]}' has a batch of {other}, and --batch is {batch}: give one of them")
    known: list[str] = onnxruntime.get_available_providers()
    short = provider.casefold().removesuffix(_SUFFIX)
    found = next((name for name in known if name.casefold().removesuffix(_SUFFIX) == short), provider)
    return Settings(batch, threads, seed, dict(shapes), found)


def compare(
    paths: Sequence[Path],
    settings: Settings,
    limits: Limits,
    *,
    baseline: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time ONNX files by `time`, and return JSON values; raises InvalidInput also if the files' inputs differ.

    Rows are named after the file, or its path if two files share a name.
    """
    names = _names(paths)
    _require_same_inputs(paths, settings)
    if baseline is not None and baseline not in paths:
        raise InvalidInput(f"--baseline {baseline} is none of the files: {', '.join(map(str, paths))}")
    base = None if baseline is None else names[list(paths).index(baseline)]
    timing = time(dict(zip(names, paths, strict=True)), settings, limits, baseline=base, progress=progress)
    found = timing.to_dict()
    for row, path in zip(found["rows"], paths, strict=True):
        row["file"] = str(path)
    return {"schema": 1, **found}


def _names(paths: Sequence[Path]) -> list[str]:
    twice = next((path for k, path in enumerate(paths) if path in paths[:k]), None)
    if twice is not None:
        raise InvalidInput(f"{twice} is given twice; a copy of the baseline is timed in any case, as the A/A row")
    called = [path.name for path in paths]
    return [str(path) if called.count(path.name) > 1 else path.name for path in paths]


def _require_same_inputs(paths: Sequence[Path], settings: Settings) -> None:
    """Raise InvalidInput if names, types or static sizes of the inputs differ; dynamic axes may have any name."""
    taken = {path: {x.name: (x.type, *x.shape) for x in settings.open(path).get_inputs()} for path in paths}
    first, *rest = paths
    for path in rest:
        one, other = taken[first], taken[path]
        if one.keys() != other.keys() or not all(map(_agree, one.values(), (other[name] for name in one))):
            raise InvalidInput(
                f"{first} takes {_text(one)} and {path} takes {_text(other)}: only files with the same inputs can be "
                "compared; export them with the same shapes and types"
            )


def _agree(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    (kind, *shape), (other_kind, *other_shape) = one, other
    pairs = zip(shape, other_shape, strict=False)
    static = all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
    return kind == other_kind and len(shape) == len(other_shape) and static


def _text(inputs: Mapping[str, tuple[Any, ...]]) -> str:
    return ", ".join(f"'{name}' {kind} ({', '.join(map(str, shape))})" for name, (kind, *shape) in inputs.items())


def render_terminal(found: Mapping[str, Any], console: Console) -> None:
    """Print the table of files, the A/A test, and the machine."""
    rows = [_cells(row) for row in found["rows"]]
    aa = found["aa"]
    if aa is not None:
        rows.append((f"{found['baseline']}, again", *("",) * 4, *_ratio(aa), *("",) * 3))
    where, settings = found["environment"], found["settings"]
    verdict = "reliable" if found["reliable"] else "UNRELIABLE"
    verdict_line = (
        f"times: {verdict}: {found['why']}; ONNX Runtime {where['onnxruntime']}, {settings['provider']}, on "
        f"{where['cpu']}, threads {settings['threads']}, batch {settings['batch']}, {found['rounds']} rounds"
    )
    print_parts([Table(COLUMNS, rows), verdict_line], console)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    memory = row["peak_memory_bytes"]
    return (
        row["name"],
        *(figure(row[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "throughput_per_s")),
        *_ratio(row["ratio"]),
        *(figure(row["load_ms"]), size(memory), size(row["file_bytes"])),
    )


def _ratio(value: Mapping[str, float]) -> tuple[str, str]:
    return ratio(value, digits=3, unit="")
