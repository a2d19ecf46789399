"""Run: ``python -m benchmarks.studies.coverage``; writes ``results/coverage.json`` row by row, and continues there."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from typing import Any

import click
import psutil
from rich.progress import Progress

from benchmarks.studies import record
from benchmarks.studies.coverage.models import CI_SLICE, Model, models

SECONDS, BYTES = 120.0, 8 * 2**30
"""What one model may take with one tool."""
RESULTS = os.environ.get("SURGERY_COVERAGE", "coverage")


def limited(model: Model, tool: str, *, seconds: float = SECONDS, limit: int = BYTES) -> dict[str, Any]:
    """Return the row of one model and tool, made in a process of its own; over a limit is a result."""
    command = [sys.executable, "-m", "benchmarks.studies.coverage", "--only", model.name, "--tool", tool]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.monotonic()
        child = psutil.Popen(command, stdout=out, stderr=err, env=environment)
        peak, over = 0, ""
        while child.poll() is None and not over:
            time.sleep(0.2)
            try:
                peak = max(peak, child.memory_info().rss)
            except psutil.Error:
                break
            over = "time" if time.monotonic() - started > seconds else "memory" if peak > limit else ""
        if over:
            child.kill()
        code = child.wait()
        out.seek(0)
        err.seek(0)
        lines = out.read().strip().splitlines()
        if over:
            row = {
                "failed": "limit",
                "message": f"over {seconds:.0f} s" if over == "time" else f"over {limit / 2**30:.0f} GiB",
            }
        elif code == 0 and lines:
            row = json.loads(lines[-1])
        else:
            said = err.read().strip().splitlines()
            row = {"failed": f"exit {code}", "message": said[-1][:300] if said else ""}
    return {**row, "process_s": round(time.monotonic() - started, 1), "peak_bytes": peak}


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
@click.option("--table", is_flag=True, help="Run nothing; write docs/coverage.md from the results file.")
@click.option("--only", hidden=True)
def main(
    names: tuple[str, ...], tools: tuple[str, ...], jobs: int, again: bool, ci: bool, table: bool, only: str | None
) -> None:
    """Run NAMES (patterns over names and families; all by default) through each tool."""
    from benchmarks.studies.coverage.tools import TOOLS, tool_version

    if only is not None:
        (model,) = (m for m in models() if m.name == only)
        click.echo(json.dumps(TOOLS[tools[0]](model)))
        return
    if table:
        from benchmarks.studies.coverage.table import DOCUMENT, render

        DOCUMENT.write_text(render(record.read(RESULTS), models()), encoding="utf-8")
        return
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
            row = {**future.result(), "version": versions[tool]}
            rows.setdefault(tool, {})[model.name] = row
            record.write(RESULTS, {"machine": record.machine(1), "rows": rows})
            bar.console.print(f"{tool:14} {model.name:40} {_short(row)}", highlight=False)
            bar.advance(task)


def _short(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['failed']}: {row['message'][:150]}"
    sound = {True: "sound", False: "UNSOUND " + row["why"], None: "cannot tell " + row["why"]}[row["sound"]]
    return f"{row['macs_kept']:.3f} of the MACs, {row['seconds']:.0f} s, {sound}"


def _read() -> dict[str, Any]:
    try:
        rows: dict[str, Any] = record.read(RESULTS)["rows"]
    except FileNotFoundError:
        return {}
    return rows


if __name__ == "__main__":
    main()
