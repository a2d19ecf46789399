"""Rows of real weights: accuracy and agreement with the dense network, ours and others at equal measured latency.

Where torch-pruning ranks layer by layer, widths follow from the share alone and are the same for every criterion: such
networks are timed once, and judged once per criterion. Ours is as shipped, with the loop; the others are brought to the
latency that it was measured at, with the same timer, and all of them are timed together at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

import surgery
from benchmarks.studies import data
from benchmarks.studies.latency import rows
from benchmarks.studies.latency.bench import MET, NEAR, Bench, loop_of, tell, told
from benchmarks.studies.latency.compare import gap
from benchmarks.studies.latency.jobs import Job
from benchmarks.studies.latency.options import Options
from benchmarks.studies.latency.rivals import SETTINGS, DoesNotRun, Setting, Subject, Uniform, by_torch_pruning
from benchmarks.studies.latency.search import Point, guess_from
from benchmarks.studies.latency.trained import Trained, classes, has_batch_norms, load, reestimated
from surgery.errors import SurgeryError

Entry = dict[str, Any]
_UNIFORM = "uniform"


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """The images of one trained network, and what the dense network and ours make of them."""

    trained: Trained
    dense: NDArray[np.int64]
    ours: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def look(self, module: nn.Module) -> dict[str, NDArray[np.int64]]:
        """Return the predicted classes before and after batch norms are re-estimated."""
        before = classes(module, self.trained.images)
        if not has_batch_norms(module):
            return {"before": before, "after": before}
        return {"before": before, "after": classes(reestimated(module, self.trained.calibration), self.trained.images)}

    def say(self, found: Mapping[str, NDArray[np.int64]]) -> Entry:
        """Return accuracy and agreement, and by how much ours are higher, before and after."""
        labels = self.trained.labels.numpy()
        entry: Entry = {}
        for when, predicted in found.items():
            entry[when] = {
                "top1": round(float((predicted == labels).mean()), 4),
                "agreement": round(float((predicted == self.dense).mean()), 4),
                "top1_gap": gap(self.ours[when] == labels, predicted == labels),
                "agreement_gap": gap(self.ours[when] == self.dense, predicted == self.dense),
            }
        return entry


def accuracy(job: Job, options: Options, folder: Path) -> Entry:
    """Shrink to a target, bring the others to the latency that was measured, judge all on the same images."""
    if job.network not in data.NETWORKS:
        options = replace(options, criteria=options.criteria_imagenet)
    trained = load(job.network, data.find_root(options.data_root))
    subject = trained.subject
    bench = Bench(subject, folder, job.threads, options.seconds)
    bench.add("dense", subject.module)
    started = time.perf_counter()
    result = surgery.shrink(subject.module, subject.inputs, surgery.recipe(latency=job.amount))
    loop, seconds = loop_of(result.report), time.perf_counter() - started
    tell(f"ours in {seconds:.0f} s: {loop['verdict']}")
    bench.add("ours", result.model)
    judge = Judge(trained, classes(subject.module, trained.images))
    judge.ours.update(judge.look(result.model))
    ours = {"macs": subject.kept(result.model), **judge.say(judge.ours)}
    found = _Search(bench, judge, options, bench.quick(result.model), _known(job)).all()
    figures = bench.measure()
    for entry in (e for e in found if "failed" not in e):
        entry |= told(entry["macs"], figures["latency"][entry["file"]])
    ours |= told(ours["macs"], figures["latency"]["ours"])
    ours["met"] = MET[0] <= loop["measured"] / job.amount <= MET[1]
    labels = trained.labels.numpy()
    dense = {"top1": round(float((judge.dense == labels).mean()), 4), "images": len(labels)}
    return {
        "dense": dense,
        "ours": ours,
        "rivals": found,
        "loop": loop,
        "timer": figures["timer"],
        "spared": list(subject.spared),
        "shrink_s": round(seconds, 1),
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """Rivals of one row: each is brought to a latency, exported for timing, and evaluated."""

    bench: Bench
    judge: Judge
    options: Options
    wanted: float
    known: dict[str, list[Point]]
    """What is known already, by file: of other targets, and of settings before."""

    def all(self) -> list[Entry]:
        """Return an entry per rival, setting and criterion."""
        found = self._with_streams() if self.bench.subject.spared else []
        for setting in SETTINGS:
            found += self._by_criterion(setting) if setting.ranks_globally else self._by_share(setting)
        uniform = Uniform(self.bench.subject)
        return found + self._one(_UNIFORM, _UNIFORM, "l1", uniform.cut)

    def _by_share(self, setting: Setting) -> list[Entry]:
        """Layer by layer: the share is found with the first criterion, the others leave networks of the same widths."""
        first, *others = self.options.criteria
        cut = partial(by_torch_pruning, self.bench.subject, replace(setting, criterion=first))
        entries = self._one("torch-pruning", setting.name, first, cut)
        if "failed" in entries[0]:
            return entries
        for criterion in others:
            base = {key: entries[0][key] for key in ("rival", "setting", "share", "macs", "file", "reached")}
            entries.append(self._judged({**base, "criterion": criterion}, replace(setting, criterion=criterion)))
        return entries

    def _by_criterion(self, setting: Setting) -> list[Entry]:
        subject = self.bench.subject
        entries = []
        for criterion in self.options.criteria:
            cut = partial(by_torch_pruning, subject, replace(setting, criterion=criterion))
            entries += self._one("torch-pruning", setting.name, criterion, cut)
        return entries

    def _one(self, rival: str, name: str, criterion: str, cut: Callable[[float], nn.Module]) -> list[Entry]:
        entry: Entry = {"rival": rival, "setting": name, "criterion": criterion}
        file = f"{name}, {criterion}"
        tell(file)
        try:
            start = guess_from(self.known.get(file, self.known.get(rival, [])), self.wanted)
            point = self.bench.to_latency(cut, self.wanted, most=self.options.evaluations, start=start)
            self.known.setdefault(rival, [point])
            module = cut(point.share)
            entry |= {"share": point.share, "macs": self.bench.subject.kept(module), "file": file}
            entry |= {"reached": point.ratio <= self.wanted * (1 + NEAR), **self.judge.say(self.judge.look(module))}
            self.bench.add(file, module)
        except SurgeryError as error:
            return [_failed(entry, error)]
        return [entry]

    def _judged(self, entry: Entry, setting: Setting) -> Entry:
        try:
            module = by_torch_pruning(self.bench.subject, setting, entry["share"])
        except DoesNotRun as error:
            return _failed(entry, error)
        return {**entry, **self.judge.say(self.judge.look(module))}

    def _with_streams(self) -> list[Entry]:
        """The result if torch-pruning is given no layers to ignore, for the record."""
        everything = Subject(self.bench.subject.module, self.bench.subject.inputs)
        entry: Entry = {"rival": "torch-pruning", "setting": "residual streams too", "criterion": "l1"}
        try:
            by_torch_pruning(everything, SETTINGS[0], 0.3)
        except DoesNotRun as error:
            return [_failed(entry, error)]
        return []


def _known(job: Job) -> dict[str, list[Point]]:
    """What rows of other targets say of shares and latencies, by file: where to begin."""
    points: dict[str, list[Point]] = {}
    for row in rows.read().values():
        if (row["part"], row["network"]) == (job.part, job.network) and "failed" not in row:
            for entry in row["rivals"]:
                if "file" in entry:
                    points.setdefault(entry["file"], []).append(Point(entry["share"], entry["latency"]["value"]))
    return points


def _failed(entry: Mapping[str, Any], error: Exception) -> Entry:
    return {**entry, "failed": type(error).__name__, "message": str(error).splitlines()[0][:300]}
