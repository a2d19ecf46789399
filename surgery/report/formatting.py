"""Format numbers."""

from __future__ import annotations

from collections.abc import Mapping


def si(value: float | None, digits: int = 4) -> str:
    """Return a count in thousands, millions and so on: 11689512 is ``11.69 M``; ``-`` for None."""
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
    """Return three significant digits, without an exponent for large values."""
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ratio(value: Mapping[str, float] | None, *, digits: int = 2, unit: str = "x") -> tuple[str, str]:
    """Return a ratio, such as a speedup, and its 95 % interval."""
    if value is None:
        return "-", "-"
    return f"{value['value']:.{digits}f}{unit}", f"{value['low']:.{digits}f}-{value['high']:.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """Return a fraction in percent: 0.9153 is ``91.53 %``."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def visible(text: str) -> str:
    r"""Return the text on one line, control characters written out as escapes such as ``\x1b``."""
    shown = (c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)
