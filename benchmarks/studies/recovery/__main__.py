"""Run: ``python -m benchmarks.studies.recovery``; writes ``results/recovery.json`` row by row, and continues there.

Each row is measured in a process of its own, because of its peak memory. Other work on the machine makes it slower but
does not change accuracy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.studies import data, record
from benchmarks.studies.recovery.jobs import Job, every_job, run
from benchmarks.studies.recovery.table import tables

NAME, MODULE = "recovery", "benchmarks.studies.recovery"


@click.command()
@click.option("--only", "patterns", multiple=True, metavar="PATTERN", help="Rows whose key contains this; repeatable.")
@click.option("--again", is_flag=True, help="Also rows that are in the results file already.")
@click.option("--minutes", type=float, help="Start no row after this time.")
@click.option("--take", type=click.Path(exists=True), help="Run nothing; add a row that --row printed elsewhere.")
@click.option("--threads", default=2, show_default=True, help="Threads of torch.")
@click.option("--data-root", type=click.Path(), help="Folder of checkpoints and images.")
@click.option("--table", is_flag=True, help="Only print the tables from the results file.")
@click.option("--row", metavar="KEY", help="Run only this row and print it; for --take.")
def main(
    patterns: tuple[str, ...],
    again: bool,
    minutes: float | None,
    take: str | None,
    threads: int,
    data_root: str | None,
    table: bool,
    row: str | None,
) -> None:
    """Measure accuracy after recovery; writes results/recovery.json."""
    if table:
        click.echo(tables(record.read(NAME)))
        return
    if row is not None:
        click.echo(json.dumps(_run(row, data.find_root(data_root), threads)))
        return
    if take is not None:
        _enter(json.loads(Path(take).read_text(encoding="utf-8").splitlines()[-1]))
        return
    begun, rows = time.monotonic(), _known()
    for job in every_job():
        wanted = not patterns or any(pattern in job.key for pattern in patterns)
        if not wanted or (job.key in rows and not again):
            continue
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            break
        print(job.key, file=sys.stderr, flush=True)
        root = [] if data_root is None else ["--data-root", data_root]
        command = [sys.executable, "-m", MODULE, "--row", job.key, "--threads", str(threads)]
        done = subprocess.run([*command, *root], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"    failed with {done.returncode}", file=sys.stderr, flush=True)
            continue
        rows = _enter(json.loads(done.stdout.splitlines()[-1]))


def _enter(row: dict[str, Any]) -> dict[str, Any]:
    """Add a row to the results file; return all rows."""
    key = Job(row["part"], row["network"], row["amount"], row["method"]).key
    rows, place = {**_known(), key: row}, record.RESULTS / f"{NAME}.json"
    machine = record.read(NAME)["machine"] if place.is_file() else record.machine(1)
    record.write(NAME, {"command": record.command(MODULE, []), "machine": machine, "rows": rows})
    return rows


def _known() -> dict[str, Any]:
    place = record.RESULTS / f"{NAME}.json"
    return dict(record.read(NAME)["rows"]) if place.is_file() else {}


def _run(key: str, root: Path, threads: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    job = next(job for job in every_job() if job.key == key)
    begun = time.monotonic()
    facts = {"threads": threads, "machine": record.sentence(record.machine(1))}
    return {**run(job, root), **facts, "all_seconds": round(time.monotonic() - begun)}


if __name__ == "__main__":
    main()
