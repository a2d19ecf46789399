"""The user's own metric: a function of a model that returns figures by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from numbers import Real
from typing import Any

import torch

from surgery.capture import evaluating
from surgery.errors import InvalidInput
from surgery.inputs import user_object

Evaluate = Callable[[Any], Mapping[str, float]]


def open_evaluation(given: str) -> Evaluate:
    """Return the function `FILE.py:CALLABLE`, with its results checked on each call.

    Raises:
        InvalidInput: there is no such callable; on a call, if it fails or does not return finite numbers by name.
    """
    owner, colon, name = given.rpartition(":")
    if not colon or not owner:
        raise InvalidInput(
            f"--metric {given}: write FILE.py:CALLABLE, a function of a model that returns {{metric: value}}"
        )
    function = user_object(owner, name)
    return checked(function, f"--metric {given}")


def checked(function: Callable[[Any], Any], told: str) -> Evaluate:
    """Wrap the function to check its result: finite numbers by name, of which the first is maximised.

    Args:
        function: function of a model.
        told: its origin, for messages.

    Raises:
        InvalidInput: it is not callable; on a call, if it returns anything else.
    """
    if not callable(function):
        raise InvalidInput(f"{told} is of type {type(function).__name__}, not a function of a model")

    def run(model: Any) -> dict[str, float]:
        if isinstance(model, torch.nn.Module):
            with evaluating(model), torch.no_grad():
                found = function(model)
        else:
            found = function(model)
        if not isinstance(found, Mapping) or not found:
            raise InvalidInput(f"{told} returned {type(found).__name__}; return figures by name, as in {{'mAP': 0.4}}")
        wrong = [k for k, v in found.items() if not isinstance(v, Real) or not isfinite(float(v))]
        if wrong:
            raise InvalidInput(f"{told}: '{wrong[0]}' is {found[wrong[0]]!r}; every figure must be a finite number")
        return {str(name): float(value) for name, value in found.items()}

    return run


def points_lost(dense: Mapping[str, float], compact: Mapping[str, float]) -> float:
    """Return the decrease of the first figure, times 100 if the dense model's is between -1 and 1."""
    name, value = next(iter(dense.items()))
    if name not in compact:
        raise InvalidInput(f"--metric: '{name}' was returned for the dense model and not for the compact one")
    return (value - compact[name]) * (100.0 if abs(value) <= 1 else 1.0)
