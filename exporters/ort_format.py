"""ONNX files in ONNX Runtime's own format (`.ort`), which its small builds for phones and boards load.

The graph is optimised as for any processor: no layouts that suit this machine's alone. Two conversions of one file
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

from exporters.place import move, workroom, writable
from surgery.errors import CheckFailed, InvalidInput

TOLERANCE = 1e-4
_OF_THIS_MACHINE = ["NchwcTransformer"]


def to_ort(source: str | os.PathLike[str], target: str | os.PathLike[str], inputs: Mapping[str, NDArray[Any]]) -> Path:
    """Convert an ONNX file, compare the two in ONNX Runtime, and put the result at `target`.

    Args:
        source: ONNX file.
        target: of the `.ort` file; its folder must exist.
        inputs: by name, to compare on.

    Raises:
        InvalidInput: the source cannot be loaded, or does not take these inputs.
        CheckFailed: the converted file computes something else.
    """
    place = writable(Path(target))
    with workroom(place) as room:
        file = room / place.name
        options = _options()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(file)
        options.add_session_config_entry("session.save_model_format", "ORT")
        wanted = _run(source, options, inputs, disabled=_OF_THIS_MACHINE)
        found = _run(file, _options(), inputs)
        for k, (a, b) in enumerate(zip(wanted, found, strict=True)):
            scale = float(np.abs(a).max()) if a.size else 0.0
            if a.shape != b.shape or not np.allclose(a, b, rtol=0, atol=TOLERANCE * max(scale, 1e-30), equal_nan=True):
                raise CheckFailed(f"{place.name}: output {k} differs from {Path(source).name}'s; nothing was written")
        move(file, place)
    return place


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return options


def _run(
    path: Any, options: onnxruntime.SessionOptions, inputs: Mapping[str, NDArray[Any]], disabled: Any = None
) -> list[NDArray[Any]]:
    try:
        session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
        found: list[NDArray[Any]] = session.run(None, {x.name: inputs[x.name] for x in session.get_inputs()})
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise InvalidInput(f"{path} cannot be brought into ONNX Runtime's format: {told}") from error
    return found
