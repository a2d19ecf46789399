"""Run: ``python -m benchmarks.studies.stacked``; writes ``results/stacked.json``, a table at a time."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.studies import data, record
from benchmarks.studies.stacked.rows import Ask, measured
from benchmarks.studies.stacked.subjects import known
from benchmarks.studies.stacked.table import page

NAME, MODULE = "stacked", "benchmarks.studies.stacked"
ASKS = {
    "resnet56": Ask(latency=0.58, deploys=("fp32", "int8")),
    "mobilenet_v2": Ask(latency=0.69, deploys=("fp32", "int8"), smaller=(192, 160), seconds=150.0),
}
"""Network → files to make; targets slightly below the goals, since a budget is met within three per cent."""


@click.command()
@click.option("--only", type=click.Choice(list(ASKS)), help="This network alone.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder that keeps networks planned and distilled.")
@click.option("--threads", default=2, show_default=True, help="Of torch.")
@click.option("--data-root", type=click.Path(), help="Folder of checkpoints and images.")
@click.option("--table", is_flag=True, help="Run nothing; print docs/results/demonstration.md from the results file.")
def main(only: str | None, work: Path | None, threads: int, data_root: str | None, table: bool) -> None:
    """Measure files in fewer bits and with fewer channels; writes results/stacked.json."""
    if table:
        click.echo(page(record.read(NAME)), nl=False)
        return
    torch.set_num_threads(threads)
    for name in ASKS if only is None else (only,):
        print(name, file=sys.stderr, flush=True)
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            found = measured(known(name, data.find_root(data_root)), ASKS[name], Path(folder), work)
        keep(name, found, record.command(MODULE, ["--only", name]))


def keep(key: str, found: dict[str, Any], command: str) -> None:
    """Put a table into the results file."""
    place = record.RESULTS / f"{NAME}.json"
    tables = dict(record.read(NAME)["tables"]) if place.is_file() else {}
    tables[key] = {**found, "command": command, "machine": record.machine(found["threads"])}
    record.write(NAME, {"tables": tables})


if __name__ == "__main__":
    main()
