"""The tables: on the terminal, and docs/results/demonstration.md from the results file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.studies.latency.table import table
from benchmarks.studies.record import sentence
from benchmarks.studies.recovery.subjects import goal_of
from surgery.report import size

Row = Mapping[str, Any]
HEADS = (
    *("file", "p50 ms", "ratio to dense", "95 %", "ratio to dense int8", "accuracy", "points lost", "95 %"),
    *("agreement with dense", "size", "dominated by"),
)
GOALS = {"resnet56": (0.6, 1.0), "mobilenet_v2": (0.7, 2.0)}
"""Network → latency goal of compact int8 relative to dense int8, and the points it may lose compared with it."""
WITH_VNNI, WITHOUT_VNNI, EARLIER = "demo", "demo_without_vnni", "demo_earlier"
"""Keys of the demonstration's tables: latency and loss in int8 depend on VNNI; one table is by an earlier version."""
AIM = 0.33, 2.0
"""Goal of the demonstration: latency of our int8 file relative to dense float32, and the points it may lose."""


def lines(rows: Sequence[Row], images: int = 0) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each row in the order of `HEADS`, evaluated on one of the sets of images."""
    for row in rows:
        by, ratio = row["judged"][images], row["latency"]
        found = by.get("lost")
        yield (
            _named(row),
            f"{row['p50_ms']:.3f}",
            f"{ratio['value']:.3f}",
            f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            f"{row['of_dense_int8']:.3f}",
            f"{by['accuracy']:.2f} %" if found else "-",
            f"{found[0]:.2f}" if found else "-",
            f"{found[1]:.2f} to {found[2]:.2f}" if found else "-",
            f"{by['match']:.1f} %",
            size(row["bytes"]),
            row["dominated_by"] or "",
        )


def _named(row: Row) -> str:
    epochs = f"{row['epochs']} epochs" if "epochs" in row else ""
    detail = ", ".join(x for x in (epochs, row.get("setting", "")) if x)
    return f"{row['name']} ({detail})" if detail else str(row["name"])


def markdown(found: Mapping[str, Any]) -> str:
    """Return the tables of a network, one per set of images."""
    parts = []
    for k, by in enumerate(found["judged_by"]):
        parts.append(f"On {by['images']:,} images: {by['name']}.\n\n{table(HEADS, lines(found['rows'], k))}")
    return "\n".join(parts)


SHORT = ("file", "p50 ms", "ratio to dense", "points lost", "95 %", "agreement with dense", "dominated by")
"""Columns of the table in the README."""


def short(found: Mapping[str, Any]) -> str:
    """Return a table with the columns of `SHORT`, on the first set of images."""
    chosen = [HEADS.index(head) for head in SHORT]
    chosen[4] = HEADS.index("points lost") + 1  # the second interval is that of the points
    return table(SHORT, (tuple(cells[k] for k in chosen) for cells in lines(found["rows"])))


def goal(found: Mapping[str, Any]) -> str:
    """Return a sentence on whether the network met its goal."""
    time, points = GOALS[found["network"]]
    best = [r for r in found["rows"] if r["name"].startswith("compact int8") and r["planned_for"] == "int8"][-1]
    results = []
    for by in best["judged"]:
        drop = dict(zip(("drop", "low", "high"), by["lost_against_int8"], strict=True))
        verdict = goal_of(drop, points) if best["of_dense_int8"] <= time else "missed"
        results.append(
            f"{drop['drop']:.2f} points lost [{drop['low']:.2f}, {drop['high']:.2f}] on {by['images']}: **{verdict}**"
        )
    return (
        f"Goal for {best['name']}: at most {time:g} of the latency of dense int8, with at most {points:g} "
        f"point{'s' * (points != 1)} lost compared with it. Result: {best['of_dense_int8']:.3f} of the latency, "
        f"{'; '.join(results)}."
    )


def aim(found: Mapping[str, Any]) -> str:
    """Return a sentence on whether the demonstration met its goal."""
    time, points = AIM
    ours = [r for r in found["rows"] if r["name"].startswith("compact int8")][-1]
    drop = dict(zip(("drop", "low", "high"), ours["judged"][0]["lost"], strict=True))
    verdict = goal_of(drop, points) if ours["latency"]["value"] <= time else "missed"
    return (
        f"Goal for compact int8: at most {time:g} of the latency of dense float32, with at most {points:g} points "
        f"lost. Result: {ours['latency']['value']:.3f} of the latency, {drop['drop']:.2f} points "
        f"[{drop['low']:.2f}, {drop['high']:.2f}]: **{verdict}**."
    )


def _photos(found: Mapping[str, Any]) -> str:
    every, some = found["photos"], found.get("calibrated", found["photos"])
    return f"{every} unlabelled photos{f', int8 files calibrated on {some} of them' if some < every else ''}"


def distillation(found: Mapping[str, Any]) -> str:
    """Return a paragraph on how the compact network was distilled; empty if it was not."""
    row = next((r for r in found["rows"] if "trained_on" in r), None)
    if row is None:
        return ""
    rates = ", ".join(f"{t['lr']:g} ({t['divergence']:.2f})" for t in row["tried"] if t.get("lr"))
    chosen = f", chosen by the divergence after a few hundred steps on held-out photos: {rates}" if rates else ""
    return (
        f"\n\nDistilled without labels: {row['epochs']:.0f} epochs of {row['images']:,} images, {row['seconds']} "
        f"seconds with `python -m benchmarks.studies.distillation` on {row['trained_on']}; "
        f"learning rate {row['lr']:g}{chosen}."
    )


def page(results: Mapping[str, Any]) -> str:
    """Return docs/results/demonstration.md."""
    parts = [_HEAD]
    for key, title in TITLES.items():
        found = results["tables"].get(key)
        if found is None:
            continue
        text = (goal(found) if key in GOALS else aim(found)) + distillation(found)
        text += _SATURATES * found.get("saturates", False) + NOTES.get(key, "")
        parts.append(
            f"## {title}\n\nWeights: {found['weights']}. {_photos(found)}. Written by\n"
            f"`{found['command']}`\non {sentence(found['machine'])}, in {found['seconds'] / 60:.0f} minutes.\n\n"
            f"{text}\n\n{markdown(found)}\nTimer check: {found['timer']['why']}.\n"
        )
    return "\n".join(parts)


TITLES = {
    WITH_VNNI: "The demonstration: MobileNetV2",
    WITHOUT_VNNI: "The demonstration on a processor without VNNI",
    EARLIER: "The demonstration on another processor with VNNI, by an earlier version",
    "mobilenet_v2": "MobileNetV2, planned for float32 and int8, and distilled",
    "resnet56": "ResNet-56 on CIFAR-10, planned for float32 and int8, and distilled",
}
_SATURATES = """

