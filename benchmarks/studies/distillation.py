"""Distillation without labels: ``python -m benchmarks.studies.distillation --work FOLDER``.

The studies plan and time networks on the target machine and store them in a folder. This command distills the networks
of that folder, possibly on another machine with an accelerator, and stores the weights next to them; the studies then
use these weights. A study that finds no weights distills by itself.
"""

from __future__ import annotations

import copy
import csv
import io
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.studies import data
from benchmarks.studies.latency.rivals import Subject
from benchmarks.studies.ours import holds, keep_weights, kept, with_weights
from benchmarks.studies.recovery.subjects import Network, logits, network, to_learn_from
from benchmarks.studies.views import Sight, batches
from surgery.capture import trace
from surgery.config import Recovery
from surgery.core import Callee
from surgery.errors import InvalidInput
from surgery.recovery import History, TrainingRun, train

CANVAS = 288
"""Side in pixels to which photos are resized; views are cropped from them."""
EXACT = 3.0
"""How often a lossless image is drawn for each JPEG image: they are few, and the first evaluation set is lossless."""
MARKS, TIMED = 10, 100


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings that are compared: learning rate, temperature, and the smallest share of a photo in a view."""

    lr: float
    temperature: float = 2.0
    area: float = 1.0


@dataclass(frozen=True, slots=True)
class DistillationRun:
    """A network and its teacher.

    Attributes:
        teacher: of the data folder.
        steps: of training, each on `batch` views.
        settings: if there are several, each is tried for `tried` steps on four fifths of the images; the one whose
            outputs are closest to the teacher's on the last fifth is used.
    """

    teacher: str
    steps: int
    batch: int
    settings: tuple[Setting, ...]
    tried: int = 0
    ema: float = 0.999

    def training(self, checkpoint: Path | None) -> Recovery:
        """Return the training settings of the first setting; steps are divided into `MARKS` epochs."""
        return Recovery(
            epochs=MARKS,
            train_batch=self.batch,
            lr=self.settings[0].lr,
            temperature=self.settings[0].temperature,
            ema=self.ema,
            mixed_precision="bf16",
            patience=MARKS,
            checkpoint=None if checkpoint is None else str(checkpoint),
        )


RUNS = {
    "resnet56.int8": DistillationRun("resnet56", steps=3160, batch=512, settings=(Setting(1e-3),)),
    "mobilenet_v2.int8": DistillationRun(
        "mobilenet_v2",
        steps=4650,
        batch=128,
        settings=tuple(Setting(lr, area=0.25) for lr in (1e-4, 3e-4, 1e-3)),
        tried=400,
    ),
}
"""Name of a planned network → how it is distilled."""


@click.command()
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder of planned networks.")
@click.option("--only", type=click.Choice(list(RUNS)), help="Only this network.")
@click.option("--steps", type=click.IntRange(min=MARKS), help="Number of steps, instead of the default.")
@click.option("--minutes", type=float, help="Time limit per network; reduces the number of steps.")
@click.option("--data-root", type=click.Path(), help="Folder of checkpoints and images.")
def main(work: Path, only: str | None, steps: int | None, minutes: float | None, data_root: str | None) -> None:
    """Distill the networks of the folder."""
    root = data.find_root(data_root)
    for name, run in RUNS.items():
        if only in (None, name) and holds(work, name):
            distill(name, run if steps is None else replace(run, steps=steps), work, root, minutes)


def distilled(name: str, folder: Path, root: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a distilled network and its facts; distills it if the folder does not contain it."""
    if not holds(folder, f"{name}.distilled"):
        distill(name, RUNS[name], folder, root)
    known = network(RUNS[name].teacher, root, jpeg=False)
    module = kept(folder, name, known.subject).module
    return module, with_weights(folder, f"{name}.distilled", module)


