"""What recovery is judged and taught by: the same images for every model, classes as they are, nothing misread."""

from __future__ import annotations

import copy
import subprocess
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_surgery
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import surgery
from surgery.config import MILDEST, recipe
from surgery.core.ir import InputSpec
from surgery.errors import InvalidInput
from surgery.inputs.datasets import open_images
from surgery.inputs.libraries import Preprocessing
from surgery.recovery import evaluation
from surgery.recovery.evaluation import Pairs, Reference, paired_drop

ROOT = Path(__file__).resolve().parents[2]
PLAIN = Preprocessing((0.0,) * 3, (1.0,) * 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.fc = nn.Conv2d(16, 24, 3, stride=2), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.bn.running_mean.normal_(0, 0.3)  # type: ignore[union-attr, operator]
        model.bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return model.eval()


@pytest.fixture(scope="module")
def images(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Each image's class is what the model says of it."""
    torch.manual_seed(1)
    x = torch.randn(160, 3, 10, 10)
    with torch.no_grad():
        return x, model(x).argmax(1)


@pytest.fixture(scope="module")
def cut(model: nn.Module, images: tuple[Tensor, Tensor]) -> surgery.Result:
    budget = surgery.Budget(macs=0.5)
    return surgery.shrink(model, images[0][:1], surgery.recipe(budget=budget, data=images[0], recover="none"))


# Images to judge by. -------------------------------------------------------------------------------------------------


def test_the_order_of_a_loader_changes_nothing(cut: surgery.Result, images: tuple[Tensor, Tensor]) -> None:
    found = [
        surgery.recover(
            cut,
            surgery.recipe(
                data=images, recover="bn", val=DataLoader(TensorDataset(*images), batch_size=32, shuffle=shuffle)
            ),
        )
        for shuffle in (False, True)
    ]
    first, second = ([step.agreement for step in result.steps] for result in found)
    assert first[0] is not None
    assert first[0].accuracy == 1.0
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        assert a.accuracy == b.accuracy
        assert a.top1_match == b.top1_match
        assert a.error == pytest.approx(b.error, rel=1e-6, abs=1e-12)


class _Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Images with noise from a generator that is known to it alone, or from torch's."""

    def __init__(self, images: tuple[Tensor, Tensor], generator: torch.Generator | None) -> None:
        self._images, self._generator = images, generator

    def __len__(self) -> int:
        return len(self._images[0])

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(3, 10, 10, generator=self._generator)
        return self._images[0][k] + 0.1 * noise, self._images[1][k]


def test_images_that_are_others_each_time_are_refused_where_they_cannot_be_held(
    cut: surgery.Result, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "KEPT", 1000)
    with pytest.raises(InvalidInput, match="val gives other images each time"):
        surgery.recover(
            cut,
            surgery.recipe(data=images, recover="bn", val=DataLoader(_Noisy(images, torch.Generator()), batch_size=32)),
        )
    for shuffle in (False, True):  # what is drawn from torch's generator is the same each time
        loader = DataLoader(_Noisy(images, None), batch_size=32, shuffle=shuffle)
        result = surgery.recover(cut, surgery.recipe(data=images, recover="bn", val=loader))
        assert result.steps[0].agreement is not None
        assert result.steps[0].agreement.accuracy is not None
        assert result.steps[0].agreement.accuracy > 0.9


def test_outputs_that_are_too_many_are_made_again(
    model: nn.Module, cut: surgery.Result, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: Any = [((part,), None) for part in torch.split(images[0], 32)]
    held = Reference(lambda inputs: model(*inputs), batches, "images")
    monkeypatch.setattr(evaluation, "HELD", 100)
    recomputed = Reference(lambda inputs: model(*inputs), batches, "images")
    assert held.outputs is not None
    assert recomputed.outputs is None
    compact = cut.model
    assert held.judge(lambda inputs: compact(*inputs)) == recomputed.judge(lambda inputs: compact(*inputs))


def test_error_and_correlation_are_what_all_outputs_at_once_give(
    model: nn.Module, cut: surgery.Result, images: tuple[Tensor, Tensor]
) -> None:
    batches: Any = [((part,), None) for part in torch.split(images[0], 48)]
    reference = Reference(lambda inputs: model(*inputs) + 100, batches, "images")
    with torch.no_grad():
        own, other = (m(images[0]).double() + shift for m, shift in ((model, 100), (cut.model, 0)))
    own, other = own.float().double(), other.float().double()
    found = reference.judge(lambda inputs: cut.model(*inputs))
    error = float((own - other).square().sum() / (own - own.mean(0)).square().sum())
    assert found.error == pytest.approx(error, rel=1e-5)
    own, other = own - own.mean(0), other - other.mean(0)
    wanted = float((own * other).sum() / (own.norm() * other.norm()))
    assert found.correlation == pytest.approx(wanted, rel=1e-5)


def drop_of(lost: int, won: int, count: int) -> tuple[float, float, float]:
    dense, compact = torch.ones(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    compact[:lost] = False
    dense[count - won :] = False
    return paired_drop(dense, compact)


@pytest.mark.parametrize("count", [10, 1000])
def test_no_disagreement_on_a_few_images_is_no_proof(count: int) -> None:
    value, low, high = drop_of(0, 0, count)
    assert value == 0.0
    assert high == -low == pytest.approx(100 * 1.96**2 / (count + 1.96**2), rel=1e-3)


@pytest.mark.parametrize(
    ("lost", "won", "count", "low", "high"),
    [(1, 0, 44, -0.05939, 0.11807), (5, 2, 40, -0.06568, 0.22339), (3, 3, 30, -0.18169, 0.18169)],
)
def test_the_interval_is_the_score_interval(lost: int, won: int, count: int, low: float, high: float) -> None:
    """Ends found by maximising the likelihood of the pairs under each difference by brute force."""
    assert drop_of(lost, won, count)[1:] == pytest.approx((100 * low, 100 * high), abs=1e-3)


@pytest.mark.parametrize("won", [0, 3, 12])
def test_no_image_lost_moves_the_interval_down_and_none_won_moves_it_up(won: int) -> None:
    for more_lost in (True, False):
        found = [drop_of(k, won, 200) if more_lost else drop_of(won, k, 200) for k in range(0, 45, 2)]
        ends = [(low, high) if more_lost else (-high, -low) for _, low, high in found]
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(ends))


def test_many_images_that_differ_have_nearly_the_bootstraps_interval() -> None:
    assert drop_of(40, 10, 1000) == pytest.approx((3.0, 1.6, 4.4), abs=0.15)


@pytest.mark.parametrize("count", [96, 100])
def test_a_fixed_batch_is_filled_from_batches_of_any_size(count: int, images: tuple[Tensor, Tensor]) -> None:
    x, y = images[0][:count], images[1][:count]
    pairs = Pairs(DataLoader(TensorDataset(x, y), batch_size=7), [InputSpec("x", (8, 3, 10, 10), "float32")])
    found = list(pairs)
    assert [len(batch[0]) for batch, _ in found] == [8] * 12
    assert torch.equal(torch.cat([batch[0] for batch, _ in found]), x[:96])
    assert torch.equal(torch.cat([labels for _, labels in found if labels is not None]), y[:96])
    assert pairs.count == 96
    assert pairs.notes == ["the model takes 8 images at a time: the last 4 of --val are left out"] * (count == 100)


def test_too_few_images_for_a_fixed_batch_are_said_to_be_few(images: tuple[Tensor, Tensor]) -> None:
    pairs = Pairs(images[0][:5], [InputSpec("x", (8, 3, 10, 10), "float32")])
    with pytest.raises(InvalidInput, match="val holds only 5 images, and the model takes 8 at a time"):
        list(pairs)


def test_a_file_that_cannot_be_read_is_not_judged_by(tmp_path: Path) -> None:
    for k in range(101):
        make(tmp_path / f"{k:03}.png", k)
    (tmp_path / "007.png").write_text("no image")
    found = open_images(str(tmp_path), (1, 3, 10, 10), PLAIN, option="--val")
    pairs = Pairs(found, [InputSpec("x", (1, 3, 10, 10), "float32", (0,))])
    red = torch.cat([batch[0][:, 0, 0, 0] for batch, _ in pairs])
    assert pairs.count == 100
    assert [round(255 * float(x)) for x in red] == [k for k in range(101) if k != 7]
    assert found.notes() == ["--val: 1 files could not be read and were left out"]


# Classes. ------------------------------------------------------------------------------------------------------------


def test_classes_in_a_column_are_classes(cut: surgery.Result, images: tuple[Tensor, Tensor]) -> None:
    loader = DataLoader(TensorDataset(images[0], images[1][:, None]), batch_size=32)
    result = surgery.recover(cut, surgery.recipe(data=images, recover="bn", val=loader))
    assert result.report["accuracy"]["status"] == "measured"


def test_classes_that_cannot_be_used_are_said(cut: surgery.Result, images: tuple[Tensor, Tensor]) -> None:
    hot = nn.functional.one_hot(images[1], 5)
    result = surgery.recover(
        cut, surgery.recipe(data=images, recover="bn", val=DataLoader(TensorDataset(images[0], hot), batch_size=32))
    )
    assert any("not one whole number for each image" in note for note in result.report["notes"])


@pytest.mark.parametrize("wrong", [99, -7])
def test_a_label_out_of_range_is_refused_before_the_work(
    cut: surgery.Result, images: tuple[Tensor, Tensor], wrong: int
) -> None:
    labels = images[1].clone()
    labels[17] = wrong
    with pytest.raises(InvalidInput, match=f"a label is {wrong}, but the model has 5 classes"):
        surgery.recover(cut, surgery.recipe(data=(images[0], labels), recover="finetune", epochs=1))


def test_labels_of_a_loader_are_looked_at_before_the_work(
    model: nn.Module, images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(x: Tensor, *classes: Tensor) -> dict[str, Any]:
        return {"data": DataLoader(TensorDataset(x, *classes), batch_size=32), "recover": "finetune", "epochs": 1}

    budget, (x, y) = surgery.Budget(macs=0.5), images
    wide = surgery.shrink(model, x[:1], surgery.recipe(budget=budget, **asked(x, y, nn.functional.one_hot(y, 9))))
    assert wide.steps[-1].name == "finetune"
    monkeypatch.setattr("surgery.planning.decision._chosen", None)
    pairs = {"val": (x, y + 5), "data": x, "recover": "none"}
    for given, said in (
        (asked(x, y + 5), "data: a label is"),
        (asked(x), "learns classes"),
        (pairs, "val: a label is"),
    ):
        with pytest.raises(InvalidInput, match=said):
            surgery.shrink(model, x[:1], surgery.recipe(budget=budget, **given))


def test_a_model_of_a_fixed_batch_is_not_trained_and_that_is_said_before_the_work(
    images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(4, 5)

    monkeypatch.setattr("surgery.planning.decision._chosen", None)
    with pytest.raises(InvalidInput, match="this one takes 4 at a time"):
        surgery.shrink(Fixed(), images[0][:4], surgery.recipe(macs=0.5, data=images[0], recover="distill"))


def make(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 10), (colour, 0, 0)).save(path)


def layout(folder: Path, kind: str) -> Path:
    for k, name in enumerate(("ant", "bee", "cat")):
        below = "deep/deeper" if kind == "deep" else "."
        make(folder / "real" / name / below / f"{name}.png", 10 * k)
    place = folder / "real"
    if kind == "stray":
        make(place / "stray.png", 200)
    if kind == "links":
        (folder / "linked").mkdir()
        for name in ("ant", "bee", "cat"):
            (folder / "linked" / name).symlink_to(place / name)
        place = folder / "linked"
    return place


@pytest.mark.parametrize("kind", ["plain", "deep", "stray", "links"])
def test_folders_are_read_as_torchvision_does(tmp_path: Path, kind: str) -> None:
    from surgery.inputs import import_torchvision

    place = layout(tmp_path, kind)
    theirs = import_torchvision().datasets.ImageFolder(str(place))
    found = open_images(str(place), (1, 3, 10, 10), PLAIN)
    assert [(str(file), label) for file, label in zip(found.items, found.classes, strict=True)] == theirs.samples
    assert any("beside the folders" in note for note in found.notes()) == (kind == "stray")


def test_a_class_without_images_keeps_its_number(tmp_path: Path) -> None:
    place = layout(tmp_path, "plain")
    (place / "bee" / "bee.png").unlink()
    found = open_images(str(place), (1, 3, 10, 10), PLAIN)
    assert found.classes == (0, 2)
    assert any("'bee' holds no images, and counts as a class" in note for note in found.notes())


def test_one_folder_is_no_class_and_that_is_said(tmp_path: Path) -> None:
    make(tmp_path / "holidays" / "a.png")
    make(tmp_path / "holidays" / "b.png")
    found = open_images(str(tmp_path), (1, 3, 10, 10), PLAIN)
    assert not found.classes
    assert any("all images are in one folder" in note for note in found.notes())


# Damage. -------------------------------------------------------------------------------------------------------------


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "z.npz"
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 255, (40, 10, 10, 3), dtype=np.uint8))
    with zipfile.ZipFile(path) as archive:
        at = archive.infolist()[0].header_offset + 200
    content = bytearray(path.read_bytes())
    content[at : at + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="give a folder of images"):
        open_images(str(path), (1, 3, 10, 10), PLAIN)


def test_files_that_cannot_be_read_are_refused_while_training_too(cut: surgery.Result, tmp_path: Path) -> None:
    for k in range(40):
        make(tmp_path / f"{k:02}.png", k)
    for k in range(1, 40, 4):
        (tmp_path / f"{k:02}.png").write_text("no image")
    data = open_images(str(tmp_path), (1, 3, 10, 10), PLAIN)
    with pytest.raises(InvalidInput, match="images cannot be read"):
        surgery.recover(cut, surgery.recipe(data=data, recover="distill", max_images=2, epochs=1, train_batch=8))


def test_a_pixel_that_is_no_number_is_refused_where_it_is_held_out(
    cut: surgery.Result, images: tuple[Tensor, Tensor]
) -> None:
    for seed in range(3):
        x = images[0].clone()
        held = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[0]
        x[held] = float("nan")
        good = [k for k in range(len(x)) if k != int(held)][:8]
        result = surgery.recover(cut, surgery.recipe(data=x[good], recover="reconstruct"))
        with pytest.raises(InvalidInput, match=r"not a number|NaN"):
            surgery.recover(
                result, surgery.recipe(data=_First(x, good), recover="distill", max_images=8, epochs=2, seed=seed)
            )


class _First(Dataset[tuple[Tensor, int]]):
    """Images of which those that are looked at first are good."""

    def __init__(self, x: Tensor, good: list[int]) -> None:
        self._x, self._good, self._asked = x, good, 0

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        self._asked += 1
        return (self._x[self._good[k % len(self._good)]] if self._asked <= 40 else self._x[k]), -1


# Training. -----------------------------------------------------------------------------------------------------------


def test_reconstruction_is_the_same_whatever_mode_the_model_is_in(images: tuple[Tensor, Tensor]) -> None:
    errors = []
    for mode in (False, True):
        torch.manual_seed(0)
        model = Net().train(mode)
        budget = surgery.Budget(macs=0.5)
        result = surgery.shrink(model, images[0][:1], surgery.recipe(budget=budget, data=images[0], criterion="l1"))
        assert result.model.training is mode
        assert result.steps[-1].agreement is not None
        errors.append(result.steps[-1].agreement.error)
    assert errors[0] == errors[1]


def test_fine_tuning_by_a_loader_never_ends_below_where_it_began(
    cut: surgery.Result, images: tuple[Tensor, Tensor]
) -> None:
    def loader() -> Any:
        return DataLoader(TensorDataset(*images), batch_size=32)

    fitted = surgery.recover(cut, surgery.recipe(data=images, recover="reconstruct", val=images))
    found = surgery.recover(cut, surgery.recipe(data=loader(), recover="finetune", val=images, epochs=2, lr=1.0))
    before, after = (result.steps[-1].agreement for result in (fitted, found))
    assert before is not None
    assert after is not None
    assert after.accuracy is not None
    assert before.accuracy is not None
    assert after.accuracy >= before.accuracy - 0.02


class Stopped(Exception):
    pass


@pytest.mark.parametrize("other", ["labels", "weights", "images"])
def test_a_checkpoint_of_another_run_is_not_taken_up(
    other: str, model: nn.Module, cut: surgery.Result, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    def stop(stage: str, fraction: float) -> None:
        if stage == "finetune" and fraction >= 0.5:
            raise Stopped

    training = {"epochs": 4, "train_batch": 32, "checkpoint_steps": 2, "checkpoint": tmp_path / "training"}
    with pytest.raises(Stopped):
        surgery.recover(cut, surgery.recipe(data=images, recover="finetune", **training), progress=stop)
    assert (tmp_path / "training" / "training.pt").is_file()
    x, y, result = images[0], images[1], cut
    if other == "labels":
        y = (y + 1) % 5
    elif other == "images":
        x = x + torch.arange(len(x)).remainder(2).view(-1, 1, 1, 1)
    else:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.fc.bias += 0.5  # type: ignore[union-attr, operator]
        result = surgery.shrink(twin, x[:1], surgery.recipe(macs=0.5, data=x, recover="none"))
        assert result.plan.digest == cut.plan.digest
    found = surgery.recover(result, surgery.recipe(data=(x, y), recover="finetune", **training))
    assert found.steps[-1].history is not None
    assert found.steps[-1].history.resumed == 0


# What is asked for. --------------------------------------------------------------------------------------------------


def test_a_drop_without_a_budget_begins_with_the_mildest_cut() -> None:
    assert recipe(max_drop=1.0, data=1).goal == MILDEST
    assert recipe(macs=0.5).goal == surgery.Budget(macs=0.5)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--max-drop", "1"], {"WORLD_SIZE": "2", "RANK": "0"}, "in one process: leave torchrun out"),
        (["--epochs", "3"], {}, "--epochs is for training: add --recover distill or finetune"),
        (["--data", ".", "--mean", "nan,0,0"], {}, "give a number for each channel"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    done = shrink(tmp_path, arguments, environment)
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("local", "silent"), [("4", True), ("0", False)])
def test_a_mistake_is_told_once_on_each_host(tmp_path: Path, local: str, silent: bool) -> None:
    environment = {"WORLD_SIZE": "8", "RANK": "4", "LOCAL_RANK": local}
    done = shrink(tmp_path, ["--data", "nowhere", "--recover", "distill"], environment)
    assert (done.stderr == "") == silent
    assert silent or "--data nowhere" in done.stderr


def shrink(folder: Path, arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    make(folder / "a.png")
    (folder / "net.py").write_text(
        "import torch\ndef net():\n    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)\n"
        "    return torch.nn.Sequential(*layers), torch.zeros(1, 3, 16, 16)\n"
    )
    done = run_surgery(folder, "shrink", "net.py:net", "--out", "out", *arguments, env=environment)
    assert done.returncode == 2
    return done


def test_the_same_images_for_fitting_and_judging_are_reported(
    cut: surgery.Result, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    np.savez(tmp_path / "some.npz", images=np.zeros((16, 10, 10, 3), np.uint8), labels=np.arange(16) % 5)
    name = str(tmp_path / "some.npz")
    for data, val, told in ((images, images, True), (name, name, True), (images[0], images, False)):
        notes = surgery.recover(cut, surgery.recipe(data=data, val=val, recover="bn")).report["notes"]
        assert any("--val has the images of --data" in note for note in notes) is told


def test_figures_are_of_the_weights_that_are_saved(
    cut: surgery.Result, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    recovered = surgery.recover(cut, surgery.recipe(data=images[0], val=images, recover="bn"))
    fast = surgery.recipe(runs=3)
    unchanged = surgery.save(recovered, tmp_path / "unchanged", fast).data
    assert [step["name"] for step in unchanged["recovery"]["steps"]] == ["dense", "cut", "bn"]
    with torch.no_grad():
        recovered.model.fc.weight.neg_()  # type: ignore[union-attr, operator]
    data = surgery.save(recovered, tmp_path / "changed", fast).data
    assert [step["name"] for step in data["recovery"]["steps"]] == ["dense", "cut", "bn", "current weights"]
    loaded = surgery.load(tmp_path / "changed", Net().train())
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        accuracy = float((loaded(images[0]).argmax(1) == images[1]).double().mean())
    row = next(row for row in data["models"] if row["name"] == "compact")
    assert row["agreement"]["accuracy"] == pytest.approx(accuracy)
    assert f"accuracy {100 * accuracy:.2f} %" in data["accuracy"]["verdict"]
    assert sum("the weights changed after" in note for note in data["notes"]) == 1


def test_figures_of_a_dense_model_that_changed_are_measured_again(
    model: nn.Module, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    dense = copy.deepcopy(model)
    found = surgery.shrink(dense, images[0][:1], recipe(macs=0.5, val=images, recover="none", runs=3))
    with torch.no_grad():
        dense.fc.weight.neg_()  # type: ignore[union-attr, operator]
    data = surgery.save(found, tmp_path / "out").data
    accuracy = float((dense(images[0]).argmax(1) == images[1]).double().mean())
    first, last = data["recovery"]["steps"]
    assert first["agreement"]["accuracy"] == pytest.approx(accuracy)
    assert last["agreement"]["drop"][0] == pytest.approx(100 * (accuracy - last["agreement"]["accuracy"]))
    assert any("the dense model's weights changed after" in note for note in data["notes"])


def test_weights_are_loaded_with_their_own_plan_and_report(cut: surgery.Result, tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    for folder, plan in ((first, cut.plan), (other, replace(cut.plan, notes=("another",)))):
        surgery.save(replace(cut, plan=plan), folder, recipe(runs=3))
    weights = (first / "compact.safetensors").read_bytes()
    (first / "compact.safetensors").write_bytes((other / "compact.safetensors").read_bytes())
    with pytest.raises(InvalidInput, match=r"has the weights of another plan than plan\.json beside it"):
        surgery.load(first, Net())
    (first / "compact.safetensors").write_bytes(weights)
    tuned = surgery.load(first, Net())
    save_file({name: x + 1 for name, x in tuned.state_dict().items()}, first / "compact.safetensors")
    with pytest.warns(UserWarning, match=r"changed after report\.json beside it, whose figures are of other weights"):
        assert torch.equal(surgery.load(first, Net()).fc.bias, tuned.fc.bias + 1)  # type: ignore[arg-type, operator]


def test_labels_that_do_not_fit_are_refused_before_any_work(model: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    others = (images[0], (images[1] + 2) % 5)
    with pytest.raises(InvalidInput, match=r"classifies 0\.0% of 160 images of --val correctly, no better than chance"):
        surgery.shrink(model, images[0][:1], recipe(macs=0.5, val=others, recover="none"))
    allowed = surgery.shrink(model, images[0][:1], recipe(macs=0.5, val=others, recover="none", allow_chance=True))
    assert allowed.steps[0].agreement is not None and allowed.steps[0].agreement.accuracy == 0


def test_folders_of_some_of_the_classes_are_refused(model: nn.Module, tmp_path: Path) -> None:
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(tmp_path / name / "1.png")
    with pytest.raises(InvalidInput, match="--val has 3 folders of classes and the model has 5"):
        surgery.shrink(model, torch.randn(1, 3, 10, 10), recipe(macs=0.5, val=str(tmp_path), recover="none"))
