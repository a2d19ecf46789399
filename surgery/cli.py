"""The command line: options in, a table or JSON out, one sentence and an exit code for everything that goes wrong.

Nothing heavy is imported until a command runs. Standard output carries the result alone; progress, warnings and
whatever libraries or the user's own file print go to standard error.
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

from surgery import __version__, together, typed_next
from surgery.errors import INTERNAL, OK, InvalidInput, SurgeryError
from surgery.options import (
    DATA,
    DELIVERY,
    EXIT_CODES,
    FILES,
    MODEL,
    OUTPUT,
    PLANNING,
    PROFILE,
    SELECTION,
    TIMING,
    TRAINING,
    Session,
    options,
)
from surgery.screen import PLAIN_WIDTH, Terminated, print_found, print_profile, print_report, say, work

if TYPE_CHECKING:
    from exporters.quantize import Int8
    from surgery.config import Recipe
    from surgery.core import Progress
    from surgery.delivery import Measurement
    from surgery.inputs import LoadedModel
    from surgery.planning import Decision
    from surgery.report import Report

INTERRUPTED = 130
TERMINATED = 143
INEXACT = {None: "if-needed", True: "never", False: "always"}
BUDGETS = ("latency", "latency_ms", "macs", "params", "channels")
ONE_OF = (*BUDGETS, "max_drop")


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="surgery")
def cli() -> None:
    """Make a PyTorch vision model physically smaller, verify it, and measure it in ONNX Runtime."""


@cli.command(epilog=EXIT_CODES)
@options(MODEL, SELECTION, TIMING, PLANNING, DATA, TRAINING, DELIVERY, OUTPUT)
@click.pass_obj
def shrink(session: Session, /, model: str, as_json: bool, quiet: bool, out: Path | None, **given: Any) -> None:
    """Shrink MODEL: cut, check, export to ONNX, time, and write everything into --out.

    MODEL is a torchvision name (resnet18), timm:NAME, FILE.py:CALLABLE or package.module:CALLABLE that returns a module
    (or a module and its example inputs), or a .pt2 exported program.
    """
    _one_budget(given)
    if given["max_drop"] is not None and together.processes() > 1:
        raise InvalidInput("--max-drop judges one model after the other, in one process: leave torchrun out")
    with work(session, quiet=quiet or together.rank() > 0) as progress:
        how = _measurement(given)
        loaded = _load(model, given, progress)
        if together.rank() > 0:
            from surgery import company

            return company.follow(loaded, _recipe(given))
        written = _deliver(session, loaded, model, out, given, how, progress, lambda: _decide(loaded, given, progress))
    print_report(written.data, as_json=as_json)


@cli.command(epilog=EXIT_CODES)
@click.argument("plan", type=click.Path(path_type=Path))
@options(MODEL, TIMING, DATA, TRAINING, DELIVERY, OUTPUT)
@click.pass_obj
def apply(
    session: Session, /, plan: Path, model: str, as_json: bool, quiet: bool, out: Path | None, **given: Any
) -> None:
    """Repeat PLAN, the plan.json of an earlier run, on MODEL: the same architecture, with any weights.

    MODEL, and what is written into --out, are as for `surgery shrink`; whatever is drawn at random is drawn as then.
    """
    with work(session, quiet=quiet or together.rank() > 0) as progress:
        from surgery.core import Plan

        decided = Plan.load(plan)
        given["seed"] = decided.settings.get("seed", 0)
        how = _measurement(given)
        loaded = _load(model, given, progress)
        if together.rank() > 0:
            from surgery import company

            return company.follow(loaded, _recipe(given))

        def again() -> Decision:
            from surgery.data_options import with_data
            from surgery.planning import as_planned, repeat

            inputs, kwargs = loaded.example_inputs, loaded.example_kwargs
            again = repeat(decided, loaded.module, inputs, example_kwargs=kwargs, progress=progress)
            return replace(again, recipe=with_data(as_planned(_recipe(given), decided), loaded))

        written = _deliver(session, loaded, model, out, given, how, progress, again)
    print_report(written.data, as_json=as_json)


@cli.command(epilog=EXIT_CODES)
@options(MODEL, PROFILE, TIMING, OUTPUT)
@click.pass_obj
def profile(
    session: Session, /, model: str, as_json: bool, quiet: bool, out: Path | None, pack: Path | None, **given: Any
) -> None:
    """Measure what MODEL's kernels take on this machine, or pack them to be measured on a device.

    The latency table that --out writes, here or there, is what `surgery shrink MODEL --latency-table` plans by. Give
    the same --keep, --part and --batch to both.
    """
    if out is not None and pack is not None:
        raise click.UsageError("--out measures here and --pack does not; choose one of them")
    with work(session, quiet=quiet) as progress:
        from surgery.latency import Settings
        from surgery.planning import profiling as profiles

        target = pack or out
        if target is not None:
            profiles.refuse_unwritable("--pack" if pack else "--out", target)
        if pack is None:
            Settings(threads=given["threads"])  # refuses more threads than there are cores, which a device may have
        loaded = _load(model, given, progress)
        _refuse_huge_batch(loaded, given["batch"])
        inputs, kwargs = loaded.example_inputs, loaded.example_kwargs
        found = profiles.survey(loaded.module, inputs, _recipe(given), example_kwargs=kwargs, progress=progress)
        session.writing = True
        if pack is not None:
            profiles.pack(found, pack, name=loaded.name, progress=progress)
            data = {"pack": str(pack), "kernels": len(found.keys)}
        else:
            measured = profiles.measure(found, progress=progress)
            data = profiles.describe(measured, name=loaded.name)
            if out is not None:
                measured.table.save(out)
    print_profile(data, out=out, as_json=as_json)


@cli.command(epilog=EXIT_CODES)
@options(FILES, TIMING, OUTPUT)
@click.pass_obj
def bench(session: Session, /, files: tuple[Path, ...], as_json: bool, quiet: bool, **given: Any) -> None:
    """Time ONNX FILES against each other: in blocks of shuffled order, beside a copy of the first.

    Each gets an equal share of the machine's quiet and busy moments. Times are relative to the first file's, with 95 %
    intervals; load time and peak memory are a fresh process's.
    """
    with work(session, quiet=quiet) as progress:
        from surgery.latency import comparison as versus

        given["shapes"] = dict(given["shapes"])
        found = versus.compare(files, **given, progress=progress)
    print_found(found, versus.render_terminal, as_json=as_json)


@cli.command(epilog=EXIT_CODES)
@options(MODEL, SELECTION, TIMING, PLANNING, DATA, OUTPUT)
@click.pass_obj
def show(session: Session, /, model: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show what would be cut from MODEL and why, without cutting, exporting or writing anything.

    MODEL and the options are those of `surgery shrink`.
    """
    _one_budget(given)
    with work(session, quiet=quiet) as progress:
        from surgery.report import with_origin

        loaded = _load(model, given, progress)
        data = with_origin(
            _decide(loaded, given, progress).report,
            name=loaded.name,
            weights=loaded.weights,
            next_command=typed_next.shrink(session.arguments),
            notes=(*loaded.warnings, *loaded.notes),
        )
    print_report(data, as_json=as_json)


