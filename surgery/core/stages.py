"""What surrounds a stage: progress reports, timings, and suppressed output of libraries."""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from surgery.core.torch_speed import ONE_AT_A_TIME

Progress = Callable[[str, float], None]
"""Called with the name of the stage and its completed fraction (0 to 1)."""


class Clock:
    """Report stages to `progress`, and record in `seconds` how long each took, without the stages within it."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress or (lambda stage, fraction: None)
        self._stages: list[str] = []
        self._within = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as one stage."""
        self.progress(stage, 0.0)
        start, before, self._within = time.perf_counter(), self._within, 0.0
        self._stages.append(stage)
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._stages.pop()
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds - self._within, 3)
            self._within = before + seconds
        self.progress(stage, 1.0)
        if self._stages:
            self.progress(self._stages[-1], 0.0)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, log records and prints within the block (process-wide)."""
    out = io.StringIO()
    with ONE_AT_A_TIME, warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(out):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