This processor has no VNNI: sums of 8-bit products saturate, which reduces the accuracy of int8 files."""
NOTES = {
    WITHOUT_VNNI: """

The host was busy, and the plan depends on measured times: a dozen other runs of the same command on this machine, which
are not in the results file, lost 15 to 27 points at 0.49 to 0.57 of the latency. The run shown is one with a reliable
timer.""",
    EARLIER: """

In this version, int8 files were calibrated on all photos.""",
    "mobilenet_v2": """

The photos are one of each of 500 classes; the evaluation images are one of each of the other 500. Other settings were
tried in single runs of 200 steps that are not in the results file. By the divergence on held-out photos, none came
closer to the goal: temperature 8 instead of 2 (0.37 instead of 0.34), and in addition crops of a tenth of a photo
instead of a quarter, at twice the learning rate (0.41). 7-bit weights, which do not saturate (`--int8-reduce-range`),
reduced the dense network to 75.0 %: its published weights were already rounded to 8 bits.""",
}
"""Notes below the tables."""
_HEAD = """# Demonstration

`scripts/demo.py` writes every kind of faster file of one network and compares them: the pruned network, the pruned and
quantized one, the dense network in int8 and on smaller images, the dense network with pruned channels set to zero
(*masked*), and torch-pruning's. All files of a table were timed together, in shuffled blocks, and evaluated in ONNX
Runtime on the same images, none of which is among the photos used for pruning. Points lost are paired on these images,
with a 95 % confidence interval. A file is *dominated* by another that is no slower and loses no more, and is better in
one of the two by non-overlapping intervals. All networks have trained weights. "Ratio to dense" is paired round by
round; "ratio to dense int8" is the quotient of two medians. The data are in `benchmarks/studies/results/stacked.json`.

*torch-pruning, default* is its L1 criterion at half of every channel count, without recovery. *torch-pruning, best* is
the setting closest to the dense network on the photos after batch-norm re-estimation on other photos, among five
criteria that need no labels, per layer and global, with channel counts in multiples of 16, which suits the machines.
Closest means the lowest divergence on 64 photos; in the older tables (all but the first two), the highest agreement on
128. The pruning ratio is the one at which L1 matches the latency of our float file; with global ranking, other criteria
give other channel counts at that ratio, and their measured latency is in the table.
"""
