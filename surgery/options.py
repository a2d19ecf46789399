"""The options of the command line: what each is called, what it accepts, and what `--help` says of it.

Imports nothing heavy, so that `--help` and mistyped options answer at once.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

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
    """What one call of the command line must remember outside its options."""

    arguments: tuple[str, ...] = ()
    debug: bool = False
    writing: bool = False
    stopped: int = 0


class Shape(click.ParamType[tuple[int, ...]]):
    """``1,3,224,224`` → (1, 3, 224, 224)."""

    name = "N,C,H,W"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the text; click reports what is raised."""
        if isinstance(value, tuple):
            return value
        try:
            shape = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 1:
            self.fail(f"'{value}' is not a shape; write positive whole numbers, as in 1,3,224,224", param, ctx)
        return shape


class NamedShape(click.ParamType[tuple[str, tuple[int, ...]]]):
    """``input=1,3,224,224`` → ("input", (1, 3, 224, 224))."""

    name = "NAME=N,C,H,W"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse the text; click reports what is raised."""
        if isinstance(value, tuple):
            return value
        name, equals, shape = str(value).rpartition("=")
        if not equals or not name:
            self.fail(f"'{value}' is not NAME=SHAPE; write for example input=1,3,224,224", param, ctx)
        return name, Shape().convert(shape, param, ctx)


class Several(click.ParamType[tuple[str, ...]]):
    """``fp32,int8`` → ("fp32", "int8"): some of the words that there are."""

    name = "WORDS"

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Parse the text; click reports what is raised."""
        if isinstance(value, tuple):
            return value
        given = tuple(dict.fromkeys(word.strip() for word in str(value).split(",")))
        wrong = [word for word in given if word not in self._words]
        if wrong:
            self.fail(f"'{wrong[0]}' is none of {', '.join(self._words)}; write some of them, with commas", param, ctx)
        return given


class Numbers(click.ParamType[tuple[float, ...]]):
    """``0.5,0.5,0.5`` → (0.5, 0.5, 0.5)."""

    name = "R,G,B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse the text; click reports what is raised."""
        try:
            return value if isinstance(value, tuple) else tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"'{value}' is no list of numbers; write one for each channel, as in 0.5,0.5,0.5", param, ctx)


class Pixels(click.ParamType[tuple[int, int]]):
    """``224`` or ``192,256`` → (height, width)."""

    name = "N|H,W"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse the text; click reports what is raised."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = [int(part) for part in str(value).split(",")]
        except ValueError:
            sizes = []
        if len(sizes) not in (1, 2) or min(sizes) < 1:
            self.fail(f"'{value}' is no size; write one number, or height and width as in 192,256", param, ctx)
        return sizes[0], sizes[-1]


