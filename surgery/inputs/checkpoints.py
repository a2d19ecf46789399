"""Read state dicts from files and load them into a model, without unpickling arbitrary objects.

A checkpoint is often a state dict inside a wrapper (`state_dict`, `model`, `ema`, ...), whose keys have a prefix
(`module.` of data parallel, `_orig_mod.` of `torch.compile`, `model.` of training frameworks). Both are removed here;
mismatches are reported in one sentence.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery.errors import InvalidInput

_AVERAGED = ("state_dict_ema", "model_ema", "ema")
_WRAPPERS = (*_AVERAGED, "state_dict", "model_state_dict", "model", "module")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_STATISTICS = ("running_mean", "running_var")
_DEPTH = 4
_LISTED = 3
_REFUSED_OBJECT = re.compile(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state dict read from `path`; `notes` say which of several was used."""

    path: Path
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Differences between a state dict and a model's; false if there are none.

    Attributes:
        missing: keys of the model missing in the file.
        unexpected: keys of the file missing in the model.
        shapes: common key → (the model's shape, the file's shape), if different.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def describe(self) -> str:
        """Return a description of the differences, up to three of each kind."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected ({_some(self.unexpected)})")
        if self.shapes:
            shapes = [f"{key}: expected {want}, found {found}" for key, (want, found) in self.shapes.items()]
            parts.append(f"{len(self.shapes)} of another shape ({_some(shapes, '; ')})")
        return ", ".join(parts)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a safetensors file, or a `torch.save` file of tensors in plain containers; nothing else is unpickled.

    Wrappers are removed; averaged (EMA) weights are preferred if there are several state dicts.

    Raises:
        InvalidInput: the file is missing, truncated, of another kind, or contains pickled objects.
    """
    if not path.is_file():
        raise InvalidInput(f"no checkpoint file {path}; --weights takes auto, random or the path of a state dict")
    data = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    wrappers = _unwrap(data)
    if wrappers is None:
        held = f"the keys {_some([str(k) for k in data])}" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise InvalidInput(f"{path} holds no state dict (found {held}); save one with torch.save(model.state_dict())")
    tensors, notes = wrappers
    return Checkpoint(path, tensors, notes)


def compare(module: nn.Module, tensors: Mapping[str, Tensor]) -> Mismatch:
    """Compare names and shapes; a missing `num_batches_tracked` is ignored."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    return Mismatch(
        missing=tuple(k for k in wanted if k not in found and not k.endswith("num_batches_tracked")),
        unexpected=tuple(k for k in found if k not in wanted and not k.endswith("num_batches_tracked")),
        shapes={k: (wanted[k], found[k]) for k in wanted if k in found and wanted[k] != found[k]},
    )


def without_prefixes(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """Strip `module.`, `model.` and `_orig_mod.` as long as more keys then match `wanted`."""
    best = dict(tensors)
    while True:
        variants = [{_strip(key, prefix): value for key, value in best.items()} for prefix in _PREFIXES]
        variants += [
            {_strip(key, prefix): value for key, value in one.items()} for one in variants for prefix in _PREFIXES
        ]
        better = max(variants, key=lambda variant: len(variant.keys() & set(wanted)))
        gained = len(better.keys() & set(wanted)) - len(best.keys() & set(wanted))
        if gained <= 0 or len(better) < len(best):
            return best
        best = better


def class_counts(mismatch: Mismatch) -> tuple[int, ...]:
    """Return the numbers of classes that could explain the differing shapes, the last layer's first."""
    counts = [found[0] for want, found in mismatch.shapes.values() if found and want and want[0] != found[0]]
    return tuple(dict.fromkeys(reversed(counts)))[:_LISTED]


def fit(module: nn.Module, checkpoint: Checkpoint, *, label: str) -> None:
    """Load a checkpoint into a module built for it, in place.

    Raises:
        InvalidInput: keys or shapes differ, or a tensor contains NaN or infinite values.
    """
    tensors = without_prefixes(checkpoint.tensors, module.state_dict().keys())
    mismatch = compare(module, tensors)
    if mismatch:
        hint = "give the class count with --model-arg num_classes=N" if mismatch.shapes else "check the model's name"
        raise InvalidInput(f"checkpoint {checkpoint.path} does not fit {label}: {mismatch.describe()}; {hint}")
    module.load_state_dict(tensors, strict=False)
    check_finite(module, origin=str(checkpoint.path))


def check_finite(module: nn.Module, *, origin: str) -> None:
    """Raise InvalidInput if a parameter or norm statistic is not finite, or a buffer contains NaN."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        # Attention masks are buffers that may contain minus infinity.
        strict = name in parameters or name.endswith(_STATISTICS)
        bad = ~torch.isfinite(value) if strict else torch.isnan(value)
        if bool(bad.any()):
            raise InvalidInput(
                f"{origin}: {name} holds {int(bad.sum())} NaN or infinite values out of {value.numel()}; "
                "use a checkpoint from before training diverged"
            )


def _some(names: Collection[str], separator: str = ", ") -> str:
    listed = separator.join(list(names)[:_LISTED])
    return listed + (separator + "..." if len(names) > _LISTED else "")


def _strip(key: str, prefix: str) -> str:
    # `torch.compile` of a submodule leaves its prefix in the middle of the key.
    return key.replace(prefix, "") if prefix == "_orig_mod." else key.removeprefix(prefix)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path, device="cpu"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {path}: truncated, or not a safetensors file ({error})") from error


def _read_pickle(path: Path) -> Any:
    # Training scripts store their arguments and best score with the weights: plain data, safe to load.
    scalar = np.float64(0).__reduce__()[0]
    harmless: list[Any] = [argparse.Namespace, np.dtype]
    harmless += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    harmless += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)]
    try:
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and TorchScript: real problems raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _pickled_objects(path, str(error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        if "TorchScript" in str(error):
            raise _pickled_objects(path, "TorchScript") from error
        raise InvalidInput(f"cannot read {path}: truncated, or not a file written by torch.save") from error


def _pickled_objects(path: Path, message: str) -> InvalidInput:
    named = _REFUSED_OBJECT.search(message)
    if named is None and "TorchScript" not in message:
        return InvalidInput(f"cannot read {path}: truncated, or not a file written by torch.save")
    what = (named.group(1) or named.group(2)) if named else "a TorchScript program"
    return InvalidInput(
        f"{path} holds pickled objects ({what}), not only weights, and was not loaded; build the model as "
        "FILE.py:CALLABLE and give its weights as torch.save(model.state_dict(), ...)"
    )


def _unwrap(data: Any, depth: int = _DEPTH) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """Find the state dict: (tensors, notes), or None if there is none within `depth` wrappers."""
    if not isinstance(data, Mapping) or depth == 0:
        return None
    present = [name for name in _WRAPPERS if isinstance(data.get(name), Mapping)]
    for name in present:
        inner = _unwrap(data[name], depth - 1)
        if inner is not None:
            others = [other for other in present if other != name] if name in _AVERAGED else []
            notes = [f"the file holds {_some(present)}: the averaged weights '{name}' were taken"] if others else []
            return inner[0], (*inner[1], *notes)
    tensors = {str(key): value.detach() for key, value in data.items() if isinstance(value, Tensor)}
    return (tensors, ()) if tensors else None
