"""Markdown tables of the recovery study, from the results file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.studies.latency.table import table
from benchmarks.studies.record import sentence
from benchmarks.studies.recovery.jobs import AT_LATENCY, GOALS, LABEL_FREE, PUBLISHED, RIVAL, SMALLER
from benchmarks.studies.recovery.subjects import goal_of
from benchmarks.studies.recovery.timed import best_of

Row = dict[str, Any]
DISTILLED_GOAL = 1.0
"""Points that ResNet-56 may lose at 0.476 of its MACs after distillation."""

PUBLISHED_GOAL = 0.3
"""Points that it may lose at torch-pruning's published compression, finetuned on all JPEG images."""


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables, each with a heading."""
    rows = list(results["rows"].values())
    parts = [
        ("Goals", goals(rows)),
        *(
            (f"{name} at {macs:g} of the MACs ({1 / macs:.1f}x fewer)", at_macs(rows, name, macs))
            for name, macs in GOALS
        ),
        ("At torch-pruning's published compression, with labels", published(rows)),
        ("At the same measured latency", at_latency(rows)),
        ("Alternatives to pruning: a smaller network, or smaller images", instead(rows)),
        ("Comparisons that settings were chosen by", choices(rows)),
    ]
    machine = sentence(results["machine"])
    elsewhere = dict.fromkeys(r["machine"] for r in rows if r.get("machine", machine) != machine)
    written = f"Written by `{results['command']}` on {machine}.\n" + "".join(
        f"\nOn {other}: {'; '.join(_named(r) for r in rows if r.get('machine') == other)}.\n" for other in elsewhere
    )
    return "\n".join([written, *(f"## {title}\n\n{text}" for title, text in parts if text.count("\n") > 2)])


def _named(row: Row) -> str:
    return f"{row['part']}, {row['network']} at {row['amount']:g}"


def _of(rows: Sequence[Row], part: str, network: str = "", amount: float | None = None) -> list[Row]:
    """Return the rows of a part, for one network and amount if given."""
    wanted = [r for r in rows if r["part"] == part and network in ("", r["network"])]
    return [x | {"threads": r["threads"]} for r in wanted if amount in (None, r["amount"]) for x in r["rows"]]


def goals(rows: Sequence[Row]) -> str:
    """Each goal, the result, and whether the whole interval meets it."""
    heads = ("goal", "allowed points lost", "points lost", "95 %", "verdict", "seconds (threads)", "peak memory")

    def lines() -> Iterator[Sequence[str]]:
        for (name, macs), goal in GOALS.items():
            for row in _of(rows, LABEL_FREE, name, macs):
                if (row["criterion"], row["recovery"]) == ("second-order", "reconstruct"):
                    for found in row["judged"]:
                        title = f"{name} at {macs:g} of the MACs, no labels, no gradients, {found['images']}"
                        yield _goal(title, found, goal, row)
        for row in _of(rows, "distilled", "resnet56", 0.476):
            for found in row["judged"]:
                yield _goal(f"resnet56 at 0.476 of the MACs, distilled, {found['images']}", found, DISTILLED_GOAL, row)
        for row in _of(rows, PUBLISHED):
            if row["tool"] == "ours" and row["recovery"] == "finetune":
                title = f"resnet56 at {row['macs']:.3f} of the MACs, finetuned on all JPEG images"
                for found in row["judged"]:
                    yield _goal(f"{title}, {found['images']}", found, PUBLISHED_GOAL, row)
        for row in _of(rows, "distilled", "resnet56", 0.0):
            for other, found in row.get("against", {}).items():
                for drop in found:
                    title = f"resnet56 at the latency of {SMALLER} loses less than {other}, {drop['images']}"
                    yield _goal(title, drop, 0.0, row)

    return table(heads, lines())


def _goal(title: str, drop: Row, goal: float, row: Row) -> tuple[str, ...]:
    return (title, f"{goal:g}", f"{drop['drop']:.2f}", _interval(drop), f"**{goal_of(drop, goal)}**", *_cost(row))


def _interval(drop: Row) -> str:
    return f"{drop['low']:.2f} to {drop['high']:.2f}"


def _cost(row: Row) -> tuple[str, str]:
    seconds, memory = row.get("seconds"), row.get("peak_memory_mb")
    return (
        "" if seconds is None else f"{seconds:.0f} ({_where(row)})",
        "" if memory is None else f"{memory / 1000:.1f} GB",
    )


def _where(row: Row) -> str:
    """Threads of torch, or the accelerator used for training."""
    name = str(row.get("trained_on", "CPU"))
    return str(row["threads"]) if name == "CPU" else name


def published(rows: Sequence[Row]) -> str:
    """ResNet-56 at torch-pruning's published compression, finetuned on all JPEG training images."""
    heads = ("images", "network", "recovery", "MACs", *_JUDGED, "seconds (threads)", "peak memory")
    found = _of(rows, PUBLISHED)

    def lines() -> Iterator[Sequence[str]]:
        for images in _sets(found):
            for row in found:
                if (judged := _on(row, images)) is not None:
                    named = (images, row["tool"], _recovery(row), f"{row['macs']:.3f}")
                    yield (*named, *_cells(judged), *_cost(row))

    return table(heads, lines())


