"""Read state dicts from files and load them into a model, without unpickling arbitrary objects.

Wrappers (`state_dict`, `model`, `ema`, ...) and prefixes of keys (`module.`, `_orig_mod.`, `model.`) are removed.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery.core import explained, require_finite
from surgery.errors import InvalidInput

_AVERAGED = ("state_dict_ema", "model_ema", "ema")
_WRAPPERS = (*_AVERAGED, "state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_DEPTH = 4
_LISTED = 3
_REFUSED_OBJECT = re.compile(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state dict read from `path`; `notes` say which of several was used."""

    path: Path
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    def without_extra(self, wanted: Collection[str]) -> Checkpoint:
        """Return the checkpoint with only the tensors that a model has, under its names, and a note on the others."""
        tensors = without_prefixes(self.tensors, wanted)
        if not (extra := [name for name in tensors if name not in wanted]):
            return self
        note = f"ignored {len(extra)} tensors of {self.path.name} that the model does not have ({_some(extra)})"
        return Checkpoint(self.path, {name: tensors[name] for name in tensors.keys() - extra}, (*self.notes, note))


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Differences between a state dict and a model's; false if there are none."""

    missing: tuple[str, ...]  # keys of the model missing in the file
    unexpected: tuple[str, ...]  # keys of the file missing in the model
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # common key → the model's, the file's, if different

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def describe(self) -> str:
        """Return a description of the differences, up to three of each kind."""
        shapes = [f"{key}: expected {want}, found {found}" for key, (want, found) in self.shapes.items()]
        kinds = (
            (self.missing, "missing", ", "),
            (self.unexpected, "unexpected", ", "),
            (shapes, "of another shape", "; "),
        )
        return ", ".join(f"{len(x)} {what} ({_some(x, separator)})" for x, what, separator in kinds if x)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a safetensors file, or a `torch.save` file of tensors in plain containers; nothing else is unpickled.

    Wrappers are removed, averaged (EMA) weights preferred. Raises InvalidInput for a missing, damaged or other file.
    """
    if not path.is_file():
        raise InvalidInput(f"no checkpoint file {path}; --weights takes auto, random or the path of a state dict")
    with explained(f"cannot read {path}: truncated, or not a checkpoint"):
        data = load_file(path, device="cpu") if path.suffix == ".safetensors" else _read_pickle(path)
    wrappers = _unwrap(data)
    if wrappers is None:
        held = f"the keys {_some([str(k) for k in data])}" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise InvalidInput(f"{path} holds no state dict (found {held}); save one with torch.save(model.state_dict())")
    return Checkpoint(path, *wrappers)


def compare(module: nn.Module, tensors: Mapping[str, Tensor]) -> Mismatch:
    """Compare names and shapes; a missing `num_batches_tracked` is ignored."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    missing, unexpected = (
        tuple(key for key in one if key not in other and not key.endswith("num_batches_tracked"))
        for one, other in ((wanted, found), (found, wanted))
    )
    return Mismatch(missing, unexpected, {k: (wanted[k], v) for k, v in found.items() if wanted.get(k, v) != v})


