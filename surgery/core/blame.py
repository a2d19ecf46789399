"""What to say of an exception that somebody else's code raised: its first line, and the user's own line of code."""

from __future__ import annotations

import importlib.util
import os
import re
import traceback
from pathlib import Path

UNKNOWN = "an unknown line"


def _foreign() -> tuple[str, ...]:
    """Beginnings of file names that say nothing to the user: torch's, our own, and generated code."""
    torch = importlib.util.find_spec("torch")
    folders = [Path(__file__).parent, *([Path(torch.origin).parent] if torch and torch.origin else [])]
    return (*(f"{folder}{os.sep}" for folder in folders), "<", "importlib")


_FOREIGN = _foreign()
_MENTIONED = re.compile(r'File "([^"]+)", line (\d+)')


def foreign(file: str) -> bool:
    """Whether a file of code says nothing to the user: it is torch's, our own, or generated."""
    return file.startswith(_FOREIGN)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message that says something, or its class name where there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(" .:")[:300] if lines else type(error).__name__


def last_own_line(text: str) -> str:
    """Return `file:line` of the last frame of the user's own that a traceback's text mentions, or an empty string."""
    own = [f"{file}:{line}" for file, line in _MENTIONED.findall(text) if not foreign(file)]
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
