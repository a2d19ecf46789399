"""The command line: prints a table or JSON; errors are reported in one sentence, with an exit code.

Large packages are imported only when a command runs, so that `--help` and errors in options are fast. Standard output
contains only the result; progress, warnings and output of libraries or the user's own file go to standard error.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery import __version__, config, distributed
from surgery.config import FLAG, HEADINGS, OLD_NAMES, OPTIONS, Kind, Option, Recipe
from surgery.core import visible
from surgery.errors import INTERNAL, OK, InvalidInput, SurgeryError
from surgery.registry import RECOVERY_METHODS

if TYPE_CHECKING:
    from rich.console import Console

    from surgery.core import Progress
    from surgery.inputs import LoadedModel

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
FEW = 12  # help with no more options than this is one page

EXIT_CODES = """\b
Exit codes:
  0    ok
  1    internal error (please report it)
  2    invalid arguments, files, shapes or plan
  3    unsupported model
  4    verification failed: nothing was written
  5    the budget cannot be reached, or is not met by the files in OUT.unmet
  130  interrupted (Ctrl-C)
  143  terminated (SIGTERM)
Unless the exit code is 0, existing files in --out are left unchanged."""
INTERRUPTED, TERMINATED = 130, 143

EXAMPLES = """\
surgery shrink resnet18 --latency 0.5 --data photos/
surgery shrink net.py:build --macs 0.6 --weights net.pt --data photos/
surgery shrink resnet18 --max-drop 1 --data photos/ --val labelled/"""


@dataclass
class Session:
    """State of one command-line call, and the options that all commands have."""

    arguments: tuple[str, ...] = ()
    as_json: bool = False
    quiet: bool = False
    debug: bool = False
    writing: bool = False
    stopped: int = 0


class Value(click.ParamType[Any]):
    """Text → the value of a field of `config`."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.name = kind, kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text; names that the user's own code may register are checked once that is loaded."""
        try:
            return value if self.kind.is_new(value) else self.kind.check(value)
        except (ValueError, TypeError):
            self.fail(f"'{value}' is not accepted; give {self.kind.accepts}", param, ctx)


class Row(click.Option):
    """An option with its place in the help."""

    def __init__(
        self, *names: str, heading: str = "Output", common: bool = True, of: Option | None = None, **more: Any
    ):
        super().__init__(list(names), **more)
        self.heading, self.common, self.of = heading, common, of

    def record(self, ctx: click.Context, case: Recipe | None, *, every: bool) -> tuple[str, str]:
        """Return the help: only the first sentence on the first page, and the default in this case."""
        names, text = self.get_help_record(ctx) or ("", "")
        text = text if every else f"{text.partition('. ')[0].rstrip('.')}."
        default = self.of.default_in(case) if self.of is not None else ""
        return names, f"{text}  [default: {default}]" if default else text


