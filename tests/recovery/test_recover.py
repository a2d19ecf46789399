"""Recovery as its users see it: by a call and on the command line, with images and without, killed and taken up."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_surgery
from stairs import table_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import surgery
from surgery import pipeline
from surgery.capture.tracing import trace
from surgery.core.ir import InputSpec
from surgery.coupling.coupler import couple
from surgery.errors import BudgetUnreachable, InvalidInput
from surgery.inputs import LoadedModel
from surgery.planning.decision import decide
from surgery.recovery import training
from surgery.recovery.evaluation import Reference, paired_drop
from surgery.recovery.random_images import drawn_images
from surgery.recovery.run import Outcome, Task
from surgery.recovery.training import Views, loss_of
from surgery.registry import RECOVERY_METHODS
from surgery.report import Report

ROOT = Path(__file__).resolve().parents[2]

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.fc = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.conv3(x))
        return self.fc(x.mean((2, 3)))

def net():
    return Net(), torch.zeros(1, 1, 8, 8)
"""
SPACE: dict[str, Any] = {}
exec(NETWORK, SPACE)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits at 8 x 8, 0 to 1."""
    data = pytest.importorskip("sklearn.datasets", reason="scikit-learn comes with the test extra").load_digits()
    return torch.from_numpy(data.images).float().unsqueeze(1) / 16, torch.from_numpy(data.target)


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = SPACE["Net"]()
    x, y = digits[0][:1300] * 2 - 1, digits[1][:1300]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(160):
        index = torch.arange(step * 64, step * 64 + 64) % len(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def images(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digits[0][:1300] * 2 - 1, digits[1][:1300]


@pytest.fixture(scope="module")
def unseen(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digits[0][1300:] * 2 - 1, digits[1][1300:]


@pytest.fixture(scope="module")
def cut(trained: nn.Module, images: tuple[Tensor, Tensor]) -> surgery.Result:
    return surgery.shrink(trained, images[0][:2], surgery.recipe(macs=0.35, criterion="l1"))


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).double().mean())


def divergence(model: nn.Module, dense: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Kullback and Leibler's, of the dense model's classes from the model's."""
    with torch.no_grad():
        ours, theirs = (m(data[0]).log_softmax(1) for m in (model, dense))
        return float((theirs.exp() * (theirs - ours)).sum(1).mean())


# Steps. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["fold", "bn", "reconstruct", "distill", "finetune"])
def test_every_level_helps(
    level: str, trained: nn.Module, cut: surgery.Result, images: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor]
) -> None:
    """A network of which a third is left: with the images it learns from, or with none."""
    before = [p.clone() for p in cut.model.parameters()]
    training = {"epochs": 3, "train_batch": 64, "lr": 2e-3, "flip": False, "mix": False}
    training = training if level in ("distill", "finetune") else {}
    data = None if level == "fold" else images
    found = surgery.recover(cut, surgery.recipe(data=data, recover=level, val=unseen, max_images=256, **training))
    assert all(torch.equal(a, b) for a, b in zip(before, cut.model.parameters(), strict=True))
    steps = found.report["recovery"]["steps"]
    assert [s["name"] for s in steps[:2]] == ["dense", "cut"]
    assert found.steps[-1].name == level
    assert accuracy(found.model, unseen) == pytest.approx(steps[-1]["agreement"]["accuracy"])
    assert divergence(found.model, trained, unseen) < 0.9 * divergence(cut.model, trained, unseen)
    if level != "bn":  # one of its layers has a norm, which alone moves few images over a border
        assert accuracy(found.model, unseen) >= accuracy(cut.model, unseen) + 0.1
    value, low, high = steps[-1]["agreement"]["drop"]
    assert low <= value <= high
    assert found.report["accuracy"]["status"] == "measured"


def test_shrink_recovers_by_default_where_there_are_data(
    trained: nn.Module, images: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor]
) -> None:
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    found = surgery.shrink(trained, images[0][:2], surgery.recipe(macs=0.5, data=images, val=unseen))
    assert found.plan.settings["criterion"] == "second-order"
    assert found.plan.settings["data"]["images"] == 512
    assert [s.name for s in found.steps] == ["dense", "cut", "reconstruct"]
    assert accuracy(found.model, unseen) > accuracy(trained, unseen) - 0.05
    assert all(torch.equal(v, state[k]) for k, v in trained.state_dict().items())
    again = surgery.shrink(trained, images[0][:2], surgery.recipe(macs=0.5, data=images, val=unseen))
    assert again.plan.to_json() == found.plan.to_json()
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), again.model.parameters(), strict=True))


