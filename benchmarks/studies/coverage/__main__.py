"""Run: ``python -m benchmarks.studies.coverage``; writes ``results/coverage.json`` row by row, and continues there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from fnmatch import fnmatch
from typing import Any

import click
from rich.progress import Progress

from benchmarks.studies import record
from benchmarks.studies.coverage.isolated import limited
from benchmarks.studies.coverage.models import CI_SLICE, Model, models

RESULTS = os.environ.get("SURGERY_COVERAGE", "coverage")


def wanted(names: Iterable[str], chosen: Iterable[Model]) -> list[Model]:
    """Return the models that the patterns name; all without any."""
    patterns = tuple(names)
    return [m for m in chosen if not patterns or any(fnmatch(m.name, p) or fnmatch(m.family, p) for p in patterns)]


@click.command()
@click.argument("names", nargs=-1)
@click.option("--tool", "tools", multiple=True, default=("surgery", "torch-pruning", "onnxsim"), show_default=True)
@click.option("--jobs", default=1, show_default=True, help="Processes at a time, one thread each.")
@click.option("--again", is_flag=True, help="Also what the results file holds already.")
@click.option("--ci", is_flag=True, help="The slice that the tests run.")
@click.option("--table", is_flag=True, help="Run nothing; write docs/results/coverage.md from the results file.")
def main(names: tuple[str, ...], tools: tuple[str, ...], jobs: int, again: bool, ci: bool, table: bool) -> None:
    """Run NAMES (patterns over names and families; all by default) through each tool."""
    if table:
        from benchmarks.studies.coverage.table import DOCUMENT, render

        DOCUMENT.write_text(render(record.read(RESULTS), models()), encoding="utf-8")
        return
    from benchmarks.studies.coverage.tools import tool_version

    rows = _read()
    chosen = [m for m in models() if m.name in CI_SLICE] if ci else wanted(names, models())
    versions = {tool: tool_version(tool) for tool in tools}
    todo = [
        (m, tool)
        for m in chosen
        for tool in tools
        if again or rows.get(tool, {}).get(m.name, {}).get("version") != versions[tool]
    ]
    with Progress() as bar, ThreadPoolExecutor(jobs) as pool:
        task = bar.add_task("models", total=len(todo))
        running = {pool.submit(limited, model, tool): (model, tool) for model, tool in todo}
        for future in as_completed(running):
            model, tool = running[future]
            row = {**future.result(), "version": versions[tool], "measured": date.today().isoformat()}
            rows.setdefault(tool, {})[model.name] = row
            record.write(RESULTS, {"machine": record.machine(1), "rows": rows})
            bar.console.print(f"{tool:14} {model.name:40} {_short(row)}", highlight=False)
            bar.advance(task)


def _short(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['failed']}: {row['message'][:150]}"
    sound = {True: "sound", False: "UNSOUND " + row["why"], None: "cannot tell " + row["why"]}[row["sound"]]
    if row["macs_kept"] is None:
        return str(row["why"])[:150]
    return f"{row['macs_kept']:.3f} of the MACs, {row['seconds']:.0f} s, {sound}"


def _read() -> dict[str, Any]:
    try:
        rows: dict[str, Any] = record.read(RESULTS)["rows"]
    except FileNotFoundError:
        return {}
    return rows


if __name__ == "__main__":
    main()