class Command(click.Command):
    """A command whose help comes in groups: the common options with `--help`, all of them with `--help-all`."""

    def __init__(self, *args: Any, examples: str = "", **more: Any) -> None:
        super().__init__(*args, **more)
        self.examples = examples
        self.params.append(Row(HELP_ALL, help="Show all options.", is_flag=True, expose_value=False))
        self.epilog = EXIT_CODES if len(self.params) > FEW else None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Show the help on request, with the defaults that follow from the other options given."""
        asked = {*HELP, HELP_ALL} & {*args}
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
        rows = [param for param in self.params if isinstance(param, Row) and not param.hidden]
        every, case = ctx.meta.get(HELP_ALL, False) or len(rows) <= FEW, _case(ctx)
        for heading in HEADINGS:
            if chosen := [row for row in rows if row.heading == heading and (every or row.common)]:
                with formatter.section(heading):
                    formatter.write_dl([row.record(ctx, case, every=every) for row in chosen])
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
        help = {name: (command.help or "").split("\n\n")[0] for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join(sentence.split())) for name, sentence in help.items()])


def _case(ctx: click.Context) -> Recipe | None:
    """Return the options given beside `--help`, with the defaults that follow; None if there are none."""
    known = {name: value for name, value in given(ctx.params).items() if name in OPTIONS}
    try:
        asked = config.recipe(**known)
    except InvalidInput:
        return None
    trained = asked.model.model is not None and asked.model.weights != "random"
    return config.resolved(asked, trained=trained) if known else None


# Options. ------------------------------------------------------------------------------------------------------------


def of_recipe(*names: str) -> list[Row]:
    """Return the options of these groups or fields, without defaults, so that given options are known."""
    chosen = [x for x in OPTIONS.values() if {x.name, x.group} & {*names} and x.name not in ("model", "checkpoint")]
    rows = []
    for option in chosen:
        typed: dict[str, Any] = {"type": Value(option.kind), "multiple": option.kind.multiple}
        typed = {"is_flag": True} if option.kind is FLAG else {**typed, "metavar": option.kind.metavar}
        flag = option.flag
        if option.kind is FLAG and option.default is not False:
            flag = f"{flag}/--no-{flag[2:]}"
        place: dict[str, Any] = {"heading": option.heading, "common": option.common, "of": option}
        rows.append(Row(flag, option.name, help=option.help, default=None, **place, **typed))
        for old, (new, implied) in OLD_NAMES.items():
            if new == option.name:
                typed = typed if implied is None else {"is_flag": True}
                rows.append(Row(f"--{old.replace('_', '-')}", old, hidden=True, default=None, **typed))
    return rows


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options among a command's parameters, merging repeated ones."""
    found = {name: value for name, value in parameters.items() if value is not None and value != ()}
    for name in found.keys() & OPTIONS.keys():
        if OPTIONS[name].kind.multiple and all(isinstance(part, Mapping) for part in found[name]):
            found[name] = {key: value for part in found[name] for key, value in part.items()}
        elif OPTIONS[name].kind.multiple:
            found[name] = tuple(x for part in found[name] for x in part)
    return found


def _set_flag(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    setattr(ctx.ensure_object(Session), str(param.name), value)


def _named_shape(value: str) -> tuple[str, tuple[int, ...]]:
    """``input=1,3,224,224`` → ("input", (1, 3, 224, 224))."""
    name, _, shape = value.rpartition("=")
    if not name:
        raise ValueError(value)
    return name, OPTIONS["input_shape"].kind.check(shape)


_PATH = click.Path(path_type=Path)
_SHAPE = Kind("NAME=N,C,H,W", "NAME=SHAPE, as in input=1,3,224,224", _named_shape)
# fmt: off
OF_SESSION: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _set_flag}
RUN = [
    Row("--json", "as_json", **OF_SESSION, help="Print the report as JSON and nothing else."),
    Row("--quiet", **OF_SESSION, help="Do not show progress."),
    Row("--debug", common=False, heading="Advanced", **OF_SESSION, help="Show the traceback of an error."),
]
"""Options of all commands that run a model."""
RECIPE_FILE = [
    Row("--recipe", "recipe_file", type=_PATH, metavar="FILE.toml", heading="Model",
        help="Read options from this file; the command line takes precedence."),
]
PROFILE = [
    Row("--out", type=_PATH, metavar="FILE", help="Write the latency table to this file."),
    Row("--pack", type=_PATH, metavar="FILE.zip",
        help="Measure nothing here, but write a pack to run on a device with Python, numpy and onnxruntime."),
]
BENCH = [
    Row("--baseline", type=_PATH, metavar="FILE", help="The file that times are relative to.  [default: the first]"),
    Row("--provider", default="cpu", show_default=True, metavar="NAME",
        help="Execution provider of ONNX Runtime, as in CUDAExecutionProvider or cuda."),
    Row("--input-shape", "shapes", type=Value(_SHAPE), multiple=True, metavar=_SHAPE.metavar,
        help="Shape of an input with more dynamic axes than the batch; may be repeated."),
    Row("--seconds", type=click.FloatRange(0.0, min_open=True), default=45.0, show_default=True, metavar="S",
        help="Start no further round after this time, once there are twelve."),
]
# fmt: on


