"""Progress reports and stage timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from surgery.core.torch_speed import rare_collections

Progress = Callable[[str, float], None]
"""Called with the name of the stage and its completed fraction (0 to 1)."""


class Clock:
    """Report stages to `progress` and record their durations in `seconds`."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress or (lambda stage, fraction: None)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as one stage."""
        self.progress(stage, 0.0)
        start = time.perf_counter()
        with rare_collections():
            yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
        self.progress(stage, 1.0)
