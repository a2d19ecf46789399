"""Latency and accuracy of each file: rows of the report, and dominated rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf
from typing import Any

from exporters.quantize import Quantised
from surgery.recovery import Agreement

FASTER = 0.97
"""A low-precision file is called faster if the upper end of its ratio's interval is below this."""

Estimate = tuple[float, float, float]
"""Value, lower end and upper end of its interval."""

Standing = tuple[Estimate, Estimate]
"""A row's relative time, and its loss."""


def rows(
    models: Sequence[Mapping[str, Any]],
    quantised: Mapping[str, Quantised],
    judged: Mapping[str, Agreement],
    timing: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the report's rows, with their agreement and the row that dominates them."""
    float_rows = {row["name"]: row for row in models}
    listed: list[dict[str, Any]] = [{**row, "precision": "fp32"} for row in models]
    for name, file in quantised.items():
        of, _, precision = name.rpartition(" ")
        listed.append({**float_rows[of], "name": name, "precision": precision, "onnx_bytes": file.bytes})
    times = _times(timing) if timing["reliable"] else {}
    standings: dict[str, Standing] = {}
    for row in listed:
        name = row["name"]
        row["agreement"] = asdict(judged[name]) if name in judged else None
        if row["agreement"] and name in times:
            standings[name] = times[name], _lost(row["agreement"])
    for row in listed:
        row["dominated_by"] = dominating(row["name"], standings)
    return listed


def _times(timing: Mapping[str, Any]) -> dict[str, Estimate]:
    return {row["name"]: tuple(row["ratio"][key] for key in ("value", "low", "high")) for row in timing["rows"]}


def _lost(agreement: Mapping[str, Any]) -> Estimate:
    """Return a row's loss: in accuracy, or else agreement, or else cosine, whose uncertainty is unknown."""
    for key in ("drop", "differs"):
        if agreement[key] is not None:
            value, low, high = (float(x) for x in agreement[key])
            return value, low, high
    return 100.0 * (1.0 - float(agreement["cosine"])), -inf, inf


def dominating(name: str, standings: Mapping[str, Standing]) -> str | None:
    """Return the fastest row that is no worse in time and loss, and better in one of them with disjoint intervals."""
    if name not in standings:
        return None

    def beats(row: str) -> bool:
        pairs = list(zip(standings[row], standings[name], strict=True))
        return all(a[0] <= b[0] for a, b in pairs) and any(a[2] < b[1] for a, b in pairs)

    return min(filter(beats, standings), key=lambda row: standings[row][0], default=None)


def notes(quantised: Mapping[str, Quantised], timing: Mapping[str, Any], deployed: str = "fp32") -> list[str]:
    """Return notes on low-precision files: caveats, and files that are not faster."""
    found = list(dict.fromkeys(f"int8: {note}" for file in quantised.values() for note in file.notes))
    times = _times(timing)
    unsure = "" if timing["reliable"] else " (in times that are unreliable)"
    for name, file in quantised.items():
        of, _, precision = name.rpartition(" ")
        if file.layers[0] < file.layers[1]:
            found.append(f"{name}: {file.layers[0]} of {file.layers[1]} layers are in 8 bits")
        if name in times and of in times and times[name][2] / times[of][0] >= FASTER:
            also = ", only smaller" if precision == "fp16" else ""
            share = times[name][0] / times[of][0]
            found.append(f"{name} is not faster on this machine{also}: {share:.2f} of the time in fp32{unsure}")
    if {"dense int8", "compact int8"} <= times.keys():
        share = times["compact int8"][0] / times["dense int8"][0]
        if share >= FASTER:
            why = "" if deployed == "int8" else ": the widths were not chosen for int8 (--latency with --deploy int8)"
            found.append(f"compact int8 takes {share:.2f} of dense int8's time{unsure}{why}")
    return found