# Commands. -----------------------------------------------------------------------------------------------------------


@click.group(cls=Commands, epilog=EXIT_CODES, invoke_without_command=True, context_settings={"help_option_names": HELP})
@click.version_option(__version__, prog_name="surgery")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Make a PyTorch vision model physically smaller, verify it, and measure it in ONNX Runtime."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(examples=EXAMPLES, params=[*RECIPE_FILE, *of_recipe(*config.GROUPS), *RUN])
@click.argument("model")
@click.pass_obj
def shrink(session: Session, /, **parameters: Any) -> None:
    """Prune MODEL, verify it, export it to ONNX, time it, and write all files to --out.

    MODEL is a torchvision name (resnet18), timm:NAME, FILE.py:CALLABLE or package.module:CALLABLE that returns a module
    (or a module and its example inputs), or a .pt2 exported program.
    """
    recipe = _recipe(parameters)
    if recipe.selection.max_drop is not None and distributed.processes() > 1:
        raise InvalidInput("--max-drop evaluates one model after the other, in one process: leave torchrun out")
    config.validate(recipe)
    with work(session) as progress:
        data = _deliver(session, recipe, progress)
    _print_report(session, data)


@cli.command(
    examples="surgery run edge.toml\nsurgery run edge.toml --latency 0.4 --out smaller",
    params=[*of_recipe(*config.GROUPS), *RUN],
)
@click.argument("recipe_file", metavar="RECIPE.toml", type=_PATH)
@click.pass_context
def run(ctx: click.Context, /, recipe_file: Path, **parameters: Any) -> None:
    """Shrink the model named in RECIPE.toml with the options in it; the command line takes precedence."""
    model = config.read_recipe(recipe_file)[0].get("model")
    if model is None:
        raise InvalidInput(f'{recipe_file} names no model: add a line such as model = "resnet18"')
    ctx.invoke(shrink, recipe_file=recipe_file, model=model, **parameters)


@cli.command(params=[*of_recipe("model", "threads", "batch", "data", "recovery", "output"), *RUN])
@click.argument("plan", type=_PATH)
@click.argument("model")
@click.pass_obj
def apply(session: Session, /, plan: Path, **parameters: Any) -> None:
    """Apply PLAN, the plan.json of an earlier run, to MODEL: the same architecture, with any weights.

    MODEL and the files in --out are as for `surgery shrink`; the seed is that of the plan.
    """
    recipe = _recipe(parameters)
    with work(session) as progress:
        data = _deliver(session, recipe, progress, plan)
    _print_report(session, data)


@cli.command(params=[*of_recipe("model", "deploy", "keep", "submodule", "seed", "threads", "batch"), *PROFILE, *RUN])
@click.argument("model")
@click.pass_obj
def profile(session: Session, /, out: Path | None, pack: Path | None, **parameters: Any) -> None:
    """Measure the latency of MODEL's kernels on this machine, or pack them to be measured on a device.

    `surgery shrink MODEL --latency-table` plans with the latency table that --out, or the pack on the device, writes.
    Pass the same --keep, --submodule and --batch to both commands.
    """
    if out is not None and pack is not None:
        raise click.UsageError("--out measures here and --pack does not; choose one of them")
    recipe = _recipe(parameters)
    with work(session) as progress:
        from surgery.latency import Settings  # saves start-up seconds
        from surgery.planning import profiling  # saves start-up seconds

        if (target := pack or out) is not None:
            profiling.require_writable("--pack" if pack else "--out", target)
        if pack is None:
            Settings(threads=recipe.target.threads)  # refuses more threads than cores, which a device may have
        loaded = _load(recipe, progress)
        found = profiling.survey(loaded, recipe, progress)
        session.writing = True
        if pack is not None:
            profiling.pack(found, pack, name=loaded.name, progress=progress)
            data: dict[str, Any] = {"pack": str(pack), "kernels": len(found.keys)}
            message = f"{pack}: {len(found.keys)} kernels; on the device: python {pack.name}"
        else:
            table, data = profiling.measure(found, name=loaded.name, progress=progress)
            message = f"written: {out}; plan by it with: surgery shrink MODEL --latency-table {out}" if out else ""
            if out is not None:
                table.save(out)

    def render(console: Console) -> None:
        if pack is None:
            profiling.render_terminal(data, console)
        if message:
            click.echo(message)

    _show(session, data, render)


