"""The rows of a table: all files, timed together and evaluated in ONNX Runtime on the same images."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from math import inf
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from benchmarks.studies.latency.bench import Bench, tell
from benchmarks.studies.latency.rivals import CRITERIA, PLAIN, DoesNotRun, Setting, by_torch_pruning
from benchmarks.studies.latency.trained import reestimated
from benchmarks.studies.ours import Ours, planned, shown, zeroed
from benchmarks.studies.stacked.subjects import Case, Judges
from exporters import onnx
from exporters.quantize import saturates, to_int8
from exporters.session import OnnxModel, feeds
from surgery.core import file_bytes
from surgery.delivery import dominating
from surgery.inputs import import_torchvision
from surgery.latency import Limits, Settings, available_cores, ort
from surgery.recovery import paired_drop

BATCH = 32
DEFAULT_SHARE = 0.5
"""Share of every channel count that torch-pruning removes by default."""
AT_ONCE = 8
"""Batch size of torch for evaluation: larger batches are slower per image, because memory is mapped again."""
LOOKED, ANEW = 64, 128
"""Photos that torch-pruning's best setting is chosen by, and photos for its batch-norm re-estimation."""
TRIES = 4
STEP = 16
"""Of widths, for torch-pruning's best: the step of this machine's stairs; odd widths would have to lose more."""


