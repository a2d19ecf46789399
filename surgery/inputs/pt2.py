"""Load `.pt2` exported programs without running untrusted code.

`torch.export.load` is not meant for untrusted files: it unpickles, opens compiled libraries, evaluates expressions as
Python, imports modules named in pytree specs, and inserts names into generated source. A program may also call any
registered operator, some of which read and write files. The archive is therefore inspected first, and rejected unless
it holds plain data and operators that only compute.
"""

from __future__ import annotations

import ast
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.export.pt2_archive import PT2ArchiveReader, constants, is_pt2_package

from surgery.core import explained, quiet
from surgery.errors import InvalidInput
from surgery.ops import rules

_NAME = re.compile(r"[\w.+\-]*")
"""Names, versions and dotted paths: nothing that could end a Python statement or call a function."""
_TREE = re.compile(r'(?:[\w\s.\-+/\[\]{},:$<>]|\\*")*')
"""A serialised tree of containers: JSON whose only escape is the quote."""
_FREE_TEXT = frozenset({"metadata", "as_string", "as_strings", "guards_code"})
"""Keys whose text is never executed: read as strings, or (guards) omitted from the module."""
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)")
_MODE = re.compile(
    "approximate|assert_msg|equation|indexing|interpolation|mode|norm|ord|padding|padding_side|reduce|rounding_mode|side|UPLO"
)
"""Arguments of operators whose text is a mode, not the name of a file."""
_ALSO = re.compile(
    "_assert_(scalar|tensor_metadata|async)|sym_constrain_range(_for_size)?|bernoulli|bincount|cummax|cummin|histc"
    "|fractional_max_pool[23]d|kthvalue|linalg_(qr|svdvals)|logcumsumexp|max|median|min|multinomial|nanmedian|randint"
    "|randint_like|randn_like|searchsorted|sort|unique_dim|view_as_(complex|real)"
)
"""Operators that compute or check, although they have neither a rule nor a decomposition."""
_SYMBOL_OPERATOR = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|truediv|mod|pow|and_|or_|lshift|rshift)"
    r"|math\.trunc|torch\.sym_(not|int|float|ite|max|min|sqrt)"
)
_SYMBOL_FUNCTION = re.compile(
    r"Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|Abs|And|Or|Not|Eq|Ne|Equality|Unequality"
    r"|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|Lt|Le|Gt|Ge|floor|ceiling|Piecewise|ExprCondPair"
    r"|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural"
    r"|FloatPow|FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt"
    r"|RoundDecimal|ToFloat|Identity"
)
_SYMBOL_SYNTAX = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.cmpop),
)


def load_program(path: Path, *, trust: bool = False) -> torch.export.ExportedProgram:
    """Read a file of `torch.export.save`; raises InvalidInput before anything runs that could, unless `trust`."""
    if not path.is_file():
        raise InvalidInput(f"no such file: {path}")
    if not trust:
        if not is_pt2_package(str(path)):
            raise InvalidInput(f"{path} is not an exported program, or is truncated; `torch.export.save` writes one")
        with explained(f"cannot read exported program {path}"):
            problem = _problem(path)
        if problem is not None:
            raise InvalidInput(
                f"{path} holds {problem}; nothing was loaded, since such files could run code. Pass --trust if you "
                "trust whoever made the file"
            )
    # Tracebacks of errors, which are raised as one exception here, would be logged.
    with explained(f"cannot load exported program {path}"), quiet():
        return torch.export.load(str(path))