@cli.command(params=[*BENCH, *of_recipe("seed", "threads", "batch", "runs"), *RUN])
@click.argument("files", nargs=-1, required=True, type=_PATH)
@click.pass_obj
def bench(session: Session, /, files: tuple[Path, ...], shapes: Any, **parameters: Any) -> None:
    """Time ONNX FILES, and a copy of the first one as a control, in blocks of runs in shuffled order.

    Other load on the machine therefore affects all files alike. Times are relative to those of the first file, with
    95 % intervals; load time and peak memory are measured in a fresh process.
    """
    with work(session) as progress:
        from surgery.latency import Limits, ort  # saves start-up seconds

        options = given(parameters)
        runs, seconds = options.pop("runs", OPTIONS["runs"].default), options.pop("seconds")
        baseline, limits = options.pop("baseline", None), Limits(runs, seconds)
        settings = ort.settings_of(dict(shapes), **options)
        found = ort.compare(files, settings, limits, baseline=baseline, progress=progress)
    _show(session, found, partial(ort.render_terminal, found))


@cli.command(params=[*RECIPE_FILE, *of_recipe("model", "budget", "selection", "target", "data"), *RUN])
@click.argument("model")
@click.pass_obj
def show(session: Session, /, **parameters: Any) -> None:
    """Show which units of MODEL would be removed, and why, without changing or writing anything.

    MODEL and the options are those of `surgery shrink`.
    """
    recipe = _recipe(parameters)
    config.validate(recipe)
    with work(session) as progress:
        from surgery import api, pipeline, report  # saves start-up seconds

        loaded = _load(recipe, progress)
        task = api.opened(recipe, loaded, trained=loaded.is_trained)
        next_command = command_line("shrink", *session.arguments[1:])
        data = report.with_origin(pipeline.decide(loaded, task, progress).report, loaded, next_command=next_command)
    _print_report(session, data)


@cli.command(cls=click.Command)
@click.option("--markdown", is_flag=True, help="A Markdown table, as in the documentation.")
@click.option("--json", "as_json", is_flag=True, help="JSON: operator, family, meaning.")
def ops(markdown: bool, as_json: bool) -> None:
    """List the operators that can be cut through, and what each does to the channels of its arguments.

    Tensors that reach any other operator are left uncut, and reported.
    """
    from surgery import report  # saves start-up seconds

    if as_json or markdown:
        click.echo(report.operators_as_json() if as_json else report.operators_as_markdown(), nl=as_json)
    else:
        _show(Session(), {}, report.print_operators)


@cli.command(cls=click.Command)
def options() -> None:
    """List all options as Markdown, with accepted values and defaults; they are also the keys of a recipe."""
    click.echo(config.options_table(), nl=False)


# Their steps. --------------------------------------------------------------------------------------------------------