class Assignment(click.ParamType[tuple[str, Any]]):
    """``num_classes=10`` → ("num_classes", 10): the value as a Python literal, or else as text."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """Parse the text; click reports what is raised."""
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"'{value}' is not NAME=VALUE; write for example num_classes=10", param, ctx)
        try:
            return name, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return name, text


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.ensure_object(Session).debug |= value


WEIGHTS = ("l1", "l2", "bn-gamma", "lamp", "fpgm", "signal", "random")
IMAGES = ("activation", "reconstruction", "taylor", "second-order")
_KEEP = click.option(
    "--keep", multiple=True, metavar="PATTERN",
    help="Leave modules or parameters of this name whole (* and ? match); may be repeated.",
)  # fmt: skip
_PART = click.option("--part", metavar="SUBMODULE", help="Shrink this submodule only; its interface stays.")
_SEED = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
    help="For everything drawn at random.",
)  # fmt: skip
_FRACTION = click.FloatRange(0.0, 1.0, min_open=True, max_open=True)

MODEL = (
    click.argument("model"),
    click.option(
        "--weights", default="auto", show_default=True, metavar="auto|random|PATH",
        help="Pretrained where they can be had, seeded random ones, or a safetensors or weights-only file.",
    ),
    click.option("--input-shape", type=Shape(), help="Shape of the example input, the batch first."),
    click.option(
        "--model-arg", "model_args", type=Assignment(), multiple=True,
        help="Passed to the model's constructor, as in num_classes=10; may be repeated.",
    ),
    click.option("--trust", is_flag=True, help="Load a .pt2 file that holds pickled payloads: it can run any code."),
)  # fmt: skip

SELECTION = (
    click.option(
        "--latency", type=_FRACTION, metavar="R",
        help="Fraction of the dense model's latency in ONNX Runtime to keep.  [default: 0.5]",
    ),
    click.option(
        "--latency-ms", type=click.FloatRange(0.0, min_open=True), metavar="X", help="Milliseconds to get down to.",
    ),
    click.option("--macs", type=_FRACTION, metavar="R", help="Fraction of the MACs to keep."),
    click.option("--params", type=_FRACTION, metavar="R", help="Fraction of the parameters to keep."),
    click.option("--channels", type=_FRACTION, metavar="R", help="Fraction of all removable units to keep."),
    click.option(
        "--max-drop", type=click.FloatRange(0.0, 100.0, min_open=True, max_open=True), metavar="P",
        help="In the place of a budget: the lowest latency at which no more than P points are lost, by the upper end "
        "of the 95 % interval on labelled --val; else of --eval's first figure, else of agreement on --data.",
    ),
    click.option(
        "--steps", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
        help="Cut so many times, a part of the way each time, and recover in between; not for latencies.",
    ),
    click.option(
        "--criterion", type=click.Choice([*WEIGHTS, *IMAGES]),
        help="What makes a unit important; activation, reconstruction, taylor and second-order look at --data.  "
        "[default: second-order with --data, else signal for a budget of time, else l1]",
    ),
    click.option(
        "--scope", type=click.Choice(["global", "uniform"]), default="global", show_default=True,
        help="Rank all units together, or keep the same share of every group.",
    ),
    click.option(
        "--round-to", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
        help="Keep multiples of N units per group.",
    ),
    click.option(
        "--exact/--allow-inexact", "exact", default=None,
        help="Never, or freely, cut what is not like zeros (norms, means); without either, only if the budget asks.",
    ),
    _KEEP,
    click.option(
        "--own-class", is_flag=True,
        help="Keep whole what your class's code cannot run at other sizes, so that your class comes back.",
    ),
    _PART,
    click.option(
        "--tracer", type=click.Choice(["export", "torch-pruning"]), default="export", show_default=True,
        help="How the model is captured; torch-pruning for what torch.export cannot capture.",
    ),
    _SEED,
)  # fmt: skip

OUTPUT = (
    click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and nothing else."),
    click.option("--quiet", is_flag=True, help="No progress."),
    click.option(
        "--debug", is_flag=True, is_eager=True, expose_value=False, callback=_set_debug,
        help="Show the traceback of an error.",
    ),
)  # fmt: skip

TIMING = (
    click.option(
        "--threads", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
        help="Intra-op threads of ONNX Runtime while timing.",
    ),
    click.option(
        "--batch", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Items per timed run.",
    ),
)  # fmt: skip

DEPLOY = (
    click.option(
        "--deploy", type=click.Choice(["fp32", "int8"]), default="fp32", show_default=True,
        help="Precision that the model will run in, and that a latency is of: int8 against the dense model in int8.",
    ),
)  # fmt: skip

PLANNING = (
    *DEPLOY,
    click.option(
        "--latency-table", type=click.Path(), metavar="FILE",
        help="Plan by this table, of another device perhaps, and time nothing to plan.  [default: this machine's]",
    ),
    click.option(
        "--acceptance", type=click.Path(), metavar="FILE",
        help="Aim by what an earlier plan was measured to take on that table's device.",
    ),
    click.option(
        "--correct/--no-correct", default=True, show_default=True,
        help="Time the compact model and correct the plan until the latency is met.",
    ),
    click.option(
        "--drop-layers/--no-drop-layers", default=True, show_default=True,
        help="Let residual blocks and depthwise layers go: dead ones, and those that buy latency most cheaply.",
    ),
)  # fmt: skip

DATA = (
    click.option(
        "--data", metavar="FOLDER|FILE.npz|FILE.py:CALLABLE",
        help="Images to choose by and to recover with, no labels needed: a folder of them, an .npz file with 'images' "
        "(N,H,W,C) of uint8 and perhaps 'labels', or a callable that returns a DataLoader.",
    ),
    click.option(
        "--val", metavar="FOLDER|FILE.npz|FILE.py:CALLABLE",
        help="Images to judge by, likewise; with classes, the accuracy lost is measured.",
    ),
    click.option(
        "--eval", "evaluation", metavar="FILE.py:CALLABLE",
        help="A function of a model that returns {metric: value}; it judges torch models and the exported files.",
    ),
    click.option(
        "--recover", type=click.Choice(["none", "fold", "bn", "reconstruct", "distill", "finetune"]),
        help="How to bring the compact model back to the dense one.  [default: reconstruct with --data, else fold]",
    ),
    click.option(
        "--images", type=click.IntRange(min=2), default=512, show_default=True, metavar="N",
        help="At most so many images of --data are looked at, to choose and to reconstruct.",
    ),
    click.option("--mean", type=Numbers(), help="Of each channel, for pixels of 0 to 1.  [default: the model's own]"),
    click.option("--std", type=Numbers(), help="Likewise.  [default: the model's own]"),
    click.option("--size", type=Pixels(), help="Height and width of the images.  [default: the example input's]"),
    click.option(
        "--crop", type=click.FloatRange(0.0, 1.0, min_open=True), metavar="F",
        help="Share of an image's shorter side that is kept of its middle.  [default: the model's own]",
    ),
)  # fmt: skip

TRAINING = (
    click.option(
        "--epochs", type=click.IntRange(min=1), metavar="N", help="Of distill and finetune, over --data.  [default: 10]"
    ),
    click.option(
        "--lr", type=click.FloatRange(0.0, 1.0, min_open=True), metavar="X",
        help="Highest learning rate.  [default: 0.0003]",
    ),
    click.option(
        "--train-batch", type=click.IntRange(min=2), metavar="N",
        help="Images a step, over all processes together.  [default: 128]",
    ),
    click.option(
        "--mixed-precision", type=click.Choice(["no", "fp16", "bf16"]), help="Of training.  [default: no]",
    ),
)  # fmt: skip

PROFILE = (
    *DEPLOY,
    _KEEP,
    _PART,
    _SEED,
    click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the latency table there."),
    click.option(
        "--pack", type=click.Path(path_type=Path), metavar="FILE.zip",
        help="Measure nothing here: write what measures on a device that has Python, numpy and onnxruntime.",
    ),
)  # fmt: skip

FILES = (
    click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path)),
    click.option(
        "--baseline", type=click.Path(path_type=Path), metavar="FILE",
        help="Which of them times are relative to.  [default: the first]",
    ),
    click.option(
        "--provider", default="cpu", show_default=True, metavar="NAME",
        help="Execution provider of ONNX Runtime, as in CUDAExecutionProvider or cuda.",
    ),
    click.option(
        "--input-shape", "shapes", type=NamedShape(), multiple=True,
        help="Whole shape of an input of which more than the batch is open; may be repeated.",
    ),
    click.option(
        "--runs", type=click.IntRange(min=3), default=2000, show_default=True, metavar="N",
        help="At most so many timed runs of a file; fewer once intervals are narrow. A p99 takes 1000.",
    ),
    click.option(
        "--seconds", type=click.FloatRange(0.0, min_open=True), default=45.0, show_default=True, metavar="S",
        help="Begin no round of measuring after that, as long as there are twelve.",
    ),
    _SEED,
)  # fmt: skip

DELIVERY = (
    click.option(
        "--precision", type=Several(("fp32", "fp16", "int8")), default="fp32", show_default=True,
        metavar="fp32,fp16,int8", help="In which precisions files are written; int8 is calibrated on --data.",
    ),
    click.option(
        "--int8-method", type=click.Choice(["minmax", "entropy", "percentile"]), default="minmax", show_default=True,
        help="How the range of an activation follows from the images.",
    ),
    click.option(
        "--int8-keep", multiple=True, metavar="first|last|PATTERN",
        help="Leave layers in float32: the first, the last, nodes or operators of this name (* and ? match); may be "
        "repeated.",
    ),
    click.option(
        "--int8-reduce-range", is_flag=True, help="Weights of 7 bits, for x86 processors without VNNI.",
    ),
    click.option("--opset", type=click.IntRange(min=18), metavar="N", help="ONNX opset.  [default: the exporter's]"),
    click.option(
        "--format", "formats", type=Several(("onnx", "ort")), default="onnx", show_default=True, metavar="onnx,ort",
        help="Of the compact files: ort is what ONNX Runtime's builds for phones load; ONNX files are always written.",
    ),
    click.option(
        "--min-ort", metavar="VERSION",
        help="Oldest ONNX Runtime that is to read the files, as in 1.16: operator set and format are such as it knows.",
    ),
    click.option(
        "--runs", type=click.IntRange(min=3), default=2000, show_default=True, metavar="N",
        help="At most so many timed runs per model; fewer once the speedup's interval is narrow.",
    ),
    click.option(
        "--out", type=click.Path(path_type=Path), metavar="DIR",
        help="Folder that is replaced as a whole.  [default: shrunk/MODEL]",
    ),
)  # fmt: skip


def options(*groups: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """Return one decorator that applies groups of click decorators in reading order."""

    def decorate(function: Command) -> Command:
        for group in reversed(groups):
            for option in reversed(group):
                function = option(function)
        return function

    return decorate
