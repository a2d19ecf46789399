"""ResNet-56 at torch-pruning's published compression, with labels and all training images; needs an accelerator.

torch-pruning's network was pruned 2.55 times and finetuned by its authors. The images here are JPEG files, so the
dense network is finetuned on them first. Then ours is pruned from it, and both compact networks are finetuned in the
same way.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from benchmarks.studies.distillation import learn
from benchmarks.studies.latency.bench import tell
from benchmarks.studies.latency.rivals import Subject
from benchmarks.studies.networks import projected_resnet
from benchmarks.studies.recovery.subjects import LOSSLESS, Judged, Network, judged_all, packed_jpegs
from benchmarks.studies.views import Sight, accelerator, batches
from surgery.config import Recovery

DENSE, CUT = "torchpruning_resnet56_groupsl_reg.pt", "torchpruning_resnet56_groupsl_pruned2.55x.pt"
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SIGHT = Sight(32, shift=4)
BATCH, STEPS_DENSE, STEPS, MARKS = 512, 1000, 2400, 10
RATE_DENSE, RATE = 0.02, 1e-3


def at_published(root: Path, steps_dense: int = STEPS_DENSE, steps: int = STEPS) -> list[dict[str, Any]]:
    """Return the rows of the dense network, ours and torch-pruning's, each before and after finetuning.

    Points lost are relative to the dense network finetuned on the images.
    """
    images, labels = _pixels(*packed_jpegs(root / "cifar10" / "train_jpeg_packed.npz"))
    raw, theirs = (_network(root / "cifar10_weights" / name) for name in (DENSE, CUT))
    tell("finetune the dense network")
    dense = _finetuned_dense(copy.deepcopy(raw), images, labels, steps_dense)
    example = torch.zeros(1, 3, 32, 32)
    subject = Subject(dense, (example,))
    known = Network("resnet56", subject, (images, labels), _judged(root, dense))
    wanted = subject.kept(theirs)
    tell(f"prune ours to {wanted:.3f} of the MACs")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:512]
    cut = surgery.shrink(dense, (example,), surgery.recipe(macs=wanted, data=images[order], recover="reconstruct"))
    rows = [
        {"tool": "dense", "recovery": "none", "macs": 1.0, "judged": judged_all(known, [raw])},
        {"tool": "dense", "recovery": "finetuned on JPEG images", "macs": 1.0, "judged": judged_all(known, [dense])},
    ]
    for tool, module, before in (("ours", cut.model, "reconstruct"), ("torch-pruning", theirs, "published weights")):
        facts = {"tool": tool, "macs": round(subject.kept(module), 4)}
        rows.append({**facts, "recovery": before, "judged": judged_all(known, [module])})
        tell(f"finetune {tool}")
        begun = time.monotonic()
        finetuned = _finetuned(copy.deepcopy(module), subject, images, labels, steps)
        rows.append({
            **facts,
            "recovery": "finetune",
            "steps": steps,
            "epochs": round(steps * BATCH / len(images), 1),
            "seconds": round(time.monotonic() - begun),
            "trained_on": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "judged": judged_all(known, [finetuned]),
        })  # fmt: skip
    return [{**row, "criterion": "second-order" if row["tool"] == "ours" else DENSE} for row in rows]


def _pixels(pixels: Any, labels: Any) -> tuple[Tensor, Tensor]:
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return ((scaled - mean) / deviation).contiguous(), torch.from_numpy(labels)


def _network(path: Path) -> nn.Module:
    return projected_resnet(torch.load(path, map_location="cpu", weights_only=True)).eval()


def _judged(root: Path, dense: nn.Module) -> tuple[Judged, ...]:
    with np.load(root / "cifar10" / "test_lossless_932.npz") as packed:
        exact = _pixels(packed["images"], packed["labels"].astype(np.int64))
    jpeg = _pixels(*packed_jpegs(root / "cifar10" / "test_jpeg_packed.npz"))
    return Judged.of(LOSSLESS, *exact, dense), Judged.of("JPEG 10,000", *jpeg, dense)


def _finetuned_dense(module: nn.Module, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """Finetune a dense network, batch norms included, with SGD and a one-cycle schedule."""
    module = module.to(accelerator(), memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE_DENSE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE_DENSE, total_steps=steps, pct_start=0.1)
    torch.manual_seed(0)
    for views, classes in batches(images, SIGHT, BATCH, steps, labels):
        with torch.autocast(views.device.type, torch.bfloat16):
            loss = F.cross_entropy(module(views), classes)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return module.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload, no-any-return]


def _finetuned(module: nn.Module, dense: Subject, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """Finetune a compact network with the classes and the dense network as a teacher."""
    training = Recovery(epochs=MARKS, lr=RATE, ema=0.999, weight_decay=5e-4, mixed_precision="bf16", patience=MARKS)
    learn(dense, module, batches(images, SIGHT, BATCH, steps // MARKS, labels), training, labels=True)
    return module.eval()