def test_several_steps_come_to_one_plan(
    trained: nn.Module, images: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor]
) -> None:
    budget = surgery.Budget(macs=0.3)
    found = surgery.shrink(
        trained,
        images[0][:2],
        surgery.recipe(budget=budget, data=iter([images]), max_images=256, val=iter([unseen]), steps=3),
    )
    dense, kept = (found.report["models"][k]["macs"] for k in (0, 2))
    assert 0.2 < kept / dense <= 0.3
    again = surgery.apply(found.plan, trained)
    assert [p.shape for p in again.parameters()] == [p.shape for p in found.model.parameters()]
    assert accuracy(found.model, unseen) > 0.6
    names = ["dense", *(f"{name} {k} of 3" for k in (1, 2) for name in ("cut", "reconstruct")), "cut", "reconstruct"]
    assert [step.name for step in found.steps] == names
    judged = [step.agreement.accuracy for step in found.steps if step.agreement is not None]
    assert len(judged) == 7 and judged[2] is not None and judged[1] is not None and judged[2] >= judged[1]
    assert judged[-1] == pytest.approx(accuracy(found.model, unseen))
    for wrong in ({"budget": surgery.Budget(latency=0.5)}, {"budget": budget, "data": None}, {"steps": 0}):
        with pytest.raises(InvalidInput, match="steps"):
            surgery.shrink(
                trained, images[0][:2], surgery.recipe(**{"budget": budget, "data": images, "steps": 2, **wrong})
            )  # type: ignore[arg-type]


@pytest.mark.parametrize("criterion", ["activation", "reconstruction", "taylor", "second-order"])
def test_criteria_that_look_at_images_beat_chance(
    criterion: str, trained: nn.Module, images: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor]
) -> None:
    def kept(by: str) -> float:
        budget = surgery.Budget(macs=0.4)
        found = surgery.shrink(
            trained, images[0][:2], surgery.recipe(budget=budget, data=images, criterion=by, max_images=256)
        )
        return accuracy(found.model, unseen)

    assert kept(criterion) >= kept("random") - 0.02


@pytest.fixture
def registered() -> Iterator[None]:
    """Methods that a test registers are removed after it."""
    built_in = RECOVERY_METHODS.names()
    yield
    for name in set(RECOVERY_METHODS.names()).difference(built_in):
        RECOVERY_METHODS.remove(name)


def test_a_method_registered_from_outside_is_chosen_by_name_and_undone_where_it_makes_it_worse(
    cut: surgery.Result, registered: None
) -> None:

    def scale(task: Task, factor: float) -> Outcome:
        with torch.no_grad():
            for p in task.subject.compact.module.parameters():
                p.mul_(factor)
        return Outcome((f"{len(task.images)} batches",))

    surgery.recovery_method("nothing", needs=["images"])(lambda task: scale(task, 1.0))
    surgery.recovery_method("spoilt", needs=["images"], after="bn")(lambda task: scale(task, float("nan")))
    surgery.recovery_method("drawn", needs=["drawn-images"])(lambda task: scale(task, 1.0))
    data = torch.rand(32, 1, 8, 8)
    kept = surgery.recover(cut, surgery.recipe(data=data, recover="nothing")).steps[-1]
    assert kept.kept and kept.name == "nothing" and kept.notes == ("1 batches",)
    with pytest.raises(InvalidInput, match="--recover nothing uses images"):
        surgery.recover(cut, surgery.recipe(recover="nothing"))
    assert surgery.recover(cut, surgery.recipe(recover="drawn", val=data)).steps[-1].name == "drawn"
    with pytest.raises(ValueError, match="already"):
        surgery.recovery_method("bn")(lambda task: Outcome())
    found = surgery.recover(cut, surgery.recipe(data=data, recover="spoilt"))
    assert [step.name for step in found.steps] == ["dense", "cut", "bn", "spoilt"]
    assert not found.steps[-1].kept
    assert any("undone" in note for note in found.steps[-1].notes)
    assert all(torch.equal(a, b) for a, b in zip(cut.model.parameters(), found.model.parameters(), strict=True))


