"""Which output a folder of images belongs to: by name, where the names of the model's classes are known, else in order.

Known are the names of published weights, and of 1000 outputs those of ImageNet: WordNet ids, torchvision's categories
and timm's descriptions. A file can name the classes of any model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from surgery.errors import InvalidInput
from surgery.inputs.libraries import import_timm, import_torchvision

IMAGENET = 1000


def read_classes(path: str, outputs: int) -> list[str]:
    """Return the lines of a file, one for each output, with a class's name, or several separated by tabs.

    Raises InvalidInput if it cannot be read, or has another number of lines.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").strip("\n").splitlines()
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"--classes {path}: cannot be read ({error}); give a text file, a class a line") from error
    if len(lines) != outputs:
        raise InvalidInput(
            f"--classes {path} has {len(lines)} lines and the model {outputs} outputs; give a line for each, in order"
        )
    return lines


def outputs_by_name(folders: Sequence[str], known: Sequence[str], file: str | None, option: str) -> list[int] | None:
    """Return the output of each folder, or None if their names are of nothing known.

    `known` are the names of each output as its weights tell, or the lines of `file`. Raises InvalidInput for a folder
    of another name, if those of most others, or of any in `file`, are known.
    """
    for names in (known,) if file is not None else _namings(known):
        index = _index(names)
        found = [index.get(_plain(folder)) for folder in folders]
        placed = [output for output in found if output is not None]
        if len(placed) == len(found):
            return placed
        if file is not None or 2 * len(placed) > len(found):
            strange, of = folders[found.index(None)], f"--classes {file}" if file is not None else "the model"
            raise InvalidInput(f"{option}: folder '{strange}' is none of the classes of {of}; rename or remove it")
    return None


def _namings(known: Sequence[str]) -> Iterator[Sequence[str]]:
    if len(known) == IMAGENET:
        yield files("surgery.inputs").joinpath("imagenet.txt").read_text("utf-8").splitlines()
        yield import_torchvision().models.ResNet18_Weights.DEFAULT.meta["categories"]
        if find_spec("timm") is not None:
            import_timm()
            from timm.data import ImageNetInfo  # timm is optional

            yield [name.replace(", ", "\t") for name in ImageNetInfo().label_descriptions()]
            yield ImageNetInfo().label_descriptions()
    yield known


def _index(names: Sequence[str]) -> dict[str, int]:
    """Return name → output; without names of several."""
    found: dict[str, set[int]] = {}
    for output, line in enumerate(names):
        for name in line.split("\t"):
            found.setdefault(_plain(name), set()).add(output)
    return {name: min(outputs) for name, outputs in found.items() if len(outputs) == 1}


def _plain(name: str) -> str:
    """``Great_White-shark`` → ``great white shark``."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()
