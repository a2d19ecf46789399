"""Rows of the study, and how each is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

import surgery
from benchmarks.studies import record
from benchmarks.studies.latency.rivals import Setting, to_macs
from benchmarks.studies.recovery.choices import by_repair, by_steps
from benchmarks.studies.recovery.distilled import to_latency_of, to_macs as distilled_to_macs
from benchmarks.studies.recovery.published import at_published
from benchmarks.studies.recovery.subjects import SEEDS, Network, judged_all, network
from benchmarks.studies.recovery.timed import (
    at_latency,
    rivals,
    rivals_at,
    rounded,
    settings,
    shortlist,
    smaller_images,
)
from surgery.errors import InvalidInput

LABEL_FREE, RIVAL, PUBLISHED = "without labels", "torch-pruning", "published"
GOALS = {
    ("resnet56", 0.714): 0.5,
    ("resnet56", 0.476): 2.0,
    ("resnet56", 0.333): 6.0,
    ("resnet20", 0.714): 1.5,
    ("resnet20", 0.5): 4.0,
    ("mobilenet_v2", 0.714): 3.0,
}
"""Network and fraction of the MACs → allowed points lost without labels or gradients."""
OURS = {
    "second-order": ("none", "bn", "reconstruct"),
    "reconstruction": ("reconstruct",),
    "activation": ("reconstruct",),
    "taylor": ("reconstruct",),
    "l1": ("none", "fold", "bn", "reconstruct"),
}
"""Criterion → recovery methods."""
COMPARED = (("resnet20", 0.5, ("l1", "reconstruction", "activation", "taylor")), ("resnet56", 0.476, ("l1",)))
"""Network, fraction of its MACs, and criteria that are compared there with `second-order`."""
ALL, SHORTLIST, ROUNDED, BOTH = "all", "shortlist", "round_to 8", "shortlist, also round_to 8"
AT_LATENCY = (
    ("resnet56", 0.6, BOTH),
    ("resnet20", 0.6, BOTH),
    ("mobilenet_v2", 0.7, SHORTLIST),
    ("mobilenet_v2", 0.7, ROUNDED),
)
"""Network, fraction of the dense latency, and torch-pruning's settings: the best at equal MACs; the best with
multiples of 8, timed separately at our latency; or both, timed together with ours."""
SMALLER = "resnet20"
"""The alternative to pruning ResNet-56."""


@dataclass(frozen=True, slots=True)
class Job:
    """One row: a network at a fraction of its MACs or latency, and a method."""

    part: str
    network: str
    amount: float
    method: str

    @property
    def key(self) -> str:
        """Name of the row in the results file."""
        return f"{self.part} {self.network} {self.amount} {self.method}"


def every_job() -> Iterator[Job]:
    """Yield all rows, the most important ones first."""
    for name, macs in GOALS:
        yield Job(LABEL_FREE, name, macs, "second-order")
    yield Job("distilled", "resnet56", 0.476, "second-order")
    yield Job("distilled", "resnet56", 0.0, SMALLER)
    yield Job(PUBLISHED, "resnet56", 0.38, "with labels")
    yield Job("smaller images", "mobilenet_v2", 1.0, "dense")
    for name, macs in GOALS:
        yield Job(RIVAL, name, macs, ALL)
    for name, ratio, among in AT_LATENCY:
        yield Job("equal latency", name, ratio, among)
    for name, macs, criteria in COMPARED:
        for criterion in criteria:
            yield Job(LABEL_FREE, name, macs, criterion)
    yield Job("choices", "resnet20", 0.5, "steps")
    for criterion in ("l1", "second-order"):
        yield Job("choices", "resnet20", 0.5, f"repair {criterion}")


def run(job: Job, root: Path) -> dict[str, Any]:
    """Return a row."""
    known = network(job.network, root, jpeg=job.part != "choices")
    rows = _WORK[job.part](known, job, root)
    return {"part": job.part, "network": job.network, "amount": job.amount, "method": job.method, "rows": rows}


def _without_labels(known: Network, job: Job, root: Path) -> list[dict[str, Any]]:
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
            surgery.recipe(macs=job.amount, data=images, criterion=job.method, recover="none", seed=seed),
        )
        kept.append(known.subject.kept(cut.model))
        for level in OURS[job.method]:
            found.setdefault(level, [])
            if level == "none":
                found[level].append(cut.model)
                continue
            result = surgery.recover(
                cut, surgery.recipe(data=None if level == "fold" else images, recover=level, seed=seed)
            )
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
            "judged": judged_all(known, modules),
        }
        for level, modules in found.items()
    ]


def _rivals(known: Network, job: Job, root: Path) -> list[dict[str, Any]]:
    """torch-pruning by each of its criteria, layer by layer and globally."""

    def made(setting: Setting) -> tuple[nn.Module, dict[str, Any]]:
        module, point = to_macs(known.subject, setting, job.amount)
        return module, {"macs": round(point.ratio, 4)}

    return rivals(known, made, settings())


def _at_latency(known: Network, job: Job, root: Path) -> list[dict[str, Any]]:
    macs = min((m for name, m in GOALS if name == job.network), key=lambda m: abs(m - job.amount))
    same = _earlier(Job(RIVAL, job.network, macs, ALL), job)
    plain, stepped = shortlist(same), rounded(shortlist(same, 1), 8)
    if job.method != ROUNDED:
        return at_latency(known, job.amount, [*plain, *stepped] if job.method == BOTH else plain)
    ours = _earlier(replace(job, method=SHORTLIST), job)[0]
    return rivals_at(known, max(float(found["value"]) for found in ours["latencies"]), stepped)


def _earlier(row: Job, job: Job) -> list[dict[str, Any]]:
    """The result of a row that another row depends on."""
    rows = record.read("recovery")["rows"]
    if row.key not in rows:
        raise InvalidInput(f"'{job.key}' depends on the result of '{row.key}': run that row first")
    return list(rows[row.key]["rows"])


def _distilled(known: Network, job: Job, root: Path) -> list[dict[str, Any]]:
    if job.method == SMALLER:
        return to_latency_of(known, SMALLER, root)
    return distilled_to_macs(known, job.amount, root)


def _choices(known: Network, job: Job, root: Path) -> list[dict[str, Any]]:
    what, _, criterion = job.method.partition(" ")
    return by_repair(known, job.amount, criterion) if what == "repair" else by_steps(known, job.amount)


_WORK: Mapping[str, Callable[[Network, Job, Path], list[dict[str, Any]]]] = MappingProxyType(
    {
        LABEL_FREE: _without_labels,
        RIVAL: _rivals,
        "distilled": _distilled,
        PUBLISHED: lambda known, job, root: at_published(root),
        "smaller images": lambda known, job, root: smaller_images(root),
        "equal latency": _at_latency,
        "choices": _choices,
    }
)
