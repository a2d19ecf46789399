"""ONNX Runtime sessions with one configuration for all measurements, and random inputs for them.

Load time, memory and latency are all measured with the same configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from surgery.errors import InvalidInput
from surgery.latency.probe import PROVIDER, available_cores, first_line, random_values, session_options


@dataclass(frozen=True, slots=True)
class Settings:
    """Session settings.

    Attributes:
        batch: length of the batch axis: axis 0 if dynamic, and any axis named `batch`.
        threads: `intra_op_num_threads`; operators run sequentially.
        seed: seed of the random inputs.
        shapes: input name → whole shape, for inputs with dynamic axes other than the batch axis.
        provider: execution provider of ONNX Runtime.

    Raises:
        InvalidInput: a value is out of range; more threads than this process has cores; a provider that this build of
            ONNX Runtime does not have.
    """

    batch: int = 1
    threads: int = 1
    seed: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    provider: str = PROVIDER

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("threads", self.threads)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidInput(f"{name}={value!r}: give a whole number of 1 or more")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InvalidInput(f"seed={self.seed!r}: give a whole number of 0 or more")
        if self.threads > available_cores():
            raise InvalidInput(
                f"threads={self.threads}: this process may use {available_cores()} cores, and threads that share one "
                "would measure waiting; ask for fewer"
            )
        if self.provider not in (known := onnxruntime.get_available_providers()):
            raise InvalidInput(
                f"provider '{self.provider}' is not in this build of ONNX Runtime, which has {', '.join(known)}; "
                "choose one of these, or install the build that has it"
            )
        for name, shape in self.shapes.items():
            if not all(isinstance(size, int) and size > 0 for size in shape):
                raise InvalidInput(f"input shape {tuple(shape)} of '{name}': every size must be a whole number above 0")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Settings:
        """Restore settings from the JSON values of `asdict`."""
        return cls(**{**fields, "shapes": {name: tuple(shape) for name, shape in fields["shapes"].items()}})


def model_file(path: str | Path) -> Path:
    """Return `path` if it is a file that can be read and is not empty; raises InvalidInput otherwise."""
    target = Path(path)
    try:
        with target.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise InvalidInput(
            f"cannot read model {target}: {error.strerror or error}; give the path of an ONNX file"
        ) from error
    if empty:
        raise InvalidInput(f"model {target} is an empty file; export it again")
    return target


def file_bytes(path: Path) -> int:
    """Return the size of the model on disk in bytes, including weights in ``<name>.data``."""
    beside = path.with_name(path.name + ".data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def open_session(path: Path, settings: Settings, *, profile: str = "") -> onnxruntime.InferenceSession:
    """Return a session; `profile` is the path prefix of an operator profile, if any.

    Raises:
        InvalidInput: ONNX Runtime cannot load the file, or the provider cannot start.
    """
    options = session_options(settings.threads, profile)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[settings.provider])
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        why = first_line(error)
        raise InvalidInput(f"ONNX Runtime cannot load {path}: {why}; check or re-export the file") from error
    if (started := session.get_providers()[0]) != settings.provider:  # ONNX Runtime falls back without an exception
        raise InvalidInput(f"provider '{settings.provider}' did not start: {path} would run by {started} instead")
    return session


def random_inputs(session: onnxruntime.InferenceSession, path: Path, settings: Settings) -> dict[str, NDArray[Any]]:
    """Return one random array per input of the session; models with the same inputs get the same values.

    Raises:
        InvalidInput: an axis has no size, a shape contradicts the model, or an input is not a numeric tensor.
    """
    inputs, examples = session.get_inputs(), _examples(session)
    shapes = {item.name: _shape(item.name, item.shape, path, settings, examples.get(item.name)) for item in inputs}
    if inputs and settings.batch not in {shape[0] for shape in shapes.values() if shape}:
        first = inputs[0].name
        raise InvalidInput(
            f"{path}: input '{first}' has the fixed shape {shapes[first]}, so it cannot run at batch={settings.batch}; "
            "ask for its own batch or export it with a dynamic batch axis"
        )
    try:
        return {item.name: random_values(item.name, item.type, shapes[item.name], settings.seed) for item in inputs}
    except TypeError as error:
        raise InvalidInput(f"{path}: {error}") from error


def run_once(session: onnxruntime.InferenceSession, inputs: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Run the session and discard the outputs; raises InvalidInput if the model rejects its inputs."""
    try:
        session.run(None, inputs)
    except Exception as error:  # as above
        shapes = {name: value.shape for name, value in inputs.items()}
        why = first_line(error)
        raise InvalidInput(f"{path} does not run on inputs of shape {shapes}: {why}; give shapes") from error


EXAMPLES = "example_shapes"
"""Key of a file's metadata: the shapes that it was exported with, by input, as JSON."""


def _examples(session: onnxruntime.InferenceSession) -> dict[str, list[int]]:
    """Return the export shapes recorded in a file, for dynamic axes; empty if there are none."""
    try:
        found = json.loads(session.get_modelmeta().custom_metadata_map.get(EXAMPLES, "{}"))
        return {str(name): [int(size) for size in shape] for name, shape in found.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _shape(
    name: str, declared: list[int | str | None], path: Path, settings: Settings, example: list[int] | None
) -> tuple[int, ...]:
    given = settings.shapes.get(name)
    fitting = example if example is not None and len(example) == len(declared) else None
    if given is not None and len(given) != len(declared):
        raise InvalidInput(
            f"{path}: input '{name}' has {len(declared)} axes {declared}, the given shape {given} has {len(given)}"
        )
    sizes: list[int] = []
    for axis, size in enumerate(declared):
        if not isinstance(size, int) and (axis == 0 or size == "batch"):
            sizes.append(settings.batch)
        elif given is not None:
            if isinstance(size, int) and size != given[axis]:
                raise InvalidInput(
                    f"{path}: axis {axis} of input '{name}' is {size} in the model, {given[axis]} in the given shape"
                )
            sizes.append(given[axis])
        elif isinstance(size, int):
            sizes.append(size)
        elif fitting is not None:
            sizes.append(fitting[axis])
        else:
            raise InvalidInput(
                f"{path}: axis {axis} of input '{name}' is dynamic ({size or 'unnamed'}); "
                f"give shapes={{'{name}': (...)}}, or --input-shape {name}=N,C,H,W on the command line"
            )
    return tuple(sizes)
