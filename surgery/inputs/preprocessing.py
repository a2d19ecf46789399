"""How pixels become a model's input: what published weights expect of images."""

from __future__ import annotations

from dataclasses import dataclass

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's images, by which most published weights are normalised."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What is done to images before a model sees them.

    Attributes:
        mean: of each channel, for pixels from 0 to 1.
        std: standard deviation of each channel.
        crop: share of the shorter side that the middle square keeps, before it is brought to the input's size.
        interpolation: `bilinear`, `bicubic` or `nearest`.
        size: height and width of the input; None for those of the example input.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    crop: float = 1.0
    interpolation: str = "bilinear"
    size: tuple[int, int] | None = None