def plain_module(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """Return the program as a graph module that supports `eval()`, copying and pickling, unlike `program.module()`."""
    unlifted = program.module(check_guards=False)
    return torch.fx.GraphModule(unlifted, unlifted.graph)


def _problem(path: Path) -> str | None:
    """Return what in the archive could run code, or None. Follows `load_pt2`, record by record."""
    with zipfile.ZipFile(path) as archive:
        if "version" in archive.namelist():
            return "the layout of torch 2.7, which is pickled"
    reader = PT2ArchiveReader(str(path))
    records = reader.get_file_names()
    prefix, suffix = constants.MODELS_FILENAME_FORMAT.split("{}")
    for record in records:
        if record.startswith(constants.AOTINDUCTOR_DIR):
            return f"a compiled library ({record})"
    for record in (r for r in records if r.startswith(constants.MODELS_DIR)):
        for payload, is_object in _pickled(reader, records, record[len(prefix) : -len(suffix)]):
            if is_object or not _is_plain_pickle(reader.read_bytes(payload)):
                return f"a pickled {'object' if is_object else 'payload'} ({payload})"
        found = _executable_text(json.loads(reader.read_string(record)))
        if found is not None and found.startswith("torch.ops."):
            return f"the operator {found[:80]} in {record}, which is not among those known to only compute"
        if found is not None:
            return f"text that is not plain data ({found[:80]!r} in {record})"
    return None


def _pickled(reader: PT2ArchiveReader, records: list[str], model: str) -> Iterator[tuple[str, bool]]:
    """Yield every record that the loader would unpickle for one model, and whether it is an object, not tensors."""
    yield constants.SAMPLE_INPUTS_FILENAME_FORMAT.format(model), False
    c = constants
    folders = (
        (c.WEIGHTS_DIR, c.WEIGHTS_CONFIG_FILENAME_FORMAT, ""),
        (c.CONSTANTS_DIR, c.CONSTANTS_CONFIG_FILENAME_FORMAT, c.TENSOR_CONSTANT_FILENAME_PREFIX),
    )
    for folder, config_format, tensor_prefix in folders:
        old = f"{folder}{model}.pt"
        if old in records:
            yield old, False
            continue
        for meta in json.loads(reader.read_string(config_format.format(model)))["config"].values():
            name = str(meta["path_name"])
            is_object = not name.startswith(tensor_prefix)
            if is_object or meta["use_pickle"]:
                yield folder + name, is_object


def _is_plain_pickle(data: bytes) -> bool:
    """Return whether the safe unpickler reads it; then the loader's unsafe one does not call anything either."""
    try:
        with warnings.catch_warnings(action="ignore"):
            if data:
                torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return True
    except Exception:  # any exception counts as a rejection
        return False


def _executable_text(value: Any, key: str = "") -> str | None:
    """Return the first string in a program's JSON that the loader could execute, or None."""
    if key in _FREE_TEXT and _is_flat_text(value):
        return None
    if isinstance(value, str):
        return None if _is_plain_text(value, key) else value
    if isinstance(value, dict):
        parts = [(name, "<name>") for name in value] + [(item, name) for name, item in value.items()]
    else:
        parts = [(item, key) for item in value] if isinstance(value, list) else []
    return next((found for part, name in parts if (found := _executable_text(part, name)) is not None), None)


def _is_flat_text(value: Any) -> bool:
    """Return whether a value is flat text: a graph value may have the name of a free-text key."""
    if isinstance(value, dict):
        return not {"name", "target", "expr_str"} & value.keys() and all(isinstance(v, str) for v in value.values())
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_plain_text(text: str, key: str) -> bool:
    if key == "expr_str":
        return _is_arithmetic(text)
    if key in ("in_spec", "out_spec"):
        # Loading an enum or a default factory of a pytree spec imports the module it names.
        return _TREE.fullmatch(text) is not None and "__enum__" not in text and "default_factory" not in text
    if key == "target" and text.startswith(("torch", "_operator", "math")):
        return _is_operator(text)
    return _NAME.fullmatch(text) is not None


def _is_operator(path: str) -> bool:
    """Return whether the path names arithmetic on symbols, or an ATen operator known to compute and do nothing else.

    Known are those with a rule or one of torch's decompositions, core operators, and the in-place forms of all of them.
    """
    match = _OPERATOR.fullmatch(path)
    if match is None:
        return _SYMBOL_OPERATOR.fullmatch(path) is not None
    namespace, name, overload = match.groups()
    packets = (getattr(torch.ops.aten, form, None) for form in (name, name.removesuffix("_")))
    found = (getattr(packet, overload, None) for packet in packets)
    forms = [op for op in found if isinstance(op, torch._ops.OpOverload)]
    known = (
        str(op) in rules() or op in decomposition_table or torch.Tag.core in op.tags or op._can_decompose()
        for op in forms
    )  # fmt: skip
    if namespace != "aten" or not (_ALSO.fullmatch(name) or any(known)):
        return False
    texts = [a.name for op in forms for a in op._schema.arguments if "str" in str(a.type)]
    return all(_MODE.fullmatch(text) for text in texts)


def _is_arithmetic(text: str) -> bool:
    """Return whether a symbolic expression, which sympy evaluates as Python, is arithmetic on symbols only."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return (
        all(isinstance(node, _SYMBOL_SYNTAX) for node in nodes)
        and all(isinstance(function, ast.Name) and _SYMBOL_FUNCTION.fullmatch(function.id) for function in called)
        and all(_NAME.fullmatch(text) for text in texts)
    )
