"""Describe exceptions raised in foreign code: the first line of the message, and the user's own line of code."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from surgery.errors import InvalidInput, SurgeryError

UNKNOWN = "an unknown line"

_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_PACKAGES = filter(None, map(find_spec, ("surgery", "exporters", "torch", "onnx", "onnx_ir", "onnxscript")))
_FOREIGN = (*(f"{Path(spec.origin).parent}{os.sep}" for spec in _PACKAGES if spec.origin), "<", "importlib")
_MENTIONED = re.compile(r'File "([^"]+\.py)", line (\d+)|(/[^\s"()]+\.py)[:(](\d+)')


def foreign(file: str) -> bool:
    """Return whether a source file belongs to torch, an exporter, Python or this package, or is generated."""
    return file.startswith(_FOREIGN) or (file.startswith(_STDLIB) and "site-packages" not in file)


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's message, or its class name if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(" .:")[:300] if lines else type(error).__name__


def visible(text: str) -> str:
    r"""Return the text on one line, control characters written out as escapes such as ``\x1b``."""
    shown = (c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


@contextmanager
def explained(what: str, kind: type[SurgeryError] = InvalidInput) -> Iterator[None]:
    """Re-raise a library's exception as one of ours: what failed, and the first line of the library's message."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # ONNX, ONNX Runtime and the converters have no common base class for their exceptions
        raise kind(f"{what}: {first_line(error)}") from error


def last_own_line(text: str) -> str:
    """Return `file:line` of the user's last frame in the text of a traceback, or an empty string."""
    found = [(a or c, b or d) for a, b, c, d in _MENTIONED.findall(text)]
    own = [f"{file}:{line}" for file, line in found if not foreign(file)]
    return own[-1] if own else ""


def where_raised(error: BaseException) -> str:
    """Return `file:line` of the innermost frame in the user's code, of the error or of its cause."""
    seen: BaseException | None = error
    while seen is not None:
        frames = [f for f in traceback.extract_tb(seen.__traceback__) if not foreign(f.filename)]
        found = last_own_line(str(seen)) or (f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "")
        if found:
            return found
        seen = seen.__cause__ or seen.__context__
    return UNKNOWN


def user_line(error: BaseException) -> str:
    """Return ` at file:line` of the innermost frame in the user's code, or an empty string."""
    found = where_raised(error)
    return "" if found == UNKNOWN else f" at {found}"
