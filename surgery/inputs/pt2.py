"""Load `.pt2` exported programs without running untrusted code.

`torch.export.load` is not meant for untrusted files: it unpickles some payloads directly and others if the safe
unpickler rejects them, opens compiled libraries, evaluates symbolic expressions as Python, imports modules named in
pytree specs, and inserts names into generated source. `load_program` therefore inspects the archive first, and rejects
it unless it contains plain data only: payloads that `torch.load(weights_only=True)` reads, registered operators,
arithmetic on symbols, and valid names.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import PT2ArchiveReader, constants, is_pt2_package

from surgery.core import first_line
from surgery.errors import InvalidInput

_NAME = re.compile(r"[\w.+\-]*")
"""Names, versions and dotted paths: nothing that could end a Python statement or call a function."""
_TREE = re.compile(r'(?:[\w\s.\-+/\[\]{},:$<>]|\\*")*')
"""A serialised tree of containers: JSON whose only escape is the quote."""
_FREE_TEXT = frozenset({"metadata", "as_string", "as_strings", "guards_code"})
"""Keys whose text is never executed: read as strings, or (guards) omitted from the module."""
_TREES = frozenset({"in_spec", "out_spec"})
_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?")
_SYMBOL_OPERATOR = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|truediv|mod|pow|and_|or_|lshift|rshift)"
    r"|math\.trunc|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)
# fmt: off
_SYMBOL_FUNCTIONS = frozenset({
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "And", "Or", "Not",
    "Eq", "Ne", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "Lt",
    "Le", "Gt", "Ge", "floor", "ceiling", "Piecewise", "ExprCondPair", "FloorDiv", "ModularIndexing", "Where",
    "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow",
    "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity",
})
# fmt: on
_SYMBOL_SYNTAX = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.cmpop),
)


def load_program(path: Path, *, trust: bool = False) -> torch.export.ExportedProgram:
    """Read a file written by `torch.export.save`; with `trust`, without the inspection.

    Raises:
        InvalidInput: the file is missing, damaged, of another kind, or, without `trust`, could run code on loading;
        nothing has been executed then.
    """
    if not path.is_file():
        raise InvalidInput(f"no such file: {path}")
    if not is_pt2_package(str(path)) and not trust:
        raise InvalidInput(f"{path} is not an exported program, or is truncated; `torch.export.save` writes one")
    if not trust:
        _inspect(path)
    with _quiet_loader():
        try:
            return torch.export.load(str(path))
        except Exception as error:  # the loader may raise any exception on damaged files
            raise InvalidInput(f"cannot load exported program {path}: {first_line(error)}") from error


def plain_module(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """Return the program as a graph module that supports `eval()`, copying and pickling, unlike `program.module()`."""
    unlifted = program.module(check_guards=False)
    return torch.fx.GraphModule(unlifted, unlifted.graph)


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """Keep the loader's tracebacks out of the log; errors are raised as one exception."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _inspect(path: Path) -> None:
    """Raise InvalidInput if loading the archive could run code that it contains."""
    try:
        with zipfile.ZipFile(path) as archive:
            old_layout = "version" in archive.namelist()
        reader = PT2ArchiveReader(str(path))
        records = reader.get_file_names()
        problem = "the layout of torch 2.7, which is pickled" if old_layout else _problem(reader, records)
    except (RuntimeError, AssertionError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InvalidInput(f"cannot read exported program {path}: {first_line(error)}") from error
    if problem is not None:
        raise InvalidInput(
            f"{path} holds {problem}, which could run code on loading; nothing was loaded. "
            "Pass --trust if you trust whoever made the file"
        )


def _problem(reader: PT2ArchiveReader, records: list[str]) -> str | None:
    """Return what in the archive could run code, or None. Follows `load_pt2`, record by record."""
    for record in records:
        if record.startswith(constants.AOTINDUCTOR_DIR):
            return f"a compiled library ({record})"
    prefix, suffix = constants.MODELS_FILENAME_FORMAT.split("{}")
    for record in (r for r in records if r.startswith(constants.MODELS_DIR)):
        model = record[len(prefix) : -len(suffix)]
        for payload, kind in _pickled(reader, records, model):
            if kind != "tensors":
                return f"a pickled {kind} ({payload})"
            if not _is_plain_pickle(reader.read_bytes(payload)):
                return f"a pickled payload ({payload})"
        found = _executable_text(json.loads(reader.read_string(record)))
        if found is not None:
            return f"text that is not plain data ({found[:80]!r} in {record})"
    return None


def _pickled(reader: PT2ArchiveReader, records: list[str], model: str) -> Iterator[tuple[str, str]]:
    """Yield (record, kind) of every payload that the loader would unpickle for one model."""
    yield constants.SAMPLE_INPUTS_FILENAME_FORMAT.format(model), "tensors"
    folders = {
        constants.WEIGHTS_DIR: constants.WEIGHTS_CONFIG_FILENAME_FORMAT,
        constants.CONSTANTS_DIR: constants.CONSTANTS_CONFIG_FILENAME_FORMAT,
    }
    for folder, config_format in folders.items():
        old = f"{folder}{model}.pt"
        if old in records:
            yield old, "tensors"
            continue
        for meta in json.loads(reader.read_string(config_format.format(model)))["config"].values():
            name = str(meta["path_name"])
            special = folder == constants.CONSTANTS_DIR and not name.startswith(
                constants.TENSOR_CONSTANT_FILENAME_PREFIX
            )
            if special:
                yield folder + name, "object"
            elif meta["use_pickle"]:
                yield folder + name, "tensors"


def _is_plain_pickle(data: bytes) -> bool:
    """Return whether the safe unpickler reads it; then the loader's unsafe one does not call anything either."""
    if not data:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # any exception counts as a rejection
        return False
    return True


def _executable_text(value: Any, key: str = "") -> str | None:
    """Return the first string in a program's JSON that the loader could execute, or None."""
    if key in _FREE_TEXT and _is_flat_text(value):
        return None
    if isinstance(value, dict):
        parts = [(name, "<name>") for name in value] + [(item, name) for name, item in value.items()]
    elif isinstance(value, list):
        parts = [(item, key) for item in value]
    else:
        return value if isinstance(value, str) and not _is_plain_text(value, key) else None
    return next((found for part, name in parts if (found := _executable_text(part, name)) is not None), None)


def _is_flat_text(value: Any) -> bool:
    """Return whether a value is flat text: a graph value may have the name of a free-text key."""
    if isinstance(value, dict):
        return not {"name", "target", "expr_str"} & value.keys() and all(isinstance(v, str) for v in value.values())
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_plain_text(text: str, key: str) -> bool:
    if key == "expr_str":
        return _is_arithmetic(text)
    if key in _TREES:
        # Loading an enum or a default factory of a pytree spec imports the module it names.
        return _TREE.fullmatch(text) is not None and "__enum__" not in text and "default_factory" not in text
    if key == "target" and text.startswith(("torch", "_operator", "math")):
        return _is_operator(text)
    return _NAME.fullmatch(text) is not None


def _is_operator(path: str) -> bool:
    """Return whether the path names a registered operator, not just any Python callable reachable from torch."""
    if _SYMBOL_OPERATOR.fullmatch(path):
        return True
    if not _OPERATOR.fullmatch(path):
        return False
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name, None)
    return found is None or isinstance(found, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))


def _is_arithmetic(text: str) -> bool:
    """Return whether a symbolic expression, which sympy evaluates as Python, is arithmetic on symbols only."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _SYMBOL_SYNTAX):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _SYMBOL_FUNCTIONS):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not _NAME.fullmatch(node.value):
            return False
    return True