def without_prefixes(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Strip up to three of `module.`, `model.`, `_orig_mod.` and a name of the file's own, if more match `wanted`."""
    best, names = dict(tensors), set(wanted)
    parts = [key.partition(".") for key in tensors]
    common = len({top for top, _, _ in parts}) == 1
    own = dict.fromkeys(f"{top}." for top, _, rest in parts if common or rest in names)  # a Lightning module's `net.`
    for prefixes in product(dict.fromkeys(("", *_PREFIXES, *own)), repeat=3):
        variant = {reduce(_strip, prefixes, key): value for key, value in tensors.items()}
        if len(variant.keys() & names) > len(best.keys() & names) and len(variant) == len(best):
            best = variant
    return best


def _strip(key: str, prefix: str) -> str:
    # `torch.compile` of a submodule leaves its prefix in the middle of the key.
    return key.replace(prefix, "") if prefix == "_orig_mod." else key.removeprefix(prefix)


def class_counts(mismatch: Mismatch) -> tuple[int, ...]:
    """Return the numbers of classes that could explain the differing shapes, the last layer's first."""
    counts = [found[0] for want, found in mismatch.shapes.values() if found and want and want[0] != found[0]]
    return tuple(dict.fromkeys(reversed(counts)))[:_LISTED]


def fit(module: nn.Module, checkpoint: Checkpoint, *, label: str) -> None:
    """Load a checkpoint into a module, in place; raises InvalidInput if it does not fit, or values are not finite."""
    tensors = without_prefixes(checkpoint.tensors, module.state_dict().keys())
    mismatch = compare(module, tensors)
    if mismatch:
        hint = "give the class count with --model-arg num_classes=N" if mismatch.shapes else "check the model's name"
        hint = hint if mismatch.shapes or mismatch.missing else "--ignore-extra leaves these tensors out"
        raise InvalidInput(f"checkpoint {checkpoint.path} does not fit {label}: {mismatch.describe()}; {hint}")
    validate_kinds(tensors, module.state_dict(), str(checkpoint.path))
    module.load_state_dict(tensors, strict=False)
    require_finite(module.state_dict(keep_vars=True), str(checkpoint.path))


def validate_kinds(tensors: Mapping[str, Tensor], wanted: Mapping[str, Any], origin: str) -> None:
    """Raise InvalidInput for tensors that loading would cast or fail at: sparse, quantised, complex, integer, meta."""
    for name, x in tensors.items():
        fits = x.is_floating_point() and x.dtype.itemsize > 1
        of_values = x.layout == torch.strided and not (x.is_quantized or x.is_meta)
        if not of_values or (getattr(wanted.get(name), "is_floating_point", lambda: False)() and not fits):
            kind = "meta" if x.is_meta else str(x.dtype if x.layout == torch.strided else x.layout).partition(".")[2]
            raise InvalidInput(
                f"{origin}: {name} is a tensor of kind {kind}, and the model's is not; give the state dict of the "
                "model in floating point"
            )


def _some(names: Collection[str], separator: str = ", ") -> str:
    return separator.join([*list(names)[:_LISTED], *(["..."] if len(names) > _LISTED else [])])


def _read_pickle(path: Path) -> Any:
    # Training scripts store their arguments and best score with the weights: plain data, safe to load.
    scalar = np.float64(0).__reduce__()[0]
    harmless: list[Any] = [argparse.Namespace, np.dtype]
    harmless += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    harmless += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)]
    try:
        # Warnings are about pickle protocols and TorchScript: real problems raise.
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        named = _REFUSED_OBJECT.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        what = (named[1] or named[2]) if named else "a TorchScript program" if "TorchScript" in str(error) else ""
        if not what:
            raise InvalidInput(f"cannot read {path}: truncated, or not a file written by torch.save") from error
        raise InvalidInput(
            f"{path} holds pickled objects ({what}), not only weights, and was not loaded; build the model as "
            "FILE.py:CALLABLE and give its weights as torch.save(model.state_dict(), ...)"
        ) from error


def _unwrap(data: Any, depth: int = _DEPTH) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """Find the state dict: (tensors, notes), or None if there is none within `depth` wrappers."""
    if not isinstance(data, Mapping) or depth == 0:
        return None
    present = [name for name in _WRAPPERS if isinstance(data.get(name), Mapping)]
    for name in present:
        inner = _unwrap(data[name], depth - 1)
        if inner is not None:
            note = f"the file holds {_some(present)}: the averaged weights '{name}' were taken"
            return inner[0], (*inner[1], *([note] if name in _AVERAGED and len(present) > 1 else []))
    tensors = {str(key): value.detach() for key, value in data.items() if isinstance(value, Tensor)}
    return (tensors, ()) if tensors else None
