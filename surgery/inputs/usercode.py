"""Models from the user's own code: `FILE.py:CALLABLE` and `package.module:CALLABLE`.

Any exception in that code is reported in one sentence with the user's source line.
"""

from __future__ import annotations

import difflib
import functools
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
from surgery.inputs.libraries import Built, Source, import_torchvision


def user_source(owner: str, name: str) -> Source:
    """Describe the model that a callable of `FILE.py` or `package.module` returns, alone or with example inputs."""
    maker, label = user_object(owner, name), f"{owner}:{name}"
    given = getattr(maker, "__wrapped__", maker)

    def build(model_args: Mapping[str, Any]) -> Built:
        if isinstance(given, nn.Module):
            return Built(given)
        if not callable(maker):
            raise InvalidInput(f"{label} is a {type(maker).__name__}, not something that returns a module")
        return _unpack(label, maker(**model_args))

    def accepts(key: str) -> bool:
        try:
            return key in inspect.signature(given).parameters
        except (TypeError, ValueError):  # no signature to read
            return False

    stem = Path(owner).stem if owner.endswith(".py") else owner.rpartition(".")[2]
    initial = f"of {label} (seed {{seed}})"
    return Source(
        name=folder_name(f"{stem}_{name}"),
        label=label,
        build=build,
        initial=initial,
        accepts=accepts,
        initial_notes=(f"weights are those that {label} returns, which are random unless it loads some (--weights)",),
        shape_notes=(f"{label} returns no example inputs: they are 1 x 3 x 224 x 224 (--input-shape)",),
    )


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


def user_object(owner: str, name: str) -> Any:
    """Return an object of the user's file or module, with its folder on `sys.path`; InvalidInput if that fails."""
    is_file = owner.endswith(".py")
    folder = Path(owner).expanduser().resolve().parent if is_file else Path.cwd()
    load = _import_file if is_file else importlib.import_module
    with _on_path(folder):
        module = guarded(f"cannot import {owner}", lambda: load(owner))
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            own = [key for key in names if getattr(vars(module)[key], "__module__", None) == module.__name__]
            raise InvalidInput(f"{owner} has no '{name}'; {near(name, names, own)}")
        found = getattr(found, part)
    if not callable(found):
        return found

    @functools.wraps(found)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _on_path(folder):
            return guarded(f"{owner}:{name} failed", lambda: found(*args, **kwargs))

    return call


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
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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
    return f"it defines {', '.join(list(otherwise)[:5])}" if otherwise else "no similar name exists"


def folder_name(text: str) -> str:
    """Return `text` with characters unsuitable for folder names replaced by underscores."""
    return re.sub(r"[^\w.\-]+", "_", text).strip("._") or "model"
