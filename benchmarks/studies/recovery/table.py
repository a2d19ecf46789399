"""Markdown tables of what recovery brings back, from the results file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.studies.record import sentence
from benchmarks.studies.recovery.jobs import GOALS
from benchmarks.studies.recovery.subjects import goal_of

_HEADER = (
    "way to choose",
    "recovery",
    "MACs",
    "accuracy",
    "points lost",
    "95 %",
    "top-1 match",
    "KL",
    "seconds",
    "peak",
)


def tables(results: Mapping[str, Any]) -> str:
    """Return all tables."""
    parts = [_machine(results), *(_of(results["rows"].values(), *pair) for pair in GOALS)]
    return "\n".join(part for part in parts if part)


def _machine(results: Mapping[str, Any]) -> str:
    return f"Written by `{results['command']}` on {sentence(results['machine'])}.\n"


def _of(rows: Any, network: str, macs: float) -> str:
    """One network at one fraction of its MACs: a table for each set of images."""
    found = [r for row in rows if (row["network"], row["macs"]) == (network, macs) for r in row["rows"]]
    lines = [f"## {network}, {macs:g} of the MACs ({1 / macs:.2g}x fewer)\n"]
    sets = list(dict.fromkeys(j["images"] for r in found for j in r.get("judged", ())))
    for name in sets:
        dense = next(j["dense"] for r in found for j in r.get("judged", ()) if j["images"] == name)
        lines.append(f"On {name}; dense {dense:.2f} %:\n")
        lines += _table(found, name)
        lines.append("")
    for goal in _goals(found, network, macs):
        lines.append(goal + "\n")
    failed = [r for r in found if "failed" in r]
    if failed:
        lines.append(
            f"torch-pruning made no network that runs by {len(failed)} of its settings: {failed[0]['failed']}\n"
        )
    return "\n".join(lines) if found else ""


def _table(found: Sequence[Mapping[str, Any]], name: str) -> Iterator[str]:
    yield "| " + " | ".join(_HEADER) + " |"
    yield "|---|---|" + "---:|" * (len(_HEADER) - 2)
    for row in _shown(found, name):
        judged = next(j for j in row["judged"] if j["images"] == name)
        yield "| " + " | ".join(_cells(row, judged)) + " |"


def _shown(found: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """All of ours; of torch-pruning its default, and its best on these images, without and with norms anew."""
    have = [r for r in found if any(j["images"] == name for j in r.get("judged", ()))]
    ours = [r for r in have if r["tool"] == "ours"]
    theirs = [r for r in have if r["tool"] != "ours"]
    shown: list[Mapping[str, Any]] = []
    for recovery in ("none", "bn"):
        same = [r for r in theirs if r["recovery"] == recovery]
        default = [r for r in same if r["criterion"] == "l1" and not r["global"]]
        best = sorted(same, key=lambda r: min(j["drop"] for j in r["judged"] if j["images"] == name))[:1]
        shown += [*default, *(r for r in best if r not in default)]
    return [*ours, *shown]


def _cells(row: Mapping[str, Any], judged: Mapping[str, Any]) -> tuple[str, ...]:
    chosen = (
        row["criterion"] if row["tool"] == "ours" else f"torch-pruning {row['criterion']}" + ", global" * row["global"]
    )
    memory = row.get("peak_memory_mb")
    return (
        chosen,
        row["recovery"] + (f", {row['epochs']} epochs" if "epochs" in row else ""),
        f"{row['macs']:.3f}",
        f"{judged['accuracy']:.2f}",
        f"{judged['drop']:.2f}",
        f"{judged['low']:.2f} to {judged['high']:.2f}",
        f"{judged['match']:.1f}",
        f"{judged['divergence']:.3f}",
        "" if row.get("seconds") is None else f"{row['seconds']:.0f}",
        "" if memory is None else f"{memory / 1000:.1f} GB",
    )


def _goals(found: Sequence[Mapping[str, Any]], network: str, macs: float) -> Iterator[str]:
    goal = GOALS[network, macs]
    for row in found:
        if row["tool"] == "ours" and row["criterion"] == "second-order" and row["recovery"] == "reconstruct":
            judged = row["judged"][0]
            yield (
                f"Goal: at most {goal:g} points lost on {judged['images']} without labels or gradients: "
                f"**{goal_of(judged, goal)}** ({judged['drop']:.2f} [{judged['low']:.2f}, {judged['high']:.2f}])."
            )
        if row["recovery"] == "distill":
            judged = row["judged"][0]
            yield (
                f"Goal: at most 1 point lost with distillation: **{goal_of(judged, 1.0)}** "
                f"({judged['drop']:.2f} [{judged['low']:.2f}, {judged['high']:.2f}])."
            )
