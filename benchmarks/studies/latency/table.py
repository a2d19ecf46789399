"""Markdown tables from the results file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.studies.latency.compare import best, nearest_above
from benchmarks.studies.latency.jobs import PREDICTED

Row = Mapping[str, Any]
_GOAL = 1.3
"""Goal: torch-pruning's latency over ours at the same MACs."""
_NEAR = 0.10
"""Goal for the relative error of a prediction."""
_RIVALS = ("torch-pruning", "uniform")


def render(rows: Mapping[str, Row]) -> str:
    """Return every table for which there are rows, with a heading each."""
    tables = (
        ("On trained networks, at equal measured latency", trained(rows)),
        ("torch-pruning's default and ours at the same MACs", at_same_macs(rows)),
        ("Latency budgets and other tools, random weights", speeds(rows)),
        ("Predicted and measured", predictions(rows)),
        ("The command line, cold and warm", profiles(rows)),
        ("Rows that failed", failures(rows)),
        ("Unreliable measurements", clocks(rows)),
    )
    return "\n".join(f"## {title}\n\n{table}" for title, table in tables if table.count("\n") > 2)


def of(rows: Mapping[str, Row], part: str) -> list[Row]:
    """Return a part's rows that did not fail, in the order of network, threads and target."""
    chosen = [row for row in rows.values() if row["part"] == part and "failed" not in row]
    return sorted(chosen, key=lambda row: (row["network"], row["threads"], -row["amount"]))