def test_without_labels_agreement_is_measured_and_named_so(cut: surgery.Result, images: tuple[Tensor, Tensor]) -> None:
    found = surgery.recover(cut, surgery.recipe(data=images[0][:100]))
    told = found.report["accuracy"]
    assert told["status"] == "agreement"
    assert told["verdict"].startswith("accuracy unknown; agreement with the dense model: top-1 match ")
    assert "--data" in told["verdict"]
    assert found.steps[-1].agreement is not None and found.steps[-1].agreement.accuracy is None


def test_a_dense_model_in_training_mode_stays_as_it_is(trained: nn.Module) -> None:
    model = copy.deepcopy(trained).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(64, 1, 8, 8)
    found = surgery.shrink(model, x[:2], surgery.recipe(macs=0.5, data=x, val=x))
    surgery.recover(found, surgery.recipe(data=x, recover="bn"))
    surgery.recover(found, surgery.recipe(data=x, recover="distill", epochs=1, train_batch=16))
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_training_that_runs_away_is_undone(cut: surgery.Result, images: tuple[Tensor, Tensor]) -> None:
    """By what is held out of images; where they come as batches, by those that were looked at."""
    x = images[0][:128]
    wild = {"epochs": 2, "train_batch": 16, "lr": 9.0, "ema": 0.0}
    before = surgery.recover(cut, surgery.recipe(data=x, recover="reconstruct")).steps[-1].agreement
    for data in (x, DataLoader(TensorDataset(x), batch_size=16)):
        after = surgery.recover(cut, surgery.recipe(data=data, recover="distill", **wild)).steps[-1].agreement
        assert before is not None and after is not None
        assert after.cosine > before.cosine - 0.05


def test_each_training_has_its_own_precision(cut: surgery.Result, images: tuple[Tensor, Tensor]) -> None:
    """Accelerate keeps one for the process, which may be the user's."""
    from accelerate import Accelerator

    before = Accelerator(cpu=True, mixed_precision="no").state.mixed_precision
    for precision in ("bf16", "no"):
        training = {"epochs": 1, "train_batch": 32, "mixed_precision": precision}
        found = surgery.recover(cut, surgery.recipe(data=images[0][:128], recover="distill", **training))
        assert found.steps[-1].history is not None and found.steps[-1].history.steps == 3
    assert Accelerator(cpu=True).state.mixed_precision == before


@pytest.mark.parametrize(("judge", "said"), [(3, "not a function"), (lambda model: 3, "returned int")])
def test_an_evaluation_that_is_none_says_so(judge: Any, said: str, trained: nn.Module) -> None:
    x = torch.rand(16, 1, 8, 8)
    with pytest.raises(InvalidInput, match=said):
        surgery.shrink(trained, x[:2], surgery.recipe(macs=0.5, data=x, metric=judge))


def test_few_images_are_said_to_be_few(cut: surgery.Result) -> None:
    found = surgery.recover(cut, surgery.recipe(data=torch.rand(4, 1, 8, 8)))
    assert any("fewer positions than weights" in note for note in found.steps[-1].notes)


def test_recovery_of_a_part_judges_the_whole(images: tuple[Tensor, Tensor], trained: nn.Module) -> None:
    whole = nn.Sequential(trained, nn.Identity())
    found = surgery.shrink(
        whole, images[0][:2], surgery.recipe(macs=0.5, submodule="0", data=images[0][:64], val=images)
    )
    assert found.steps[-1].agreement is not None
    assert found.steps[-1].agreement.accuracy == pytest.approx(accuracy(found.model, images))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"recover": "magic"}, "one of bn, distill, finetune, fold, none, reconstruct"),
        ({"recover": "distill"}, "--recover distill uses images"),
        ({"data": torch.rand(8, 3, 8, 8)}, r"takes \(N, 1, "),
        ({"data": torch.full((8, 1, 8, 8), float("nan"))}, "NaN"),
        ({"data": torch.rand(8, 1, 8, 8), "val": (torch.rand(3, 1, 8, 8), torch.tensor([1, 2, 10]))}, "a label is 10"),
        ({"data": torch.rand(8, 1, 8, 8), "val": (torch.rand(3, 1, 8, 8), torch.tensor([1]))}, "3 images, but 1"),
        ({"data": torch.rand(90, 1, 8, 8), "recover": "finetune"}, "learns classes"),
        ({"data": (torch.rand(90, 1, 8, 8), torch.full((90,), 99)), "recover": "finetune"}, "a label is 99, but"),
        ({"data": (torch.rand(90, 1, 8, 8), torch.rand(90)), "recover": "finetune"}, "whole numbers"),
        ({"data": 3}, "is of type int"),
        ({"data": torch.rand(8, 1, 8, 8).numpy()}, "ndarray"),
        ({"data": torch.rand(8, 1, 8, 8), "max_images": 0}, "max_images=0"),
    ],
)
def test_what_cannot_be_used_says_so(asked: dict[str, Any], said: str, cut: surgery.Result) -> None:
    with pytest.raises(InvalidInput, match=said):
        surgery.recover(cut, surgery.recipe(**asked))


