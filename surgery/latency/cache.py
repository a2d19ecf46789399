"""Sources of latency tables: this machine, whose table is kept in the user's cache folder, or a table that is given.

There is one file per device, runtime and number of threads. It is read, completed, and merged into the file under a
lock, so that concurrent processes do not lose results. A file that cannot be read is reported and measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import filelock

from surgery.core import cache_folder
from surgery.errors import InvalidInput
from surgery.latency import fill, probe
from surgery.latency.fill import Point, Progress, Timer
from surgery.latency.micro import FP32
from surgery.latency.probe import Conditions
from surgery.latency.tables import LatencyTable

LOCK_S = 600.0


class Measured:
    """The table of this machine, kept at `path`; missing entries are measured.

    `warn` is called with a sentence on problems with the file on disk; `seed` determines the order of measurements.
    """

    live = True

    def __init__(
        self,
        conditions: Conditions,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        probe.require_cores(conditions.threads, f"--threads {conditions.threads}")
        self._timer, self._warn = Timer(conditions, seed, progress=progress), warn
        self.device: Mapping[str, Any] = probe.describe(conditions)
        key = hashlib.sha256(json.dumps(self.device, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_folder() / f"latency-{key}.json"
        self._table = self._read(warn)

    def cover(self, placed: Sequence[Point]) -> LatencyTable:
        """Return the table with all kernels of a dense network, tabulated over their widths."""
        return self._keep(fill.fill(self._table or fill.new_table(self._timer), placed, self._timer))

    def refine(self, points: Iterable[Point]) -> LatencyTable | None:
        """Return the table with these points measured, or None if it already contained all of them."""
        assert self._table is not None, "cover comes first"
        before = self._table
        refined = fill.refine(before, points, self._timer)
        return None if refined is before else self._keep(refined)

    def _keep(self, table: LatencyTable) -> LatencyTable:
        """Merge with entries that another process may have written meanwhile; existing entries are kept."""
        if table is not self._table and table.entries:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with filelock.FileLock(f"{self.path}.lock", timeout=LOCK_S):
                    other = self._read(lambda sentence: None)  # reported when the table was opened
                    table = table if other is None else other.with_entries(table.entries)
                    table.save(self.path)
            except (OSError, filelock.Timeout, InvalidInput) as error:
                self._warn(f"the latency table cannot be kept in {self.path.parent}: {error}")
        self._table = table
        return table

    def _read(self, warn: Callable[[str], None]) -> LatencyTable | None:
        if not self.path.exists():
            return None
        try:
            return LatencyTable.load(self.path)
        except InvalidInput as error:
            warn(f"{error}; it is measured again")
            return None


@dataclass(slots=True)
class Given:
    """A table given by the user, possibly from another device: nothing is measured here.

    The first call of `cover` is for the whole model, all of whose kernels must be in the table. Later calls are for the
    model without some of its blocks, for which runtimes fuse operators differently: for missing kernels, the time of
    the most similar one is used.

    `origin` names the table in messages; `warn` is called with a sentence on kernels that were missing.
    """

    table: LatencyTable
    origin: str
    warn: Callable[[str], None] = lambda sentence: None
    covered: bool = False
    live: ClassVar[bool] = False

    @property
    def device(self) -> Mapping[str, Any]:
        """The device the table was measured on."""
        return self.table.device

    def cover(self, placed: Sequence[Point]) -> LatencyTable:
        """Return the table; raises InvalidInput if kernels of the network are missing."""
        points = fill.largest(placed)
        missing = [(kernel, widths) for kernel, widths in points if not self.table.covers(kernel, widths)]
        # Kernels that the table has only up to smaller widths are not due to dropped blocks.
        made = [kernel for kernel, widths in missing if self.covered and self.table.ms(kernel, widths) is None]
        similar = {kernel.key: entry for kernel in made if (entry := self.table.relative(kernel)) is not None}
        strange = [kernel for kernel, _ in missing if kernel.key not in similar]
        without = " without some of its blocks" if self.covered else ""
        if strange:
            instead = "; or keep the blocks with --no-drop-layers" if self.covered else ""
            raise InvalidInput(
                f"latency table {self.origin} lacks {len(strange)} of {len(points)} kernels of this model{without} "
                f"(one is {strange[0].title}); `surgery profile MODEL --out {self.origin}` measures them, with the "
                f"same --keep, --submodule and --batch{instead}"
            )
        if missing:
            self.table = self.table.with_entries(similar)
            self.warn(
                f"latency table {self.origin} lacks {len(missing)} kernels of the model{without} (one is "
                f"{missing[0][0].title}); their times are those of the most similar kernels"
            )
        self.covered = True
        return self.table

    def refine(self, points: Iterable[Point]) -> LatencyTable | None:
        """Return None, since a given table is not extended."""
        return None


Source = Measured | Given


def table_source(
    table: LatencyTable | str | Path | None,
    conditions: Conditions,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Source:
    """Return the source of kernel times: the given table, or this machine if None; raises InvalidInput as `load`."""
    if table is None:
        return Measured(conditions, seed=seed, progress=progress, warn=warn)
    given, origin = (table, "table.json") if isinstance(table, LatencyTable) else (LatencyTable.load(table), str(table))
    threads, theirs = conditions.threads, given.device.get("threads", conditions.threads)
    if theirs != threads:
        warn(f"the plan is for --threads {theirs}, as latency table {origin} is; times here are of --threads {threads}")
    precision = given.device.get("precision", FP32)
    if precision != conditions.precision:
        raise InvalidInput(
            f"latency table {origin} is of {precision}, and the plan is for {conditions.precision}: give --deploy "
            f"{precision}, or a table that `surgery profile --deploy {conditions.precision}` wrote"
        )
    return Given(given, origin, warn=warn)
