"""Acceptances: a compact model's latency measured on another device, which calibrates the next plan for that device.

``python PACK.zip accept compact.onnx`` writes one on the device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.config import Recipe
from surgery.errors import InvalidInput

SCHEMA = 1
MOST = 0.999
_HINT = "`python PACK.zip accept compact.onnx` writes one on the device"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A measurement on a device.

    Attributes:
        origin: name in messages.
        ratio: measured latency of the compact model relative to the dense one.
        predicted: the ratio predicted by the latency table when the plan was made.
        dense_ms: the dense model's measured latency.
        device: the device, as in latency tables.
        fingerprint: fingerprint of the dense architecture.
        batch: items per timed run.
    """

    origin: str
    ratio: float
    predicted: float
    dense_ms: float
    device: Mapping[str, Any]
    fingerprint: str
    batch: int

    @classmethod
    def load(cls, path: str | Path) -> Acceptance:
        """Read the output of a pack; raises InvalidInput if the file is missing or unsuitable for calibration."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise InvalidInput(
                    f"{path}: acceptance of schema {data['schema']}, this version reads {SCHEMA}; use a new pack"
                )
            if data["predicted_latency_ratio"] is None:
                raise InvalidInput(
                    f"{path}: its compact model does not say which latency was predicted for it; accept one that "
                    "`surgery shrink --latency` wrote"
                )
            return cls(
                str(path),
                _above_zero(data["ratio"]),
                _above_zero(data["predicted_latency_ratio"]),
                _above_zero(data["dense_ms"]),
                dict(data["device"]),
                str(data["dense_fingerprint"]),
                int(data["batch"]),
            )
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot read acceptance {path}: {error}; {_HINT}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{path}: not an acceptance ({error!s:.120}); {_HINT}") from error

    def aim(self, target: float) -> float:
        """Return the fraction to aim at by the table so that the device measures `target`."""
        return min(target * self.predicted / self.ratio, MOST)

    def note(self, aim: float) -> str:
        """Return a note on the calibrated aim."""
        return (
            f"aimed at {aim:.4f} of the dense latency by the table, calibrated with a measurement from the device: "
            f"{self.ratio:.4f} where the table predicted {self.predicted:.4f}"
        )

    def validate_device(self, device: Mapping[str, Any], fingerprint: str, batch: int) -> None:
        """Raise InvalidInput if the table is from another device, or the plan for another architecture or batch."""
        names = sorted(name for name in {*device, *self.device} if device.get(name) != self.device.get(name))
        if names:
            raise InvalidInput(
                f"acceptance {self.origin} was measured on another device than the latency table: {', '.join(names)} "
                "differ; run the pack once more there, for both"
            )
        if batch != self.batch:
            raise InvalidInput(
                f"acceptance {self.origin} was measured with a batch of {self.batch}, the plan is for --batch {batch}; "
                "give both the same"
            )
        if fingerprint != self.fingerprint:
            raise InvalidInput(
                f"acceptance {self.origin} is of another architecture than this model; accept a compact model of this"
            )


def _above_zero(value: Any) -> float:
    figure = float(value)
    if not 0 < figure < float("inf"):
        raise ValueError(f"{value!r:.20} is no latency")
    return figure


def acceptance_of(recipe: Recipe) -> Acceptance | None:
    """Return the acceptance of a recipe, if any.

    Raises:
        InvalidInput: it cannot be read, or there is no latency table.
    """
    target = recipe.target
    if target.acceptance is None:
        return None
    return Acceptance.load(target.acceptance)
