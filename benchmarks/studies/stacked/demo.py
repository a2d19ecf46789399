"""The demonstration: one network, a folder of photos, every way to a faster file in one table, in minutes.

``python scripts/demo.py --weights mobilenet_v2.pt --photos folder --val labelled``. Without options it takes
MobileNetV2 and the images of the data folder (`benchmarks.studies.data`): the README's figure comes from there.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from benchmarks.studies import data
from benchmarks.studies.stacked.__main__ import keep
from benchmarks.studies.stacked.rows import Ask, measured
from benchmarks.studies.stacked.subjects import Case, known, named
from benchmarks.studies.stacked.table import HEADS, WITH_VNNI, WITHOUT_VNNI, lines
from surgery.errors import InvalidInput, SurgeryError
from surgery.latency import available_cores
from surgery.report import Table, rich_table

MODEL, SMALLER, LATENCY = "mobilenet_v2", 192, 0.72
CALIBRATED = 128
"""Photos that files in int8 are calibrated on, all of them alike: with hundreds more that takes minutes."""
_WIDTH = 160


@click.command()
@click.option("--model", default=MODEL, show_default=True, help="As for `surgery shrink`.")
@click.option("--weights", default="auto", show_default=True, help="A checkpoint, or pretrained ones.")
@click.option("--photos", metavar="FOLDER|FILE.npz", help="Images without classes.  [default: the data folder's]")
@click.option("--val", metavar="FOLDER|FILE.npz", help="Images with classes, to judge by.")
@click.option(
    "--latency",
    type=click.FloatRange(0.1, 0.95),
    default=LATENCY,
    show_default=True,
    help="Of ours in int8, as a fraction of the dense network's in int8.",
)
@click.option(
    "--smaller",
    type=click.IntRange(min=32),
    default=SMALLER,
    show_default=True,
    metavar="PIXELS",
    help="Smaller images, for the dense network.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of ONNX Runtime.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON, and how each row came about.")
@click.option("--keep", "kept", is_flag=True, help="Put the table into the studies' results file.")
def main(
    model: str,
    weights: str,
    photos: str | None,
    val: str | None,
    latency: float,
    smaller: int,
    threads: int,
    as_json: bool,
    kept: bool,
) -> None:
    """Make all kinds of faster files of one network, and compare them."""
    torch.set_num_threads(available_cores())
    _keep_freed_memory()
    try:
        case = _case(model, weights, photos, val)
        ask = Ask(
            latency=latency,
            smaller=(smaller,) if case.at is not None else (),
            calibrated=CALIBRATED,
            threads=threads,
            seconds=45.0,
        )
        with tempfile.TemporaryDirectory() as folder:
            found = measured(case, ask, Path(folder))
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if kept:
        keep(WITHOUT_VNNI if found["saturates"] else WITH_VNNI, found, "python scripts/demo.py")
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)


def _keep_freed_memory() -> None:
    """Let glibc give freed memory out again, where it is the C library.

    Else it maps every tensor above 32 MB anew, page by page, and hands it back: half of the time of networks in torch
    whose activations are as large. Files are timed in ONNX Runtime, which keeps its own memory.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        mallopt(option, value)


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1
"""Options of mallopt(3): blocks that may be mapped, and what is given back, -1 for nothing."""


def _show(found: dict[str, Any]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(rich_table(Table(HEADS, list(lines(found["rows"])))))
    by = found["judged_by"][0]
    facts = (
        f"judged on {by['images']} images: {by['name']}; {found['photos']} photos without labels, int8 calibrated on "
        f"{found['calibrated']}; {found['seconds'] / 60:.1f} minutes; timer: {found['timer']['why']}"
    )
    console.print(facts, markup=False, highlight=False, soft_wrap=True)


def _case(model: str, weights: str, photos: str | None, val: str | None) -> Case:
    """What the user names, else what the data folder holds."""
    if photos is not None:
        return named(model, weights, photos, val)
    if (model, weights, val) != (MODEL, "auto", None):
        raise InvalidInput("give a folder of photos with --photos; without it the data folder's own network is shown")
    try:
        return known(MODEL, data.find_root(), distill=False)
    except InvalidInput as error:
        raise InvalidInput(f"give a folder of photos with --photos ({error})") from error


if __name__ == "__main__":
    main()
