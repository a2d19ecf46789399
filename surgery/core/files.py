"""Atomic replacement of files. Part of a profiling pack, so it must run on Python 3.8."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union

from surgery.errors import InvalidInput


@contextmanager
def replacing(path: Union[str, os.PathLike[str]]) -> Iterator[Path]:
    """Yield a temporary path; its file, and its `.data` file, replace those at `path` if the block succeeds.

    It has the same name in a folder next to `path`, so that the move is atomic. InvalidInput if `path` is not writable.
    """
    target = Path(path)
    if target.is_dir():
        raise InvalidInput(f"cannot write {target}: it is a folder; give the name of a file in it")
    if not target.parent.is_dir():
        raise InvalidInput(f"cannot write {target}: there is no folder {target.parent}; create it first")
    try:
        with tempfile.TemporaryDirectory(dir=str(target.parent), prefix=f".{target.name}.") as folder:
            file = Path(folder, target.name)
            yield file
            data = file.with_name(f"{file.name}.data")
            if data.exists():
                data.replace(target.with_name(data.name))
            file.replace(target)
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror or error}") from error


def file_bytes(path: Union[str, os.PathLike[str]]) -> int:
    """Return the size of a file, with that of the `.data` file beside it, which holds an ONNX file's large weights."""
    return sum(part.stat().st_size for part in (Path(path), Path(f"{os.fspath(path)}.data")) if part.exists())