def test_settings_out_of_range_say_so() -> None:
    for wrong in ({"epochs": 0}, {"lr": 0.0}, {"ema": 1.0}, {"mixed_precision": "fp4"}, {"train_batch": 1.5}):
        with pytest.raises(InvalidInput):
            surgery.recipe(**wrong)


# What it is made of. -------------------------------------------------------------------------------------------------


def test_the_drop_is_paired_and_its_interval_like_a_bootstraps() -> None:
    dense = torch.ones(400, dtype=torch.bool)
    compact = dense.clone()
    compact[:40] = False
    value, low, high = paired_drop(dense, compact)
    assert value == pytest.approx(10.0)
    assert 6.5 < low < 8.0 and 12.0 < high < 13.5


def test_agreement_of_outputs_that_are_no_classes() -> None:
    batches = [([torch.rand(4, 3)], None)]
    reference = Reference(lambda inputs: inputs[0].reshape(4, 3, 1), batches, "images")
    found = reference.judge(lambda inputs: 2 * inputs[0].reshape(4, 3, 1))
    assert found.top1_match is None and found.accuracy is None
    assert found.cosine == pytest.approx(1.0)
    assert found.error > 0.1


def test_a_network_that_was_never_trained_is_not_folded() -> None:
    torch.manual_seed(0)
    result = surgery.shrink(SPACE["Net"]().eval(), torch.randn(1, 1, 8, 8), surgery.recipe(macs=0.5, recover="fold"))
    before = result.model.state_dict()
    images = torch.randn(8, 1, 8, 8)
    found = surgery.recover(result, surgery.recipe(recover="fold", val=images))
    assert any("fold was skipped" in note for note in found.steps[-1].notes)
    assert all(torch.equal(x, before[name]) for name, x in found.model.state_dict().items())


