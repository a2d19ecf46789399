"""An ONNX file as a callable model, for evaluation code that was written for a torch module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.errors import InvalidInput


class OnnxModel:
    """A file in ONNX Runtime: called with tensors, it returns tensors.

    Args:
        path: of the file.
        threads: intra-op threads.

    Raises:
        InvalidInput: the file cannot be run.
    """

    training = False

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise InvalidInput(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0][:200]}") from error
        self.path = Path(path)
        self._inputs = [x.name for x in self._session.get_inputs()]
        firsts = {x.shape[0] for x in self._session.get_inputs() if x.shape}
        self._batch = next((size for size in firsts if isinstance(size, int)), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on tensors or arrays, by position or by name; returns a tensor, or a tuple of them.

        Where the file fixes the batch, as many images as are given are run in pieces, the last one filled up.
        """
        given = {**dict(zip(self._inputs, args, strict=False)), **kwargs}
        with torch.no_grad():
            tensors = {k: x.detach().cpu() if isinstance(x, Tensor) else torch.as_tensor(x) for k, x in given.items()}
        count = len(next(iter(tensors.values()))) if tensors and self._batch else 0
        if not self._batch or count == self._batch:
            found = self._run(tensors)
        else:
            filled = {k: torch.cat([x, x[-1:].expand(-count % self._batch, *x.shape[1:])]) for k, x in tensors.items()}
            parts = [self._run(piece) for piece in self.pieces(list(filled.values()), list(filled))]
            found = tuple(torch.cat(column)[:count] for column in zip(*parts, strict=True))
        return found[0] if len(found) == 1 else found

    def pieces(self, tensors: Sequence[Tensor], names: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
        """Yield inputs by name, in pieces of the file's own batch where it fixes one; what is left over is left out.

        Args:
            tensors: of the model's inputs in order, each (N, ...).
            names: of them; None: the file's own.
        """
        named = dict(zip(names or self._inputs, tensors, strict=False))
        if self._batch is None:
            yield named
            return
        for start in range(0, len(tensors[0]) - self._batch + 1, self._batch):
            yield {name: x[start : start + self._batch] for name, x in named.items()}

    def _run(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        found = self._session.run(None, {name: x.numpy() for name, x in tensors.items()})
        return tuple(torch.from_numpy(np.asarray(x)) for x in found)

    def eval(self) -> OnnxModel:
        """Return the model: it is always evaluating."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> OnnxModel:
        """Return the model: it stays on the processor."""
        return self

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return nothing: weights are in the file."""
        return {}


def feeds(path: str | Path, batches: Iterable[Sequence[Tensor]]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield batches of a model's inputs in order, each tensor (N, ...), by the names of a file's inputs."""
    model = OnnxModel(path)
    for batch in batches:
        for piece in model.pieces(batch):
            yield {name: x.numpy() for name, x in piece.items()}
