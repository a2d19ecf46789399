"""Files in fewer bits beside the float ones, and what each file comes to on the images that a result was judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from exporters.quantize import FEWEST, Int8, Quantised, to_fp16, to_int8
from exporters.session import OnnxModel, feeds
from surgery.errors import InvalidInput
from surgery.inputs import Calibration
from surgery.recovery import Agreement, Recovery, Reference

PRECISIONS = ("fp32", "fp16", "int8")
FASTER = 0.97
"""A file in fewer bits is called faster where the upper end of its relative time's interval is below this."""


@dataclass(frozen=True, slots=True)
class Precisions:
    """In which precisions files are written, float32 in any case.

    Attributes:
        names: of `PRECISIONS`.
        int8: how to quantise.

    Raises:
        InvalidInput: there is no such precision.
    """

    names: tuple[str, ...] = ("fp32",)
    int8: Int8 = field(default_factory=Int8)

    def __post_init__(self) -> None:
        wrong = [name for name in self.names if name not in PRECISIONS]
        if wrong or not self.names:
            raise InvalidInput(f"precision {', '.join(wrong) or 'none'}: there are {', '.join(PRECISIONS)}")

    @property
    def fewer(self) -> tuple[str, ...]:
        """Those of fewer bits, in the order of `PRECISIONS`."""
        return tuple(name for name in PRECISIONS[1:] if name in self.names)


def with_deployed(how: Precisions, deploy: str) -> Precisions:
    """Return the precisions with the one that a budget of time was of, which has to be written to be timed."""
    return how if deploy in (*how.names, PRECISIONS[0]) else replace(how, names=(*how.names, deploy))


def refuse_without_images(how: Precisions, seen: Calibration | None) -> None:
    """Raise InvalidInput where files in fewer bits have no images to be calibrated on or compared by."""
    if not how.fewer:
        return
    if seen is None:
        raise InvalidInput(f"--precision {','.join(how.fewer)} needs images to calibrate on: give them with --data")
    refuse_too_few(how, seen.count)


def refuse_too_few(how: Precisions, count: int) -> None:
    """Raise InvalidInput where there are not enough images to calibrate files in int8 on."""
    if "int8" in how.fewer and count < FEWEST:
        raise InvalidInput(f"too few images to calibrate files in int8 on ({count}); give {FEWEST} or more with --data")


def write(
    files: Mapping[str, Path], folder: Path, how: Precisions, seen: Calibration, *, whole: bool
) -> dict[str, Quantised]:
    """Write each float file in the precisions of fewer bits, into `folder`, and return them by row: `dense int8`.

    Args:
        files: row → float32 file.
        folder: to write into.
        how: which precisions.
        seen: images to calibrate on.
        whole: whether the files hold the whole model of which a part was shrunk.

    Raises:
        InvalidInput, CheckFailed: as `exporters.quantize.to_int8`.
    """
    found = {}
    for precision in how.fewer:
        for row, source in files.items():
            target = folder / f"{row}.{precision}.onnx"
            batches = list(feeds(source, (seen.given or seen.batches) if whole else seen.batches))
            if precision == "int8":
                found[f"{row} int8"] = to_int8(source, target, batches, how.int8)
            else:
                found[f"{row} fp16"] = to_fp16(source, target, batches)
    return found


def judge(files: Mapping[str, Path], reference: Reference, threads: int) -> dict[str, Agreement]:
    """Return how each file does beside the dense model, in ONNX Runtime."""
    found = {}
    for row, path in files.items():
        model = OnnxModel(path, threads=threads)
        found[row] = reference.judge(lambda inputs, model=model: model(*inputs))  # type: ignore[misc]
    return found


def of_steps(recovery: Recovery | None) -> dict[str, Agreement]:
    """Return what the torch models of the float rows came to: dense, masked (the one as cut) and compact."""
    steps = recovery.steps if recovery is not None else ()
    known = {step.name: step.agreement for step in steps if step.agreement is not None}
    found = {"dense": known.get("dense"), "masked": known.get("cut")}
    if steps:
        found["compact"] = steps[-1].agreement
    return {row: agreement for row, agreement in found.items() if agreement is not None}


