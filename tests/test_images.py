"""Calibration images: every way to give them comes to the same batches, and what does not fit says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from surgery import images
from surgery.errors import InvalidInput
from surgery.ir import InputSpec
from surgery.part import reach
from surgery.trace import trace

SPEC = (InputSpec("x", (2, 3, 8, 8), "float32", (0,)),)
GIVEN = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def labelled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(GIVEN, torch.arange(40)), batch_size=7)


@pytest.mark.parametrize(
    "given", [GIVEN, GIVEN.double(), list(GIVEN.split(9)), [(part, None) for part in GIVEN.split(40)], labelled()]
)
def test_every_way_to_give_images_comes_to_the_same(given: Any) -> None:
    found, wanted = images.gather(given, SPEC), images.gather(GIVEN, SPEC)
    assert found.described() == wanted.described() == {"images": 40, "sha256": wanted.digest}
    assert [len(x) for (x,) in found.batches] == [8, 8, 8, 8, 8]
    assert torch.equal(torch.cat([x for (x,) in found.batches]), GIVEN)


def test_other_images_have_another_digest() -> None:
    other = GIVEN.clone()
    other[3, 1, 4, 4] += 1e-3
    assert images.gather(other, SPEC).digest != images.gather(GIVEN, SPEC).digest


def test_a_fixed_batch_is_kept() -> None:
    found = images.gather(GIVEN, (InputSpec("x", (12, 3, 8, 8), "float32", ()),))
    assert [len(x) for (x,) in found.batches] == [12, 12, 12]
    assert found.count == 36


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("photos", "DataLoader"),
        (3, "DataLoader"),
        ([], "no images"),
        ([torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 9, 9)], "do not go together"),
        (torch.zeros(4, 3, 9, 9), r"takes \(N, 3, 8, 8\)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "normalise"),
        (torch.full((4, 3, 8, 8), float("nan")), "NaN"),
        ([("a", "b")], "holds 0 tensors"),
        (torch.zeros(0, 3, 8, 8), "at least 1"),
    ],
)
def test_what_does_not_fit_says_so(given: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        images.gather(given, SPEC)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_an_archive_is_scaled_resized_and_normalised(tmp_path: Path) -> None:
    known = pixels(5, 8, 8, 3)
    np.savez(tmp_path / "a.npz", images=known, labels=np.arange(5))
    found = images.read(tmp_path / "a.npz", (1, 3, 8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5))
    assert found.shape == (5, 3, 8, 8)
    assert float(found[2, 0, 3, 4]) == pytest.approx((known[2, 3, 4, 0] / 255 - 0.5) / 0.25, abs=1e-6)
    assert images.read(tmp_path / "a.npz", (1, 3, 32, 16)).shape == (5, 3, 32, 16)
    np.savez(tmp_path / "many.npz", images=pixels(1000, 2, 2, 3))
    assert len(images.read(tmp_path / "many.npz", (1, 3, 2, 2))) == images.MOST


def test_a_folder_is_read_by_name_from_the_middle_of_each_image(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "b" / "1.png")
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    found = images.read(tmp_path, (1, 3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    assert found.shape == (2, 3, 8, 8)
    assert bool((found[1] == 1).all())
    grey = images.read(tmp_path, (1, 1, 8, 8), mean=(0,), std=(1,))
    assert grey.shape == (2, 1, 8, 8)


def test_files_that_cannot_be_used_say_so(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "other.npz", pictures=pixels(2, 8, 8, 3))
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 8, 8, 3)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"nothing")
    for name in ("missing.npz", "broken.npz", "other.npz", "floats.npz", "empty", "bad"):
        with pytest.raises(InvalidInput, match="--calibrate"):
            images.read(tmp_path / name, (1, 3, 8, 8))
    with pytest.raises(InvalidInput, match="--mean"):
        images.read(tmp_path / "other.npz", (1, 1, 8, 8))
    with pytest.raises(InvalidInput, match=r"N, C, H, W"):
        images.read(tmp_path / "other.npz", (1, 10))


def test_a_part_sees_what_arrives_at_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())).eval()
    whole = reach(model, "1", GIVEN[:2], None)
    found = images.seen_by(GIVEN, trace(*whole.call), whole)
    assert torch.equal(found.batches[1][0], model[0](GIVEN[8:16]))
    assert found.digest == images.gather(GIVEN, SPEC).digest