def table(heads: Sequence[str], lines: Iterator[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    written = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n" for cells in written)


# Each table. ---------------------------------------------------------------------------------------------------------


def trained(rows: Mapping[str, Row]) -> str:
    """Accuracy and agreement of ours, and of the best setting of each rival at our latency."""

    def lines() -> Iterator[Sequence[str]]:
        for row in of(rows, "accuracy"):
            ours = row["ours"]
            name = f"{row['network']}, {row['amount']:g} (dense {row['dense']['top1']:.1%})"
            yield name, "ours", "", *_figures(ours), *_scores(ours), "", ""
            for rival in _RIVALS:
                yield from _of_rival(row, rival)

    heads = ("network, target", "by", "setting", "latency", "MACs", "top-1", "agreement")
    differences = ("ours − theirs", "ours − theirs, BN re-estimated")
    return table((*heads, "top-1, BN re-estimated", "agreement", *differences), lines())


def _of_rival(row: Row, rival: str) -> Iterator[Sequence[str]]:
    entries = [e for e in row["rivals"] if e["rival"] == rival]
    ours = row["ours"]["latency"]["value"]
    chosen: list[tuple[str, Row]] = []
    for when in ("before", "after"):
        for what in ("top1", "agreement"):
            found = best(entries, ours, when=when, what=what)
            if found is not None and all(found is not other for _, other in chosen):
                chosen.append((_setting(found), found))
    if not chosen:
        near = nearest_above(entries, ours)
        if near is None:
            yield "", rival, _why(entries), *[""] * 8
            return
        chosen = [(f"{_setting(near)}: nearest, does not reach our latency", near)]
    for name, entry in chosen:
        gaps = [_gap(entry[when]["top1_gap"]) for when in ("before", "after")]
        yield "", rival, name, *_figures(entry), *_scores(entry), *gaps


def at_same_macs(rows: Mapping[str, Row]) -> str:
    """Latency of torch-pruning's default at a share of the channels, and ours at the same MACs."""

    def lines() -> Iterator[Sequence[str]]:
        for row in of(rows, "channels"):
            theirs, ours = row["entries"]["torch-pruning"], row["entries"]["ours"]
            met = "yes" if row["gain"] >= _GOAL else "no"
            yield (
                f"{row['network']}, {row['amount']:.0%} of the channels",
                f"{theirs['macs']:.3f}",
                _interval(theirs["latency"]),
                f"{ours['macs']:.3f}",
                _interval(ours["latency"]),
                f"{row['gain']:.2f}x",
                met,
            )

    heads = ("network", "MACs, torch-pruning", "latency, torch-pruning", "MACs, ours", "latency, ours")
    return table((*heads, "speedup over torch-pruning", f"{_GOAL}x or more"), lines())


def speeds(rows: Mapping[str, Row]) -> str:
    """Every entry of every row: latency, MACs, efficiency."""

    def lines() -> Iterator[Sequence[str]]:
        for row in of(rows, "speed"):
            threads = f", {row['threads']} threads" if row["threads"] > 1 else ""
            loop, name = row["loop"], f"{row['network']}, {row['amount']:g}{threads}"
            verdict = f"{'met' if row['entries']['ours']['met'] else 'NOT met'}: {loop['measured']:.3f}"
            for tool, entry in sorted(row["entries"].items(), key=lambda kv: (kv[0] != "ours", kv[0])):
                if "failed" in entry:
                    yield name, tool, f"{entry['failed']}: {entry['message'][:60]}", "", "", ""
                    continue
                remark = verdict if tool == "ours" else _short_of(entry)
                yield name, tool, *_figures(entry), f"{entry['efficiency']:.2f}", remark
                name = ""

    return table(("network, target", "by", "latency", "MACs", "efficiency", "in fresh processes"), lines())


def _short_of(entry: Row) -> str:
    return "does not reach our latency" if entry.get("to") == "latency" and not entry["reached"] else ""


def predictions(rows: Mapping[str, Row]) -> str:
    """Predicted and measured latency of dense networks, first plans and chosen plans."""

    def lines() -> Iterator[Sequence[str]]:
        for network in PREDICTED:
            own = [r for r in of(rows, "speed") if r["network"] == network and r["threads"] == 1]
            for number, row in enumerate(own):
                loop = row["loop"]
                if number == 0:
                    yield network, "1.0", "", *_pair(loop["predicted_dense_ms"], loop["dense_ms"])
                for k in sorted({0, loop["taken"]}):
                    found = loop["rounds"][k]
                    which = "final plan" if k == loop["taken"] else "first plan"
                    figures = _pair(found["predicted_ms"], found["measured_ms"])
                    processes = f"{found['processes']} process{'es' * (found['processes'] > 1)}"
                    yield network, f"{row['amount']:g}", f"{which}, {processes}", *figures

    return table(("network", "target", "plan", "predicted", "measured", "error", "within 10 %"), lines())


def profiles(rows: Mapping[str, Row]) -> str:
    """Time per stage of a command-line run."""

    def lines() -> Iterator[Sequence[str]]:
        for row in of(rows, "profile"):
            for name, run in row["runs"].items():
                stages = sorted(run["stages_s"].items(), key=lambda kv: -kv[1])
                longest = ", ".join(f"{stage} {s:.0f}" for stage, s in stages if s >= 0.5)
                yield row["network"], name, f"{run['seconds']:.0f} s", f"{run['measured']:.3f}", longest
            yield row["network"], "difference between the cold runs", f"{row['apart']:.1%}", "", ""

    return table(("network", "run", "total", "measured ratio", "stages, s"), lines())


def failures(rows: Mapping[str, Row]) -> str:
    """Rows without figures."""
    failed = [(key, row) for key, row in sorted(rows.items()) if "failed" in row]
    return table(("row", "why"), (((key, f"{row['failed']}: {row['message']}")) for key, row in failed))


def clocks(rows: Mapping[str, Row]) -> str:
    """Rows with an unreliable timer, and the versions of the code that rows were measured with."""

    def lines() -> Iterator[Sequence[str]]:
        for key, row in sorted(rows.items()):
            if "timer" in row and not row["timer"]["reliable"]:
                yield key, row["timer"]["why"]
        sources = sorted({str(row["source"]) for row in rows.values()})
        if len(sources) > 1:
            yield "all", f"measured with different versions of the code: {', '.join(sources)}"

    return table(("row", "reason"), lines())


# Cells. --------------------------------------------------------------------------------------------------------------


def _setting(entry: Row) -> str:
    name = str(entry["setting"]).removeprefix(str(entry["rival"])).removeprefix(", ")
    return f"{name or 'plain'}, {entry['criterion']}"


def _figures(entry: Row) -> tuple[str, str]:
    return _interval(entry["latency"]), f"{entry['macs']:.3f}"


def _scores(entry: Row) -> tuple[str, ...]:
    return tuple(f"{entry[when][what]:.1%}" for when in ("before", "after") for what in ("top1", "agreement"))


def _interval(ratio: Row) -> str:
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _gap(gap: Row) -> str:
    return f"{100 * gap['value']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"


def _pair(predicted_ms: float, measured_ms: float) -> tuple[str, str, str, str]:
    off = predicted_ms / measured_ms - 1
    return f"{predicted_ms:.2f} ms", f"{measured_ms:.2f} ms", f"{off:+.1%}", "yes" if abs(off) <= _NEAR else "no"


def _why(entries: Sequence[Row]) -> str:
    return "; ".join(sorted({f"{e['failed']}: {e['message'][:80]}" for e in entries if "failed" in e})) or "not run"