@cli.command(epilog=EXIT_CODES)
@click.option("--markdown", is_flag=True, help="A Markdown table, as in docs/reference/operators.md.")
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


def _one_budget(given: Mapping[str, Any]) -> None:
    budgets = [f"--{kind.replace('_', '-')}" for kind in ONE_OF if given[kind] is not None]
    if len(budgets) > 1:
        raise click.UsageError(f"{' and '.join(budgets)} are given, but a run has one budget; choose one of them")


def _refuse_huge_batch(loaded: LoadedModel, batch: int) -> None:
    """Refuse before the long work what could not be timed after it."""
    import psutil
    from torch import Tensor
    from torch.utils import _pytree

    leaves = _pytree.tree_leaves((loaded.example_inputs, dict(loaded.example_kwargs)))
    needed = batch * sum(x[:1].numel() * x.element_size() for x in leaves if isinstance(x, Tensor) and x.ndim)
    memory = psutil.virtual_memory().total
    if needed > memory:
        what = f"the input alone takes {needed / 2**30:,.0f} GiB and this machine has {memory / 2**30:,.0f}"
        raise InvalidInput(f"--batch {batch}: {what}; use a smaller batch")


def _load(model: str, given: Mapping[str, Any], progress: Progress) -> LoadedModel:
    from surgery.inputs import load_model

    progress("load", 0.0)
    loaded = load_model(
        model,
        weights=given["weights"],
        input_shape=given["input_shape"],
        model_args=dict(given["model_args"]),
        seed=given["seed"],
        trust=given["trust"],
    )
    for warning in loaded.warnings:
        say(f"warning: {warning}")
    return loaded


