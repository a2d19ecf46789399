"""Results that take minutes, kept in the user's cache folder from run to run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from surgery.core.files import replacing
from surgery.errors import InvalidInput

VARIABLE = "SURGERY_CACHE"
MOST = 200  # results of a kind; the oldest are removed


def cache_folder() -> Path:
    """Return the folder of latency tables and other results: that of the environment variable, else the user's own."""
    return Path(os.environ.get(VARIABLE) or platformdirs.user_cache_dir("model-surgery", appauthor=False))


def remembered(kind: str, depends_on: object, compute: Callable[[], Any]) -> Any:
    """Return a dictionary of JSON values computed earlier by the same code from the same JSON values.

    It is computed, and kept if the folder can be written, where there is none.
    """
    digest = hashlib.sha256(f"{_code()} {json.dumps(depends_on)}".encode()).hexdigest()
    path = cache_folder() / f"{kind}-{digest[:32]}.json"
    with suppress(OSError, ValueError, RecursionError):
        if isinstance(known := json.loads(path.read_text("utf-8")), dict):
            return known
    found = compute()
    with suppress(OSError, InvalidInput):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write_text(json.dumps(found), "utf-8")
        for old in sorted(path.parent.glob(f"{kind}-*.json"), key=os.path.getmtime)[:-MOST]:
            old.unlink()
    return found


@cache
def _code() -> str:
    """The digest of this package's source, since another version may compute something else."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
