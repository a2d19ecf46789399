"""Calibration images: every way to give them comes to the same batches, and what does not fit says so."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from surgery.capture import reach
from surgery.capture.tracing import trace
from surgery.core.ir import InputSpec
from surgery.errors import InvalidInput
from surgery.inputs import batches
from surgery.inputs.datasets import Images, open_images
from surgery.inputs.libraries import Preprocessing

SPEC = (InputSpec("x", (2, 3, 8, 8), "float32", (0,)),)
MANY = (InputSpec("x", (2, 3, 2, 2), "float32", (0,)),)
GIVEN = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def labelled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(GIVEN, torch.arange(40)), batch_size=7)


@pytest.mark.parametrize(
    "given", [GIVEN, GIVEN.double(), list(GIVEN.split(9)), [(part, None) for part in GIVEN.split(40)], labelled()]
)
def test_every_way_to_give_images_comes_to_the_same(given: Any) -> None:
    found, wanted = batches.gather(given, SPEC), batches.gather(GIVEN, SPEC)
    assert found.described() == wanted.described() == {"images": 40, "sha256": wanted.digest}
    assert [len(x) for (x,) in found.batches] == [32, 8]
    assert torch.equal(torch.cat([x for (x,) in found.batches]), GIVEN)


def test_other_images_have_another_digest() -> None:
    other = GIVEN.clone()
    other[3, 1, 4, 4] += 1e-3
    assert batches.gather(other, SPEC).digest != batches.gather(GIVEN, SPEC).digest


def test_a_fixed_batch_is_kept() -> None:
    found = batches.gather(GIVEN, (InputSpec("x", (12, 3, 8, 8), "float32", ()),))
    assert [len(x) for (x,) in found.batches] == [12, 12, 12]
    assert found.count == 36


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("photos", "DataLoader"),
        (3, "DataLoader"),
        ([], "no images"),
        ([torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 9, 9)], "cannot join the batches of data"),
        (torch.zeros(4, 3, 9, 9), r"takes \(N, 3, 8, 8\)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "normalise"),
        (torch.full((4, 3, 8, 8), float("nan")), "NaN"),
        ([("a", "b")], "holds 0 tensors"),
        (torch.zeros(0, 3, 8, 8), "at least 1"),
    ],
)
def test_what_does_not_fit_says_so(given: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        batches.gather(given, SPEC)


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def opened(place: Path, shape: tuple[int, ...], **how: Any) -> Images:
    found = open_images(str(place), shape, Preprocessing(**how))
    assert isinstance(found, Images)
    return found


def test_an_archive_is_scaled_resized_and_normalised(tmp_path: Path) -> None:
    known = pixels(5, 8, 8, 3)
    np.savez(tmp_path / "a.npz", images=known, labels=np.arange(5))
    found = opened(tmp_path / "a.npz", (1, 3, 8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5))
    assert len(found) == 5 and found.classes
    image, label = found[2]
    assert image.shape == (3, 8, 8) and label == 2
    assert float(image[0, 3, 4]) == pytest.approx((known[2, 3, 4, 0] / 255 - 0.5) / 0.25, abs=1e-6)
    assert opened(tmp_path / "a.npz", (1, 3, 32, 16))[0][0].shape == (3, 32, 16)
    assert opened(tmp_path / "a.npz", (1, 3, 32, 16), size=(12, 20))[0][0].shape == (3, 12, 20)
    np.savez(tmp_path / "many.npz", images=pixels(1000, 2, 2, 3))
    assert batches.gather(opened(tmp_path / "many.npz", (1, 3, 2, 2)), MANY, 100).count == 100


def test_a_folder_is_read_by_name_from_the_middle_of_each_image(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "b" / "1.png")
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    found = opened(tmp_path, (1, 3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    assert len(found) == 2 and not found.classes
    assert bool((found[1][0] == 1).all())
    assert opened(tmp_path, (1, 1, 8, 8), mean=(0,), std=(1,))[0][0].shape == (1, 8, 8)


def test_the_crop_is_a_share_of_the_shorter_side(tmp_path: Path) -> None:
    framed = np.zeros((16, 32, 3), np.uint8)
    framed[4:12, 12:20] = 255
    Image.fromarray(framed).save(tmp_path / "1.png")
    whole, middle = (opened(tmp_path, (1, 3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), crop=c)[0][0] for c in (1.0, 0.5))
    assert float(middle.mean()) == pytest.approx(1.0)
    assert float(whole.mean()) == pytest.approx(0.25, abs=0.05)


def test_folders_side_by_side_are_classes(tmp_path: Path) -> None:
    for k, name in enumerate(("cat", "ant", "bee")):
        (tmp_path / name).mkdir()
        for n in range(k + 1):
            Image.fromarray(pixels(8, 8, 3)).save(tmp_path / name / f"{n}.png")
    found = opened(tmp_path, (1, 3, 8, 8))
    assert [found[k][1] for k in range(6)] == [0, 0, 1, 1, 1, 2]


def test_loops_of_links_count_each_file_once(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name / "deep").mkdir(parents=True)
        Image.fromarray(pixels(8, 8, 3)).save(tmp_path / name / "deep" / "1.png")
        (tmp_path / name / "deep" / "up").symlink_to(tmp_path)
        (tmp_path / name / "again").symlink_to(tmp_path / name / "deep")
    assert opened(tmp_path, (1, 3, 8, 8)).classes == (0, 1)


def test_classes_without_images_are_one_note(tmp_path: Path) -> None:
    for k in range(9):
        (tmp_path / str(k)).mkdir()
    for k in (3, 7):
        Image.fromarray(pixels(8, 8, 3)).save(tmp_path / str(k) / "1.png")
    found = opened(tmp_path, (1, 3, 8, 8))
    assert found.classes == (3, 7)
    assert found.notes() == ["--data: folder '0' and 6 others hold no images, and count as classes"]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_images_of_16_bits_are_scaled(tmp_path: Path, mode: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    raw = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(mode, (8, 8), raw)
    image.save(tmp_path / "1.tif")
    Image.fromarray(values).save(tmp_path / "2.png")
    found = opened(tmp_path, (1, 1, 8, 8), mean=(0,), std=(1,))
    for k in range(2):
        assert torch.allclose(found[k][0][0], torch.from_numpy(values / 65535).float(), atol=1 / 255)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_images_without_a_known_range_are_refused(tmp_path: Path, mode: str) -> None:
    Image.fromarray(pixels(8, 8)).convert(mode).save(tmp_path / "1.tif")
    with pytest.raises(InvalidInput, match=r"--data .*1 of 1 images .*1\.tif \(.* range is unknown: convert it to 8"):
        opened(tmp_path, (1, 1, 8, 8), mean=(0,), std=(1,))[0]


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    upright = pixels(8, 8, 3)
    held = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    held.save(tmp_path / "1.png", exif=exif)
    found = opened(tmp_path, (1, 3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1))[0][0]
    assert torch.allclose(found, torch.from_numpy(upright / 255).float().permute(2, 0, 1), atol=1e-6)


def exif_of(*entries: tuple[int, int, bytes]) -> bytes:
    """EXIF data of entries (tag, type, value in four bytes)."""
    content = b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + content + bytes(4)


def test_a_photo_is_turned_though_other_data_of_its_camera_are_damaged(tmp_path: Path) -> None:
    upright = pixels(8, 8, 3)
    turned, too_large = (0x0112, 3, struct.pack("<HH", 6, 0)), (0x0213, 4, struct.pack("<I", 70000))
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "1.png", exif=exif_of(turned, too_large))
    Image.fromarray(upright).save(tmp_path / "2.png", exif=b"Exif\0\0II*\0nothing of use")
    found = opened(tmp_path, (1, 3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(found[0][0], found[1][0])


def test_links_are_followed_and_one_to_itself_cannot_be_read(tmp_path: Path) -> None:
    for name in ("cats", "dogs", "store/inner"):
        (tmp_path / "data" / name if "store" not in name else tmp_path / name).mkdir(parents=True)
    for name in ("store/1.png", "store/inner/2.png", "data/cats/3.png"):
        Image.fromarray(pixels(8, 8, 3)).save(tmp_path / name)
    (tmp_path / "data" / "cats" / "1.png").symlink_to(tmp_path / "store" / "1.png")
    (tmp_path / "data" / "dogs" / "1.png").symlink_to(tmp_path / "store" / "1.png")  # in two classes
    for name in ("hens", "owls"):  # two classes that are links to one folder
        (tmp_path / "data" / name).symlink_to(tmp_path / "store")
    found = opened(tmp_path / "data", (1, 3, 8, 8))
    assert found.classes == (0, 0, 1, 2, 2, 3, 3)
    assert not found.folder_notes
    (tmp_path / "data" / "dogs" / "9.png").symlink_to(tmp_path / "data" / "dogs" / "9.png")
    with pytest.raises(InvalidInput, match=r"1 of 8 images cannot be read, the first is .*9\.png \("):
        list(opened(tmp_path / "data", (1, 3, 8, 8)).some(8))


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "1.png")
    (tmp_path / "._1.png").write_bytes(b"as macOS puts beside each file on other disks")
    assert len(opened(tmp_path, (1, 3, 8, 8))) == 1


def test_files_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    for k in range(120):
        Image.fromarray(pixels(8, 8, 3)).save(tmp_path / f"{k:03}.png")
    (tmp_path / "007.png").write_bytes(b"nothing")
    found = opened(tmp_path, (1, 3, 8, 8))
    assert batches.gather(found, SPEC, 120).count == 119
    assert found.notes() == ["--data: 1 files could not be read and were left out"]
    assert torch.equal(found[7][0], found[8][0])
    (tmp_path / "008.png").write_bytes((tmp_path / "009.png").read_bytes()[:40])
    with pytest.raises(InvalidInput, match=r"2 of 120 images cannot be read, the first is .*007.png"):
        batches.gather(opened(tmp_path, (1, 3, 8, 8)), SPEC, 120)


def test_files_that_cannot_be_used_say_so(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "other.npz", pictures=pixels(2, 8, 8, 3))
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "short.npz", images=pixels(2, 8, 8, 3), labels=np.arange(3))
    np.savez(tmp_path / "negative.npz", images=pixels(2, 8, 8, 3), labels=np.array([0, -1]))
    np.savez(tmp_path / "large.npz", images=pixels(2, 8, 8, 3), labels=np.array([0, 2**63], np.uint64))
    np.savez(tmp_path / "flat.npz", images=pixels(2, 0, 8, 3))
    (tmp_path / "empty").mkdir()
    for name in ("large.npz", "flat.npz"):
        with pytest.raises(InvalidInput, match="expected"):
            opened(tmp_path / name, (1, 3, 8, 8))
    for name in ("missing.npz", "broken.npz", "other.npz", "floats.npz", "short.npz", "negative.npz", "empty"):
        with pytest.raises(InvalidInput, match="--data"):
            opened(tmp_path / name, (1, 3, 8, 8))
    said = (
        "with --mean and --std give one finite number for each of 1 channels .* ImageNet's are taken, which are for 3"
    )
    with pytest.raises(InvalidInput, match=said):
        opened(tmp_path / "other.npz", (1, 1, 8, 8))
    with pytest.raises(InvalidInput, match=r"N, C, H, W"):
        opened(tmp_path / "other.npz", (1, 10))


def test_a_callable_of_the_users_gives_its_batches(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef good():\n    return [(torch.ones(4, 3, 8, 8), torch.arange(4))] * 3\n"
        "def bad():\n    return 3\ndef broken():\n    raise ValueError('no disk')\n"
    )
    found = open_images(f"{tmp_path}/mine.py:good", (1, 3, 8, 8), Preprocessing())
    assert batches.gather(found, SPEC).count == 12
    for name, said in (("bad", "returned int"), ("broken", "no disk"), ("none", "has no 'none'")):
        with pytest.raises(InvalidInput, match=said):
            open_images(f"{tmp_path}/mine.py:{name}", (1, 3, 8, 8), Preprocessing())


def test_a_part_sees_what_arrives_at_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())).eval()
    whole = reach(model, "1", GIVEN[:2], None)
    found = batches.calibration_images(GIVEN, trace(*whole.call), whole)
    assert torch.equal(found.batches[1][0], model[0](GIVEN[32:]))
    assert found.digest == batches.gather(GIVEN, SPEC).digest


def test_no_two_seeds_and_batches_give_the_same_draws() -> None:
    """As they would for augmentation, epoch by epoch."""
    draws = [float(x) for seed in range(3) for x in batches.read_batches((torch.rand(()) for _ in range(3)), seed)]
    assert len(set(draws)) == 9
