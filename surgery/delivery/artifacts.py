"""The output folder, replaced as a whole, so that it never mixes old and new files.

A run writes into a hidden sibling folder, ``.NAME.partial-XXXX``, which replaces ``NAME`` in one step at the end. If
the run ends before that (a failed check, Ctrl-C, SIGTERM, a power cut), the previous set is unchanged. A run locks its
sibling folder, so that the next run can distinguish remains of killed runs, which it removes, from running ones.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporters.formats import FORMATS
from surgery.errors import InvalidInput
from surgery.report import REPORT_FILES

DENSE_ONNX = "dense.onnx"
COMPACT_ONNX = "compact.onnx"
COMPACT_PT2 = "compact.pt2"
COMPACT_WEIGHTS = "compact.safetensors"
PLAN = "plan.json"
RECIPE = "recipe.toml"
NAMES = (DENSE_ONNX, COMPACT_ONNX, COMPACT_PT2, COMPACT_WEIGHTS, PLAN, RECIPE, *REPORT_FILES[:3])
"""Files of a complete set; models above 2 GB have an additional ``.data`` file."""

FEWER_BITS = tuple(f"{name}.{precision}.onnx" for name in ("dense", "compact") for precision in ("fp16", "int8"))
"""Files written on request."""
_OURS = {*NAMES, *FEWER_BITS, *REPORT_FILES, f"{DENSE_ONNX}.data", f"{COMPACT_ONNX}.data"}
_USERS_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EBUSY}
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def prepare(out: str | Path) -> Path:
    """Return the absolute output folder, after an early check that it can be written.

    Remains of killed runs are removed, and a set that one of them had moved aside is restored.

    Args:
        out: the output folder; it and its parents need not exist.

    Raises:
        InvalidInput: it cannot be written, or contains files that replacing the folder would remove.
    """
    try:
        target = Path(out).expanduser().resolve()
        target.exists()  # raised if the name is too long or contains NUL
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"--out {out!r}: no name for a folder ({error}); name another") from error
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir():
        raise InvalidInput(f"--out {target}: {above} is a file, not a folder; name a folder elsewhere")
    _refuse_unsafe(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _tidy(target)
        _new_folder(target).rmdir()
    except OSError as error:
        raise InvalidInput(_cannot_write(target, error)) from error
    return target


@contextmanager
def output_set(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder, which replaces `out` if the block succeeds.

    Args:
        out: the final folder; an earlier set is unchanged until the swap, and then removed.

    Yields:
        The folder to write into, on the same file system as `out`.

    Raises:
        InvalidInput: it cannot be written (no permission, no space), or contains other files.
    """
    target = prepare(out)
    try:
        partial = _new_folder(target)
    except OSError as error:
        raise InvalidInput(_cannot_write(target, error)) from error
    lock = _lock(partial)
    try:
        yield partial
        _swap(partial, target)
    except OSError as error:
        if error.errno in _USERS_FAULT and _inside(error.filename, target.parent):
            raise InvalidInput(_cannot_write(target, error)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unlock(lock)


def _refuse_unsafe(target: Path) -> None:
    """Raise InvalidInput if replacing the folder would remove the user's files."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InvalidInput(f"--out {target}: is a file, not a folder; name a folder")
    if target == Path.cwd() or os.path.ismount(target):
        raise InvalidInput(f"--out {target}: cannot be replaced as a whole here; name a folder inside it")
    if not os.access(target, os.W_OK | os.X_OK):
        raise InvalidInput(f"--out {target}: cannot be written; change its permissions or name another folder")
    foreign = sorted(entry.name for entry in target.iterdir() if not _is_ours(entry.name))
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InvalidInput(
            f"--out {target}: holds {shown}, which replacing the folder would remove; move them or name another folder"
        )


def _is_ours(name: str) -> bool:
    """Return whether a file belongs to a set, including compact files in other formats."""
    others = {f"compact{bits}{form.suffix}" for form in FORMATS.values() for bits in ("", ".fp16", ".int8")}
    return name in _OURS or name in others


def _tidy(target: Path) -> None:
    """Restore a set that a killed run had moved aside, and remove folders of dead runs."""
    for aside in sorted(target.parent.glob(f"{_prefix(target, 'previous')}*")):
        if not target.exists() and _abandoned(aside):
            aside.rename(target)
    for kind in ("partial", "previous"):
        for folder in target.parent.glob(f"{_prefix(target, kind)}*"):
            if _abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _swap(partial: Path, target: Path) -> None:
    """Replace `target` by `partial`, which afterwards is gone or contains the previous set."""
    if not target.exists():
        partial.rename(target)
        return
    if _exchange(partial, target):
        return
    aside = target.parent / (_prefix(target, "previous") + partial.name.rsplit("-", 1)[-1])
    target.rename(aside)
    try:
        partial.rename(target)
    except BaseException:
        # Ctrl-C between the two steps must not lose both sets.
        if not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders atomically; returns False if not supported (not Linux, NFS)."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    result = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE))
    return bool(result == 0)


def _lock(folder: Path) -> int | None:
    """Lock the folder for this run until `_unlock` or the end of the process; None if locks are unsupported."""
    try:
        import fcntl
    except ImportError:  # Windows: remains are never removed, which is safe.
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # A file system without locks.
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _abandoned(folder: Path) -> bool:
    """Return whether no running process has locked the folder."""
    try:
        handle = _lock(folder)
    except OSError:
        return False
    _unlock(handle)
    return handle is not None


def _prefix(target: Path, kind: str) -> str:
    return f".{target.name}.{kind}-"


def _new_folder(target: Path) -> Path:
    folder = target.parent / f"{_prefix(target, 'partial')}{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def _inside(filename: object, folder: Path) -> bool:
    return filename is None or (isinstance(filename, str | os.PathLike) and Path(filename).is_relative_to(folder))


def _cannot_write(target: Path, error: OSError) -> str:
    return f"--out {target}: cannot be written ({error.strerror or error}); name a folder that can, with room to spare"
