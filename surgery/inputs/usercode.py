"""Models from the user's own code: `FILE.py:CALLABLE` and `package.module:CALLABLE`.

Any exception in that code is reported in one sentence with the user's source line.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from surgery.core import first_line, user_line
from surgery.errors import InvalidInput, SurgeryError
from surgery.inputs.compat import import_torchvision
from surgery.inputs.libraries import Built, Source


def user_source(owner: str, name: str) -> Source:
    """Describe a model from the user's callable, which this function imports (and `build` calls).

    Args:
        owner: `FILE.py` or `package.module`; imported with its folder, or the working directory, on `sys.path`.
        name: name of a callable (or module) in it that returns an `nn.Module` or (module, example inputs).
    """
    maker, folder = _found(owner, name)
    label = f"{owner}:{name}"

    def build(model_args: Mapping[str, Any]) -> Built:
        if isinstance(maker, nn.Module):
            return Built(maker)
        if not callable(maker):
            raise InvalidInput(f"{label} is a {type(maker).__name__}, not something that returns a module")
        with _on_path(folder):
            return _unpack(label, guarded(f"{label} failed", lambda: maker(**model_args)))

    stem = Path(owner).stem if owner.endswith(".py") else owner.rpartition(".")[2]
    return Source(
        name=folder_name(f"{stem}_{name}"),
        label=label,
        build=build,
        initial=f"of {label} (seed {{seed}})",
        accepts=lambda key: _takes(maker, key),
    )


def user_object(owner: str, name: str) -> Any:
    """Return an object of the user's file or module by name; a callable's errors are reported as in `guarded`.

    Raises:
        InvalidInput: there is no such name, or the import or the call fails.
    """
    maker, folder = _found(owner, name)
    if not callable(maker):
        return maker

    def call(*args: Any, **kwargs: Any) -> Any:
        with _on_path(folder):
            return guarded(f"{owner}:{name} failed", lambda: maker(*args, **kwargs))

    return call


def _found(owner: str, name: str) -> tuple[Any, Path]:
    """Return the object, and the folder that was on `sys.path`."""
    is_file = owner.endswith(".py")
    folder = Path(owner).expanduser().resolve().parent if is_file else Path.cwd()
    with _on_path(folder):
        module = guarded(f"cannot import {owner}", lambda: _import_file(owner) if is_file else _import_name(owner))
    maker: Any = module
    for part in name.split("."):
        if not hasattr(maker, part):
            names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            own = [key for key in names if getattr(vars(module)[key], "__module__", None) == module.__name__]
            raise InvalidInput(f"{owner} has no '{name}'; {near(name, names, own)}")
        maker = getattr(maker, part)
    return maker, folder


def _unpack(label: str, result: Any) -> Built:
    if isinstance(result, nn.Module):
        return Built(result)
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module):
        module, inputs = result
        if isinstance(inputs, Mapping):
            return Built(module, (), dict(inputs))
        return Built(module, inputs if isinstance(inputs, tuple) else (inputs,))
    raise InvalidInput(
        f"{label} returned {type(result).__name__}; it must return an nn.Module, or (module, example inputs)"
    )


def _takes(maker: Any, name: str) -> bool:
    try:
        return name in inspect.signature(maker).parameters
    except (TypeError, ValueError):  # no signature to read
        return False


def _import_file(file: str) -> ModuleType:
    """Import a file under a unique registered name, so that its classes pickle and its source can be inspected."""
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise InvalidInput(f"no such file: {file}")
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]
    name = f"surgery_user_{re.sub('[^0-9a-zA-Z_]', '_', path.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{file} cannot be imported as Python")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise InvalidInput(f"no module '{name}'; for a file give its path, FILE.py:CALLABLE") from error
        raise


def guarded(what: str, action: Callable[[], Any]) -> Any:
    """Run user code; raises InvalidInput for any exception, with the user's source line."""
    try:
        return action()
    except SurgeryError:
        raise
    except SyntaxError as error:
        raise InvalidInput(f"{what} at {error.filename}:{error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # user code may raise any exception
        if "torchvision::" in str(error):  # torchvision's operators do not load
            import_torchvision()
            return action()
        raise InvalidInput(f"{what}{user_line(error)}: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def near(name: str, names: Collection[str], otherwise: Collection[str] = ()) -> str:
    """Return a hint: names similar to `name`, else the first few of `otherwise`."""
    similar = difflib.get_close_matches(name, names, n=3)
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    return f"it defines {', '.join(list(otherwise)[:5])}" if otherwise else "nothing there has a similar name"


def top_level_names(path: Path) -> list[str]:
    """Return the functions and classes that a file defines, without running it; raises InvalidInput on failure."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InvalidInput(f"cannot read {path}: {first_line(error)}") from error
    return [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def folder_name(text: str) -> str:
    """Return `text` with characters unsuitable for folder names replaced by underscores."""
    return re.sub(r"[^\w.\-]+", "_", text).strip("._") or "model"
