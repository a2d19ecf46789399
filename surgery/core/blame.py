"""What to say of an exception that somebody else's code raised: its first line, and the user's own line of code."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import InvalidInput, SurgeryError

UNKNOWN = "an unknown line"


_OURS = Path(__file__).parents[1]
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep


def _foreign() -> tuple[str, ...]:
    """Beginnings of names of files that are not the user's: torch's, those of exporters, our own, generated code."""
    specs = (importlib.util.find_spec(name) for name in ("torch", "onnx", "onnx_ir", "onnxscript"))
    folders = [_OURS, _OURS.with_name("exporters"), *(Path(s.origin).parent for s in specs if s and s.origin)]
    return (*(f"{folder}{os.sep}" for folder in folders), "<", "importlib")


_FOREIGN = _foreign()
_MENTIONED = re.compile(r'File "([^"]+\.py)", line (\d+)|(/[^\s"()]+\.py)[:(](\d+)')


def foreign(file: str) -> bool:
    """Whether a file of code is not the user's: of torch, of an exporter, of Python, our own, or generated."""
    return file.startswith(_FOREIGN) or (file.startswith(_STDLIB) and "site-packages" not in file)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message that says something, or its class name where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(" .:")[:300] if lines else type(error).__name__


@contextmanager
def explained(what: str, kind: type[SurgeryError] = InvalidInput) -> Iterator[None]:
    """Raise what a library raises within the block as an error of ours: what failed, and the library's first line."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # those of ONNX, of its runtime and of converters have no base of their own
        raise kind(f"{what}: {first_line(error)}") from error


def last_own_line(text: str) -> str:
    """Return `file:line` of the last frame of the user's own that a traceback's text mentions, or an empty string."""
    found = [(a or c, b or d) for a, b, c, d in _MENTIONED.findall(text)]
    own = [f"{file}:{line}" for file, line in found if not foreign(file)]
    return own[-1] if own else ""


def where_raised(error: BaseException) -> str:
    """Return `file:line` of the innermost frame that is the user's own, of the error or of what led to it."""
    seen: BaseException | None = error
    while seen is not None:
        frames = [f for f in traceback.extract_tb(seen.__traceback__) if not foreign(f.filename)]
        found = last_own_line(str(seen)) or (f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "")
        if found:
            return found
        seen = seen.__cause__ or seen.__context__
    return UNKNOWN


def user_line(error: BaseException) -> str:
    """Return ` at file:line` of the innermost frame that is the user's own, or an empty string."""
    found = where_raised(error)
    return "" if found == UNKNOWN else f" at {found}"
