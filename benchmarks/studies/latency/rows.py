"""The results file: rows by key, each with the versions it was measured with, written after each row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.studies import record
from benchmarks.studies.latency.jobs import Job
from surgery import __version__

NAME = "latency"
FORM = 1
"""Of the rows: raised where old ones cannot be compared with new ones."""
_ROOT = Path(__file__).resolve().parents[3]
_LIBRARIES = ("torch", "onnxruntime", "torch-pruning", "onnxsim")

Row = dict[str, Any]


def made_with() -> str:
    """What a row must match to be kept: the format of this study and the version of every library."""
    found = [f"form {FORM}", f"model-surgery {__version__}"]
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


@cache
def source() -> str:
    """Return a digest of the code that decides, cuts and times, the studies left out."""
    folders = (*_ROOT.glob("surgery/**/*.py"), *_ROOT.glob("exporters/*.py"), *_ROOT.glob("benchmarks/*.py"))
    digest = hashlib.sha256()
    for path in sorted(folders):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read() -> dict[str, Row]:
    """Return the rows that there are."""
    try:
        rows: dict[str, Row] = record.read(NAME)["rows"]
    except FileNotFoundError:
        return {}
    return rows


def write(rows: Mapping[str, Row]) -> Path:
    """Write all rows in place of the earlier file."""
    command = record.command("benchmarks.studies.latency", ())
    return record.write(NAME, {"command": command, "machine": record.machine(1), "rows": rows})


def signed(row: Mapping[str, Any], job: Job, seconds: float) -> Row:
    """Return a row with its job, the date, the versions it was measured with, and the seconds it took."""
    stamp = {"made_with": made_with(), "source": source(), "measured": date.today().isoformat()}
    of = {"part": job.part, "network": job.network, "amount": job.amount, "threads": job.threads}
    return {**row, **of, **stamp, "seconds": round(seconds, 1)}


def is_done(row: Mapping[str, Any] | None, *, stale: bool) -> bool:
    """Tell whether a row need not be measured again.

    Args:
        row: what the file holds, if anything.
        stale: whether rows that other code measured count as missing.
    """
    if row is None or row.get("failed") == "limit":
        return False
    return row.get("made_with") == made_with() and not (stale and row.get("source") != source())
