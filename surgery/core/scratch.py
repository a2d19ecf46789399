"""Folders for unfinished files. A process locks its own, so that remains of killed ones are known, and removed."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".surgery.lock"


@contextmanager
def locked_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder, which is removed at the end; raises OSError if it cannot be made."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
        lock = FileLock(folder / LOCK)
        with suppress(OSError, NotImplementedError):  # a file system without locks
            lock.acquire()
        if folder.exists():
            break  # else another process removed it before it was locked
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path, prefix: str, rescue: Callable[[Path], None] = lambda folder: None) -> None:
    """Remove folders of `locked_folder` whose processes have ended, after a call of `rescue` with each."""
    for folder in sorted(path for path in parent.iterdir() if path.name.startswith(prefix)):
        with suppress(OSError, NotImplementedError, Timeout):
            if not (_is_own(folder) and (folder / LOCK).is_file()):
                continue
            with FileLock(folder / LOCK, timeout=0):
                rescue(folder)
                shutil.rmtree(folder, ignore_errors=True)
            if os.name == "nt":  # where a file cannot be removed as long as it is open
                shutil.rmtree(folder, ignore_errors=True)


def _is_own(folder: Path) -> bool:
    """Return whether it is no link, and belongs to this user: others may write into the parent."""
    return not folder.is_symlink() and (os.name == "nt" or folder.stat().st_uid == os.getuid())


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a temporary folder; those of killed processes are removed first."""
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent, "surgery-")
    with locked_folder(parent, "surgery-") as folder:
        yield folder