def _recipe(parameters: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the command line and its recipe file."""
    typed, messages = config.current(given(parameters))
    path = typed.pop("recipe_file", None)
    read, of_file = config.read_recipe(path) if path is not None else ({}, [])
    for message in (*messages, *of_file):
        say(f"warning: {message}")
    if typed.keys() & set(config.ONE_OF):
        read = {name: value for name, value in read.items() if name not in config.ONE_OF}
    chosen = {**read, **typed}
    owner, _, name = str(chosen.get("model")).rpartition(":")
    if any(OPTIONS[key].kind.is_new(value) for key, value in chosen.items()):
        if owner.endswith(".py"):
            from surgery.inputs import user_object  # saves start-up seconds

            with only_result_on_stdout():
                user_object(owner, name)  # may register a criterion, a recovery method or a format
        if path is not None:
            config.read_recipe(path, registered=True)
    return config.recipe(**chosen)


def _require_memory(loaded: LoadedModel, batch: int) -> None:
    """Raise early if the batch is too large to be timed."""
    import psutil  # saves start-up seconds

    from surgery.core import Callee  # saves start-up seconds

    tensors = Callee(*loaded.call).tensors
    needed = batch * sum(x[:1].numel() * x.element_size() for x in tensors if x.ndim)
    memory = psutil.virtual_memory().total
    if needed > memory:
        what = f"the input alone takes {needed / 2**30:,.0f} GiB and this machine has {memory / 2**30:,.0f}"
        raise InvalidInput(f"--batch {batch}: {what}; use a smaller batch")


def _load(recipe: Recipe, progress: Progress) -> LoadedModel:
    from surgery import api  # saves start-up seconds

    progress("load", 0.0)
    loaded = api.load_named(recipe)
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    _require_memory(loaded, recipe.target.batch)
    return loaded


def _deliver(session: Session, recipe: Recipe, progress: Progress, plan: Path | None = None) -> Mapping[str, Any]:
    """Cut, check, export, time, and write everything into the output folder; return the report.

    What is cut is decided here, or by an earlier run's plan. Processes of a distributed run other than the first return
    an empty report.
    """
    from surgery import api, delivery, pipeline, planning, recovery, report  # saves start-up seconds
    from surgery.core import Plan  # saves start-up seconds

    decided = None if plan is None else Plan.load(plan)
    delivery.validate_output(recipe)
    if decided is not None:
        recipe = planning.as_planned(recipe, decided)
    loaded = _load(recipe, progress)
    task = api.opened(recipe, loaded, trained=loaded.is_trained)
    shared = RECOVERY_METHODS.has_need(task.recovery.recover, "gradients") and distributed.processes() > 1
    if shared:
        recovery.validate_batch(task.data.data, task.recovery, distributed.processes())
        distributed.connect()
    if distributed.rank() > 0:
        if shared:
            sent, tensors = distributed.receive()
            decision = planning.repeat(sent, loaded)
            pipeline.follow(replace(decision, recipe=planning.as_planned(task, sent)), tensors)
            distributed.disconnect()
        return {}
    out = Path(recipe.output.out or Path("shrunk", loaded.name))
    session.writing = True
    delivery.prepare(out)
    task = task.but(checkpoint=out.absolute().parent / f".{out.name}.training")
    if decided is None:
        decision = pipeline.decide(loaded, task, progress)
    else:
        decision = replace(planning.repeat(decided, loaded, progress), recipe=task)
    result = pipeline.realise(replace(decision, shared=shared), progress=progress)
    asked = config.resolved(recipe.but(out=out, recover=task.recovery.recover))
    next_command = command_to_evaluate(out, loaded, recipe)
    command = command_line(*session.arguments)
    data = report.with_origin(result.report, loaded, next_command=next_command, command=command)
    result = replace(result, report=data, recipe=asked)
    written = delivery.save(result, out, evaluate=task.data.metric, progress=progress)
    distributed.disconnect()
    return written.data


def _print_report(session: Session, data: Mapping[str, Any]) -> None:
    from surgery.report import Report  # saves start-up seconds

    if data:  # else another process prints it
        _show(session, data, Report(data).print)


# Progress and results. ------------------------------------------------------------------------------------------------

PLAIN_WIDTH = 110  # width of tables if standard output is a file or a pipe


HEARTBEAT_S = 15.0  # a log file gets a line at least as often
TIMED = ("measure kernels", "timing")  # stages in which this process times files


@dataclass
class _Stage:
    """The stage that runs now."""

    name: str
    done: float  # completed fraction
    start: float = 0.0

    def __str__(self) -> str:
        seconds = time.monotonic() - self.start
        left = f", about {seconds / self.done - seconds:.0f} s left" if 0.05 < self.done < 1 else ""
        return f"{self.name}: {self.done:.0%} after {seconds:.0f} s{left}"


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception, so that cleanup runs as for Ctrl-C."""


@contextlib.contextmanager
def work(session: Session) -> Iterator[Progress]:
    """Keep standard output clean while stages run, and yield the function that shows progress."""
    from rich.console import Console  # saves start-up seconds
    from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn  # saves start-up seconds

    console, quiet = Console(stderr=True), session.quiet or distributed.rank() > 0
    columns = (TimeElapsedColumn(), BarColumn(), TextColumn("{task.description}", markup=False))
    bar = Bar(*columns, console=console, auto_refresh=False, transient=True, disable=quiet, redirect_stdout=False)
    task = bar.add_task("", total=1.0)
    seen: set[str] = set()
    now, over = _Stage("", 0.0), threading.Event()

    def progress(stage: str, fraction: float) -> None:
        if session.stopped:
            raise Terminated
        if stage != now.name:
            now.name, now.start = stage, time.monotonic()
        now.done = fraction
        if console.is_terminal:
            bar.update(task, description=visible(stage), completed=fraction, refresh=True)
        elif stage not in seen and not quiet:  # a log file: one line per stage
            console.print(visible(stage), markup=False, highlight=False)
        seen.add(stage)

    def remind() -> None:
        while not over.wait(1 if console.is_terminal else HEARTBEAT_S):
            if console.is_terminal and now.name not in TIMED:  # drawing the bar would disturb a measurement
                bar.refresh()
            elif not console.is_terminal and now.name:
                console.print(visible(str(now)), markup=False, highlight=False)

    with only_result_on_stdout(), warnings.catch_warnings(), _logged(console, quiet):
        if not session.debug:
            warnings.simplefilter("ignore")
        if not quiet:
            threading.Thread(target=remind, daemon=True).start()
        try:
            with bar if console.is_terminal else contextlib.nullcontext():
                yield progress
        finally:
            over.set()


class _Said(logging.Handler):
    """Prints what the package logs, above the progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        line = f"surgery: {visible(record.getMessage())}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _logged(console: Console, quiet: bool) -> Iterator[None]:
    """Print what the package logs, such as the dense model's accuracy as soon as it is known."""
    logger, handler = logging.getLogger("surgery"), _Said(console)
    before, handler.level = logger.level, logging.CRITICAL if quiet else logging.INFO
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def only_result_on_stdout() -> Iterator[None]:
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


def _show(session: Session, data: Mapping[str, Any], render: Callable[[Console], None]) -> None:
    """Print a command's result as JSON, or by the given function; nothing follows on standard output."""
    from rich.console import Console  # saves start-up seconds

    if session.as_json:
        click.echo(json.dumps(data, sort_keys=True, indent=1))
    else:
        console = Console()
        render(console if console.is_terminal else Console(width=PLAIN_WIDTH))
    sys.stdout.flush()
    os.dup2(2, 1)  # what the user's file prints at exit is no part of the result


def say(sentence: str) -> None:
    """Print one sentence on standard error."""
    click.echo(f"surgery: {visible(sentence)}", err=True)


# Commands that a report tells the user to type next. ------------------------------------------------------------------


def command_to_evaluate(out: Path, loaded: LoadedModel, recipe: Recipe) -> str:
    """Return the command that opens a Python prompt with `dense` and `compact`, to evaluate or train them."""
    asked = recipe.model
    known: dict[str, object] = {
        "weights": asked.weights if loaded.is_trained else "random",
        "input_shape": asked.input_shape,
        "model_args": dict(asked.model_arg),
        "seed": recipe.selection.seed,
        "trust": asked.trust,
    }
    arguments = ", ".join([repr(asked.model), *(f"{key}={value!r}" for key, value in known.items() if value)])
    code = (
        f"import surgery; dense = surgery.load_model({arguments}).module; compact = surgery.load({str(out)!r}, dense)"
    )
    code = code if '"' in code or "\\" in code else code.replace("'", '"')  # so that the shell needs no escaping
    return f"{_python()} -i -c {shlex.quote(code)}"


def command_line(*arguments: str) -> str:
    """Return the command line of a run with these arguments."""
    return f"{_python()} -m surgery.cli {shlex.join(arguments)}"


def _python() -> str:
    """Return how the running interpreter is called from here: by name where that finds it, else by path."""
    here, found = Path(sys.executable), shutil.which("python")
    if found and Path(found).parent == here.parent:
        return "python"
    return shlex.quote(str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here))


