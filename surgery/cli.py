"""The command line: prints a table or JSON; errors are reported in one sentence, with an exit code.

Large packages are imported only when a command runs. Standard output contains only the result; progress, warnings and
output of libraries or the user's own file go to standard error.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery import __version__, config, distributed
from surgery.config import Recipe
from surgery.errors import INTERNAL, OK, InvalidInput, SurgeryError
from surgery.terminal import (
    EXIT_CODES,
    PLAIN_WIDTH,
    Commands,
    Session,
    Terminated,
    command_again,
    command_to_evaluate,
    command_to_shrink,
    folder_name,
    given,
    of_bench,
    of_profile,
    of_recipe,
    of_run,
    print_found,
    print_profile,
    print_report,
    recipe_file,
    say,
    with_options,
    work,
)

if TYPE_CHECKING:
    from surgery.core import Progress
    from surgery.inputs import LoadedModel
    from surgery.planning import Decision
    from surgery.report import Report

INTERRUPTED = 130
TERMINATED = 143

EXAMPLES = """\
surgery shrink resnet18 --latency 0.5 --data photos/
surgery shrink net.py:build --macs 0.6 --weights net.pt --data photos/
surgery shrink resnet18 --max-drop 1 --data photos/ --val labelled/"""


@click.group(
    cls=Commands,
    epilog=EXIT_CODES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="surgery")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Make a PyTorch vision model physically smaller, verify it, and measure it in ONNX Runtime."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(examples=EXAMPLES)
@click.argument("model")
@with_options(recipe_file(), of_recipe(*config.GROUPS, without=("checkpoint",)), of_run())
@click.pass_obj
def shrink(session: Session, /, as_json: bool, quiet: bool, **parameters: Any) -> None:
    """Shrink MODEL: cut, check, export to ONNX, time, and write everything into --out.

    MODEL is a torchvision name (resnet18), timm:NAME, FILE.py:CALLABLE or package.module:CALLABLE that returns a module
    (or a module and its example inputs), or a .pt2 exported program.
    """
    _shrink(session, _recipe(parameters), as_json=as_json, quiet=quiet)


@cli.command(examples="surgery run edge.toml\nsurgery run edge.toml --latency 0.4 --out smaller")
@click.argument("recipe_file", metavar="RECIPE.toml", type=click.Path(path_type=Path))
@with_options(of_recipe(*config.GROUPS, without=("checkpoint",)), of_run())
@click.pass_obj
def run(session: Session, /, as_json: bool, quiet: bool, **parameters: Any) -> None:
    """Shrink the model that RECIPE.toml names, with the options in it; those on the command line come first."""
    recipe = _recipe(parameters)
    if recipe.model.model is None:
        raise InvalidInput(f'{parameters["recipe_file"]} names no model: add a line such as model = "resnet18"')
    _shrink(session, recipe, as_json=as_json, quiet=quiet)


def _shrink(session: Session, recipe: Recipe, *, as_json: bool, quiet: bool) -> None:
    if recipe.selection.max_drop is not None and distributed.processes() > 1:
        raise InvalidInput("--max-drop judges one model after the other, in one process: leave torchrun out")
    config.validate(recipe)
    with work(session, quiet=quiet or distributed.rank() > 0) as progress:
        _validate_output(recipe)
        loaded = _load(recipe, progress)
        if distributed.rank() > 0:
            return distributed.follow(loaded, recipe)
        written = _deliver(session, loaded, recipe, progress, lambda asked: _decide(loaded, asked, progress))
    print_report(written.data, as_json=as_json)


@cli.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("model")
@with_options(of_recipe("model", "threads", "batch", "data", "recovery", "output", without=("checkpoint",)), of_run())
@click.pass_obj
def apply(session: Session, /, plan: Path, as_json: bool, quiet: bool, **parameters: Any) -> None:
    """Repeat PLAN, the plan.json of an earlier run, on MODEL: the same architecture, with any weights.

    MODEL, and what is written into --out, are as for `surgery shrink`; whatever is drawn at random is drawn as then.
    """
    recipe = _recipe(parameters)
    with work(session, quiet=quiet or distributed.rank() > 0) as progress:
        from surgery.core import Plan
        from surgery.planning import as_planned, repeat

        decided = Plan.load(plan)
        _validate_output(recipe)
        recipe = as_planned(recipe, decided)
        loaded = _load(recipe, progress)
        if distributed.rank() > 0:
            return distributed.follow(loaded, recipe)

        def again(asked: Recipe) -> Decision:
            inputs, kwargs = loaded.example_inputs, loaded.example_kwargs
            again = repeat(decided, loaded.module, inputs, example_kwargs=kwargs, progress=progress)
            return replace(again, recipe=asked)

        written = _deliver(session, loaded, recipe, progress, again)
    print_report(written.data, as_json=as_json)


@cli.command()
@click.argument("model")
@with_options(of_recipe("model", "deploy", "keep", "submodule", "seed", "threads", "batch"), of_profile(), of_run())
@click.pass_obj
def profile(
    session: Session, /, as_json: bool, quiet: bool, out: Path | None, pack: Path | None, **parameters: Any
) -> None:
    """Measure what MODEL's kernels take on this machine, or pack them to be measured on a device.

    The latency table that --out writes, here or there, is what `surgery shrink MODEL --latency-table` plans by. Give
    the same --keep, --submodule and --batch to both.
    """
    if out is not None and pack is not None:
        raise click.UsageError("--out measures here and --pack does not; choose one of them")
    recipe = _recipe(parameters)
    with work(session, quiet=quiet) as progress:
        from surgery.latency import Settings
        from surgery.planning import profiling as profiles

        target = pack or out
        if target is not None:
            profiles.refuse_unwritable("--pack" if pack else "--out", target)
        if pack is None:
            Settings(threads=recipe.target.threads)  # refuses more threads than cores, which a device may have
        loaded = _load(recipe, progress)
        _refuse_huge_batch(loaded, recipe.target.batch)
        inputs, kwargs = loaded.example_inputs, loaded.example_kwargs
        found = profiles.survey(loaded.module, inputs, recipe, example_kwargs=kwargs, progress=progress)
        session.writing = True
        if pack is not None:
            profiles.pack(found, pack, name=loaded.name, progress=progress)
            data = {"pack": str(pack), "kernels": len(found.keys)}
        else:
            table, data = profiles.measure(found, name=loaded.name, progress=progress)
            if out is not None:
                table.save(out)
    print_profile(data, out=out, as_json=as_json)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@with_options(of_bench(), of_recipe("seed", "threads", "batch"), of_run())
@click.pass_obj
def bench(
    session: Session, /, files: tuple[Path, ...], as_json: bool, quiet: bool, shapes: Any, **parameters: Any
) -> None:
    """Time ONNX FILES against each other: in blocks of shuffled order, beside a copy of the first.

    Each gets an equal share of the machine's quiet and busy moments. Times are relative to the first file's, with 95 %
    intervals; load time and peak memory are a fresh process's.
    """
    with work(session, quiet=quiet) as progress:
        from surgery.latency import Limits, comparison as versus

        options = given(parameters)
        baseline, limits = options.pop("baseline", None), Limits(options.pop("runs"), options.pop("seconds"))
        settings = versus.settings_of(dict(shapes), **options)
        found = versus.compare(files, settings, limits, baseline=baseline, progress=progress)
    print_found(found, versus.render_terminal, as_json=as_json)


@cli.command()
@click.argument("model")
@with_options(recipe_file(), of_recipe("model", "budget", "selection", "target", "data"), of_run())
@click.pass_obj
def show(session: Session, /, as_json: bool, quiet: bool, **parameters: Any) -> None:
    """Show what would be cut from MODEL and why, without cutting, exporting or writing anything.

    MODEL and the options are those of `surgery shrink`.
    """
    recipe = _recipe(parameters)
    config.validate(recipe)
    with work(session, quiet=quiet) as progress:
        from surgery.api import opened
        from surgery.report import with_origin

        loaded = _load(recipe, progress)
        data = with_origin(
            _decide(loaded, opened(recipe, loaded, trained=loaded.is_trained), progress).report,
            name=loaded.name,
            weights=loaded.weights,
            next_command=command_to_shrink(session.arguments),
            notes=(*loaded.warnings, *loaded.notes),
        )
    print_report(data, as_json=as_json)


@cli.command(cls=click.Command)
@click.option("--markdown", is_flag=True, help="A Markdown table, as in the documentation.")
@click.option("--json", "as_json", is_flag=True, help="JSON: operator, family, meaning.")
def ops(markdown: bool, as_json: bool) -> None:
    """List the operators that can be cut through, and what each does to the channels of its arguments.

    Layers that meet any other operator are left untouched and reported.
    """
    from rich.console import Console

    from surgery.report import operators_as_json, operators_as_markdown, print_operators

    if as_json:
        click.echo(operators_as_json())
    elif markdown:
        click.echo(operators_as_markdown(), nl=False)
    else:
        console = Console()
        print_operators(console if console.is_terminal else Console(width=PLAIN_WIDTH))


@cli.command(cls=click.Command)
@click.option("--markdown", is_flag=True, help="Markdown, as in the documentation; the only format so far.")
def options(markdown: bool) -> None:
    """List all options with accepted values and defaults; they are the keys of a recipe too."""
    click.echo(config.options_table(), nl=False)


def _recipe(parameters: Mapping[str, Any]) -> Recipe:
    """Return the recipe of the command line and its recipe file."""
    typed, said = config.current(given(parameters))
    path = typed.pop("recipe_file", None)
    read, of_file = config.read_recipe(path) if path is not None else ({}, [])
    for sentence in (*said, *of_file):
        say(f"warning: {sentence}")
    if typed.keys() & set(config.ONE_OF):
        read = {name: value for name, value in read.items() if name not in config.ONE_OF}
    return config.recipe(**{**read, **typed})


def _refuse_huge_batch(loaded: LoadedModel, batch: int) -> None:
    """Raise early if the batch is too large to be timed."""
    import psutil
    from torch import Tensor
    from torch.utils import _pytree

    leaves = _pytree.tree_leaves((loaded.example_inputs, dict(loaded.example_kwargs)))
    needed = batch * sum(x[:1].numel() * x.element_size() for x in leaves if isinstance(x, Tensor) and x.ndim)
    memory = psutil.virtual_memory().total
    if needed > memory:
        what = f"the input alone takes {needed / 2**30:,.0f} GiB and this machine has {memory / 2**30:,.0f}"
        raise InvalidInput(f"--batch {batch}: {what}; use a smaller batch")


def _load(recipe: Recipe, progress: Progress) -> LoadedModel:
    from surgery.api import load_named

    progress("load", 0.0)
    loaded = load_named(recipe)
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    return loaded


def _decide(loaded: LoadedModel, recipe: Recipe, progress: Progress) -> Decision:
    from surgery import search

    inputs, kwargs = loaded.example_inputs, loaded.example_kwargs
    return search.decide(loaded.module, inputs, recipe, example_kwargs=kwargs, progress=progress)


def _deliver(
    session: Session,
    loaded: LoadedModel,
    recipe: Recipe,
    progress: Progress,
    decide: Callable[[Recipe], Decision],
) -> Report:
    """Cut what is decided, check, export, time, and write everything into the output folder."""
    from surgery import search
    from surgery.api import opened
    from surgery.delivery import prepare, save
    from surgery.report import with_origin

    _refuse_huge_batch(loaded, recipe.target.batch)
    out = Path(recipe.output.out or Path("shrunk", folder_name(loaded.name)))
    task = opened(recipe, loaded, trained=loaded.is_trained)
    share = distributed.send if distributed.processes() > 1 and distributed.meet(task) else None
    session.writing = True
    prepare(out)
    checkpoint = out.absolute().parent / f".{out.name}.training"
    result = search.realise(decide(task.but(checkpoint=checkpoint)), progress=progress, share=share)
    asked = config.resolved(recipe.but(out=out, recover=task.recovery.recover))
    data = with_origin(
        result.report,
        name=loaded.name,
        weights=loaded.weights,
        next_command=command_to_evaluate(out, loaded, recipe),
        command=command_again(session.arguments),
        notes=(*loaded.warnings, *loaded.notes),
    )
    written = save(replace(result, report=data, recipe=asked), out, evaluate=task.data.metric, progress=progress)
    distributed.part()
    return written


def _validate_output(recipe: Recipe) -> None:
    from surgery.delivery import validate_output

    validate_output(recipe)


# What goes wrong. ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `arguments` are those of the process by default."""
    session = Session(arguments=tuple(sys.argv[1:] if arguments is None else arguments))
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
            say(_stopped(session.stopped))
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
    sentence, code = _told(error, session)
    ended = distributed.lost(error) or bool(session.stopped)  # it may be for another process's sake
    if distributed.rank() > 0 and (ended or distributed.leave_word(sentence) or distributed.follows()):
        return code
    say((ended and distributed.word()) or sentence)
    return code


