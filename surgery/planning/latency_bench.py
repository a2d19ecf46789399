"""Time compact models against the dense one, as ONNX files in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from exporters import onnx
from exporters.quantize import FEWEST, Int8, to_int8
from exporters.session import feeds
from exporters.signature import bind
from surgery.config import Recipe
from surgery.core import Program, Progress
from surgery.inputs import Calibration
from surgery.latency import INT8, Settings, ratio as timer


def int8_of(recipe: Recipe) -> Int8:
    """Return the quantization settings."""
    output = recipe.output
    return Int8(output.int8_method, output.int8_keep, output.int8_reduce_range)


class LatencyBench:
    """The dense model as an ONNX file, and compact ones to be timed against it.

    Args:
        program: the dense program.
        folder: output folder.
        recipe: threads, batch and precision.
        seen: images to calibrate int8 files on, if any.
        progress: called with the current export or measurement.
        for_accuracy: whether accuracy is also measured, so that int8 files are calibrated on all images.
    """

    def __init__(
        self,
        program: Program,
        folder: Path,
        recipe: Recipe,
        seen: Calibration | None = None,
        progress: Progress | None = None,
        *,
        for_accuracy: bool = False,
    ) -> None:
        self._program, self._folder, self._recipe, self._seen = program, folder, recipe, seen
        self._progress, self._for_accuracy = progress, for_accuracy
        self._tensors = bind(program.model, program.example_args, program.example_kwargs).tensors
        self._axes = {name: spec.dynamic for name, spec in zip(self._tensors, program.inputs, strict=True)}
        free = any(0 in axes for axes in self._axes.values())
        self._batch = recipe.target.batch if free else next(iter(self._tensors.values())).shape[0]
        self.dense = self.export(program.model, "dense")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Input name → timed shape."""
        free = {name for name, axes in self._axes.items() if 0 in axes}
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        return {name: (self._batch, *shape[1:]) if name in free else shape for name, shape in shapes.items()}

    def export(self, module: torch.nn.Module, name: str = "compact") -> Path:
        """Export a module with the dense model's inputs; replaces a file of the same name."""
        if self._progress is not None:
            self._progress(f"export {name} to time it", 0.0)
        program = self._program
        path = onnx.export(
            module,
            program.example_args,
            self._folder / f"{name}.onnx",
            onnx.ExportSettings(check=False),
            example_kwargs=program.example_kwargs,
            dynamic_axes=self._axes,
        ).path
        if self._recipe.target.deploy == INT8:
            to_int8(path, path, self._calibration(path), int8_of(self._recipe), check=False)
        return path

    def ratio(self, compact: Path, *, processes: int, after: timer.Ratio | None = None) -> timer.Ratio:
        """Return a file's latency relative to the dense model's, from several processes including those of `after`."""
        done = len(after.ratios) if after is not None else 0
        found = timer.measure(
            self.dense, compact, self._settings(seed=done), processes=processes - done, progress=self._progress
        )
        return found if after is None else after + found

    def dense_ms(self) -> float:
        """Return the dense model's latency."""
        return timer.measure(self.dense, self.dense, self._settings()).dense_ms

    def _settings(self, seed: int = 0) -> Settings:
        recipe = self._recipe
        return Settings(self._batch, recipe.target.threads, recipe.selection.seed + seed, self.shapes)

    def _calibration(self, path: Path) -> list[dict[str, Any]]:
        """Return the calibration images: a few if files are only timed, the example inputs if there are none.

        Calibration ranges affect a file's results, but not its time.
        """
        seen = self._seen
        batches = seen.batches if seen is not None else [tuple(self._tensors.values())] * FEWEST
        found, count = list[dict[str, Any]](), 0
        for feed in feeds(path, batches):
            if count >= FEWEST and not (self._for_accuracy and seen is not None):
                break
            found.append(feed)
            count += len(next(iter(feed.values())))
        return found
