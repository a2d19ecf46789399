"""Rows of distilled networks: without labels, on all available images."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from benchmarks.studies.distillation import learn
from benchmarks.studies.latency.bench import Bench, loop_of
from benchmarks.studies.recovery.subjects import SEEDS, Network, against, judged_all, network, to_learn_from
from surgery.config import Recovery

TO_MACS = Recovery(epochs=4, train_batch=128, lr=5e-4, mixed_precision="bf16")
TO_LATENCY = replace(TO_MACS, epochs=8, lr=1e-3)
"""For 57,728 images. Learning rates of 0.0005 and 0.0015 were compared by the loss on held-out training images, on
10,240 images: the lower one was better, by much after two epochs at 0.476 of the MACs, by little after four at 0.35.
The longer run uses one in between."""
_RACE_S = 40.0


def to_macs(known: Network, macs: float, root: Path) -> list[dict[str, Any]]:
    """Prune to a fraction of the MACs with 512 images, reconstruct with the same images, then distill."""
    images = known.calibration(SEEDS[0])
    budget = surgery.Budget(macs=macs)
    cut = surgery.shrink(
        known.subject.module, known.subject.inputs, surgery.recipe(budget=budget, data=images, recover="none")
    )
    result, facts = _distilled(cut, known, root, TO_MACS)
    kept = round(known.subject.kept(result.model), 4)
    return [{**facts, "tool": "ours", "macs": kept, "judged": judged_all(known, [result.model])}]


def to_latency_of(known: Network, smaller: str, root: Path) -> list[dict[str, Any]]:
    """Prune to the latency of a smaller network, distill, and compare with that network, as published and distilled.

    All of them are timed together at the end.
    """
    other = network(smaller, root)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(known.subject, Path(folder), 1, _RACE_S)
        bench.add("dense", known.subject.module)
        bench.add(smaller, other.subject.module)
        wanted = bench.measure()["latency"][smaller]["value"]
        images = known.calibration(SEEDS[0])
        budget = surgery.Budget(latency=wanted)
        cut = surgery.shrink(
            known.subject.module, known.subject.inputs, surgery.recipe(budget=budget, data=images, recover="none")
        )
        result, facts = _distilled(cut, known, root, TO_LATENCY)
        bench.add("ours", result.model)
        figures = bench.measure()
    distilled, seconds = _peer(known, other.subject.module, root)
    theirs = judged_all(known, [other.subject.module])
    rows: list[dict[str, Any]] = [
        {
            "tool": "dense",
            "criterion": known.name,
            "recovery": "none",
            "judged": judged_all(known, [known.subject.module]),
        },
        {"tool": "dense", "criterion": smaller, "recovery": "none", "judged": theirs},
        {
            "tool": "dense",
            "criterion": smaller,
            "recovery": f"distilled from {known.name}",
            "epochs": TO_LATENCY.epochs,
            "seconds": seconds,
            "judged": judged_all(known, [distilled]),
        },
        {**facts, "tool": "ours", "judged": judged_all(known, [result.model])},
    ]
    times = figures["latency"]
    for row, name in zip(rows, ("dense", smaller, smaller, "ours"), strict=True):
        module = {"dense": known.subject.module, smaller: other.subject.module, "ours": result.model}[name]
        row |= {"macs": round(known.subject.kept(module), 4), "latency": times[name], "timer": figures["timer"]}
    rows[-1] |= {
        "loop": loop_of(cut.report),
        "against": {
            smaller: against(known, result.model, other.subject.module),
            f"{smaller}, distilled": against(known, result.model, distilled),
        },
    }
    return rows


def _distilled(
    cut: surgery.Result, known: Network, root: Path, training: Recovery
) -> tuple[surgery.Result, dict[str, Any]]:
    """Reconstruct with the images of the first seed, then distill with all images."""
    fitted = surgery.recover(cut, surgery.recipe(data=known.calibration(SEEDS[0]), recover="reconstruct"))
    before = judged_all(known, [fitted.model])
    pixels = to_learn_from(known, root)
    options = {
        "epochs": training.epochs,
        "train_batch": training.train_batch,
        "lr": training.lr,
        "mixed_precision": training.mixed_precision,
    }
    result = surgery.recover(fitted, surgery.recipe(data=pixels, recover="distill", **options))
    step = result.report["recovery"]["steps"][-1]
    return result, {
        "criterion": "second-order",
        "recovery": "distill",
        "epochs": training.epochs,
        "images": len(pixels),
        "seconds": step["seconds"],
        "peak_memory_mb": round(step["peak_memory_bytes"] / 1e6),
        "steps": step["history"]["steps"],
        "reconstructed": before,
    }


def _peer(known: Network, smaller: nn.Module, root: Path) -> tuple[nn.Module, float]:
    """Distill the smaller network on the same images in the same way."""
    module, begun = copy.deepcopy(smaller), time.monotonic()
    pixels = to_learn_from(known, root)
    unknown = torch.full((len(pixels),), -1)
    learn(known.subject, module, torch.utils.data.TensorDataset(pixels, unknown), TO_LATENCY)
    return module.eval(), round(time.monotonic() - begun, 1)
