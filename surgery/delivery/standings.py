"""Latency and accuracy of each file: rows of the report, and dominated rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from exporters.quantize import Quantised
from exporters.session import OnnxModel
from surgery.recovery import Agreement, Recovery, Reference

FASTER = 0.97
"""A low-precision file is called faster if the upper end of its ratio's interval is below this."""


def judge(files: Mapping[str, Path], reference: Reference, threads: int) -> dict[str, Agreement]:
    """Return each file's agreement with the dense model, in ONNX Runtime."""
    found = {}
    for row, path in files.items():
        model = OnnxModel(path, threads=threads)
        found[row] = reference.judge(lambda inputs, model=model: model(*inputs))  # type: ignore[misc]
    return found


def agreement_of_steps(recovery: Recovery | None) -> dict[str, Agreement]:
    """Return the agreement of the torch models of the float rows: dense, masked and compact."""
    steps = recovery.steps if recovery is not None else ()
    known = {step.name: step.agreement for step in steps}
    found = {"dense": known.get("dense"), "masked": known.get("cut")}
    if steps:
        found["compact"] = steps[-1].agreement
    return {row: agreement for row, agreement in found.items() if agreement is not None}


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
    times = {t["name"]: t["ratio"] for t in timing["rows"]} if timing["reliable"] else {}
    standings = {}
    for row in listed:
        name = row["name"]
        row["agreement"] = asdict(judged[name]) if name in judged else None
        if row["agreement"] and name in times:
            standings[name] = standing(times[name], _lost(row["agreement"]))
    for row in listed:
        row["dominated_by"] = dominating(row["name"], standings)
    return listed


def _lost(agreement: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return a row's loss with interval: in accuracy, or else agreement, or else cosine.

    The interval of a cosine is unbounded, since its uncertainty is unknown.
    """
    for key in ("drop", "differs"):
        if agreement[key] is not None:
            value, low, high = (float(x) for x in agreement[key])
            return value, low, high
    return 100.0 * (1.0 - float(agreement["cosine"])), -inf, inf


@dataclass(frozen=True, slots=True)
class Standing:
    """A row's relative time and loss, each (value, lower end, upper end)."""

    time: tuple[float, float, float]
    loss: tuple[float, float, float]

    def beats(self, other: Standing) -> bool:
        """Return whether it is not worse in either, and better in one of them with disjoint intervals."""
        ours, theirs = (self.time, self.loss), (other.time, other.loss)
        no_worse = all(a[0] <= b[0] for a, b in zip(ours, theirs, strict=True))
        return no_worse and any(a[2] < b[1] for a, b in zip(ours, theirs, strict=True))


def standing(ratio: Mapping[str, float], loss: tuple[float, float, float]) -> Standing:
    """Return the standing of a row."""
    return Standing((ratio["value"], ratio["low"], ratio["high"]), loss)


def dominating(name: str, standings: Mapping[str, Standing]) -> str | None:
    """Return the fastest of the rows that beat this one."""
    if name not in standings:
        return None
    better = [row for row, found in standings.items() if found.beats(standings[name])]
    return min(better, key=lambda row: standings[row].time[0], default=None)


def notes(quantised: Mapping[str, Quantised], timing: Mapping[str, Any], deployed: str = "fp32") -> list[str]:
    """Return notes on low-precision files: caveats, and files that are not faster."""
    found = list(dict.fromkeys(f"int8: {note}" for file in quantised.values() for note in file.notes))
    times = {t["name"]: t["ratio"] for t in timing["rows"]}
    unsure = "" if timing["reliable"] else " (in times that are unreliable)"
    for name, file in quantised.items():
        of, _, precision = name.rpartition(" ")
        if file.layers[0] < file.layers[1]:
            found.append(f"{name}: {file.layers[0]} of {file.layers[1]} layers are in 8 bits")
        if name in times and of in times and times[name]["high"] / times[of]["value"] >= FASTER:
            also = ", only smaller" if precision == "fp16" else ""
            share = times[name]["value"] / times[of]["value"]
            found.append(f"{name} is not faster on this machine{also}: {share:.2f} of the time in fp32{unsure}")
    if {"dense int8", "compact int8"} <= times.keys():
        share = times["compact int8"]["value"] / times["dense int8"]["value"]
        if share >= FASTER:
            why = "" if deployed == "int8" else ": the widths were not chosen for int8 (--latency with --deploy int8)"
            found.append(f"compact int8 takes {share:.2f} of dense int8's time{unsure}{why}")
    return found