def rows(
    models: Sequence[Mapping[str, Any]],
    quantised: Mapping[str, Quantised],
    judged: Mapping[str, Agreement],
    timing: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Return the report's rows with those in fewer bits, what each comes to, and which other beats it in all.

    Args:
        models: the float rows.
        quantised: the others.
        judged: row → what it came to.
        timing: the timer's findings.
    """
    float_rows = {row["name"]: row for row in models}
    listed: list[dict[str, Any]] = [{**row, "precision": "fp32"} for row in models]
    for name, file in quantised.items():
        of, _, precision = name.rpartition(" ")
        listed.append({**float_rows[of], "name": name, "precision": precision, "onnx_bytes": file.bytes})
    for row in listed:
        row["agreement"] = asdict(judged[row["name"]]) if row["name"] in judged else None
    times = {t["name"]: t["ratio"] for t in timing["rows"]} if timing else {}
    known = {row["name"]: row["agreement"] for row in listed if row["agreement"] and row["name"] in times}
    standings = {name: standing(times[name], lost(agreement)) for name, agreement in known.items()}
    if timing and not timing["reliable"]:
        standings = {}  # which is faster is not known
    for row in listed:
        row["dominated_by"] = dominating(row["name"], standings)
    return listed


def lost(agreement: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return what a row loses and its interval: points of accuracy, of agreement without labels, else of cosine.

    How sure a cosine is, is not known: its interval is open.
    """
    for key in ("drop", "differs"):
        if agreement[key] is not None:
            value, low, high = (float(x) for x in agreement[key])
            return value, low, high
    apart = 100.0 * (1.0 - float(agreement["cosine"]))
    return apart, -inf, inf


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a row stands: its relative time and what it loses, each (value, lower end, upper end)."""

    time: tuple[float, float, float]
    loss: tuple[float, float, float]

    def beats(self, other: Standing) -> bool:
        """Whether it is no worse in either, and in one of them better by intervals that do not meet."""
        ours, theirs = (self.time, self.loss), (other.time, other.loss)
        no_worse = all(a[0] <= b[0] for a, b in zip(ours, theirs, strict=True))
        return no_worse and any(a[2] < b[1] for a, b in zip(ours, theirs, strict=True))


def standing(ratio: Mapping[str, float], loss: tuple[float, float, float]) -> Standing:
    """Return where a row of this relative time stands."""
    return Standing((ratio["value"], ratio["low"], ratio["high"]), loss)


def dominating(name: str, standings: Mapping[str, Standing]) -> str | None:
    """Return the fastest of the rows that beat this one."""
    if name not in standings:
        return None
    better = [row for row, found in standings.items() if found.beats(standings[name])]
    return min(better, key=lambda row: standings[row].time[0], default=None)


def notes(quantised: Mapping[str, Quantised], timing: Mapping[str, Any] | None, deployed: str = "fp32") -> list[str]:
    """Return what the user should know of the files in fewer bits: doubts, and those that are no faster.

    Args:
        quantised: the files, by row.
        timing: the timer's findings.
        deployed: the precision that the plan is for.
    """
    told = list(dict.fromkeys(f"int8: {note}" for file in quantised.values() for note in file.notes))
    times = {t["name"]: t["ratio"] for t in timing["rows"]} if timing else {}
    unsure = " (in times that are unreliable)" if timing and not timing["reliable"] else ""
    for name, file in quantised.items():
        of, _, precision = name.rpartition(" ")
        if file.layers[0] < file.layers[1]:
            told.append(f"{name}: {file.layers[0]} of {file.layers[1]} layers are in 8 bits")
        if name in times and of in times:
            relative = times[name]["high"] / times[of]["value"]
            if relative >= FASTER:
                also = ", only smaller" if precision == "fp16" else ""
                share = times[name]["value"] / times[of]["value"]
                told.append(f"{name} is not faster on this machine{also}: {share:.2f} of the time in fp32{unsure}")
    if {"dense int8", "compact int8"} <= times.keys():
        share = times["compact int8"]["value"] / times["dense int8"]["value"]
        if share >= FASTER:
            why = "" if deployed == "int8" else ": the widths were not chosen for int8 (--latency with --deploy int8)"
            told.append(f"compact int8 takes {share:.2f} of dense int8's time{unsure}{why}")
    return told
