"""Rows of the study: what each does, and what it comes to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from benchmarks.studies.latency.rivals import CRITERIA, DoesNotRun, Setting, to_macs
from benchmarks.studies.latency.trained import reestimated
from benchmarks.studies.recovery.subjects import SEEDS, Network, judged, logits, network

GOALS = {
    ("resnet56", 0.714): 0.5,
    ("resnet56", 0.476): 2.0,
    ("resnet56", 0.333): 6.0,
    ("resnet20", 0.714): 1.5,
    ("resnet20", 0.5): 4.0,
    ("mobilenet_v2", 0.714): 3.0,
}
"""Network and fraction of the MACs → points that may be lost without labels or gradients."""
OURS = {
    "second-order": ("none", "bn", "reconstruct"),
    "reconstruction": ("reconstruct",),
    "activation": ("reconstruct",),
    "taylor": ("reconstruct",),
    "l1": ("none", "fold", "bn", "reconstruct"),
}
"""Criterion → levels of recovery."""
TAUGHT = (("resnet56", 0.476),)


@dataclass(frozen=True, slots=True)
class Job:
    """One row: a network at a fraction of its MACs, a way to choose."""

    part: str
    network: str
    macs: float
    method: str

    @property
    def key(self) -> str:
        """Name of the row in the results file."""
        return f"{self.part} {self.network} {self.macs} {self.method}"


def every_job() -> Iterator[Job]:
    """Yield all rows, the most important ones first."""
    for name, macs in GOALS:
        yield Job("without labels", name, macs, "second-order")
    for name, macs in TAUGHT:
        yield Job("taught", name, macs, "second-order")
    for name, macs in GOALS:
        yield Job("without labels", name, macs, "l1")
        yield Job("torch-pruning", name, macs, "all")
    for name, macs in GOALS:
        for method in ("reconstruction", "activation", "taylor"):
            yield Job("without labels", name, macs, method)


def run(job: Job, root: Path) -> dict[str, Any]:
    """Return a row."""
    jpeg = job.part == "taught" or job.method in ("second-order", "l1", "all")
    known = network(job.network, root, jpeg=jpeg)
    what = {"without labels": _without_labels, "torch-pruning": _rivals, "taught": _taught}
    rows = what[job.part](known, job)
    return {"part": job.part, "network": job.network, "macs": job.macs, "method": job.method, "rows": rows}


def _without_labels(known: Network, job: Job) -> list[dict[str, Any]]:
    """For each level of recovery, the networks of all seeds."""
    found: dict[str, list[nn.Module]] = {}
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    kept: list[float] = []
    for seed in SEEDS:
        images = known.calibration(seed)
        cut = surgery.shrink(
            known.subject.module,
            known.subject.inputs,
            budget=surgery.Budget(macs=job.macs),
            data=images,
            criterion=job.method,
            recover="none",
            seed=seed,
        )
        kept.append(known.subject.kept(cut.model))
        for level in OURS[job.method]:
            found.setdefault(level, [])
            if level == "none":
                found[level].append(cut.model)
                continue
            result = surgery.recover(cut, None if level == "fold" else images, level=level, seed=seed)
            step = result.report["recovery"]["steps"][-1]
            found[level].append(result.model)
            seconds.setdefault(level, []).append(step["seconds"])
            memory[level] = step["peak_memory_bytes"]
    return [
        {
            "tool": "ours",
            "criterion": job.method,
            "recovery": level,
            "macs": round(sum(kept) / len(kept), 4),
            "seconds": round(sum(seconds[level]) / len(seconds[level]), 1) if level in seconds else None,
            "peak_memory_mb": round(memory[level] / 1e6) if level in memory else None,
            "judged": _judged(known, modules),
        }
        for level, modules in found.items()
    ]


def _judged(known: Network, modules: list[nn.Module]) -> list[dict[str, Any]]:
    return [judged([logits(module, by.images) for module in modules], by) for by in known.judged]


def _rivals(known: Network, job: Job) -> list[dict[str, Any]]:
    """torch-pruning by each of its criteria that need neither labels nor gradients, each layer alone and globally."""
    rows = []
    for criterion in CRITERIA:
        for ranks_globally in (False, True):
            setting = Setting(f"torch-pruning {criterion}", ranks_globally=ranks_globally, criterion=criterion)
            told: dict[str, Any] = {"tool": "torch-pruning", "criterion": criterion, "global": ranks_globally}
            try:
                module, point = to_macs(known.subject, setting, job.macs)
            except DoesNotRun as error:
                rows.append({**told, "failed": str(error)})
                continue
            lossless = copy.copy(known.judged[:1])
            for recovery in ("none", "bn"):
                images = [known.calibration(seed) for seed in SEEDS] if recovery == "bn" else [torch.empty(0)]
                modules = [reestimated(module, x) if recovery == "bn" else module for x in images]
                sets = lossless if recovery == "none" else known.judged
                rows.append(
                    {
                        **told,
                        "recovery": recovery,
                        "macs": round(point.ratio, 4),
                        "judged": [judged([logits(m, by.images) for m in modules], by) for by in sets],
                    }
                )
    return rows


def _taught(known: Network, job: Job) -> list[dict[str, Any]]:
    """Reconstructed, then taught by the dense network on all images to learn from."""
    pixels, labels = known.learnable
    rows = []
    for level in ("distill",):
        training = surgery.Training(epochs=EPOCHS, seed=0)
        cut = surgery.shrink(
            known.subject.module,
            known.subject.inputs,
            budget=surgery.Budget(macs=job.macs),
            data=(pixels, labels),
            recover=level,
            training=training,
        )
        step = cut.report["recovery"]["steps"][-1]
        rows.append(
            {
                "tool": "ours",
                "criterion": job.method,
                "recovery": level,
                "macs": round(known.subject.kept(cut.model), 4),
                "seconds": step["seconds"],
                "peak_memory_mb": round(step["peak_memory_bytes"] / 1e6),
                "epochs": EPOCHS,
                "steps": step["history"]["steps"],
                "judged": _judged(known, [cut.model]),
            }
        )
    return rows


EPOCHS = 12
Ran = Callable[[Network, Job], list[dict[str, Any]]]
Pair = tuple[Tensor, Tensor]
