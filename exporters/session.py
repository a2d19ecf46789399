"""An ONNX file as a callable model, for evaluation code that was written for a torch module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on tensors or arrays, by position or by name; returns a tensor, or a tuple of them."""
        given = {**dict(zip(self._inputs, args, strict=False)), **kwargs}
        with torch.no_grad():
            feed = {
                name: x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x) for name, x in given.items()
            }
        found = tuple(torch.from_numpy(np.asarray(x)) for x in self._session.run(None, feed))
        return found[0] if len(found) == 1 else found

    def eval(self) -> OnnxModel:
        """Return the model: it is always evaluating."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> OnnxModel:
        """Return the model: it stays on the processor."""
        return self

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return nothing: weights are in the file."""
        return {}