# What goes wrong. ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `arguments` are those of the process by default."""
    session = Session(arguments=tuple(sys.argv[1:] if arguments is None else arguments))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's threads spin for a core that others use
    gc.set_threshold(100_000, 50, 100)  # graphs are many objects, which live long: by default a tenth of all time
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: _stop(session, received))
    try:
        code = cli.main(list(session.arguments), prog_name="surgery", standalone_mode=False, obj=session)
        return code if isinstance(code, int) else OK
    except (Exception, KeyboardInterrupt) as error:  # The boundary: nothing above it could tell the user.
        return _explain(error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error, session)


def _stop(session: Session, number: int) -> None:
    """Answer Ctrl-C and SIGTERM.

    Before anything is written the process ends at once: an exception raised in the middle of an import can be lost.
    Later it is raised here, and again by the next progress report should library code have swallowed it.
    """
    session.stopped = TERMINATED if number == signal.SIGTERM else INTERRUPTED
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process; the previous files are whole in any case
    if not session.writing:
        if distributed.rank() == 0:
            say(distributed.word() or _stopped(session.stopped))
        os._exit(session.stopped)
    raise Terminated


def _stopped(code: int) -> str:
    what = "terminated" if code == TERMINATED else "interrupted"
    return f"{what} before the end; no file is half written, run the same command again"


