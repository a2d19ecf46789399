"""Robust estimate of a latency ratio from block medians, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Full width of the interval relative to the value."""
        return (self.high - self.low) / self.value

    def inverse(self) -> Interval:
        """Return the interval of 1 / ratio."""
        return Interval(1.0 / self.value, 1.0 / self.high, 1.0 / self.low)


UNITY = Interval(1.0, 1.0, 1.0)


def paired_ratio(model_ms: Sequence[float], baseline_ms: Sequence[float], *, seed: int) -> Interval:
    """Return the model's latency relative to the baseline's, from block medians of the same rounds.

    Each round gives one ratio, so that slowdowns of a whole round cancel. The estimate is the interquartile mean of the
    log ratios: robust to a quarter of disturbed rounds on either side, and smoother under resampling than a median.

    Args:
        model_ms: block medians, one per round, (R,).
        baseline_ms: the baseline's block medians in the same rounds, (R,).
        seed: seed of the resampling.

    Returns:
        The ratio and its percentile-bootstrap 95 % interval over rounds.
    """
    logs = np.log(np.asarray(model_ms, float)) - np.log(np.asarray(baseline_ms, float))  # (R,)
    picks = np.random.default_rng(seed).integers(0, logs.size, (RESAMPLES, logs.size))
    low, high = np.percentile(_interquartile_mean(logs[picks]), [2.5, 97.5])
    value = _interquartile_mean(logs[None])[0]
    return Interval(*(float(np.exp(x)) for x in (value, low, high)))


def _interquartile_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    length = values.shape[-1]
    middle = np.sort(values, axis=-1)[..., length // 4 : length - length // 4]
    means: NDArray[np.float64] = middle.mean(axis=-1)
    return means
