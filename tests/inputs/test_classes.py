"""Folders of images are matched to the model's outputs by name where the classes' names are known."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import surgery
from surgery.api import opened
from surgery.config import recipe
from surgery.errors import InvalidInput
from surgery.inputs import Images, LoadedModel


class Net(nn.Module):
    """Says of an image of one value which value it is."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def photos(folder: Path, *names: str) -> str:
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4, 3), k, np.uint8)).save(folder / name / "1.png")
    return str(folder)


def classes_of(outputs: int, known: tuple[str, ...] = (), **options: str) -> list[int]:
    loaded = LoadedModel(Net(outputs), torch.zeros(1, 3, 4, 4), classes=known)
    found = opened(recipe(**options), loaded, trained=True).data.val
    assert isinstance(found, Images)
    return list(found.classes)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("n01440764", "n01443537", "n15075141"), [0, 1, 999]),
        (("great_white_shark", "tench", "Toilet Tissue"), [2, 0, 999]),
        (("Carcharodon carcharias", "Tinca tinca"), [2, 0]),  # timm's
    ],
)
def test_folders_of_some_classes_of_imagenet_are_known_by_name(
    tmp_path: Path, names: tuple[str, ...], classes: list[int]
) -> None:
    assert classes_of(1000, val=photos(tmp_path, *names)) == [classes[names.index(name)] for name in sorted(names)]


def test_folders_of_a_model_with_as_many_outputs_are_taken_in_order(tmp_path: Path) -> None:
    assert classes_of(3, val=photos(tmp_path, "n01440764", "n01443537", "n15075141")) == [0, 1, 2]


def test_folders_are_called_by_the_names_of_published_weights(tmp_path: Path) -> None:
    assert classes_of(3, ("owl", "cat", "dog"), val=photos(tmp_path, "cat", "dog", "owl")) == [1, 2, 0]
    assert classes_of(2, ("owl", "cat", "dog"), val=photos(tmp_path / "b", "cat", "dog")) == [0, 1]  # another head


def test_a_file_names_the_classes_of_any_model(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("owl\tbird\ncat\ndog\nelk\nfly\n")
    val, names = photos(tmp_path / "val", "bird", "dog"), str(tmp_path / "names.txt")
    assert classes_of(5, val=val, classes=names) == [0, 2]
    with pytest.raises(InvalidInput, match=r"has 5 lines and the model 4 outputs"):
        classes_of(4, val=val, classes=names)
    with pytest.raises(InvalidInput, match=r"cannot be read"):
        classes_of(5, val=val, classes=str(tmp_path / "other.txt"))
    photos(tmp_path / "val", "yak")
    with pytest.raises(InvalidInput, match=r"--val: folder 'yak' is none of the classes of --classes .*names.txt"):
        classes_of(5, val=val, classes=names)
    with pytest.raises(InvalidInput, match="--classes is for images"):
        surgery.shrink(Net(5), torch.zeros(1, 3, 4, 4), recipe(macs=0.5, classes=names))


def test_folders_whose_classes_are_not_known_are_refused_at_once(tmp_path: Path) -> None:
    val = photos(tmp_path, "cat", "dog", "owl")
    with pytest.raises(InvalidInput, match=r"--val has 3 folders of classes and the model has 5.*--classes FILE"):
        classes_of(5, val=val)
    opened(recipe(data=val), LoadedModel(Net(5), torch.zeros(1, 3, 4, 4)), trained=True)  # which needs no classes
    with pytest.raises(InvalidInput, match="--data has 3 folders of classes and the model has 5"):
        opened(recipe(data=val, recover="finetune"), LoadedModel(Net(5), torch.zeros(1, 3, 4, 4)), trained=True)
    photos(tmp_path / "b", "n01440764", "n01443537", "tench")
    with pytest.raises(InvalidInput, match="folder 'tench' is none of the classes of the model"):
        classes_of(1000, val=str(tmp_path / "b"))


def test_how_images_are_read_and_the_dense_accuracy_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    val, model = photos(tmp_path, "cat", "dog", "owl"), Net(3)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    with caplog.at_level(logging.INFO, "surgery"), pytest.raises(InvalidInput, match="no better than chance"):
        surgery.shrink(model, torch.zeros(1, 3, 4, 4), recipe(macs=0.5, val=val, mean=(0.5,) * 3))
    assert caplog.messages == [
        f"--val {tmp_path}: 3 images of 3 classes, --size 4,4 --crop 1 --mean 0.5,0.5,0.5 --std 0.229,0.224,0.225",
        "dense model: accuracy 33.33 % on 3 images of --val",
    ]
