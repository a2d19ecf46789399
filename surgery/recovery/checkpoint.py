"""Checkpoints of a training run: tensors and numbers only, replaced atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from surgery.core import replacing
from surgery.errors import InvalidInput

FILE = "training.safetensors"
_TOLD = "told"


class Checkpoint:
    """The last state of a run, in its own folder.

    Args:
        folder: created if missing.
        key: identity of the run; a checkpoint with another key is ignored.

    Attributes:
        passed_over: whether `load` ignored a checkpoint because it is damaged or of another run.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self.passed_over = False

    def save(self, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Write a state, replacing the previous one; raises InvalidInput if it cannot be written."""
        plain = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
        content = save(plain, metadata={_TOLD: json.dumps(dict(told)), "key": self._key})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._folder / FILE) as file, file.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise InvalidInput(f"{self._folder}: a checkpoint cannot be written ({error.strerror or error})") from error

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the last state; None if there is none, or if it is of another run (see `passed_over`)."""
        place = self._folder / FILE
        self.passed_over = place.exists()
        try:
            with place.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                metadata = json.loads(stream.read(min(length, place.stat().st_size))).get("__metadata__", {})
            if metadata.get("key") != self._key:
                return None
            found = load_file(place), json.loads(metadata[_TOLD])
        except (OSError, ValueError, KeyError, SafetensorError):
            return None
        self.passed_over = False
        return found

    def clear(self) -> None:
        """Remove the folder, including remains of killed runs."""
        shutil.rmtree(self._folder, ignore_errors=True)