def at_macs(rows: Sequence[Row], network: str, macs: float) -> str:
    """One network at one fraction of its MACs."""
    ours = _of(rows, LABEL_FREE, network, macs)
    distilled = _of(rows, "distilled", network, macs)
    theirs = _of(rows, RIVAL, network, macs)
    heads = ("images", "criterion", "recovery", "MACs", *_JUDGED, "seconds (threads)", "peak memory")
    shown = [*ours, *distilled, *best_of(theirs)]

    def lines() -> Iterator[Sequence[str]]:
        for images in _sets(shown):
            for row in shown:
                if (judged := _on(row, images)) is not None:
                    yield (images, _chosen(row), _recovery(row), f"{row['macs']:.3f}", *_cells(judged), *_cost(row))

    return _with_failures(table(heads, lines()), theirs)


_JUDGED = ("accuracy", "points lost", "95 %", "agreement", "KL divergence")


def _cells(judged: Row) -> tuple[str, ...]:
    return (
        f"{judged['accuracy']:.2f}",
        f"{judged['drop']:.2f}",
        _interval(judged),
        f"{judged['match']:.1f}",
        f"{judged['divergence']:.3f}",
    )


def _sets(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(j["images"] for r in rows for j in r.get("judged", ())))


def _on(row: Row, images: str) -> Row | None:
    judged: Sequence[Row] = row.get("judged", ())
    return next((j for j in judged if j["images"] == images), None)


def _chosen(row: Row) -> str:
    if row["tool"] == "torch-pruning":
        steps = f", round_to {row['round_to']}" if row.get("round_to") else ""
        return f"torch-pruning {row['criterion']}{', global' if row['global'] else ''}{steps}"
    return str(row["criterion"])


def _recovery(row: Row) -> str:
    return str(row["recovery"]) + (f", {row['epochs']} epochs" if "epochs" in row else "")


def _with_failures(text: str, theirs: Sequence[Row]) -> str:
    failed = [r for r in theirs if "failed" in r]
    if not failed:
        return text
    named = ", ".join(_chosen(r).removeprefix("torch-pruning ") for r in failed)
    return f"{text}\ntorch-pruning's network does not run with: {named} ({failed[0]['failed']})\n"


def at_latency(rows: Sequence[Row]) -> str:
    """Ours and torch-pruning's, timed together with the dense network."""
    heads = ("network", "tool", "recovery", "latency", "MACs", "images", *_JUDGED)
    places = dict.fromkeys((network, ratio) for network, ratio, _ in AT_LATENCY)

    def lines() -> Iterator[Sequence[str]]:
        for network, ratio in places:
            found = _of(rows, "equal latency", network, ratio)
            ours = [r for r in found if r["tool"] == "ours"]
            for row in [*ours, *best_of([r for r in found if r["tool"] != "ours"])]:
                for judged in row["judged"]:
                    name = "ours" if row["tool"] == "ours" else _chosen(row)
                    time = f"{row['latency']['value']:.3f}"
                    cells = (time, f"{row['macs']:.3f}", judged["images"], *_cells(judged))
                    yield (network, name, _recovery(row), *cells)

    failed = [r for network, ratio in places for r in _of(rows, "equal latency", network, ratio)]
    return _with_failures(table(heads, lines()), failed)


def instead(rows: Sequence[Row]) -> str:
    """What could be used instead of a pruned network, with its latency."""
    heads = ("network", "recovery", "latency", "ms", "MACs", "images", *_JUDGED)

    def lines() -> Iterator[Sequence[str]]:
        found = [*_of(rows, "distilled", "resnet56", 0.0), *_of(rows, "smaller images")]
        for row in found:
            for judged in row["judged"]:
                name = "resnet56, compact" if row["tool"] == "ours" else row["criterion"]
                time = row["latency"]
                cells = (f"{time['value']:.3f}", f"{time['p50_ms']:.3f}", f"{row['macs']:.3f}", judged["images"])
                yield (name, _recovery(row), *cells, *_cells(judged))

    return table(heads, lines())


def choices(rows: Sequence[Row]) -> str:
    """Settings that were compared on training images."""
    heads = ("network", "MACs", "criterion", "setting", *_JUDGED)

    def lines() -> Iterator[Sequence[str]]:
        for whole in (r for r in rows if r["part"] == "choices"):
            for row in whole["rows"]:
                cells = (whole["network"], f"{whole['amount']:g}", row["criterion"], row["way"])
                yield (*cells, *_cells(row["judged"][0]))

    return table(heads, lines())
