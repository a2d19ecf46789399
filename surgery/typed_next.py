"""Commands that a report tells the user to type next."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.config import Recipe

if TYPE_CHECKING:
    from surgery.inputs import LoadedModel


def evaluate(out: Path, loaded: LoadedModel, recipe: Recipe) -> str:
    """Return the command that leaves `dense` and `compact` at a Python prompt, to be evaluated or trained."""
    asked = recipe.model
    weights = "random" if loaded.weights.startswith("random") else asked.weights
    known: dict[str, object] = {
        "weights": weights,
        "input_shape": asked.input_shape,
        "model_args": dict(asked.model_arg),
        "seed": recipe.selection.seed,
        "trust": asked.trust,
    }
    arguments = [repr(asked.model), *(f"{key}={value!r}" for key, value in known.items() if value)]
    code = (
        f"import surgery; dense = surgery.load_model({', '.join(arguments)}).module; "
        f"compact = surgery.load({str(out)!r}, dense)"
    )
    # Double quotes inside, so that the shell's single ones need no escaping; names with quotes keep Python's choice.
    code = code if '"' in code or "\\" in code else code.replace("'", '"')
    return f"{_python()} -i -c {shlex.quote(code)}"


def again(arguments: Sequence[str]) -> str:
    """Return the command line of this run."""
    return f"{_python()} -m surgery.cli {shlex.join(arguments)}"


def shrink(arguments: Sequence[str]) -> str:
    """Return the command line of `show` as one of `shrink`."""
    return f"{_python()} -m surgery.cli shrink {shlex.join(arguments[1:])}"


def _python() -> str:
    """Return how the running interpreter is called from here: by name where that finds it, else by path."""
    here, found = Path(sys.executable), shutil.which("python")
    if found and Path(found).parent == here.parent:
        return "python"
    return shlex.quote(str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here))


def folder_name(name: str) -> str:
    """Return a name that is a plain folder name on every system."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"
