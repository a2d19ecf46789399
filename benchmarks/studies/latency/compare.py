"""Two networks on the same images: the difference, how sure it is, and which of a rival's settings counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
EQUAL = 1.02
"""A rival counts where its latency is at most this many times ours."""


def gap(ours: NDArray[np.bool_], theirs: NDArray[np.bool_], *, seed: int = 0) -> dict[str, float]:
    """Return by how much the share of hits differs, with its 95 % interval by a paired bootstrap over images.

    Args:
        ours: hit or not, per image, (N,).
        theirs: the same for another network and the same images, (N,).
        seed: of the resampling.
    """
    differences = ours.astype(float) - theirs.astype(float)  # (N,)
    counts = np.random.default_rng(seed).multinomial(
        differences.size, np.full(differences.size, 1 / differences.size), RESAMPLES
    )  # (R, N): how often each image is drawn
    means = counts @ differences / differences.size
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": float(differences.mean()), "low": float(low), "high": float(high)}


def at_equal_latency(entries: Iterable[Mapping[str, Any]], ours: float) -> list[Mapping[str, Any]]:
    """Return the entries that were timed, and take at most `EQUAL` times our latency."""
    return [e for e in entries if "failed" not in e and e["latency"]["value"] <= EQUAL * ours]


def best(entries: Iterable[Mapping[str, Any]], ours: float, *, when: str, what: str) -> Mapping[str, Any] | None:
    """Return the entry that does best of those at our latency or below, or None where there is none.

    Args:
        entries: of one rival, as `accuracy` makes them.
        ours: our latency, relative to the dense one.
        when: `before` or `after` the batch norms are re-estimated.
        what: `top1` or `agreement`.
    """
    return max(at_equal_latency(entries, ours), key=lambda e: float(e[when][what]), default=None)


def nearest_above(entries: Iterable[Mapping[str, Any]], ours: float) -> Mapping[str, Any] | None:
    """Return the entry that comes nearest to our latency where none gets down to it."""
    timed = [e for e in entries if "failed" not in e]
    return min(timed, key=lambda e: abs(float(e["latency"]["value"]) - ours), default=None)
