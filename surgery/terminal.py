"""What the user sees of a command: progress on standard error, the result alone on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.config import Recipe
from surgery.options import Session

if TYPE_CHECKING:
    from rich.console import Console

    from surgery.core import Progress
    from surgery.inputs import LoadedModel

PLAIN_WIDTH = 110
"""Columns of tables where standard output is a file or a pipe."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program stands, so that everything is cleaned up as for Ctrl-C."""


@contextlib.contextmanager
def work(session: Session, *, quiet: bool) -> Iterator[Progress]:
    """Keep standard output clean while stages run, and yield the function that shows how far they are."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TimeElapsedColumn(), BarColumn(), TextColumn("{task.description}"))
    # No refreshing thread: it would disturb the timer.
    bar = Bar(*columns, console=console, auto_refresh=False, transient=True, disable=quiet, redirect_stdout=False)
    task = bar.add_task("", total=1.0)
    seen: list[str] = []

    def progress(stage: str, fraction: float) -> None:
        if session.stopped:
            raise Terminated
        if console.is_terminal:
            bar.update(task, description=stage, completed=fraction, refresh=True)
        elif stage not in seen and not quiet:  # a log file: one line per stage
            console.print(stage, highlight=False)
        seen.append(stage)

    with _only_result_on_stdout(), warnings.catch_warnings():
        if not session.debug:
            warnings.simplefilter("ignore")
        with bar if console.is_terminal else contextlib.nullcontext():
            yield progress


@contextlib.contextmanager
def _only_result_on_stdout() -> Iterator[None]:
    """Send what others print to standard error, also below Python: commands that the user's file runs, native code."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()  # what was written past the redirection lies here still
        os.dup2(saved, 1)
        os.close(saved)


def print_report(data: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the report as a table or as JSON, the last thing that standard output gets."""
    from rich.console import Console

    from surgery.report import Report

    if as_json:
        click.echo(Report(data).to_json(), nl=False)
    else:
        console = Console()
        Report(data).print(console if console.is_terminal else Console(width=PLAIN_WIDTH))
    sys.stdout.flush()
    os.dup2(2, 1)  # what the user's file prints at exit is no part of the result


def print_found(
    data: Mapping[str, Any], render: Callable[[Mapping[str, Any], Console], None], *, as_json: bool
) -> None:
    """Print what a command found as JSON, or by the function that renders it."""
    from rich.console import Console

    if as_json:
        click.echo(json.dumps(data, indent=1))
    else:
        console = Console()
        render(data, console if console.is_terminal else Console(width=PLAIN_WIDTH))


def print_profile(data: Mapping[str, Any], *, out: Path | None, as_json: bool) -> None:
    """Print a profile, or where the pack lies, as text or as JSON; nothing follows on standard output."""
    from rich.console import Console

    from surgery.planning import profiling as profiles

    if as_json:
        click.echo(json.dumps(data, indent=1))
    elif "pack" in data:
        click.echo(f"{data['pack']}: {data['kernels']} kernels; on the device: python {Path(data['pack']).name}")
    else:
        console = Console()
        profiles.render_terminal(data, console if console.is_terminal else Console(width=PLAIN_WIDTH))
        if out is not None:
            click.echo(f"written: {out}; plan by it with: surgery shrink MODEL --latency-table {out}")
    sys.stdout.flush()
    os.dup2(2, 1)  # as above


def say(sentence: str) -> None:
    """Print one sentence on standard error."""
    click.echo(f"surgery: {sentence}", err=True)


# Commands that a report tells the user to type next. ------------------------------------------------------------------


def command_to_evaluate(out: Path, loaded: LoadedModel, recipe: Recipe) -> str:
    """Return the command that leaves `dense` and `compact` at a Python prompt, to be evaluated or trained."""
    asked = recipe.model
    weights = "random" if loaded.weights.startswith("random") else asked.weights
    known: dict[str, object] = {
        "weights": weights,
        "input_shape": asked.input_shape,
        "model_args": dict(asked.model_arg),
        "seed": recipe.selection.seed,
        "trust": asked.trust,
    }
    arguments = [repr(asked.model), *(f"{key}={value!r}" for key, value in known.items() if value)]
    code = (
        f"import surgery; dense = surgery.load_model({', '.join(arguments)}).module; "
        f"compact = surgery.load({str(out)!r}, dense)"
    )
    # Double quotes inside, so that the shell's single ones need no escaping; names with quotes keep Python's choice.
    code = code if '"' in code or "\\" in code else code.replace("'", '"')
    return f"{_python()} -i -c {shlex.quote(code)}"


def command_again(arguments: Sequence[str]) -> str:
    """Return the command line of this run."""
    return f"{_python()} -m surgery.cli {shlex.join(arguments)}"


def command_to_shrink(arguments: Sequence[str]) -> str:
    """Return the command line of `show` as one of `shrink`."""
    return f"{_python()} -m surgery.cli shrink {shlex.join(arguments[1:])}"


def _python() -> str:
    """Return how the running interpreter is called from here: by name where that finds it, else by path."""
    here, found = Path(sys.executable), shutil.which("python")
    if found and Path(found).parent == here.parent:
        return "python"
    return shlex.quote(str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here))


def folder_name(name: str) -> str:
    """Return a name that is a plain folder name on every system."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"
