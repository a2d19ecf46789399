"""Rows at a measured latency: ours, torch-pruning's, and the dense MobileNetV2 on smaller images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from benchmarks.studies.latency.bench import Bench, loop_of, tell
from benchmarks.studies.latency.rivals import CRITERIA, SLOPES, DoesNotRun, Setting, by_torch_pruning
from benchmarks.studies.latency.trained import reestimated
from benchmarks.studies.recovery.subjects import (
    ODD,
    SEEDS,
    Judged,
    Network,
    judged,
    judged_all,
    logits,
    network,
    rows_of,
)
from exporters import onnx
from surgery.latency import Limits, ort

RACE_S = 60.0
TRIES = 6


def settings() -> list[Setting]:
    """Return torch-pruning's: each criterion layer by layer and ranked globally."""
    return [
        Setting(f"torch-pruning {criterion}{', global' * ranks_globally}", 0, ranks_globally, criterion)
        for criterion in (*CRITERIA, *SLOPES)
        for ranks_globally in (False, True)
    ]


def shortlist(rows: Sequence[Mapping[str, Any]], most: int = 2) -> list[Setting]:
    """Return torch-pruning's default, and of each recovery the settings of these rows that lose least."""
    named: dict[tuple[str, bool], None] = {("l1", False): None}
    for recovery in ("none", "bn"):
        same = [r for r in rows if r.get("recovery") == recovery]
        best = sorted(same, key=lambda r: float(r["judged"][0]["drop"]))[:most]
        named |= {(r["criterion"], r["global"]): None for r in best}
    return [s for s in settings() if (s.criterion, s.ranks_globally) in named]


def rounded(among: Sequence[Setting], to: int) -> list[Setting]:
    """Return the settings with widths in steps of so many."""
    return [replace(setting, name=f"{setting.name}, round_to {to}", round_to=to) for setting in among]


def at_latency(known: Network, ratio: float, among: Sequence[Setting]) -> list[dict[str, Any]]:
    """Ours as shipped, by each seed's images; torch-pruning in these settings, at the latency of the slowest of ours.

    Where it ranks layer by layer, widths and with them the latency are the same for every criterion.
    """
    subject = known.subject
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(subject, Path(folder), 1, RACE_S)
        bench.add("dense", subject.module)
        results = []
        for seed in SEEDS:
            images = known.calibration(seed)
            budget = surgery.Budget(latency=ratio)
            results.append(
                surgery.shrink(subject.module, subject.inputs, surgery.recipe(budget=budget, data=images, seed=seed))
            )
            bench.add(f"ours {seed}", results[-1].model)
        ours = {
            "tool": "ours",
            "criterion": "second-order",
            "recovery": "reconstruct",
            "macs": round(sum(subject.kept(r.model) for r in results) / len(results), 4),
            "loops": [loop_of(r.report) for r in results],
            "judged": judged_all(known, [r.model for r in results]),
        }
        wanted = max(bench.quick(r.model) for r in results)
        rows = [ours, *rivals(known, _brought_to(bench, wanted), among)]
        figures = bench.measure()
    times = figures["latency"]
    ours |= {"latency": times["ours 0"], "latencies": [times[f"ours {seed}"] for seed in SEEDS]}
    ours["timer"] = figures["timer"]
    return _with_times(rows, times)