def _decide(loaded: LoadedModel, given: Mapping[str, Any], progress: Progress) -> Decision:
    from surgery.api import decided
    from surgery.data_options import with_data

    inputs, kwargs = loaded.example_inputs, loaded.example_kwargs
    recipe = with_data(_recipe(given), loaded)
    return decided(loaded.module, inputs, recipe, example_kwargs=kwargs, progress=progress)


def _deliver(
    session: Session,
    loaded: LoadedModel,
    model: str,
    out: Path | None,
    given: dict[str, Any],
    how: Measurement,
    progress: Progress,
    decided: Callable[[], Decision],
) -> Report:
    """Cut what is decided, check, export, time, and write everything into the output folder."""
    from surgery import api as pipeline
    from surgery.delivery import artifacts as artefacts, saving as deliver
    from surgery.recovery import open_evaluation
    from surgery.report import with_origin

    _refuse_huge_batch(loaded, given["batch"])
    out = out if out is not None else Path("shrunk", typed_next.folder_name(loaded.name))
    share = None
    if together.processes() > 1:
        from surgery import company

        share = together.send if company.meet(loaded, _recipe(given)) else None
    given["checkpoint"] = out.absolute().parent / f".{out.name}.training"
    session.writing = True
    artefacts.prepare(out)
    result = pipeline.realise(decided(), progress=progress, share=share)
    data = with_origin(
        result.report,
        name=loaded.name,
        weights=loaded.weights,
        next_command=typed_next.evaluate(model, out, loaded, given),
        command=typed_next.again(session.arguments),
        notes=(*loaded.warnings, *loaded.notes),
    )
    evaluation = given.get("evaluation")
    judge = open_evaluation(evaluation) if evaluation is not None else None
    written = deliver.save(replace(result, report=data), out, how, evaluate=judge, progress=progress)
    together.part()
    return written


def _measurement(given: Mapping[str, Any]) -> Measurement:
    from surgery.delivery import Measurement, Precisions, with_deployed

    chosen = with_deployed(Precisions(given["precision"], _int8(given)), given.get("deploy", "fp32"))
    if chosen.fewer and given["data"] is None:
        asked = "--deploy int8" if given["precision"] == ("fp32",) else f"--precision {','.join(chosen.fewer)}"
        raise InvalidInput(f"{asked} needs images to calibrate on: give them with --data")
    if given["int8_keep"] and "int8" not in chosen.names:
        raise InvalidInput("--int8-keep is of files in int8: ask for them with --precision int8 or --deploy int8")
    names = ("opset", "threads", "batch", "runs", "seed", "min_ort", "formats")
    return Measurement(**{name: given[name] for name in names}, precisions=chosen)


def _int8(given: Mapping[str, Any]) -> Int8:
    from exporters.quantize import Int8

    return Int8(given["int8_method"], given["int8_keep"], given["int8_reduce_range"])


def _recipe(given: Mapping[str, Any]) -> Recipe:
    from surgery.config import OPTIONS, Recipe

    told = {"part": "submodule", "evaluation": "metric", "images": "max_images"}
    found = {told.get(name, name): value for name, value in given.items() if value is not None}
    found["inexact"] = INEXACT[given.get("exact")]
    return Recipe().but(**{name: value for name, value in found.items() if name in OPTIONS})


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
        if together.rank() == 0:
            say(_stopped(session.stopped))
        os._exit(session.stopped)
    raise Terminated


def _stopped(code: int) -> str:
    what = "terminated" if code == TERMINATED else "interrupted"
    return f"{what} before the end; no file is half written, run the same command again"


def _explain(error: BaseException, session: Session) -> int:
    """Say on standard error what went wrong, in one sentence, and return the exit code for it.

    Of several processes the first speaks, for the others too once they have met.
    """
    if session.debug:
        traceback.print_exception(error)
    sentence, code = _told(error, session)
    ended = together.lost(error) or bool(session.stopped)  # it may be for another process's sake
    if together.rank() > 0 and (ended or together.leave_word(sentence) or together.follows()):
        return code
    say((ended and together.word()) or sentence)
    return code


def _told(error: BaseException, session: Session) -> tuple[str, int]:
    """The sentence and the exit code."""
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
    if together.lost(error):
        return "error: another process of this run has ended; look above, or on its host, for why", INTERNAL
    what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    told = f"internal error: {what}; this is a bug, please report it with what the same command prints with --debug"
    return told, INTERNAL


if __name__ == "__main__":
    sys.exit(main())
