"""A file that takes an older one's place only once it is whole."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import InvalidInput


def writable(path: Path) -> Path:
    """Return `path` if a file can be made there; raises InvalidInput before any work is done."""
    if path.is_dir():
        raise InvalidInput(f"cannot write {path}: it is a folder; give the name of a file, such as {path}/model.onnx")
    if not path.parent.is_dir():
        raise InvalidInput(f"cannot write {path}: there is no folder {path.parent}; create it first")
    with workroom(path):
        return path


@contextlib.contextmanager
def workroom(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target: on the same file system, so that moving a file out of it is atomic."""
    try:
        room = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error}") from error
    with room as name:
        yield Path(name)


def move(file: Path, target: Path) -> None:
    """Put the finished file in place, external data first; the older file is there until the last moment."""
    data = file.with_name(f"{file.name}.data")
    try:
        if data.exists():
            data.replace(target.with_name(data.name))
        file.replace(target)
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error}") from error