def rivals_at(known: Network, wanted: float, among: Sequence[Setting]) -> list[dict[str, Any]]:
    """torch-pruning timed with the dense network, at the latency measured for ours in another row."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(known.subject, Path(folder), 1, RACE_S)
        bench.add("dense", known.subject.module)
        rows = rivals(known, _brought_to(bench, wanted), among)
        figures = bench.measure()
    rows[0]["timer"] = figures["timer"]
    return _with_times(rows, figures["latency"])


def _brought_to(bench: Bench, wanted: float) -> Callable[[Setting], tuple[nn.Module, dict[str, Any]]]:
    """Setting → its network at this latency; the share is searched for once where it ranks layer by layer."""
    shares: dict[tuple[bool, int], float] = {}

    def made(setting: Setting) -> tuple[nn.Module, dict[str, Any]]:
        cut, key = partial(by_torch_pruning, bench.subject, setting), (setting.ranks_globally, setting.round_to)
        share = None if setting.ranks_globally else shares.get(key)
        if share is None:
            share = bench.to_latency(cut, wanted, most=TRIES, start=shares.get(key)).share
            shares.setdefault(key, share)
        module = cut(share)
        bench.add(setting.name, module)
        return module, {"macs": round(bench.subject.kept(module), 4), "file": setting.name}

    return made


def _with_times(rows: list[dict[str, Any]], times: Mapping[str, Any]) -> list[dict[str, Any]]:
    for row in (r for r in rows if "file" in r):
        row["latency"] = times[row.pop("file")]
    return rows


def rivals(
    known: Network, made: Callable[[Setting], tuple[nn.Module, dict[str, Any]]], among: Sequence[Setting]
) -> list[dict[str, Any]]:
    """Judge a rival's networks in these settings: as they are, and with the batch norms of each seed's images.

    On sets of images after the first, only its default and the setting that is best on the first one.
    """
    rows, modules = list[dict[str, Any]](), list[list[nn.Module]]()
    first = replace(known, judged=known.judged[:1])
    for setting in among:
        facts: dict[str, Any] = {"tool": "torch-pruning", "criterion": setting.criterion}
        facts["global"] = setting.ranks_globally
        if setting.round_to:
            facts["round_to"] = setting.round_to
        tell(setting.name)
        try:
            module, more = made(setting)
        except DoesNotRun as error:
            rows.append({**facts, "failed": str(error)})
            modules.append([])
            continue
        renormed = [reestimated(module, known.calibration(seed)) for seed in SEEDS]
        for recovery, found in (("none", [module]), ("bn", renormed)):
            rows.append({**facts, **more, "recovery": recovery, "judged": judged_all(first, found)})
            modules.append(found)
    rest = replace(known, judged=known.judged[1:])
    for row, found in zip(rows, modules, strict=True):
        if any(row is r for r in best_of(rows)):
            row["judged"] += judged_all(rest, found)
    return rows


def best_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A rival's default and its best setting on the first images, without and with batch-norm re-estimation."""
    shown: list[dict[str, Any]] = []
    for recovery in ("none", "bn"):
        same = [r for r in rows if r.get("recovery") == recovery]
        default = [r for r in same if r["criterion"] == "l1" and not r["global"]]
        best = sorted(same, key=lambda r: float(r["judged"][0]["drop"]))[:1]
        shown += [*default, *(r for r in best if not any(r is d for d in default))]
    return shown


def smaller_images(root: Path, sizes: Sequence[int] = (224, 192, 160)) -> list[dict[str, Any]]:
    """The dense MobileNetV2 on smaller images: the alternative without pruning."""
    known = network("mobilenet_v2", root)
    module, full = known.subject.module, known.judged[0]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for size in sizes:
            files[str(size)] = Path(folder) / f"{size}.onnx"
            onnx.export(module, (torch.zeros(1, 3, size, size),), files[str(size)], onnx.ExportSettings(check=False))
            images, labels = rows_of(root, size, odd=True)
            by = Judged(ODD, images, labels, lambda: full.logits)
            row = {"tool": "dense", "criterion": f"mobilenet_v2 at {size} px", "recovery": "none", "macs": 1.0}
            rows.append({**row, "judged": [judged([logits(module, by.images)], by)]})
        timing = ort.time(files, limits=Limits(max_seconds=RACE_S, width=0.02), baseline=str(sizes[0]), fresh=False)
    for row, size in zip(rows, sizes, strict=True):
        found = timing.row(str(size))
        row["latency"] = {**asdict(found.ratio), "p50_ms": found.p50_ms}
        row["macs"] = round((size / sizes[0]) ** 2, 4)
    return rows
