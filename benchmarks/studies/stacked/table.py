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
    *("file", "p50 ms", "of dense", "95 %", "of dense int8", "accuracy", "points lost", "95 %"),
    *("same class as dense", "bytes", "dominated by"),
)
GOALS = {"resnet56": (0.6, 1.0), "mobilenet_v2": (0.7, 2.0)}
"""Network → of dense int8's time that compact int8 may take, and points that it may lose against it."""
WITH_VNNI, WITHOUT_VNNI, EARLIER = "demo", "demo_without_vnni", "demo_earlier"
"""Keys of the demonstration's tables, since time and loss in int8 hang on these instructions; one is an earlier one."""
AIM = 0.33, 2.0
"""Of the demonstration: of dense's time in float32 that ours in int8 may take, and points that it may lose."""


def lines(rows: Sequence[Row], images: int = 0) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each row, in the order of `HEADS`, judged by one of the sets of images."""
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
    told = ", ".join(x for x in (epochs, row.get("setting", "")) if x)
    return f"{row['name']} ({told})" if told else str(row["name"])


def markdown(found: Mapping[str, Any]) -> str:
    """Return the tables of a network, one for each set of images."""
    parts = []
    for k, by in enumerate(found["judged_by"]):
        parts.append(f"{by['images']:,} images: {by['name']}.\n\n{table(HEADS, lines(found['rows'], k))}")
    return "\n".join(parts)


SHORT = ("file", "p50 ms", "of dense", "points lost", "95 %", "same class as dense", "dominated by")
"""Columns of the table in the README."""


def short(found: Mapping[str, Any]) -> str:
    """Return the demonstration's table with the columns of `SHORT`, on the first set of images."""
    chosen = [HEADS.index(head) for head in SHORT]
    chosen[4] = HEADS.index("points lost") + 1  # the second interval is that of the points
    return table(SHORT, (tuple(cells[k] for k in chosen) for cells in lines(found["rows"])))


def goal(found: Mapping[str, Any]) -> str:
    """Return what the goal of a network came to, in a sentence."""
    time, points = GOALS[found["network"]]
    best = [r for r in found["rows"] if r["name"].startswith("compact int8") and r["planned_for"] == "int8"][-1]
    told = []
    for by in best["judged"]:
        drop = dict(zip(("drop", "low", "high"), by["lost_against_int8"], strict=True))
        verdict = goal_of(drop, points) if best["of_dense_int8"] <= time else "missed"
        told.append(
            f"{drop['drop']:.2f} points less [{drop['low']:.2f}, {drop['high']:.2f}] on {by['images']}: **{verdict}**"
        )
    return (
        f"Goal: {best['name']} in at most {time:g} of dense int8's time, with at most {points:g} "
        f"point{'s' * (points != 1)} less than dense int8. Found: {best['of_dense_int8']:.3f} of the time, "
        f"{'; '.join(told)}."
    )


def aim(found: Mapping[str, Any]) -> str:
    """Return what the demonstration's aim came to, in a sentence."""
    time, points = AIM
    ours = [r for r in found["rows"] if r["name"].startswith("compact int8")][-1]
    drop = dict(zip(("drop", "low", "high"), ours["judged"][0]["lost"], strict=True))
    verdict = goal_of(drop, points) if ours["latency"]["value"] <= time else "missed"
    return (
        f"Aim: at most {time:g} of dense's time in float32, and {points:g} points. Found: "
        f"{ours['latency']['value']:.3f} of the time, {drop['drop']:.2f} points "
        f"[{drop['low']:.2f}, {drop['high']:.2f}]: **{verdict}**."
    )


def _photos(found: Mapping[str, Any]) -> str:
    every, some = found["photos"], found.get("calibrated", found["photos"])
    return f"{every} photos without labels{f', files in int8 calibrated on {some} of them' if some < every else ''}"


