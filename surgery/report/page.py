"""The report as one HTML page: no network, no script, for a screen, a phone and paper, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from surgery.core import si, size
from surgery.report import charts, content as report, tables as report_steps

MOST_LAYERS = 120
"""Layers whose widths are drawn; the rest is in report.json."""


def render(data: Mapping[str, Any]) -> str:
    """Return report.html.

    Args:
        data: what report.json holds.
    """
    import jinja2  # as in `report`
    from markupsafe import Markup

    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    template = environment.from_string(files("surgery.report").joinpath("templates/report.html.j2").read_text("utf-8"))
    safe = {key: [Markup(svg) for svg in drawn] for key, drawn in _charts(data).items()}
    return template.render(
        data=data,
        charts=safe,
        headline=_headline(data),
        sentences=report.sentences(data),
        tables=_tables(data),
        sections={
            "Dropped: whole branches and layers": report.dropped_lines(data),
            "Inexact: not what zeros would give": report.inexact_lines(data),
            "Frozen, and why": report.frozen_lines(data),
            "Notes": report.note_lines(data),
        },
        machine=_machine(data),
    )


def _headline(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The few figures that matter: (figure, what of, its interval or what it is relative to)."""
    found = []
    times = {row["name"]: row for row in (data["timing"] or {"rows": ()})["rows"]}
    rows = {row["name"]: row for row in data["models"]}
    compact = sorted((n for n in times if n.startswith("compact")), key=lambda n: times[n]["ratio"]["value"])
    deployed = report.deployed(data)
    asked = "compact" if deployed == "fp32" else f"compact {deployed}"
    for name in dict.fromkeys(n for n in (asked, "compact", *compact[:1]) if n in times):
        speedup = times[name]["speedup"]
        told = f"{_faster(speedup['value'])}, {name} [{speedup['low']:.2f}, {speedup['high']:.2f}]"
        sure = "" if data["timing"]["reliable"] else ", UNRELIABLE: see below"
        found.append((f"{speedup['value']:.2f}×", told, f"{times[name]['p50_ms']:.3g} ms{sure}"))
        found += _against_its_like(name, times) + _loss(name, rows[name].get("agreement"))
    before, after = rows["dense"], rows[asked] if asked in rows else rows["compact"]
    if before["macs"] and after["macs"]:
        found.append((f"{after['macs'] / before['macs']:.2f}", "of the MACs", si(after["macs"])))
    if before["onnx_bytes"] and after["onnx_bytes"]:
        of = f"of the bytes, {after['name']}"
        found.append((f"{after['onnx_bytes'] / before['onnx_bytes']:.2f}", of, size(after["onnx_bytes"])))
    return found


def _against_its_like(name: str, times: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A file in fewer bits beside the dense model in as many."""
    dense = name.replace("compact", "dense")
    if dense == "dense" or dense not in times:
        return []
    share = times[name]["p50_ms"] / times[dense]["p50_ms"]
    told = f"{_faster(1 / share)}, {name}, against {dense}"
    return [(f"{1 / share:.2f}×", told, f"{times[dense]['p50_ms']:.3g} ms before")]


def _faster(speedup: float) -> str:
    return "faster" if speedup >= 1 else "the speed: slower"


def _loss(name: str, found: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    if not found:
        return []
    if found["drop"] is not None:
        value, low, high = found["drop"]
        gained, least, most = (0.0 - x for x in (value, high, low))  # never -0.00
        return [(f"{gained:+.2f}", f"points of accuracy, {name} [{least:+.2f}, {most:+.2f}]",
                 f"{100 * found['accuracy']:.2f} %")]  # fmt: skip
    if found["top1_match"] is not None:
        return [(f"{100 * found['top1_match']:.1f} %", f"same class as the dense model, {name}", "accuracy unknown")]
    return [(f"{found['cosine']:.4f}", f"cosine with the dense model's output, {name}", "accuracy unknown")]


def _tables(data: Mapping[str, Any]) -> list[tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    known = [
        ("Files", report.COLUMNS, report.cells(data)),
        ("Time and what it costs", report_steps.JUDGED, report_steps.judged_cells(data)),
        ("Recovery, step by step", report_steps.STEP_COLUMNS, report_steps.step_cells(data)),
    ]
    return [(title, *_filled(columns, rows)) for title, columns, rows in known if rows]


def _filled(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Leave out columns that say nothing of any row: a phone is narrow."""
    used = [k for k in range(len(columns)) if k == 0 or any(row[k] not in ("", "-") for row in rows)]
    return [columns[k] for k in used], [[row[k] for k in used] for row in rows]


def _charts(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """Title → SVGs."""
    found: dict[str, list[str]] = {}
    if data["timing"]:
        found["Run times"] = [charts.times([*data["timing"]["rows"]])]
    if (steps := charts.recovery(data)) is not None:
        found["Accuracy by step"] = [charts.inline(steps, "accuracy or agreement by step of recovery")]
    for name in data.get("operators") or {}:
        before, after = (data["operators"].get(n) for n in (name.replace("compact", "dense"), name))
        if name.startswith("compact") and before and after:
            drawings = found.setdefault("Where the time goes", [])
            drawings.append(charts.operators(before, after, name))
    changed = [x for x in data.get("layers") or () if x["compact"] is None or x["compact"][0] != x["dense"][0]]
    if changed:
        found["Widths of the layers that changed"] = [charts.widths(changed[:MOST_LAYERS])]
    if data.get("stairs"):
        found["The costliest kernels, and where their widths stand"] = [charts.staircase(x) for x in data["stairs"]]
    return found


def _machine(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = [("tool", f"{data['tool']['name']} {data['tool']['version']}")]
    if data["timing"]:
        where, how = data["timing"]["environment"], data["timing"]["settings"]
        told += [
            ("processor", f"{where['cpu']}, {where['cores']} cores, {', '.join(where['instruction_sets'])}"),
            ("system", f"{where['system']}, Python {where['python']}"),
            ("ONNX Runtime", f"{where['onnxruntime']}, {where['provider']}"),
            ("threads, batch", f"{how['threads']}, {how['batch']}"),
        ]
    told.append(("plan", data["plan"]["digest"][:16]))
    return told + [(name, str(value)) for name, value in sorted(data["settings"].items())]
