"""Inference sessions on ONNX files, and a file as a callable model for evaluation code written for a torch module."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.core import explained
from surgery.errors import InvalidInput, SurgeryError


def open_session(
    path: str | os.PathLike[str],
    options: onnxruntime.SessionOptions | None = None,
    *,
    kind: type[SurgeryError] = InvalidInput,
    **more: Any,
) -> onnxruntime.InferenceSession:
    """Return a session on the CPU, by default with one thread; raises `kind` if the file cannot be loaded."""
    options = options or session_options()
    with explained(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}", kind):
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"], **more)


def session_options(threads: int = 1) -> onnxruntime.SessionOptions:
    """Return options that keep ONNX Runtime's log off the terminal."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return options


class OnnxModel(torch.nn.Module):
    """A file in ONNX Runtime: called with tensors, it returns tensors; raises InvalidInput if it cannot be run."""

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        super().__init__()
        self.eval()
        self._session = open_session(path, session_options(threads))
        self.inputs = [x.name for x in self._session.get_inputs()]
        firsts = {x.shape[0] for x in self._session.get_inputs() if x.shape}
        self._batch = next((size for size in firsts if isinstance(size, int)), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on tensors, by position or name, in filled pieces of a fixed batch; returns a tensor or a tuple."""
        given = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        tensors = {name: torch.as_tensor(x).detach().cpu() for name, x in given.items()}
        count = len(next(iter(tensors.values()))) if tensors and self._batch else 0
        if not self._batch or count == self._batch:
            found = self._run(tensors)
        else:
            filled = {k: torch.cat([x, x[-1:].expand(-count % self._batch, *x.shape[1:])]) for k, x in tensors.items()}
            parts = [self._run(piece) for piece in self.pieces(filled)]
            found = tuple(torch.cat(column)[:count] for column in zip(*parts, strict=True))
        return found[0] if len(found) == 1 else found

    def pieces(self, tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        """Yield inputs in pieces of the file's own batch where it fixes one; a smaller last piece is left out."""
        if self._batch is None:
            yield tensors
            return
        count = len(next(iter(tensors.values())))
        for start in range(0, count - self._batch + 1, self._batch):
            yield {name: x[start : start + self._batch] for name, x in tensors.items()}

    def _run(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        found = self._session.run(None, {name: x.numpy() for name, x in tensors.items()})
        return tuple(torch.from_numpy(np.asarray(x)) for x in found)


def feeds(path: str | Path, batches: Iterable[Sequence[Tensor]]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield batches of a model's inputs in order, each tensor (N, ...), by the names of a file's inputs."""
    model = OnnxModel(path)
    for batch in batches:
        for piece in model.pieces(dict(zip(model.inputs, batch, strict=False))):
            yield {name: x.numpy() for name, x in piece.items()}
