"""Figures as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table


def si(value: float | None, digits: int = 4) -> str:
    """Return a count in thousands, millions and so on: 11689512 is ``11.69 M``."""
    if value is None:
        return "-"
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.{digits}g} {letter}"
    return f"{value:.{digits}g}"


def size(value: int | None) -> str:
    """Return a size in bytes: 46755000 is ``46.8 MB`` (decimal megabytes)."""
    return "-" if value is None else f"{si(value, 3)}B"


def figure(value: float | None) -> str:
    """Return three significant digits, and no exponent for what is large."""
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ratio(value: Mapping[str, float] | None, *, digits: int = 2, unit: str = "x") -> tuple[str, str]:
    """Return a ratio, a speedup for instance, and its 95 % interval."""
    if value is None:
        return "-", "-"
    return f"{value['value']:.{digits}f}{unit}", f"{value['low']:.{digits}f}-{value['high']:.{digits}f}"


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, whole: bool = False) -> Table:
    """Return a table without the columns in which nothing is known; where `whole`, with them, showing -."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    shown = [k for k in range(len(columns)) if k == 0 or whole or any(row[k] not in ("-", "") for row in rows)]
    for k in shown:
        table.add_column(columns[k].replace(" ", "\n"), justify="left" if k == 0 else "right")
    for row in rows:
        table.add_row(*(escape(row[k]) for k in shown))
    return table
