"""Run: ``python -m benchmarks.studies.latency``; writes ``results/latency.json`` row by row, and continues there.

Rows come in the order in which they matter, so that ``--minutes`` can end a run at any time and the next one goes on.
Nothing else may run on the machine meanwhile.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import asdict
from typing import Any

import click

from benchmarks.studies.latency.jobs import LIMIT_S, PARTS, chosen, every_job
from benchmarks.studies.latency.options import Options

_USUAL = Options()


@click.command()
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only rows of this part; repeatable.")
@click.option(
    "--only", "patterns", multiple=True, metavar="PATTERN", help="Only rows whose key holds this; repeatable."
)
@click.option("--again", is_flag=True, help="Also rows that the results file holds already.")
@click.option("--stale", is_flag=True, help="Also rows that other code of this repository measured.")
@click.option("--minutes", type=float, help="Begin no row after that.")
@click.option("--seconds", default=_USUAL.seconds, show_default=True, help="Target duration of the timing of one row.")
@click.option(
    "--equal-latency", multiple=True, type=float, default=_USUAL.equal_latency, show_default=True,
    help="Targets at which rivals are brought to our latency too, on random weights; repeatable, 0 for none.",
)  # fmt: skip
@click.option("--onnxsim/--no-onnxsim", default=True, show_default=True, help="Run its structured pruning as well.")
@click.option(
    "--criteria-imagenet", multiple=True, default=_USUAL.criteria_imagenet, show_default=True, help="Of torch-pruning."
)
@click.option("--evaluations", default=_USUAL.evaluations, show_default=True, help="Networks tried for one latency.")
@click.option(
    "--torch-threads", default=_USUAL.torch_threads, show_default=True, help="To judge images; 2 on an idle machine."
)
@click.option("--data-root", type=click.Path(), help="Folder of checkpoints and images.")
@click.option("--list", "as_list", is_flag=True, help="Run nothing; print the rows that would be run.")
@click.option("--table", is_flag=True, help="Run nothing; print Markdown tables from the results file.")
def main(
    parts: tuple[str, ...],
    patterns: tuple[str, ...],
    again: bool,
    stale: bool,
    minutes: float | None,
    as_list: bool,
    table: bool,
    **given: Any,
) -> None:
    """Measure budgets of time against other tools; writes results/latency.json."""
    from benchmarks.studies.latency import rows as store

    rows = store.read()
    if table:
        from benchmarks.studies.latency.table import render

        click.echo(render(rows), nl=False)
        return
    jobs = chosen(parts, patterns, every_job())
    todo = [job for job in jobs if again or not store.is_done(rows.get(job.key), stale=stale)]
    if as_list:
        click.echo("\n".join(job.key for job in todo))
        return
    _run(todo, rows, Options(**given), minutes)


def _run(todo: list[Any], rows: dict[str, Any], options: Options, minutes: float | None) -> None:
    from benchmarks.studies.latency import rows as store
    from benchmarks.studies.latency.isolated import limited

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the row's own process ends too
    started = time.monotonic()
    for number, job in enumerate(todo):
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            _say(f"{minutes:g} minutes are over; {len(todo) - number} rows are left")
            return
        _say(f"[{number + 1}/{len(todo)}] {job.key}")
        began = time.monotonic()
        row = limited(job, asdict(options), seconds=LIMIT_S[job.part])
        rows[job.key] = store.signed(row, job, time.monotonic() - began)
        store.write(rows)
        said = f"{row['failed']}: {row['message']}" if "failed" in row else "done"
        _say(f"    {said} in {time.monotonic() - began:.0f} s")


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