def lesson(found: Mapping[str, Any]) -> str:
    """Return how the taught network was taught, in a paragraph of its own; nothing where there is none."""
    row = next((r for r in found["rows"] if "trained_on" in r), None)
    if row is None:
        return ""
    tried = [t for t in row["tried"] if t.get("lr")]
    rates = ", ".join(f"{t['lr']:g} ({t['divergence']:.2f})" for t in tried)
    chosen = f", chosen by the divergence that a few hundred steps leave on photos held back: {rates}" if tried else ""
    return (
        f"\n\nTaught without labels: {row['epochs']:.0f} epochs of {row['images']:,} images, {row['seconds']} seconds "
        f"by `python -m benchmarks.studies.lessons` on {row['trained_on']}; learning rate {row['lr']:g}{chosen}."
    )


def page(results: Mapping[str, Any]) -> str:
    """Return docs/results/demonstration.md."""
    parts = [_HEAD]
    for key, title in TITLES.items():
        found = results["tables"].get(key)
        if found is None:
            continue
        told = (goal(found) if key in GOALS else aim(found)) + lesson(found)
        told += _SATURATES * found.get("saturates", False) + NOTES.get(key, "")
        parts.append(
            f"## {title}\n\nWeights: {found['weights']}. {_photos(found)}. Written by\n"
            f"`{found['command']}`\non {sentence(found['machine'])}, in {found['seconds'] / 60:.0f} minutes.\n\n"
            f"{told}\n\n{markdown(found)}\nThe timer: {found['timer']['why']}.\n"
        )
    return "\n".join(parts)


TITLES = {
    WITH_VNNI: "The demonstration: MobileNetV2",
    WITHOUT_VNNI: "The demonstration on a processor without VNNI",
    EARLIER: "The demonstration on another processor with VNNI, by an earlier version",
    "mobilenet_v2": "MobileNetV2, planned for either precision, and taught",
    "resnet56": "ResNet-56 on CIFAR-10, planned for either precision, and taught",
}
_SATURATES = """

This processor has no VNNI: sums of 8-bit products saturate on it, which costs files in int8 some accuracy."""
NOTES = {
    WITHOUT_VNNI: """

The host was busy, and what is timed moves the plan: a dozen runs of the same command on this machine, which the results
file does not hold, lost 15 to 27 points at 0.49 to 0.57 of the time. Shown is one whose timer was reliable.""",
    EARLIER: """

Files in int8 were calibrated on all photos then.""",
    "mobilenet_v2": """

The photos are one of each of 500 classes, and the judged images one of each of the other 500. Tried for the goal, in
single runs of 200 steps that the results file does not hold, and no nearer to it by the divergence on photos held back:
a temperature of 8 in the place of 2 (0.37 in the place of 0.34), and with that views of a tenth of a photo in the place
of a quarter, at twice the rate (0.41). Weights of 7 bits, which do not saturate (`--int8-reduce-range`), brought the
dense network to 75.0 %: its weights were rounded to 8 bits before.""",
}
"""What a reader should know of a table."""
_HEAD = """# Results

Cut, then quantise, beside what is there without any surgery: the dense network in int8, the same on smaller images,
zeros in place of channels (*masked*), and torch-pruning. All files of a table were timed in one race, in shuffled
blocks, and judged in ONNX Runtime on the same images, none of which was among the photos. Points lost are paired on
those images, with their 95 % interval. A row is *dominated* by another that takes no more time and loses no more, and
is better in one of them by intervals that do not meet. The figures are those of
`benchmarks/studies/results/stacked.json`; only real weights are in it. "Of dense" is paired, round by round; "of dense
int8" is the quotient of two medians.

torch-pruning's default is its L1 criterion at half of every width, as it leaves the network. Its best is the one of
its settings (five criteria that need no labels, layer by layer and globally, widths in steps of 16, which suits the
machine) that is nearest to the dense network on photos, with its batch norms estimated anew on others of them. Nearest
is the least divergence, on 64 photos; in all tables but the first two, which are older, the most agreement on 128. The
share of channels is the one at which L1 takes the time of our float file; ranked globally, other criteria leave other
widths there, and the row says what they take.
"""
