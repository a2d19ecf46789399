"""The terminal interface of commands: options and help from the fields of `config`, progress, and results.

Imports no large packages, so that `--help` and errors in options are fast. Progress goes to standard error, and only
the result to standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from surgery.config import (
    FLAG,
    GROUPS,
    HEADINGS,
    OPTIONS,
    Kind,
    Option,
    Recipe,
    flag,
    option_of,
    resolved,
    shown_default,
)
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from rich.console import Console

    from surgery.core import Progress
    from surgery.inputs import LoadedModel

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

HELP, HELP_ALL = ("-h", "--help"), "--help-all"

EXIT_CODES = """\b
Exit codes:
  0    ok
  1    internal error (please report it)
  2    bad arguments, files, shapes or plan
  3    the model is not supported
  4    the check failed: nothing was written
  5    the budget cannot be reached
  130  interrupted (Ctrl-C)
  143  terminated (SIGTERM)
In every case but 0 an earlier set of files in --out stays as it was."""


@dataclass
class Session:
    """State of one command-line call besides its options."""

    arguments: tuple[str, ...] = ()
    debug: bool = False
    writing: bool = False
    stopped: int = 0


class Value(click.ParamType[Any]):
    """Text → the value of a field of `config`."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.name = kind, kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text; click reports what is raised."""
        try:
            return self.kind.check(self.kind.parse(value) if isinstance(value, str) else value)
        except (ValueError, TypeError):
            self.fail(f"'{value}' is not accepted; give {self.kind.accepts}", param, ctx)


class NamedShape(click.ParamType[Any]):
    """``input=1,3,224,224`` → ("input", (1, 3, 224, 224))."""

    name = "NAME=N,C,H,W"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text; click reports what is raised."""
        name, equals, shape = str(value).rpartition("=")
        if not equals or not name:
            self.fail(f"'{value}' is not NAME=SHAPE; write for example input=1,3,224,224", param, ctx)
        return name, Value(option_of(OPTIONS["input_shape"][1]).kind).convert(shape, param, ctx)


class Row(click.Option):
    """An option with its place in the help."""

    def __init__(self, *declared: str, heading: str = "Output", common: bool = True, field: Any = None, **more: Any):
        super().__init__(list(declared), **more)
        self.heading, self.common, self.field = heading, common, field

    def row(self, ctx: click.Context, case: Recipe | None, *, every: bool) -> tuple[str, str] | None:
        """Return the help row: only the first sentence on the first page, and the default in this case."""
        found = self.get_help_record(ctx)
        if found is None:
            return None
        names, told = found
        if not every:
            told = f"{told.partition('. ')[0].rstrip('.')}."
        default = "" if self.field is None else self._default(case)
        return names, f"{told}  [default: {default}]" if default else told

    def _default(self, case: Recipe | None) -> str:
        name = self.field.name
        known = None if case is None else getattr(getattr(case, OPTIONS[name][0]), name)
        if self.field.default is None and isinstance(known, (str, int, float)):
            return str(known)
        return shown_default(self.field)


class Command(click.Command):
    """A command whose help comes in groups: the common options with `--help`, all of them with `--help-all`."""

    def __init__(self, *args: Any, examples: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.examples = examples
        self.params.append(Row(HELP_ALL, is_flag=True, expose_value=False, help="Show all options."))
        if len(self.params) > 12:  # one page of few options is the whole help
            self.epilog = EXIT_CODES

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help on request, with defaults for the other given options."""
        asked = {*HELP, HELP_ALL} & set(args)
        if not asked:
            return super().parse_args(ctx, args)
        ctx.resilient_parsing = True
        with contextlib.suppress(click.UsageError):  # the help says what is right
            super().parse_args(ctx, [arg for arg in args if arg not in asked])
        ctx.meta[HELP_ALL] = HELP_ALL in asked
        click.echo(self.get_help(ctx))
        ctx.exit()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        rows = [param for param in self.params if isinstance(param, Row)]
        every = ctx.meta.get(HELP_ALL, False) or len(rows) <= 12
        for heading in HEADINGS:
            chosen = [row for row in rows if row.heading == heading and (every or row.common)]
            if listed := [told for row in chosen if (told := row.row(ctx, _case(ctx), every=every)) is not None]:
                with formatter.section(heading):
                    formatter.write_dl(listed)
        if self.examples:
            with formatter.section("Examples"), formatter.indentation():
                for line in self.examples.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent - 2}}{line}\n")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the exit codes, with all options."""
        if ctx.meta.get(HELP_ALL, False):
            super().format_epilog(ctx, formatter)


