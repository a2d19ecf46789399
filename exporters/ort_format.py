"""ONNX files in ONNX Runtime's own format (`.ort`), which its small builds for phones and boards load.

The graph is optimised for any processor, without memory layouts for this machine. Two conversions of one file
compute the same and may differ in the order of their bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from exporters.session import open_session, session_options
from surgery.core import explained, replacing
from surgery.errors import CheckFailed

TOLERANCE = 1e-4
_OF_THIS_MACHINE = ["NchwcTransformer"]


def to_ort(source: str | os.PathLike[str], target: str | os.PathLike[str], inputs: Mapping[str, NDArray[Any]]) -> None:
    """Convert an ONNX file, compare the two in ONNX Runtime, and write the result to `target`.

    Args:
        source: ONNX file.
        target: path of the `.ort` file; its folder must exist.
        inputs: by name, to compare on.

    Raises:
        InvalidInput: the source cannot be loaded, or does not take these inputs.
        CheckFailed: the converted file computes something else.
    """
    with replacing(target) as file:
        options = session_options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(file)
        options.add_session_config_entry("session.save_model_format", "ORT")
        wanted = _outputs(open_session(source, options, disabled_optimizers=_OF_THIS_MACHINE), inputs, source)
        found = _outputs(open_session(file), inputs, source)
        for k, (a, b) in enumerate(zip(wanted, found, strict=True)):
            scale = float(np.abs(a).max()) if a.size else 0.0
            if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=TOLERANCE * max(scale, 1e-30), equal_nan=True):
                raise CheckFailed(f"{file.name}: output {k} differs from {Path(source).name}'s; nothing was written")


def _outputs(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, NDArray[Any]], source: str | os.PathLike[str]
) -> list[NDArray[Any]]:
    with explained(f"{source} does not run on these inputs"):
        found: list[NDArray[Any]] = session.run(None, {x.name: inputs[x.name] for x in session.get_inputs()})
    return found