def distill(name: str, run: DistillationRun, folder: Path, root: Path, minutes: float | None = None) -> None:
    """Distill a network; store its weights and a description in the folder."""
    begun = time.monotonic()
    if not holds(folder, name):
        raise InvalidInput(f"{folder} contains no network {name}: run the study that plans it first")
    known = network(run.teacher, root, jpeg=False)
    ours = kept(folder, name, known.subject)
    module = ours.module
    images, sight = _images(known, root)
    tried = _tried(name, run, known, module, images, sight) if len(run.settings) > 1 else []
    chosen = min(range(len(run.settings)), key=lambda k: float(tried[k + 1]["divergence"]) if tried else k)
    run = replace(run, settings=(run.settings[chosen],))
    if minutes is not None:
        short = replace(run, steps=TIMED)
        before = time.monotonic()
        _learn(f"{name}, timed", known, copy.deepcopy(module), images, sight, short)
        now = time.monotonic()
        fitting = int((60 * minutes - (now - begun)) / (now - before) * TIMED)
        run = replace(run, steps=max(MARKS, min(run.steps, fitting // MARKS * MARKS)))
    marks = _learn(name, known, module, images, sight, run, folder / f"{name}.checkpoint")
    told = {
        **ours.facts,
        "steps": run.steps,
        "batch": run.batch,
        "epochs": round(run.steps * run.batch / len(images), 1),
        "images": len(images),
        **asdict(run.settings[0]),
        "tried": tried,
        "marks": marks,
        "seconds": round(time.monotonic() - begun),
        "trained_on": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    keep_weights(folder, f"{name}.distilled", module, told)


def _images(known: Network, root: Path) -> tuple[Tensor, Sight]:
    """Training images, none of which is used for evaluation, and their augmentation."""
    if known.name == "mobilenet_v2":
        return canvases(root), Sight(224)
    images = to_learn_from(known, root)
    exact = len(known.learnable[0])
    often = torch.where(torch.arange(len(images)) < exact, EXACT, 1.0)
    return images, Sight(32, shift=4, often=often)


def canvases(root: Path) -> Tensor:
    """Return the even rows of the ImageNet samples in MobileNetV2's normalization, (N, 3, CANVAS, CANVAS)."""
    from PIL import Image

    folder, pixels = root / "imagenet", []
    with zipfile.ZipFile(folder / "imagenet_samples_256.zip") as archive:
        rows = list(csv.DictReader(io.StringIO((folder / "labels.csv").read_text(encoding="utf-8"))))
        for row in rows[::2]:
            image = Image.open(io.BytesIO(archive.read(row["file"]))).convert("RGB")
            pixels.append(np.asarray(image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)))
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1).flip(2, 3).contiguous()


def _tried(
    name: str, run: DistillationRun, known: Network, module: nn.Module, images: Tensor, sight: Sight
) -> list[dict[str, Any]]:
    """Divergence from the teacher on held-out images for each setting, first without distillation."""
    order = torch.randperm(len(known.learnable[0]), generator=torch.Generator().manual_seed(0))
    apart, learnt = order[: len(order) // 5], order[len(order) // 5 :]
    judged = known.learnable[0][apart]
    dense = logits(known.subject.module, judged).double()
    found = []
    for setting in (None, *run.settings):
        copied = copy.deepcopy(module)
        if setting is not None:
            short = replace(run, steps=run.tried, settings=(setting,))
            part = sight if sight.often is None else replace(sight, often=sight.often[learnt])
            _learn(f"{name} by {setting}", known, copied, images[learnt], part, short)
        ours = logits(copied, judged).double()
        logs = dense.log_softmax(1)
        divergence = float((logs.exp() * (logs - ours.log_softmax(1))).sum(1).mean())
        match = 100 * float((ours.argmax(1) == dense.argmax(1)).double().mean())
        told = {} if setting is None else asdict(setting)
        found.append({**told, "divergence": round(divergence, 4), "match": round(match, 1)})
        print(f"    {found[-1]}", file=sys.stderr, flush=True)
    return found


def _learn(
    name: str,
    known: Network,
    module: nn.Module,
    images: Tensor,
    sight: Sight,
    run: DistillationRun,
    checkpoint: Path | None = None,
) -> list[dict[str, Any]]:
    """Distill in place; return the training history."""
    told, begun = [0.0], time.monotonic()

    def tell(fraction: float) -> None:
        if fraction >= told[0] + 0.1:
            told[0] = fraction
            print(f"    {name}: {100 * fraction:.0f} %, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    part = replace(sight, area=run.settings[0].area)
    views = batches(images.contiguous(memory_format=LAYOUT), part, run.batch, run.steps // MARKS)
    training, key = run.training(checkpoint), f"{name} {run}"
    history = learn(known.subject, module, views, training, key=key, progress=tell)
    return [asdict(mark) for mark in history.marks]


LAYOUT = torch.channels_last
"""Memory format of weights and images during distillation."""


def learn(
    teacher: Subject,
    module: nn.Module,
    images: Any,
    training: Recovery,
    *,
    labels: bool = False,
    key: str = "",
    progress: Callable[[float], None] = lambda fraction: None,
) -> History:
    """Distill a network in place, all of its parameters. The teacher is unchanged. Arguments are those of `train`."""
    program, dense = trace(teacher.module, teacher.inputs), copy.deepcopy(teacher.module)
    for each in (module, dense):
        each.to(memory_format=LAYOUT)  # type: ignore[call-overload]
    torch.manual_seed(0)
    models = Callee.of(program, module), Callee.of(program, dense)
    run = TrainingRun(*models, images, training, program.inputs, list(module.parameters()), labels, key)
    history = train(run, progress)
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return history


if __name__ == "__main__":
    main()
