"""The output folder, replaced as a whole, so that it never mixes old and new files.

A run writes into a folder in a hidden sibling, ``.NAME.partial-XXXX``, which replaces ``NAME`` at the end. If the run
ends before that (a failed check, Ctrl-C, SIGTERM, a power cut), the previous set is unchanged. A run locks its sibling
folder, so that the next run can distinguish remains of killed runs, which it removes, from running ones.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

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
_USERS_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EBUSY}
_LOCK, _PREVIOUS = ".lock", ".previous"


def prepare(out: str | Path) -> Path:
    """Return the absolute output folder, after an early check that it can be written.

    It and its parents need not exist. Remains of killed runs are removed, and a set that one of them had moved aside is
    restored.

    Raises:
        InvalidInput: it cannot be written, or contains files that replacing the folder would remove.
    """
    try:
        target = Path(out).expanduser().resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_unsafe(target)
        for folder in sorted(target.parent.glob(f".{target.name}.partial-*")):
            if _abandoned(folder):
                if (folder / _PREVIOUS).exists() and not target.exists():
                    (folder / _PREVIOUS).rename(target)
                shutil.rmtree(folder, ignore_errors=True)
        _new_folder(target).rmdir()
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(_cannot_write(out, error)) from error
    return target


@contextmanager
def output_set(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder on the same file system, which replaces `out` if the block succeeds.

    Raises:
        InvalidInput: it cannot be written (no permission, no space), or contains other files.
    """
    target = prepare(out)
    partial = _new_folder(target)
    lock = FileLock(partial / _LOCK)
    with suppress(OSError, NotImplementedError):  # a file system without locks
        lock.acquire()
    try:
        made = partial / target.name
        made.mkdir()
        yield made
        _replace(target, made, partial / _PREVIOUS)
    except OSError as error:
        if error.errno in _USERS_FAULT:
            raise InvalidInput(_cannot_write(target, error)) from error
        raise
    finally:
        lock.release()
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_unsafe(target: Path) -> None:
    """Raise InvalidInput if replacing the folder would remove the user's files."""
    if not target.exists():
        return
    if not target.is_dir():
        raise InvalidInput(f"--out {target}: is a file, not a folder; name a folder")
    if target == Path.cwd() or os.path.ismount(target):
        raise InvalidInput(f"--out {target}: cannot be replaced as a whole here; name a folder inside it")
    converted = {f"compact{bits}{form.suffix}" for form in FORMATS.values() for bits in ("", ".fp16", ".int8")}
    foreign = sorted({entry.name for entry in target.iterdir()} - _OURS - converted)
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InvalidInput(
            f"--out {target}: holds {shown}, which replacing the folder would remove; move them or name another folder"
        )


def _replace(target: Path, made: Path, aside: Path) -> None:
    """Move `made` to `target`, and what is there to `aside`."""
    if target.exists():
        target.rename(aside)
    try:
        made.rename(target)
    finally:
        if aside.exists() and not target.exists():  # Ctrl-C between the two steps must not lose both sets
            aside.rename(target)


def _abandoned(folder: Path) -> bool:
    """Return whether no running process has locked the folder."""
    try:
        with FileLock(folder / _LOCK, timeout=0):
            return True
    except (OSError, NotImplementedError, Timeout):
        return False


def _new_folder(target: Path) -> Path:
    folder = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def _cannot_write(target: str | Path, error: Exception) -> str:
    why = getattr(error, "strerror", None) or error
    above = [folder for folder in Path(target).absolute().parents if folder.is_file()]
    why = f"{above[0]} is a file" if above else why
    return f"--out {target}: cannot be written ({why}); name a folder that can, with room to spare"