def test_drawn_images_are_the_same_for_a_seed_and_look_like_normalised_ones() -> None:
    first, again, other = (drawn_images(24, 3, 32, 24, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (24, 3, 32, 24) and first.dtype == torch.float32
    assert abs(float(first.mean())) < 0.5 and 0.5 < float(first.std()) < 2
    flat = torch.nn.functional.avg_pool2d(first, 4)
    assert float(flat.var() / first.var()) > 0.3, "neighbours go together"


def test_views_follow_from_seed_epoch_and_number() -> None:
    data, inputs = (
        TensorDataset(torch.rand(20, 3, 16, 16), torch.arange(20)),
        [InputSpec("x", (1, 3, 16, 16), "float32")],
    )
    views, again = (Views(data, range(20), inputs, 3, shift=0.2, flip=True, mix=True) for _ in range(2))
    assert torch.equal(views[5][0], again[5][0])
    before = views[5][0]
    views.epoch = 1
    assert not torch.equal(views[5][0], before)
    plain = Views(data, range(20), inputs, 3)
    assert torch.equal(plain[5][0], data[5][0]) and int(plain[5][1]) == 5


def test_the_loss_is_least_where_the_outputs_are_the_teachers() -> None:
    wanted = [torch.randn(16, 10)]
    assert float(loss_of(wanted, wanted, None, 2.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(loss_of([torch.randn(16, 10)], wanted, None, 2.0)) > 0.1
    images = [torch.randn(4, 3, 8, 8)]
    assert float(loss_of([images[0] + 1], images, None, 2.0)) == pytest.approx(1.0, rel=0.3)


# Killed and taken up. ------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a signal."""


def killing(stage: str, at: float) -> Callable[[str, float], None]:
    def progress(name: str, fraction: float) -> None:
        if name == stage and at <= fraction < 1:
            raise Killed

    return progress


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    cut: surgery.Result, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    def train(folder: Path, progress: Any = None) -> surgery.Result:
        how = {"epochs": 3, "train_batch": 64, "checkpoint_steps": 5, "checkpoint": folder}
        return surgery.recover(
            cut, surgery.recipe(data=images, recover="distill", max_images=64, **how), progress=progress
        )

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", killing("distill", 0.5))
    assert (tmp_path / "killed" / "training.pt").is_file()
    resumed = train(tmp_path / "killed")
    assert resumed.steps[-1].history is not None and resumed.steps[-1].history.resumed > 0
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    marks = [step.history.marks for step in (whole.steps[-1], resumed.steps[-1]) if step.history]
    assert str(marks[0]) == str(marks[1])
    assert not (tmp_path / "killed").exists(), "nothing is left behind"


class Jittered(Dataset[dict[str, Any]]):
    """The user's own: a dictionary, the label first, of images that torch, numpy and Python change at random."""

    def __init__(self, images: tuple[Tensor, Tensor]) -> None:
        self._x, self._y = images

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, k: int) -> dict[str, Any]:
        noise = 0.1 * torch.rand(1) + 0.1 * np.random.rand() + 0.1 * random.random()
        return {"label": int(self._y[k]), "image": self._x[k] + noise}


@pytest.mark.parametrize("shuffled", ["by torch's generator", "by its own", "not: a data set"])
def test_what_a_loader_draws_is_the_same_for_a_killed_run(
    shuffled: str, cut: surgery.Result, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    how = {"epochs": 2, "train_batch": 32, "checkpoint_steps": 2, "held_out": 0.0}
    generator = torch.Generator().manual_seed(7)

    def train(folder: Path, progress: Any = None) -> surgery.Result:
        data: Any = Jittered((images[0][:192], images[1][:192]))
        if shuffled != "not: a data set":
            own = generator if shuffled == "by its own" else None
            data = DataLoader(data, batch_size=32, shuffle=True, generator=own)
        training = {**how, "checkpoint": folder}
        return surgery.recover(
            cut, surgery.recipe(data=data, recover="finetune", max_images=64, **training), progress=progress
        )

    states = generator.get_state(), torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    whole = train(tmp_path / "whole")
    torch.rand(3), np.random.rand(3), random.random(), torch.rand(2, generator=generator)
    between = generator.get_state(), torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(Killed):
        train(tmp_path / "killed", killing("finetune", 0.7))
    resumed = train(tmp_path / "killed")
    assert resumed.steps[-1].history is not None and resumed.steps[-1].history.resumed == 8
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    after = generator.get_state(), torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert str(between) == str(after) != str(states)


def test_a_checkpoint_that_is_not_taken_up_is_said_to_be(
    cut: surgery.Result, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    how = {"epochs": 2, "train_batch": 32, "checkpoint_steps": 2, "checkpoint": tmp_path / "training"}
    with pytest.raises(Killed):
        progress = killing("distill", 0.6)
        surgery.recover(cut, surgery.recipe(data=images[0][:192], recover="distill", **how), progress=progress)
    found = surgery.recover(cut, surgery.recipe(data=images[0][:256], recover="distill", **how))
    assert any("of another run" in note for note in found.steps[-1].notes)
    assert found.steps[-1].history is not None and found.steps[-1].history.resumed == 0


def test_the_scale_of_losses_is_part_of_a_checkpoint(
    cut: surgery.Result, images: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of half precision, which needs a GPU, here with a scaler for processors that grows quickly."""
    import accelerate

    scalers = []

    class Scaling(accelerate.Accelerator):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=4)
            scalers.append(self.scaler)

    def train(folder: Path, progress: Any = None) -> None:
        how = {"epochs": 3, "train_batch": 64, "checkpoint_steps": 5, "checkpoint": folder}
        surgery.recover(
            cut, surgery.recipe(data=images[0][:300], recover="distill", max_images=64, **how), progress=progress
        )

    monkeypatch.setattr(training, "Accelerator", Scaling)
    train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "killed", killing("distill", 0.8))
    train(tmp_path / "killed")
    whole, _, resumed = (scaler.state_dict() for scaler in scalers)
    assert resumed == whole and whole["scale"] > 2.0


@pytest.mark.parametrize("keep", [slice(-400), slice(0), slice(3, 90)])
def test_a_damaged_checkpoint_is_not_used(
    keep: slice, cut: surgery.Result, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    how = {"epochs": 2, "train_batch": 64, "checkpoint_steps": 2, "checkpoint": tmp_path / "training"}
    asked = surgery.recipe(data=images[0][:192], recover="distill", **how)
    with pytest.raises(Killed):
        surgery.recover(cut, asked, progress=killing("distill", 0.6))
    file = tmp_path / "training" / "training.pt"
    file.write_bytes(file.read_bytes()[keep])
    history = surgery.recover(cut, asked).steps[-1].history
    assert history is not None and history.passed_over and history.resumed == 0


# The command line. ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, trained: nn.Module, digits: tuple[Tensor, Tensor]) -> Path:
    """A folder with the network, its weights, and digits as an archive and as files."""
    folder = tmp_path_factory.mktemp("recover")
    (folder / "net.py").write_text(NETWORK)
    (folder / "judge.py").write_text(
        "import sys, torch\ndef spread(model):\n    out = model(torch.ones(2, 1, 8, 8))\n"
        "    print('by the way')\n    print('and past all redirection', file=sys.__stdout__)\n"
        "    return {'spread': float(out.std())}\ndef wrong(model):\n    return {'spread': float('nan')}\n"
        "def loader(batch=50, spoilt=()):\n    import numpy as np\n"
        "    from torch.utils.data import DataLoader, TensorDataset\n"
        "    data = np.load('train.npz')\n    x = torch.from_numpy(data['images']).permute(0, 3, 1, 2) / 127.5 - 1\n"
        "    y = torch.from_numpy(data['labels'])\n    y[list(spoilt)] = 14\n"
        "    return DataLoader(TensorDataset(x, y), batch_size=batch)\n"
        "def odd():\n    return loader(51)\ndef late():\n    return loader(spoilt=[849])\n"
    )
    torch.save(trained.state_dict(), folder / "net.pt")
    pixels = (digits[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    labels = digits[1].numpy()
    np.savez(folder / "train.npz", images=pixels[:1300], labels=labels[:1300])
    np.savez(folder / "val.npz", images=pixels[1300:], labels=labels[1300:])
    np.savez(folder / "wrong.npz", images=pixels[1300:], labels=labels[1300:] + 5)
    for k in range(60):
        at = folder / "photos" / str(labels[k])
        at.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[k, :, :, 0]).save(at / f"{k}.png")
    return folder


NORMALISED = ("--mean", "0.5", "--std", "0.5")


def surgery_shrink(
    place: Path, *arguments: str, launcher: tuple[str, ...] = (), processes: int = 1
) -> subprocess.CompletedProcess[str]:
    arguments = ("net.py:net", "--weights", "net.pt", "--macs", "0.4", "--runs", "3", *arguments)
    if not launcher:
        return run_surgery(place, "shrink", *arguments, env={"OMP_NUM_THREADS": "1"}, processes=processes)
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "shrink.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)


def test_one_command_from_images_to_accuracy(place: Path) -> None:
    done = surgery_shrink(
        place,
        *NORMALISED,
        "--data",
        "photos",
        "--val",
        "val.npz",
        "--metric",
        "judge.py:spread",
        "--out",
        "out",
        "--json",
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "by the way" in done.stderr and "past all redirection" in done.stderr
    assert told["accuracy"]["status"] == "measured"
    assert "paired, on 497 images of --val" in told["accuracy"]["verdict"]
    assert [s["name"] for s in told["recovery"]["steps"]] == ["dense", "cut", "reconstruct"]
    assert told["recovery"]["steps"][-1]["metrics"]["spread"] == pytest.approx(
        told["evaluation"]["compact"]["spread"], rel=1e-3
    )
    text = (place / "out" / "report.md").read_text()
    assert "| reconstruct |" in text and "](recovery.svg)" in text
    assert "<svg" in (place / "out" / "recovery.svg").read_text()
    compact = surgery.load(place / "out", SPACE["Net"]().eval())
    with np.load(place / "val.npz") as data:
        x = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        assert accuracy(compact, (x, torch.from_numpy(data["labels"]))) == pytest.approx(
            told["recovery"]["steps"][-1]["agreement"]["accuracy"]
        )


def test_without_images_a_trained_model_is_folded(place: Path) -> None:
    mistaken = surgery_shrink(place, *NORMALISED, "--out", "folded", "--json", "--quiet")
    assert mistaken.returncode == 2 and "--mean is for images" in mistaken.stderr
    done = surgery_shrink(place, "--out", "folded", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["recovery"]["level"] == "fold"
    assert told["accuracy"]["verdict"].startswith("accuracy unknown: recovered without images")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere"], "--data nowhere"),
        (["--data", "train.npz", "--val", "wrong.npz"], "a label is 14, but the model has 10 classes"),
        (["--data", "train.npz", "--metric", "judge.py:wrong"], "'spread' is nan"),
        (["--data", "train.npz", "--metric", "judge.py"], "write FILE.py:CALLABLE"),
        (["--val", "val.npz", "--recover", "reconstruct"], "--recover reconstruct uses images"),
        (["--data", "train.npz", "--max-drop", "1"], "--max-drop looks for the lowest latency"),
        (["--data", "photos", "--recover", "distill", "--train-batch", "128"], ""),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(place: Path, arguments: list[str], said: str) -> None:
    if not said:
        arguments = [*arguments, "--epochs", "1"]
    done = surgery_shrink(place, *NORMALISED, *arguments, "--out", "mistake", "--quiet")
    if not said:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert not (place / "mistake").exists() and not list(place.glob(".mistake*"))


TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "judge.py:odd", "--recover", "distill"], "error: batch 51: it is shared by 2 processes"),
        (["--data", "train.npz", "--val", "wrong.npz", "--recover", "distill"], "error: --val: a label is 14"),
        (["--data", "judge.py:late", "--recover", "finetune"], "process 1: error: data: a label is 14"),
    ],
)
def test_of_two_processes_one_tells_what_went_wrong(place: Path, arguments: list[str], said: str) -> None:
    plain = ["--max-images", "64", "--criterion", "l1", "--epochs", "1", "--quiet"]
    if "judge.py" in arguments[1]:
        plain += ["--val", "val.npz"]
    done = surgery_shrink(place, *NORMALISED, *arguments, *plain, "--out", "mistake", processes=2)
    assert done.returncode != 0
    (told,) = [line for line in done.stderr.splitlines() if "surgery: " in line]
    assert told.startswith(f"surgery: {said}")


def test_two_processes_give_what_one_gives(place: Path) -> None:
    taught = (
        *NORMALISED,
        "--data",
        "train.npz",
        "--val",
        "val.npz",
        "--recover",
        "distill",
        "--epochs",
        "2",
        "--json",
        "--quiet",
    )
    alone = surgery_shrink(place, *taught, "--out", "one")
    assert alone.returncode == 0, alone.stderr
    together = surgery_shrink(place, *taught, "--out", "two", launcher=TWO)
    assert together.returncode == 0, together.stderr
    told = [json.loads(done.stdout) for done in (alone, together)]
    assert [t["recovery"]["steps"][-1]["history"]["processes"] for t in told] == [1, 2]
    x = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    outputs = []
    for name in ("one", "two"):
        with torch.no_grad():
            outputs.append(surgery.load(place / name, SPACE["Net"]().eval())(x))
    assert float(nn.functional.cosine_similarity(*outputs, dim=1).mean()) >= 0.999


def test_the_lowest_latency_within_a_drop(
    trained: nn.Module, images: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock has tests of its own; here a network takes as long as it has parameters."""

    class Bench:
        def export(self, module: nn.Module) -> nn.Module:
            return module

        def ratio(self, module: nn.Module, *, processes: int) -> Any:
            return type("Ratio", (), {"value": sum(p.numel() for p in module.parameters()) / 1e4})

    program = trace(trained, images[0][:2])
    table = table_of(program, couple(program))
    asked = surgery.recipe(latency=0.9, latency_table=table, data=images, val=unseen, max_images=128)
    decision = decide(LoadedModel(trained, images[0][:2]), asked)
    monkeypatch.setattr(pipeline, "LatencyBench", lambda *args, **more: Bench())

    def fastest(points: float) -> surgery.Result:
        limited = replace(decision, recipe=decision.recipe.but(max_drop=points))
        found: surgery.Result = pipeline.fastest(limited, None)
        return found

    found = fastest(4.0)
    told = found.report["within"]
    assert found.steps[-1].agreement is not None and found.steps[-1].agreement.drop is not None
    assert found.steps[-1].agreement.drop[2] <= 4.0
    assert told["measured"] == min(t["measured"] for t in told["tried"] if t["measured"] is not None)
    assert all((t["measured"] is not None) == (t["upper"] <= 4.0) for t in told["tried"])
    assert f" (measured {100 * told['measured']:.1f} %) loses up to " in Report(found.report).to_markdown()
    with pytest.raises(BudgetUnreachable, match="no model within --max-drop"):
        monkeypatch.setattr(pipeline, "lost_by", lambda steps: (9.0, 10.0, "accuracy"))
        fastest(1.0)


def test_a_loader_of_batches_teaches_too(cut: surgery.Result, images: tuple[Tensor, Tensor]) -> None:
    loader = DataLoader(TensorDataset(*images), batch_size=100)
    how = {"epochs": 1}
    found = surgery.recover(cut, surgery.recipe(data=loader, recover="finetune", max_images=100, **how))
    assert found.steps[-1].history is not None and found.steps[-1].history.steps == 13


def test_what_follows_the_images_in_a_batch_changes_no_distillation(
    cut: surgery.Result, images: tuple[Tensor, Tensor]
) -> None:
    """Classes one-hot, soft or none, in a tuple or in a dictionary with the label first; images of another dtype."""
    x, y = images[0][:192], images[1][:192]
    hot = nn.functional.one_hot(y, 10)
    named = Listed([{"label": b, "image": a} for a, b in zip(x, y.tolist(), strict=True)])
    how = {"epochs": 1, "train_batch": 64}
    sets: list[Any] = [TensorDataset(x, *more) for more in ((), (y,), (hot,), (hot.float(),), (y, hot))]
    sets = [*sets, named, TensorDataset(x.double(), y)]
    loaders = [DataLoader(data, batch_size=32) for data in sets]
    for kind in (sets, loaders):
        models = [
            surgery.recover(cut, surgery.recipe(data=data, recover="distill", max_images=64, **how)).model
            for data in kind
        ]
        for model in models[1:]:
            assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), model.parameters(), strict=True))
    with pytest.raises(InvalidInput, match="finetune learns classes, whole numbers"):
        surgery.recover(cut, surgery.recipe(data=loaders[2], recover="finetune", **how))
    with pytest.raises(InvalidInput, match="the DataLoader has no batch_size"):
        surgery.recover(cut, surgery.recipe(data=DataLoader([x[:64]], batch_size=None), recover="distill", **how))  # type: ignore[arg-type]


class Listed(Dataset[Any]):
    """A list as a data set; the item that is an exception is raised."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, k: int) -> Any:
        if isinstance(self._items[k], Exception):
            raise self._items[k]
        return self._items[k]


@pytest.mark.parametrize("batched", [False, True])
def test_what_goes_wrong_in_the_users_own_data_is_told_with_the_line(batched: bool, cut: surgery.Result) -> None:
    items = [*torch.rand(99, 1, 8, 8), OSError("the disk is gone")]
    data: Any = DataLoader(Listed(items), batch_size=20) if batched else Listed(items)
    for asked in (
        {"data": data},
        {"data": data, "recover": "distill", "max_images": 20},
        {"data": items[0][None], "val": data},
    ):
        with pytest.raises(InvalidInput, match=r"failed at .*test_recover.py:\d+: OSError: the disk is gone"):
            surgery.recover(cut, surgery.recipe(**asked))


def test_training_that_brings_nothing_says_so(cut: surgery.Result, images: tuple[Tensor, Tensor]) -> None:
    wild = {"epochs": 1, "train_batch": 16, "lr": 9.0, "ema": 0.0}
    found = surgery.recover(cut, surgery.recipe(data=images[0][:128], recover="distill", **wild))
    assert found.steps[-1].history is not None and found.steps[-1].history.best == 0
    assert any("the weights it began with stay" in note for note in found.steps[-1].notes)
