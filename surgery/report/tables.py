"""What models come to in a report: each file beside the dense model, and the steps of recovery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.core import figure, ratio, size

STEP_COLUMNS = (
    "step",
    "accuracy",
    "points lost",
    "95% interval",
    "top-1 match",
    "cosine",
    "KL",
    "eval",
    "seconds",
    "memory",
)
"""Headers of the table of steps, in the order of `step_cells`."""
_GONE = " (undone)"
JUDGED = (
    *("model", "p50 ms", "relative time", "95% interval", "accuracy", "points lost", "95% interval"),
    *("top-1 match", "cosine", "bytes", "dominated by"),
)
"""Headers of the table of what models come to, in the order of `judged_cells`."""


def judged_cells(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return what each model comes to, in the order of `JUDGED`; empty where nothing was judged and timed."""
    timing = data["timing"] or {"rows": ()}
    times = {row["name"]: row for row in timing["rows"]}
    judged = [model for model in data["models"] if model.get("agreement") and model["name"] in times]
    return [_judged(model, times[model["name"]]) for model in judged]


def _judged(model: Mapping[str, Any], time: Mapping[str, Any]) -> tuple[str, ...]:
    found = model["agreement"]
    accuracy, drop, match = (found[key] for key in ("accuracy", "drop", "top1_match"))
    return (
        model["name"],
        figure(time["p50_ms"]),
        *ratio(time["ratio"], digits=3, unit=""),
        f"{100 * accuracy:.2f}%" if accuracy is not None else "-",
        f"{drop[0]:.2f}" if drop else "-",
        f"{drop[1]:.2f} to {drop[2]:.2f}" if drop else "-",
        f"{100 * match:.1f}%" if match is not None else "-",
        f"{found['cosine']:.4f}",
        size(model["onnx_bytes"]),
        model["dominated_by"] or "",
    )


def step_cells(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of steps as text, one tuple per row in the order of `STEP_COLUMNS`; ``-`` where not known."""
    return [_row(step) for step in (data.get("recovery") or {"steps": ()})["steps"]]


def _row(step: Mapping[str, Any]) -> tuple[str, ...]:
    found = step["agreement"] or {}
    drop = found.get("drop")
    return (
        step["name"] + ("" if step["kept"] else _GONE),
        _share(found.get("accuracy")),
        f"{drop[0]:.2f}" if drop else "-",
        f"{drop[1]:.2f} to {drop[2]:.2f}" if drop else "-",
        _share(found.get("top1_match")),
        _number(found.get("cosine"), 4),
        _number(found.get("divergence"), 4),
        ", ".join(f"{name} {value:.4g}" for name, value in (step["metrics"] or {}).items()) or "-",
        f"{step['seconds']:.1f}",
        f"{step['peak_memory_bytes'] / 1e9:.2f} GB",
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def judged_line(data: Mapping[str, Any]) -> str:
    """Return what the steps were judged by; the empty string where nothing was recovered or judged."""
    recovery = data.get("recovery")
    if not recovery or not recovery["judged_by"]:
        return ""
    what = "accuracy" if recovery["labelled"] else "agreement with the dense model"
    return f"recovery ({recovery['level']}): {what} on {recovery['judged_by']}"


def step_notes(data: Mapping[str, Any]) -> list[str]:
    """Return what the steps want the user to know."""
    notes = [note for step in (data.get("recovery") or {"steps": ()})["steps"] for note in step["notes"]]
    for name, figures in (data.get("evaluation") or {}).items():
        notes.append(
            f"--eval of {name.replace(' ', '.')}.onnx: "
            + ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        )
    if within := data.get("within"):
        tries = ", ".join(map(_tried, within["tried"]))
        notes.append(
            f"the lowest latency within {within['max_drop']:g} points of {within['of']}: measured "
            f"{within['measured']:.3f} of {within.get('dense', 'the dense')} model's; aimed at: {tries}"
        )
    return notes


def _tried(one: Mapping[str, Any]) -> str:
    timed = "" if one["measured"] is None else f" (measured {one['measured']:.3f})"
    return f"{one['aim']:.2f}{timed} lost up to {one['upper']:.2f}"
