"""Rows of networks that the dense one has taught: without labels, on all images that there are to learn from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import surgery
from benchmarks.studies import lessons
from benchmarks.studies.latency.bench import Bench
from benchmarks.studies.ours import Ours, planned, shown
from benchmarks.studies.recovery.subjects import SEEDS, Network, against, judged_all, network

_RACE_S = 40.0


def to_macs(known: Network, macs: float, root: Path, work: Path) -> list[dict[str, Any]]:
    """Cut to a fraction of the MACs by 512 images, reconstructed with them, then taught."""
    name = f"{known.name}.macs-{macs}"
    ours = planned(name, known.subject, known.calibration(SEEDS[0]), surgery.Budget(macs=macs), work)
    return [_taught(known, name, ours, root, work)]


def to_latency_of(known: Network, smaller: str, root: Path, work: Path) -> list[dict[str, Any]]:
    """Cut to the time that a smaller network takes, taught, and set against that network, as it is and taught as well.

    All of them are timed in one race at the end.
    """
    other, name = network(smaller, root), f"{known.name}.as-{smaller}"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(known.subject, Path(folder), 1, _RACE_S)
        bench.add("dense", known.subject.module)
        bench.add(smaller, other.subject.module)
        wanted = bench.race()["latency"][smaller]["value"]
        ours = planned(name, known.subject, known.calibration(SEEDS[0]), surgery.Budget(latency=wanted), work)
        bench.add("ours", ours.module)
        figures = bench.race()
    module, facts = lessons.taught(name, work, root)
    peer, lesson = lessons.taught(smaller, work, root)
    dense = {"tool": "dense", "recovery": "none"}
    rows: list[dict[str, Any]] = [
        {**dense, "criterion": known.name, "judged": judged_all(known, [known.subject.module])},
        {**dense, "criterion": smaller, "judged": judged_all(known, [other.subject.module])},
        {
            **dense,
            **_lesson(lesson),
            "criterion": smaller,
            "recovery": f"taught by {known.name}",
            "judged": judged_all(known, [peer]),
        },
        _taught(known, name, ours, root, work),
    ]
    times = figures["latency"]
    for row, timed in zip(rows, ("dense", smaller, smaller, "ours"), strict=True):
        sized = {"dense": known.subject.module, smaller: other.subject.module, "ours": ours.module}[timed]
        row |= {"macs": round(known.subject.kept(sized), 4), "latency": times[timed], "timer": figures["timer"]}
    rows[-1] |= {
        "loop": facts["loop"],
        "against": {
            smaller: against(known, module, other.subject.module),
            f"{smaller}, taught": against(known, module, peer),
        },
    }
    return rows


def _taught(known: Network, name: str, ours: Ours, root: Path, work: Path) -> dict[str, Any]:
    module, facts = lessons.taught(name, work, root)
    return {
        "tool": "ours",
        "criterion": "second-order",
        "recovery": "distill",
        **_lesson(facts),
        "macs": round(known.subject.kept(module), 4),
        "reconstructed": judged_all(known, [ours.module]),
        "judged": judged_all(known, [module]),
    }


def _lesson(facts: dict[str, Any]) -> dict[str, Any]:
    """How a network was taught."""
    names = ("epochs", "images", "steps", "batch", "lr", "seconds", "trained_on")
    return {key: value for key, value in shown(facts).items() if key in names}
