"""Distillation in the studies: augmented views on the accelerator, and weights moved between machines."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import surgery
from benchmarks.studies import distillation
from benchmarks.studies.distillation import RUNS, DistillationRun, Setting
from benchmarks.studies.latency.rivals import Subject
from benchmarks.studies.ours import holds, keep, kept, planned, zeroed
from benchmarks.studies.views import Sight, batches, seen
from surgery.errors import InvalidInput


@pytest.fixture
def images() -> Tensor:
    return torch.rand(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_view_at_the_images_own_scale_is_the_image_flipped_or_not(images: Tensor) -> None:
    torch.manual_seed(0)
    views = seen(images, Sight(32))
    same, mirrored = (torch.isclose(views, x, atol=1e-5).flatten(1).all(1) for x in (images, images.flip(3)))
    assert bool((same | mirrored).all())
    assert 10 < int(same.sum()) < 38


def test_a_view_is_shifted_by_whole_pixels_at_most_so_far(images: Tensor) -> None:
    torch.manual_seed(0)
    views = seen(images[:8], Sight(32, shift=2))
    wide = torch.from_numpy(np.pad(images[:8].numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="symmetric"))
    windows = [x[:, :, a : a + 32, b : b + 32] for x in (wide, wide.flip(3)) for a in range(5) for b in range(5)]
    found = [[bool(torch.allclose(views[k], w[k], atol=1e-5)) for w in windows] for k in range(8)]
    assert all(any(x) for x in found)
    assert len({x.index(True) for x in found}) > 3


def test_a_zoomed_view_stays_within_the_image() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 288).expand(64, 1, 288, 288)
    views = seen(ramp, Sight(224, area=0.25))
    width = (views[:, 0, 0, -1] - views[:, 0, 0, 0]).abs()
    assert views.shape == (64, 1, 224, 224)
    assert 0.4 < float(width.min()) < 0.6 and float(width.max()) <= 1
    steps = views[:, 0, 0].diff(dim=1)
    assert bool(((steps > 0).all(1) | (steps < 0).all(1)).all())  # nothing is reflected


def test_classes_go_with_their_views(images: Tensor) -> None:
    flat = torch.arange(48.0).view(48, 1, 1, 1).expand(48, 1, 8, 8)
    for views, classes in batches(flat, Sight(8), 16, 3, torch.arange(48)):
        assert torch.equal(views[:, 0, 0, 0].round().long().cpu(), classes.cpu())


def test_the_same_seed_draws_the_same_views(images: Tensor) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append([views for (views,) in batches(images, Sight(32, shift=4), 8, 2)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(*found[0])


# Networks in a folder. -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> Any:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.BatchNorm2d(24), nn.ReLU()
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    images = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(20):
            module(images)
        module[-1].weight.mul_(20)  # outputs that differ from image to image
    module.eval()
    return SimpleNamespace(
        name="net", subject=Subject(module, (torch.zeros(1, 3, 12, 12),)), learnable=(images, torch.zeros(64))
    )


def test_a_network_comes_back_from_the_folder_as_it_was(known: Any, tmp_path: Path) -> None:
    images = known.learnable[0]
    ours = planned("net.macs", known.subject, images, surgery.Budget(macs=0.5), tmp_path)
    again = kept(tmp_path, "net.macs", known.subject)
    with torch.no_grad():
        assert torch.equal(ours.module(images), again.module(images))
        assert zeroed(known.subject, ours.plan)(images).shape == (64, 10)
    assert again.facts["macs"] == ours.facts["macs"] == pytest.approx(0.5, abs=0.03)
    assert planned("net.macs", known.subject, images, surgery.Budget(macs=0.9), tmp_path).facts["macs"] < 0.6


def test_a_lesson_brings_outputs_nearer_and_is_taken_up_again(
    known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = known.learnable[0]
    ours = planned("net.macs", known.subject, images, surgery.Budget(macs=0.5), tmp_path)
    with torch.no_grad():
        for p in ours.module.parameters():  # there is something to learn
            p.mul_(1 + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    keep(tmp_path, "net.macs", ours)
    settings = Setting(1e-5), Setting(1e-3, temperature=4)
    run = DistillationRun("net", steps=80, batch=16, settings=settings, tried=40, ema=0.9)
    monkeypatch.setitem(RUNS, "net.macs", run)
    monkeypatch.setattr(distillation, "network", lambda name, root, jpeg: copy.deepcopy(known))
    monkeypatch.setattr(distillation, "_images", lambda known, root: (images, Sight(12)))
    before = kept(tmp_path, "net.macs", known.subject).module
    after, facts = distillation.distilled("net.macs", tmp_path, tmp_path)
    assert holds(tmp_path, "net.macs.distilled")
    assert [t.get("lr") for t in facts["tried"]] == [None, 1e-5, 1e-3]
    assert facts["lr"] == min(facts["tried"][1:], key=lambda t: float(t["divergence"]))["lr"]
    assert (facts["steps"], facts["epochs"]) == (80, 20.0)
    with torch.no_grad():
        dense, *found = (m(images).log_softmax(1) for m in (known.subject.module, before, after))
    apart = [float((dense.exp() * (dense - x)).sum(1).mean()) for x in found]
    assert apart[1] < apart[0]
    monkeypatch.setattr(distillation, "distill", lambda *arguments: pytest.fail("was distilled before"))
    assert torch.equal(distillation.distilled("net.macs", tmp_path, tmp_path)[0](images), after(images))


def test_a_lesson_of_what_was_not_planned_is_refused(
    known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "network", lambda name, root, jpeg: known)
    with pytest.raises(InvalidInput, match="contains no network gone"):
        distillation.distill("gone", replace(RUNS["resnet56.int8"], teacher="net"), tmp_path, tmp_path)
