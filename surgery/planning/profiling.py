"""Profile a model's kernels: on this machine, or on a device by a pack.

A plan may drop blocks, and runtimes then fuse operators differently around the gap. Kernels of the model without every
other block, and without all blocks, are therefore timed too, so that the table also covers such plans.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from surgery import __version__
from surgery.config import Recipe
from surgery.core import Clock, Program, Progress, replacing, scratch_folder
from surgery.errors import InvalidInput
from surgery.inputs import LoadedModel
from surgery.latency import LatencyTable, Measured, Point, device
from surgery.planning.choice import Candidates, traced_part
from surgery.planning.latency_planner import conditions_of
from surgery.planning.latency_search import predicted_ms
from surgery.planning.refinement import LatencyBench
from surgery.report import Part, Table, print_parts

DEVICE_FILES = (
    "surgery/errors.py",
    "surgery/core/blame.py",
    "surgery/core/files.py",
    "surgery/core/kernels.py",
    *(f"surgery/latency/{name}.py" for name in ("tables", "micro", "probe", "fill", "ratio", "device")),
)
"""Files of this package that a pack contains unchanged."""

PACK_MAIN = '''"""Measures a model's kernels on this device: python THIS_FILE.zip --help."""

import os
import sys

if sys.version_info < (3, 8):
    sys.exit("error: this needs Python 3.8 or newer")
try:
    import numpy
    import onnxruntime
except ImportError as error:
    sys.exit("error: %s; install what is needed: python -m pip install numpy onnxruntime" % error)

from surgery.latency.device import main

if __name__ == "__main__":
    sys.exit(main(os.path.dirname(os.path.abspath(__file__))))
'''

PACK_TEXTS = {
    "__main__.py": PACK_MAIN,
    "surgery/__init__.py": "",
    "surgery/core/__init__.py": "".join(f"from surgery.core.{x} import *\n" for x in ("blame", "files", "kernels")),
    "surgery/latency/__init__.py": "",
}
"""Further files of a pack: minimal package `__init__` files."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
_SHOWN = 20


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """The kernels of a model to time: those of the traced program in order, and others that occur without blocks."""

    program: Program
    recipe: Recipe
    dense: tuple[Point, ...]
    others: tuple[Point, ...]

    @property
    def keys(self) -> dict[str, list[tuple[int, ...]]]:
        """Kernel key → its widths."""
        found: dict[str, list[tuple[int, ...]]] = {}
        for kernel, widths in dict.fromkeys((*self.dense, *self.others)):
            found.setdefault(kernel.key, []).append(widths)
        return found


def survey(loaded: LoadedModel, recipe: Recipe, progress: Progress | None = None) -> Survey:
    """Return the kernels of a model to time; the recipe's budget is ignored, errors are those of `shrink`."""
    run = Clock(progress)
    program, _ = traced_part(loaded, recipe, run)
    candidates = Candidates(program, recipe, None, run)
    dense = candidates.without(()).lowered.points()
    with run("couple without blocks"):
        names = [block.name for block in candidates.blocks]
        chosen = (names[::2], names[1::2], names, ())
        gone = {frozenset(some).union(candidates.dead) for some in chosen} - {frozenset()}
        others = [point for some in sorted(gone, key=sorted) for point in candidates.without(some).lowered.points()]
    return Survey(program, recipe, tuple(dense), tuple(others))


def measure(subject: Survey, *, name: str, progress: Progress | None = None) -> tuple[LatencyTable, dict[str, Any]]:
    """Time kernels missing in this machine's table, including those at the dense widths.

    Returns the table with only this model's kernels, and a profile of JSON values.
    """
    warnings: list[str] = []
    recipe, dense = subject.recipe, subject.dense
    conditions = conditions_of(subject.program, recipe)
    source = Measured(conditions, seed=recipe.selection.seed, progress=progress, warn=warnings.append)
    table = source.cover([*dense, *subject.others])
    table = (source.refine(dense) or table).only([*dense, *subject.others])
    total = predicted_ms(dense, table)
    rows: list[dict[str, Any]] = []
    for (kernel, widths), count in Counter(dense).items():
        ms = predicted_ms([(kernel, widths)] * count, table)
        rows.append({"title": kernel.title, "widths": list(widths), "count": count, "ms": ms, "share": ms / total})
    of = {"model": name, "batch": recipe.target.batch, "device": dict(table.device), "cache": str(source.path)}
    stairs = {kind: stairs.step for kind, stairs in table.stairs.items()}
    found = {"kernels": sorted(rows, key=lambda row: -row["ms"]), "stairs": stairs, "notes": warnings}
    return table, {**of, "predicted_ms": total, "overhead_ms": table.overhead_ms, **found}


def render_terminal(data: Mapping[str, Any], console: Console) -> None:
    """Print a profile: the costliest kernels, and the device's stairs."""
    where, more = data["device"], len(data["kernels"]) - _SHOWN
    rows = [
        (x["title"], "x".join(map(str, x["widths"])) or "-", str(x["count"]), f"{x['ms']:.3g}", f"{x['share']:.1%}")
        for x in data["kernels"][:_SHOWN]
    ]
    parts: list[Part] = [
        f"{data['model']}, batch {data['batch']}: {data['predicted_ms']:.4g} ms by the sum of its kernels; "
        f"{where['precision']}, ONNX Runtime {where['onnxruntime']} on {where['cpu']}, threads {where['threads']}",
        Table(("kernel", "widths", "count", "ms", "share"), rows),
        *([f"… and {more} more (--json)"] if more > 0 else ()),
        f"hardware steps in channels: {', '.join(f'{kind} {step}' for kind, step in sorted(data['stairs'].items()))}",
        *(f"note: {note}" for note in data["notes"]),
    ]
    print_parts(parts, console)


def pack(subject: Survey, path: str | Path, *, name: str, progress: Progress | None = None) -> None:
    """Write a zip file that measures the model's kernels on a device with only Python, numpy and onnxruntime."""
    recipe, conditions = subject.recipe, conditions_of(subject.program, subject.recipe)
    with replacing(path) as file, scratch_folder() as folder:
        bench = LatencyBench(subject.program, folder, recipe, progress=progress)
        of = {"model": name, "fingerprint": subject.program.fingerprint, "part": recipe.selection.submodule}
        how = {"batch": recipe.target.batch, "seed": recipe.selection.seed, **asdict(conditions)}
        request = {"tool_version": __version__, **of, **how, "shapes": bench.shapes, "kernels": subject.keys}
        package = files("surgery")
        own = {part: package.joinpath(part.removeprefix("surgery/")).read_text("utf-8") for part in DEVICE_FILES}
        texts = {**PACK_TEXTS, **own, device.REQUEST: json.dumps(request, indent=1) + "\n"}
        with zipfile.ZipFile(file, "w") as archive:
            for part, text in texts.items():
                archive.writestr(zipfile.ZipInfo(part, _EPOCH), text, zipfile.ZIP_DEFLATED)
            for model in sorted(folder.glob(f"{device.DENSE}*")):
                entry = zipfile.ZipInfo(model.name, _EPOCH)
                entry.file_size = model.stat().st_size  # large files need another header
                with model.open("rb") as read, archive.open(entry, "w") as write:
                    shutil.copyfileobj(read, write)


def require_writable(option: str, path: Path) -> None:
    """Raise InvalidInput if a file cannot be written, before long computations."""
    if path.is_dir():
        raise InvalidInput(f"{option} {path}: is a folder; name a file in it")
    if not path.resolve().parent.is_dir():
        raise InvalidInput(f"{option} {path}: there is no folder {path.parent}; make it, or name another")