def _told(error: BaseException, session: Session) -> tuple[str, int]:
    if session.stopped or isinstance(error, KeyboardInterrupt):
        return _stopped(session.stopped or INTERRUPTED), session.stopped or INTERRUPTED
    if isinstance(error, MemoryError):
        told = f"error: not enough memory ({error}); use a smaller --batch, --input-shape or model"
        return told, InvalidInput.exit_code
    if isinstance(error, click.UsageError):
        hint = f"; see '{error.ctx.command_path} --help'" if error.ctx else ""
        if session.arguments[:1] == ("shrink",) and session.arguments[1:2] and session.arguments[1] in cli.commands:
            hint = f"; '{session.arguments[1]}' is a command of its own: surgery {shlex.join(session.arguments[1:])}"
        return f"error: {error.format_message().rstrip('.')}{hint}", error.exit_code
    if isinstance(error, click.ClickException):
        return f"error: {error.format_message()}", InvalidInput.exit_code
    if isinstance(error, SurgeryError):
        return f"error: {error}", error.exit_code
    if distributed.lost(error):
        return "error: another process of this run has ended; look above, or on its host, for why", INTERNAL
    what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    told = f"internal error: {what}; this is a bug, please report it with what the same command prints with --debug"
    return told, INTERNAL


if __name__ == "__main__":
    sys.exit(main())