Facts = Mapping[str, Any]
"""Facts about a file besides latency and loss: MACs, target precision, distillation."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is made.

    Attributes:
        latency: of ours, as a fraction of the dense network's in the precision that is planned for.
        deploys: precisions that are planned for, each a network of its own.
        smaller: sizes in pixels of smaller images, for the dense network.
        calibrated: photos that every file in int8 is calibrated on; None: all of them.
        rivals: whether torch-pruning is there.
        threads: of ONNX Runtime.
        seconds: for timing.
    """

    latency: float
    deploys: tuple[str, ...] = ("int8",)
    smaller: tuple[int, ...] = ()
    calibrated: int | None = None
    rivals: bool = True
    threads: int = 1
    seconds: float = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A file to be written: of a module, for an input of this shape; and where asked for, in int8 by these images."""

    module: nn.Module
    example: Tensor
    path: Path
    seen: Tensor | None

    @property
    def int8(self) -> Path:
        """Of the file in int8."""
        return self.path.with_suffix(".int8.onnx")

    def write(self) -> None:
        """Export and quantize; the files are evaluated later."""
        onnx.export(self.module, (self.example,), self.path, onnx.ExportSettings(check=False))
        if self.seen is not None:
            batches = [(part,) for part in torch.split(self.seen, BATCH)]
            to_int8(self.path, self.int8, feeds(self.path, batches), check=False)


def _handed(pool: ProcessPoolExecutor, job: Job) -> Future[None]:
    """Submit a job to another process; its contents may not be picklable."""
    try:
        return pool.submit(_written, pickle.dumps(job))
    except Exception as error:  # a user's own module may raise anything
        failed = Future[None]()
        failed.set_exception(error)
        return failed


def _written(packed: bytes) -> None:
    """Write a file in a process of its own, which one core is for."""
    torch.set_num_threads(1)
    import_torchvision()  # a network of its may not be unpacked before
    job: Job = pickle.loads(packed)
    job.write()


@dataclass(eq=False)
class Files:
    """Float files and those in int8 of the same networks, by name; `calibrated` as for `Ask`."""

    case: Case
    folder: Path
    calibrated: int | None = None
    paths: dict[str, Path] = field(default_factory=dict)
    sets: dict[str, tuple[Judges, ...]] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)

    def add(self, name: str, module: nn.Module, facts: Facts, *, int8: str = "", size: int | None = None) -> None:
        """Take a network, to be exported, and under the name `int8` also in int8, calibrated on the photos."""
        photos, judged = (self.case.photos, self.case.judged) if size is None else _at(self.case, size)
        path, seen = self.folder / f"{len(self.paths)}.onnx", photos[: self.calibrated].clone() if int8 else None
        job = self.jobs[name] = Job(module, photos[:1].clone(), path, seen)
        self._enter(name, job.path, judged, facts)
        if int8:
            self._enter(int8, job.int8, judged, facts)

    def write(self) -> None:
        """Write the files, as many at a time as there are cores: exporting is work for one."""
        tell(f"exports: {', '.join(self.jobs)}")
        method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
        with ProcessPoolExecutor(available_cores(), get_context(method)) as pool:
            for name, done in [(name, _handed(pool, job)) for name, job in self.jobs.items()]:
                if (error := done.exception()) is not None:  # it does not go there; or fails, and says so here
                    tell(f"{name} is written in this process ({type(error).__name__}: {error})")
                    self.jobs[name].write()
        self.jobs.clear()

    def _enter(self, name: str, path: Path, judged: tuple[Judges, ...], facts: Facts) -> None:
        self.paths[name], self.sets[name], self.facts[name] = path, judged, facts


def _at(case: Case, size: int) -> tuple[Tensor, tuple[Judges, ...]]:
    assert case.at is not None, "asked for where images come in sizes"
    return case.at(size)


def measured(case: Case, ask: Ask, folder: Path, work: Path | None = None) -> dict[str, Any]:
    """Return the table of a network as JSON values: its rows, the timer's verdict, and how each came about.

    Args:
        case: the network and its images.
        ask: which files to make.
        folder: an empty one, for files.
        work: folder of networks that are planned or distilled already, and where new ones are kept; None: `folder`.
    """
    begun = time.monotonic()
    files = Files(case, folder, ask.calibrated)
    dense = case.subject.module
    files.add("dense", dense, {"macs": 1.0}, int8="dense int8")
    for size in ask.smaller:
        facts = {"macs": round((size / case.photos.shape[-1]) ** 2, 4)}
        files.add(f"dense at {size} px", dense, facts, int8=f"dense at {size} px, int8", size=size)
    ours = {deploy: _ours(files, ask, deploy, work or folder) for deploy in ask.deploys}
    if ask.rivals:
        _rivals(files, ask, ours[ask.deploys[-1]].module, folder)
    files.write()
    settings, limits = Settings(threads=ask.threads), Limits(max_seconds=ask.seconds, width=0.02)
    timing = ort.time(files.paths, settings, limits, baseline="dense", fresh=False)
    logits = {name: [_logits(path, by.images) for by in files.sets[name]] for name, path in files.paths.items()}
    rows = [_row(name, files, timing, logits) for name in files.paths]
    mark_dominated(rows, reliable=timing.reliable)
    return {
        "network": case.name,
        "weights": case.weights,
        "photos": len(case.photos),
        "calibrated": min(ask.calibrated or len(case.photos), len(case.photos)),
        "judged_by": [{"name": by.name, "images": len(by.images)} for by in case.judged],
        "latency": ask.latency,
        "saturates": saturates(),
        "threads": ask.threads,
        "rows": rows,
        "loops": {deploy: dict(made.facts["loop"]) for deploy, made in ours.items()},
        "timer": {
            "aa": asdict(timing.aa) if timing.aa else None,
            "reliable": timing.reliable,
            "why": timing.why,
            "rounds": timing.rounds,
        },
        "seconds": round(time.monotonic() - begun),
    }


# Ours. ---------------------------------------------------------------------------------------------------------------


def _ours(files: Files, ask: Ask, deploy: str, work: Path) -> Ours:
    case, last = files.case, deploy == ask.deploys[-1]
    suffix, name = "" if len(ask.deploys) == 1 else f", planned for {deploy}", f"{case.name}.{deploy}"
    budget = surgery.Budget(latency=ask.latency)
    ours = planned(name, case.subject, case.photos, budget, work, deploy=deploy, threads=ask.threads)
    if last:
        files.add("masked", zeroed(case.subject, ours.plan), {"macs": 1.0})
    files.add(f"compact{suffix}", ours.module, shown(ours.facts), int8=f"compact int8{suffix}")
    if last and case.distilled is not None:
        module, facts = case.distilled(name, work)
        files.add(f"compact{suffix}, distilled", module, shown(facts), int8=f"compact int8{suffix}, distilled")
    return ours


# Theirs. -------------------------------------------------------------------------------------------------------------


def _rivals(files: Files, ask: Ask, ours: nn.Module, folder: Path) -> None:
    """torch-pruning's default, and its best setting at our float file's latency after batch-norm re-estimation."""
    case = files.case
    try:
        plain = by_torch_pruning(case.subject, PLAIN, DEFAULT_SHARE)
        files.add("torch-pruning, default", plain, {"macs": round(case.subject.kept(plain), 4)})
    except DoesNotRun as error:
        tell(str(error))
    bench = Bench(case.subject, folder / "search", ask.threads, ask.seconds)
    bench.folder.mkdir()
    wanted = bench.quick(ours)
    found: list[tuple[float, Setting, nn.Module]] = []
    seen = case.photos[-LOOKED:]
    dense = _outputs(case.subject.module, seen)
    for globally in (False, True):
        for setting, module in _at_latency(case, bench, wanted, globally):
            apart = divergence(dense, _outputs(reestimated(module, case.photos[:LOOKED]), seen))
            found.append((apart, setting, module))
    if found:
        _, setting, module = min(found, key=lambda each: each[0])
        module = reestimated(module, case.photos[:ANEW])
        facts = {"macs": round(case.subject.kept(module), 4), "setting": setting.name, "of_settings": len(found)}
        files.add("torch-pruning, best", module, facts, int8="torch-pruning, best, int8")


def _outputs(module: nn.Module, images: Tensor) -> Tensor:
    """What a network gives for images, (N, classes)."""
    with torch.no_grad():
        return torch.cat([module(part) for part in torch.split(images, AT_ONCE)])


def _at_latency(case: Case, bench: Bench, wanted: float, globally: bool) -> Iterable[tuple[Setting, nn.Module]]:
    """Every criterion at the share of channels at which L1 takes our time.

    Layer by layer widths are the same for all of them; ranked globally each leaves its own, and takes its own time. A
    search for each would take minutes, which the demonstration has not.
    """
    share = None
    for criterion in CRITERIA:
        name = f"{criterion}{', global' * globally}, round_to {STEP}"
        setting = Setting(name, STEP, globally, criterion)
        cut = partial(by_torch_pruning, case.subject, setting)
        try:
            if share is None:
                share = bench.to_latency(cut, wanted, most=TRIES).share
            module = cut(share)
            if _weights(module) == _weights(case.subject.module):
                tell(f"torch-pruning by {name}: removes nothing from this network")
                continue
        except DoesNotRun as error:
            tell(str(error))
            continue
        tell(f"torch-pruning by {name}")
        yield setting, module


def _weights(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


# Evaluation. --------------------------------------------------------------------------------------------------------


def _logits(path: Path, images: Tensor) -> Tensor:
    """Outputs of a file for all images, (N, classes)."""
    model = OnnxModel(path, threads=torch.get_num_threads())
    return torch.cat([model(part) for part in torch.split(images, BATCH)])


def _row(name: str, files: Files, timing: ort.Timing, logits: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """Time and loss of a file: against the dense one in float32, and against it in int8."""
    found, dense = timing.row(name), timing.row("dense int8")
    sets = files.sets[name]
    return {
        "name": name,
        "p50_ms": found.p50_ms,
        "latency": asdict(found.ratio),
        "of_dense_int8": round(found.p50_ms / dense.p50_ms, 4),
        "bytes": file_bytes(files.paths[name]),
        **files.facts[name],
        "judged": [
            judged(by, logits[name][k], logits["dense"][k], logits["dense int8"][k]) for k, by in enumerate(sets)
        ],
    }


def judged(by: Judges, found: Tensor, dense: Tensor, dense_int8: Tensor) -> dict[str, Any]:
    """Return accuracy, points lost against both dense files with their intervals, and agreement with the float one."""
    facts = {
        "images": by.name,
        "match": round(100 * float((found.argmax(1) == dense.argmax(1)).double().mean()), 2),
        "divergence": round(divergence(dense, found), 4),
    }
    if by.labels is None:
        return facts
    right = {key: (x.argmax(1) == by.labels).double() for key, x in (("", found), ("d", dense), ("q", dense_int8))}
    return {
        **facts,
        "accuracy": round(100 * float(right[""].mean()), 2),
        "lost": _lost(right["d"], right[""], itself=torch.equal(found, dense)),
        "lost_against_int8": _lost(right["q"], right[""], itself=torch.equal(found, dense_int8)),
    }


def divergence(dense: Tensor, found: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of logits (N, classes) from the dense network's."""
    logs, other = dense.double().log_softmax(1), found.double().log_softmax(1)
    return float((logs.exp() * (logs - other)).sum(1).mean())


def _lost(before: Tensor, after: Tensor, *, itself: bool) -> list[float]:
    """Points lost, paired, with the 95 % interval; a file loses nothing against itself."""
    return [0.0, 0.0, 0.0] if itself else [round(x, 2) for x in paired_drop(before, after)]


def lost(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return what a row loses on the first set, and its interval; of agreement where there are no classes, open."""
    first = row["judged"][0]
    value, low, high = first.get("lost", (100.0 - first["match"], -inf, inf))
    return value, low, high


def mark_dominated(rows: Sequence[dict[str, Any]], *, reliable: bool) -> None:
    """Name for each row the fastest one that beats it; none where which is faster is not known."""
    keys = ("value", "low", "high")
    found = {row["name"]: (tuple(row["latency"][key] for key in keys), lost(row)) for row in rows}
    standings = found if reliable else {}
    for row in rows:
        row["dominated_by"] = dominating(row["name"], standings)