def _explain(error: BaseException, session: Session) -> int:
    """Print the error to standard error, in one sentence, and return its exit code.

    In distributed runs the first process prints, also for the others if they are connected.
    """
    if session.debug:
        traceback.print_exception(error)
    sentence, code = _explained(error, session)
    ended = distributed.lost(error) or bool(session.stopped)  # it may be for another process's sake
    if distributed.rank() > 0 and (ended or distributed.leave_word(sentence) or distributed.follows()):
        if not ended and not session.writing:
            time.sleep(distributed.GRACE)
        return code
    say((ended and distributed.word()) or sentence)
    if session.as_json or "--json" in session.arguments:
        found = {"exit_code": code, "message": sentence.removeprefix("error: ")}
        click.echo(json.dumps({"error": {**found, "figures": getattr(error, "figures", {})}}))
    return code


def _explained(error: BaseException, session: Session) -> tuple[str, int]:
    if session.stopped or isinstance(error, KeyboardInterrupt):
        return _stopped(session.stopped or INTERRUPTED), session.stopped or INTERRUPTED
    if isinstance(error, MemoryError):
        what = f"not enough memory ({error}); use a smaller --batch, --input-shape or model"
        return f"error: {what}", InvalidInput.exit_code
    if isinstance(error, click.UsageError):
        hint = f"; see '{error.ctx.command_path} --help'" if error.ctx else ""
        command, *rest = session.arguments or ("",)
        if command == "shrink" and rest and rest[0] in cli.commands:
            hint = f"; '{rest[0]}' is a command of its own: surgery {shlex.join(rest)}"
        return f"error: {error.format_message().rstrip('.')}{hint}", error.exit_code
    if isinstance(error, click.ClickException):
        return f"error: {error.format_message()}", InvalidInput.exit_code
    if isinstance(error, SurgeryError):
        return f"error: {error}", error.exit_code
    if distributed.lost(error):
        return "error: another process of this run has ended; look above, or on its host, for why", INTERNAL
    what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    report = "this is a bug, please report it with what the same command prints with --debug"
    return f"internal error: {what}; {report}", INTERNAL


if __name__ == "__main__":
    sys.exit(main())
