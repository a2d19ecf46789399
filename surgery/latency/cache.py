"""Latency tables on disk: one file per device, runtime and number of threads, in the user's cache folder.

A table is read, completed, and merged into the file under a lock, so that concurrent processes do not lose results. A
file that cannot be read, or that was measured elsewhere, is reported and measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from surgery.errors import InvalidInput
from surgery.latency import fill, probe
from surgery.latency.fill import Point, Progress
from surgery.latency.micro import FP32
from surgery.latency.probe import Conditions
from surgery.latency.tables import LatencyTable

VARIABLE = "SURGERY_CACHE"
LOCK_S = 600.0


def folder() -> Path:
    """Return the folder that holds tables: ``$SURGERY_CACHE``, or the user's cache folder for this tool."""
    return Path(os.environ.get(VARIABLE) or platformdirs.user_cache_dir("model-surgery", appauthor=False))


def device_key(conditions: Conditions) -> str:
    """Return the name of this device's table: a digest of the result of `probe.describe`."""
    device = json.dumps(probe.describe(conditions), sort_keys=True)
    return hashlib.sha256(device.encode()).hexdigest()[:16]


class Measured:
    """The table of this machine; missing entries are measured.

    Args:
        conditions: conditions of kernel measurements.
        seed: seed of the order of measurements.
        progress: called with the current measurement.
        warn: called with a sentence on problems with the file on disk.
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
        self._conditions, self._seed, self._progress, self._warn = conditions, seed, progress, warn
        self._path = folder() / f"latency-{device_key(conditions)}.json"
        self._table = self._read(warn)

    @property
    def device(self) -> Mapping[str, Any]:
        """The device that times are measured on."""
        return probe.describe(self._conditions)

    @property
    def path(self) -> Path:
        """Path of the table."""
        return self._path

    def cover(self, placed: Sequence[Point]) -> LatencyTable:
        """Return the table with all kernels of a dense network, tabulated over their widths."""
        table = self._table or fill.new_table(conditions=self._conditions, progress=self._progress)
        wanted = fill.wanted_of(placed)
        filled = fill.fill(table, wanted, conditions=self._conditions, seed=self._seed, progress=self._progress)
        return self._keep(filled, changed=filled is not self._table and len(filled.entries) > 0)

    def refine(self, points: Iterable[Point]) -> LatencyTable | None:
        """Return the table with these points measured, or None if it already contained all of them."""
        assert self._table is not None, "cover comes first"
        before = self._table
        refined = fill.refine(before, points, conditions=self._conditions, seed=self._seed, progress=self._progress)
        if sum(len(e.points) for e in refined.entries.values()) == sum(len(e.points) for e in before.entries.values()):
            return None
        return self._keep(refined, changed=True)

    def _keep(self, table: LatencyTable, *, changed: bool) -> LatencyTable:
        """Merge with entries that another process may have written meanwhile; existing entries are kept."""
        if changed:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with filelock.FileLock(f"{self._path}.lock", timeout=LOCK_S):
                    other = self._read(lambda sentence: None)  # reported when the table was opened
                    if other is not None:
                        table = other.with_entries(table.entries)
                    table.save(self._path)
            except (OSError, filelock.Timeout, InvalidInput) as error:
                self._warn(f"the latency table cannot be kept in {self._path.parent}: {error}")
        self._table = table
        return table

    def _read(self, warn: Callable[[str], None]) -> LatencyTable | None:
        if not self._path.exists():
            return None
        try:
            table = LatencyTable.load(self._path)
        except InvalidInput as error:
            warn(f"{error}; it is measured again")
            return None
        if dict(table.device) != json.loads(json.dumps(probe.describe(self._conditions))):
            warn(f"{self._path} was measured on another device or runtime; it is measured again")
            return None
        return table


class Given:
    """A table given by the user, possibly from another device: nothing is measured here.

    The first call of `cover` is for the whole model, all of whose kernels must be in the table. Later calls are for the
    model without some of its blocks, for which runtimes fuse operators differently: for missing kernels, the time of
    the most similar one is used.

    Args:
        table: the table, used unchanged.
        origin: name of the table in messages.
        warn: called with a sentence on kernels whose times were taken from similar ones.
    """

    live = False

    def __init__(
        self, table: LatencyTable, origin: str, *, warn: Callable[[str], None] = lambda sentence: None
    ) -> None:
        self._table, self._origin, self._warn = table, origin, warn
        self._covered = False

    @property
    def device(self) -> Mapping[str, Any]:
        """The device the table was measured on."""
        return self._table.device

    def cover(self, placed: Sequence[Point]) -> LatencyTable:
        """Return the table; raises InvalidInput if kernels of the network are missing."""
        wanted = fill.wanted_of(placed)
        lacking = [w for w in wanted if not self._table.covers(w.kernel, w.widths)]
        missing = [w.kernel for w in lacking]
        # Kernels that the table has only up to smaller widths are not due to dropped blocks.
        made = [w.kernel for w in lacking if self._covered and self._table.ms(w.kernel, w.widths) is None]
        kin = {kernel.key: self._table.relative(kernel) for kernel in made}
        strange = [kernel for kernel in missing if kin.get(kernel.key) is None]
        if strange:
            without = " without some of its blocks" if self._covered else ""
            instead = "; or keep the blocks with --no-drop-layers" if self._covered else ""
            raise InvalidInput(
                f"latency table {self._origin} lacks {len(strange)} of {len(wanted)} kernels of this model{without} "
                f"(one is {strange[0].title}); `surgery profile MODEL --out {self._origin}` measures them, with the "
                f"same --keep, --submodule and --batch{instead}"
            )
        if missing:
            self._table = self._table.with_entries({key: entry for key, entry in kin.items() if entry is not None})
            self._warn(
                f"latency table {self._origin} lacks {len(missing)} kernels of the model without some of its blocks "
                f"(one is {missing[0].title}); their times are those of the kernels most like them"
            )
        self._covered = True
        return self._table

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
    """Return the source of kernel times: the given table, or this machine if None.

    Raises:
        InvalidInput: the table cannot be read, or is of another precision.
    """
    if table is None:
        return Measured(conditions, seed=seed, progress=progress, warn=warn)
    if not isinstance(table, (LatencyTable, str, Path)):
        raise InvalidInput(f"latency_table is of type {type(table).__name__}: give a path, or a LatencyTable")
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
