"""Suppress the output of libraries."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from surgery.core.torch_speed import ONE_AT_A_TIME


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, log records and prints within the block (process-wide)."""
    with (
        ONE_AT_A_TIME,
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
