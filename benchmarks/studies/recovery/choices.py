"""Comparisons that settings were chosen by, on held-out training images, never on evaluation images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import surgery
from benchmarks.studies.recovery.subjects import CALIBRATION, SEEDS, Judged, Network, judged, logits
from surgery.importance import Moments, Solution, solve
from surgery.recovery import reconstruction

HELD = 2000
STEPS = (1, 2, 4)
REPAIRS = (0.0, 0.5, 1.0)


def by_steps(known: Network, macs: float) -> list[dict[str, Any]]:
    """Prune at once, or in several steps with reconstruction in between."""

    def made(images: Tensor, seed: int, steps: int) -> nn.Module:
        budget = surgery.Budget(macs=macs)
        subject = known.subject
        return surgery.shrink(
            subject.module, subject.inputs, surgery.recipe(budget=budget, data=images, seed=seed, steps=steps)
        ).model

    return _rows(known, "second-order", {f"{n} steps" if n > 1 else "1 step": _with(made, n) for n in STEPS})


def by_repair(known: Network, macs: float, criterion: str) -> list[dict[str, Any]]:
    """Reconstruction that restores none, half or all of the variance that least squares removes from a channel."""

    def made(images: Tensor, seed: int, repair: float) -> nn.Module:
        subject = known.subject
        with patch.object(reconstruction, "solve", _with(_repaired, repair)):
            return surgery.shrink(
                subject.module, subject.inputs, surgery.recipe(macs=macs, criterion=criterion, data=images, seed=seed)
            ).model

    return _rows(known, criterion, {f"{100 * r:.0f} % of the variance restored": _with(made, r) for r in REPAIRS})


def _with(call: Callable[..., Any], last: Any) -> Callable[..., Any]:
    return lambda *given, **named: call(*given, last, **named)


def _repaired(folds: Sequence[Moments], prior: Tensor, share: float, **named: Any) -> Solution:
    """Move each output's standard deviation this share of the way to the target's; its mean is unchanged."""
    solution = solve(folds, prior, **named)
    whole = sum(folds[1:], folds[0])
    kernel, shift = solution.weight[:, :-1], solution.weight[:, -1]
    mean, var = whole.moments_of(kernel)
    factor = (whole.wanted_variance() / var.clamp_min(1e-12)).sqrt().clamp(0.5, 2.0) ** share
    shift = shift + mean - factor * mean if named["shift"] else shift
    return replace(solution, weight=torch.cat([kernel * factor.unsqueeze(1), shift.unsqueeze(1)], 1))


def _rows(known: Network, criterion: str, ways: dict[str, Callable[..., nn.Module]]) -> list[dict[str, Any]]:
    pixels, labels = known.learnable
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SEEDS[0]))
    held, rest = order[:HELD], order[HELD:]
    by = Judged.of("training images", pixels[held], labels[held], known.subject.module)
    rows = []
    for name, made in ways.items():
        found = []
        for seed in SEEDS:
            drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
            module = made(pixels[rest[drawn[: CALIBRATION[known.name]]]], seed)
            found.append(logits(module, by.images))
        rows.append({"tool": "ours", "criterion": criterion, "way": name, "judged": [judged(found, by)]})
    return rows
