"""docs/results/coverage.md from the results file: totals, then every model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.studies import record
from benchmarks.studies.coverage.models import Model
from benchmarks.studies.coverage.oracle import DOES_NOT_RUN, TOLERANCE
from benchmarks.studies.coverage.tools import LEAST, MACS, PARITY

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "results" / "coverage.md"
Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]
_TITLES = {
    "torchvision": "torchvision, classification",
    "segmentation": "torchvision, segmentation",
    "video": "torchvision, video",
    "detection": "torchvision, backbones of detectors (`--submodule backbone`)",
    "timm": "timm",
}


_OUTCOMES = {
    "sound": "sound",
    "refused": "refused",
    "unsound": "unsound",
    "does not run": "does not run",
    "not judged": "not judged",
    "limit": "over a limit",
    "failed": "failed",
    "missed": f"outside {LEAST} to {MACS}",
    "not run": "not run",
}


def outcome(row: Mapping[str, Any] | None) -> str:
    """One of sound, refused, unsound, does not run, not judged, limit, failed, missed (the budget's range), not run."""
    if row is None:
        return "not run"
    if "failed" in row:
        if row["failed"] == "limit":
            return "limit"
        return "refused" if row["failed"] in ("BudgetUnreachable", "UnsupportedModel") else "failed"
    if row["why"].startswith(DOES_NOT_RUN):
        return "does not run"
    if row["sound"] is not True:
        return "unsound" if row["sound"] is False else "not judged"
    return "sound" if LEAST <= row["macs_kept"] <= MACS else "missed"


def summary(rows: Rows, models: Iterable[Model]) -> dict[str, dict[str, int]]:
    """Tool → outcome → number of models."""
    models = tuple(models)
    counts: dict[str, dict[str, int]] = {}
    for tool, found in rows.items():
        for model in models:
            kind = outcome(found.get(model.name))
            counts.setdefault(tool, {})[kind] = counts.get(tool, {}).get(kind, 0) + 1
    return counts


_HEAD = """# Coverage

{models} models are pruned to half of their multiply-adds, in float64 with well-conditioned random weights, and
checked by an oracle that shares no code with any of the tools. Every weight has a distinct value, so the compact
tensors identify the dense elements they contain, and the dense model without the others must compute the same. For
this compiler, the result is also cast to float32, exported, and compared in ONNX Runtime (largest difference
{parity}, or what torch's own float32 rounding explains on the same inputs).

A model "trains" if the gradients of one training step, with layers as in evaluation mode, are those of the dense
model without the removed elements, to a relative difference of {tolerance:.0e}; of {judged} models that this was
measured on, {trained} do. Rows without an entry are from before this was measured.

torch-pruning is told to ignore attention heads, an output transform and the classifier, and prunes in steps until
half of the MACs is left: with global L1 ranking or, if that fails, with the same ratio in every layer (marked as
such). onnxsim prunes ONNX files (from torch's TorchScript exporter if possible) with its defaults and sparsity 0.5;
the weights are distinct, and its output is run but not judged. Models are loaded, and torch-pruning's MACs counted,
by this package.

Written by `python -m benchmarks.studies.coverage --table` from
`benchmarks/studies/results/coverage.json`, measured
on {machine},
with one thread, at most 120 s of CPU time and 8 GiB per model and tool. Seconds are for pruning including its MAC
counts, without oracle and ONNX, in CPU time (older rows: wall-clock time). Rows were measured during development,
next to other work that slows the two cores down by up to a half; a row over the time limit could be within it on an
idle machine. Rows with a date in the results file are of that day's code, rows without of earlier days.
"""


def render(data: Mapping[str, Any], models: Iterable[Model]) -> str:
    """Return the document."""
    models, rows = tuple(models), data["rows"]
    trains = [_trains(row) for m in models if "failed" not in (row := rows.get("surgery", {}).get(m.name, {}))]
    head = _HEAD.format(
        models=len(models),
        parity=f"{PARITY:.0e}",
        tolerance=TOLERANCE,
        judged=sum(map(bool, trains)),
        trained=trains.count("yes"),
        machine=record.sentence(data["machine"]),
    )
    lines = [head, "| tool | " + " | ".join(_OUTCOMES.values()) + " |", "|---" * (len(_OUTCOMES) + 1) + "|"]
    for tool, counts in summary(rows, models).items():
        lines.append(f"| {tool} | " + " | ".join(str(counts.get(kind, 0)) for kind in _OUTCOMES) + " |")
    lines += ["", *_comparison(rows, models), "", *_refusals(rows, models), "", *_whole(rows, models)]
    for family, title in _TITLES.items():
        lines += ["", f"## {title}", "", *_table(rows, [m for m in models if m.family == family])]
    return "\n".join(lines) + "\n"


def _comparison(rows: Rows, models: tuple[Model, ...]) -> list[str]:
    ours, theirs = rows.get("surgery", {}), rows.get("torch-pruning", {})
    both = [
        (m.name, ours[m.name]["frozen_share"], theirs[m.name]["frozen_share"])
        for m in models
        if outcome(theirs.get(m.name)) in ("sound", "missed") and outcome(ours.get(m.name)) in ("sound", "missed")
    ]
    if not both:
        return ["No model is sound with both this compiler and torch-pruning."]
    more = [f"{name} ({mine:.1%} against {other:.1%})" for name, mine, other in both if mine > other + 1e-6]
    text = (
        f"Both this compiler and torch-pruning are sound on {len(both)} models. The share of parameters outside any "
        f"removable unit is larger with this compiler on {len(more)} of them"
    )
    return [text + (": " + ", ".join(more) + "." if more else ".")]


def _refusals(rows: Rows, models: tuple[Model, ...]) -> list[str]:
    lines = [
        "## Models that are not pruned, and why",
        "",
        "Models over the time limit are listed with the stages that had started, and after how many seconds of CPU",
        "time. A model that reached the oracle was pruned and has passed this compiler's own verification.",
        "",
    ]
    for model in models:
        row = rows.get("surgery", {}).get(model.name)
        kind = outcome(row)
        if kind not in ("sound", "not run") and row is not None:
            why = row.get("message") or row.get("why") or f"{row['macs_kept']:.3f} of the MACs kept"
            lines.append(f"- **{model.name}** ({_OUTCOMES[kind]}): {why.replace('|', '/')}")
    missing = sum(model.name not in rows.get("surgery", {}) for model in models)
    rest = "of the models that were run" if missing else "on the list"
    return lines if lines[-1] else [*lines[:2], f"Nothing {rest}."]


_MUCH = 0.02
"""Share of parameters outside any removable unit from which a model is listed."""
_WHOLE = (
    "## Parameters that cannot be pruned",
    "",
    f"In these models, more than {_MUCH:.0%} of the parameters are in no removable unit, for the given reasons.",
    "Some axes cannot be pruned in principle: classes and boxes are the network's output; a layer over tokens has as",
    "many as the image has patches; a convolution along the channels (efficient channel attention) depends on their",
    "order. Layers that forward does not run in eval mode are left unchanged.",
    "",
)


def _whole(rows: Rows, models: tuple[Model, ...]) -> list[str]:
    lines = []
    for model in models:
        row = rows.get("surgery", {}).get(model.name, {})
        if row.get("frozen_share", 0.0) > _MUCH:
            most = list(row["frozen"].items())[:2]
            reasons = "; ".join(f"{why.replace('|', '/')} ({count / row['parameters']:.1%})" for why, count in most)
            lines.append(f"- **{model.name}** {row['frozen_share']:.1%}: {reasons}")
    return [*_WHOLE, *lines] if lines else []


def _table(rows: Rows, models: list[Model]) -> list[str]:
    lines = [
        "| model | input | MACs kept | parameters kept | seconds | groups cut (inexact) | result | frozen | error "
        "| trains | torch-pruning | MACs kept | seconds | frozen | onnxsim: MACs kept |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in models:
        ours, peer, third = (rows.get(t, {}).get(model.name) for t in ("surgery", "torch-pruning", "onnxsim"))
        lines.append("| " + " | ".join([f"{model.name}", model.note, *_ours(ours), *_peer(peer), _third(third)]) + " |")
    return lines


def _ours(row: Mapping[str, Any] | None) -> list[str]:
    kind = outcome(row)
    if row is None or "failed" in row:
        return ["", "", "", "", kind, "", "", ""]
    return [
        f"{row['macs_kept']:.3f}",
        f"{row['parameters_kept']:.3f}",
        f"{row['seconds']:.0f}",
        f"{row['groups_cut']} ({row['groups_inexact']})",
        f"{kind}, {row['kind']}",
        f"{row['frozen_share']:.1%}",
        f"{row['error']:.0e}" if row["error"] is not None else "",
        _trains(row),
    ]


def _trains(row: Mapping[str, Any]) -> str:
    """Whether one training step gives the right gradients; empty in rows from before this was measured."""
    if row.get("untrainable"):
        return f"no: {row['untrainable'].replace('|', '/')}"
    if (difference := row.get("gradients")) is None:
        return ""
    return "yes" if difference <= TOLERANCE else f"other gradients, by {difference:.0e}"


def _peer(row: Mapping[str, Any] | None) -> list[str]:
    kind = outcome(row)
    if row is None or "failed" in row:
        return [kind if row is None or kind == "limit" else f"fails: {row['failed']}", "", "", ""]
    if row["macs_kept"] is None:
        return [kind, "", "", ""]
    kind += ", same ratio" if row.get("scope") == "local" else ""
    return [kind, f"{row['macs_kept']:.3f}", f"{row['seconds']:.0f}", f"{row['frozen_share']:.1%}"]


def _third(row: Mapping[str, Any] | None) -> str:
    if row is None or "failed" in row:
        return "" if row is None else ("limit" if row["failed"] == "limit" else "fails")
    return f"{row['macs_kept']:.2f}"