class Commands(click.Group):
    """The commands, each with its first sentence."""

    command_class = Command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write name and first sentence, uncut."""
        told = {name: (command.help or "").split("\n\n")[0] for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join(sentence.split())) for name, sentence in told.items()])


def _case(ctx: click.Context) -> Recipe | None:
    """Return the recipe given with the help option, with resolved defaults; None if there is none."""
    known = {name: value for name, value in given(ctx.params).items() if name in OPTIONS}
    try:
        asked = Recipe().but(**known)
        trained = asked.model.model is not None and asked.model.weights != "random"
        return resolved(asked, trained=trained) if known else None
    except SurgeryError:
        return None


# Options. ------------------------------------------------------------------------------------------------------------


def of_recipe(*names: str, without: Iterable[str] = ()) -> list[Row]:
    """Return the options of these groups or fields, without defaults, so that given options are known."""
    chosen = [f.name for name in names for f in (fields(GROUPS[name]) if name in GROUPS else [OPTIONS[name][1]])]
    found = []
    for name in chosen:
        if name != "model" and name not in without:
            found += _rows(OPTIONS[name][1])
    return found


def _rows(declared: Any) -> list[Row]:
    """The option of a field, and hidden ones for its earlier names."""
    told: Option = option_of(declared)
    name = declared.name
    negated = told.kind is FLAG and declared.default is not False
    names = f"{flag(name)}/--no-{name.replace('_', '-')}" if negated else flag(name)
    place = {"heading": told.group, "common": told.common, "field": declared}
    rows = [Row(names, name, help=told.help, **place, **_typed(told))]
    for old, fixed in told.was.items():
        typed = _typed(told) if fixed is None else {"is_flag": True, "default": None}
        rows.append(Row(flag(old), old, hidden=True, **typed))
    return rows


def _typed(told: Option) -> dict[str, Any]:
    if told.kind is FLAG:
        return {"is_flag": True, "default": None}
    return {
        "type": Value(told.kind),
        "multiple": told.kind.multiple,
        "metavar": told.kind.metavar,
        "default": None,
    }


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options among a command's parameters, merging repeated ones."""
    found = {name: value for name, value in parameters.items() if value is not None and value != ()}
    for name in found.keys() & OPTIONS.keys():
        kind = option_of(OPTIONS[name][1]).kind
        if kind.multiple and isinstance(found[name], tuple):
            parts = found[name]
            mapped = all(isinstance(part, dict) for part in parts)
            found[name] = (
                {key: value for part in parts for key, value in part.items()}
                if mapped
                else tuple(x for part in parts for x in part)
            )
    return found


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.ensure_object(Session).debug |= value


def of_run() -> list[Row]:
    """Return the options common to all commands that run a model."""
    return [
        Row("--json", "as_json", is_flag=True, help="Print the report as JSON and nothing else."),
        Row("--quiet", is_flag=True, help="No progress."),
        Row(
            "--debug",
            common=False,
            heading="Advanced",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_set_debug,
            help="Show the traceback of an error.",
        ),
    ]


def recipe_file() -> list[Row]:
    """Return the option that names a recipe."""
    return [
        Row(
            "--recipe",
            "recipe_file",
            type=click.Path(path_type=Path),
            metavar="FILE.toml",
            heading="Model",
            help="Take options from this file; those on the command line come first.",
        )
    ]


def of_profile() -> list[Row]:
    """Return the options of `profile` alone."""
    path = click.Path(path_type=Path)
    return [
        Row("--out", type=path, metavar="FILE", help="Write the latency table there."),
        Row(
            "--pack",
            type=path,
            metavar="FILE.zip",
            help="Measure nothing here: write what measures on a device that has Python, numpy and onnxruntime.",
        ),
    ]


def of_bench() -> list[Row]:
    """Return the options of `bench` alone."""
    whole, positive = click.IntRange(min=3), click.FloatRange(0.0, min_open=True)
    return [
        Row(
            "--baseline",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Which of them times are relative to.  [default: the first]",
        ),
        Row(
            "--provider",
            default="cpu",
            show_default=True,
            metavar="NAME",
            help="Execution provider of ONNX Runtime, as in CUDAExecutionProvider or cuda.",
        ),
        Row(
            "--input-shape",
            "shapes",
            type=NamedShape(),
            multiple=True,
            help="Whole shape of an input of which more than the batch is open; may be repeated.",
        ),
        Row(
            "--runs",
            type=whole,
            default=2000,
            show_default=True,
            metavar="N",
            help="Timed runs of a file at most; fewer once intervals are narrow. A p99 takes 1000.",
        ),
        Row(
            "--seconds",
            type=positive,
            default=45.0,
            show_default=True,
            metavar="S",
            help="Begin no round of measuring after that, as long as there are twelve.",
        ),
    ]


def with_options(*rows: list[Row]) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds options in reading order."""

    def decorate(function: Decorated) -> Decorated:
        params = function.__dict__.setdefault("__click_params__", [])
        params += [row for group in reversed(rows) for row in reversed(group)]
        return function

    return decorate


# Progress and results. ------------------------------------------------------------------------------------------------

PLAIN_WIDTH = 110
"""Width of tables if standard output is a file or a pipe."""


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that cleanup runs as for Ctrl-C."""


@contextlib.contextmanager
def work(session: Session, *, quiet: bool) -> Iterator[Progress]:
    """Keep standard output clean while stages run, and yield the function that shows progress."""
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
    """Print the report as a table or as JSON; nothing follows on standard output."""
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
    """Print a command's result as JSON, or by the given function."""
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
    """Return the command that opens a Python prompt with `dense` and `compact`, to evaluate or train them."""
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
