"""Files that take an older one's place only when they are whole. Part of a pack, where Python may be 3.8."""

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
    """Yield a path to write to; the file there, and its `.data` file, replace those at `path` when the block succeeds.

    The path has the same name in a temporary folder beside `path`: on the same file system, so that the move is atomic.

    Raises:
        InvalidInput: nothing can be written at `path`; before the block, if that shows then.
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
