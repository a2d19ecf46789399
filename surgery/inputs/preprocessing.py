"""Image preprocessing that published weights expect."""

from __future__ import annotations

from dataclasses import dataclass

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation, used by most published weights."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Preprocessing of images.

    Attributes:
        mean: mean of each channel, for pixels from 0 to 1.
        std: standard deviation of each channel.
        crop: side of the centre square relative to the shorter side, before resizing.
        interpolation: `bilinear`, `bicubic` or `nearest`.
        size: height and width of the input; None for those of the example input.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    crop: float = 1.0
    interpolation: str = "bilinear"
    size: tuple[int, int] | None = None
