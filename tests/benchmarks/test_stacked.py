"""The comparison of every way to a faster file: its rows, its verdicts, the demonstration on what a user names."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import WARM, run_python
from torch import nn

from benchmarks.studies import record
from benchmarks.studies.latency.rivals import Subject
from benchmarks.studies.stacked import rows, table
from benchmarks.studies.stacked.rows import Ask, measured
from benchmarks.studies.stacked.subjects import Case, Judges, named
from exporters.session import OnnxModel
from surgery.errors import InvalidInput
from surgery.inputs import import_torchvision
from surgery.latency import fill, ort
from surgery.latency.ratio import Ratio
from surgery.planning.refinement import LatencyBench

ROOT = Path(__file__).resolve().parents[2]

NET = """
import torch
from torch import nn


def net():
    widths = [(3, 32), (32, 32), (32, 32)]
    layers = [x for i, o in widths for x in (nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)), torch.zeros(1, 3, 24, 24)
"""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    space: dict[str, object] = {}
    exec(NET, space)
    torch.manual_seed(0)
    module: nn.Module = space["net"]()[0]  # type: ignore[operator]
    with torch.no_grad():
        for _ in range(20):
            module(torch.rand(8, 3, 24, 24) * 4 - 2)
    return module.eval()


@pytest.fixture(scope="module")
def case(network: nn.Module) -> Case:
    images = torch.rand(96, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 4 - 2
    with torch.no_grad():
        labels = network(images).argmax(1)

    def at(size: int) -> tuple[torch.Tensor, tuple[Judges, ...]]:
        small = nn.functional.interpolate(images, (size, size))
        return small[:48], (Judges("held back", small[48:], labels[48:]),)

    subject = Subject(network, (torch.zeros(1, 3, 24, 24),))
    return Case("net", "random", subject, images[:48], at(24)[1], at)


@pytest.fixture(scope="module")
def found(case: Case, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CRITERIA", {"l1": rows.CRITERIA["l1"]})
        patch.setattr(rows, "TRIES", 2)
        patch.setattr(ort, "MIN_ROUNDS", 3)
        patch.setattr(fill, "MOST_PROBES", 1)
        patch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))  # others' tables are measured with more
        get_context("forkserver").set_forkserver_preload([WARM])
        patch.setattr(LatencyBench, "ratio", lambda *given, **named: Ratio(((0.8, 1.0, 0.8),)))  # met at once
        return measured(case, Ask(0.8, ("fp32", "int8"), smaller=(16,), seconds=1.0), tmp_path_factory.mktemp("files"))


def test_every_way_has_its_row(found: dict[str, object]) -> None:
    listed = found["rows"]
    assert isinstance(listed, list)
    names = [row["name"] for row in listed]
    assert names == [
        *("dense", "dense int8", "dense at 16 px", "dense at 16 px, int8"),
        *("compact, planned for fp32", "compact int8, planned for fp32"),
        *("masked", "compact, planned for int8", "compact int8, planned for int8"),
        *("torch-pruning, default", "torch-pruning, best", "torch-pruning, best, int8"),
    ]
    by_name = {row["name"]: row for row in listed}
    assert by_name["dense"]["judged"][0]["lost"] == [0.0, 0.0, 0.0]
    assert by_name["dense"]["judged"][0]["match"] == 100.0
    assert by_name["dense int8"]["judged"][0]["lost_against_int8"] == [0.0, 0.0, 0.0]
    assert by_name["dense int8"]["bytes"] < by_name["dense"]["bytes"]
    assert by_name["compact, planned for int8"]["macs"] < 1
    again = [dict(row) for row in listed]
    rows.mark_dominated(again, reliable=False)
    assert not any(row["dominated_by"] for row in again)
    rows.mark_dominated(again, reliable=True)
    timer = found["timer"]
    assert isinstance(timer, dict)
    assert [row["dominated_by"] for row in listed] == [
        row["dominated_by"] if timer["reliable"] else None for row in again
    ]
    for row in again:
        time, loss = row["latency"], rows.lost(row)
        clearly = [
            r
            for r in again
            if r["latency"]["value"] <= time["value"] and rows.lost(r)[0] <= loss[0]
            and (r["latency"]["high"] < time["low"] or rows.lost(r)[2] < loss[1])
        ]  # fmt: skip
        assert (row["dominated_by"] is None) is (not clearly)
    text = table.markdown(found)
    assert text.count("\n| ") == len(listed) + 2
    assert "48 images: held back" in text


def row(name: str, time: float, lost: tuple[float, float, float], **more: object) -> dict[str, object]:
    judged = [{"images": "photos", "lost": list(lost), "lost_against_int8": list(lost), "match": 90.0}]
    return {"name": name, "of_dense_int8": time, "latency": {"value": time}, "judged": judged, **more}


@pytest.mark.parametrize(
    ("time", "lost", "verdict"),
    [
        (0.59, (0.2, -0.3, 0.9), "met"),
        (0.59, (0.8, 0.1, 1.5), "undecided"),
        (0.59, (3.0, 2.1, 3.9), "missed"),
        (0.61, (0.2, -0.3, 0.9), "missed"),
    ],
)
def test_a_goal_is_met_by_the_interval_and_the_time(
    time: float, lost: tuple[float, float, float], verdict: str
) -> None:
    ours = row("compact int8, planned for int8", time, lost, planned_for="int8")
    assert f"**{verdict}**" in table.goal({"network": "resnet56", "rows": [ours]})


def test_a_rival_that_cuts_nothing_is_not_its_best(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()  # no norms, whose scales could be told
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()
    photos = torch.rand(8, 3, 24, 24)
    case = Case("net", "random", Subject(module, (photos[:1],)), photos, ())
    monkeypatch.setattr(rows, "CRITERIA", {key: rows.CRITERIA[key] for key in ("l1", "bn-scale")})
    bench = SimpleNamespace(to_latency=lambda *_, **__: SimpleNamespace(share=0.5))
    (found,) = rows._at_latency(case, bench, 0.7, False)
    assert found[0].criterion == "l1" and case.subject.kept(found[1]) < 0.5
    assert "bn-scale, round_to 16: removes nothing" in capsys.readouterr().err


def test_networks_of_torchvision_are_written_in_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, photos = import_torchvision().models.squeezenet1_1().eval(), torch.rand(4, 3, 64, 64)
    files = rows.Files(Case("net", "random", Subject(nn.Identity(), ()), photos, ()), tmp_path)
    files.add("dense", module, {})
    monkeypatch.setattr(rows.Job, "write", lambda job: pytest.fail(f"{job.path.name} was left to this process"))
    files.write()
    assert "in this process" not in capsys.readouterr().err
    with torch.no_grad():
        assert torch.allclose(OnnxModel(files.paths["dense"])(photos), module(photos), atol=1e-3)


def test_a_network_that_does_not_go_to_another_process_is_written_in_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Own(nn.Sequential):
        """Of a function: it has no name by which another process could find it."""

    photos = torch.rand(32, 3, 8, 8)
    files = rows.Files(Case("net", "random", Subject(nn.Identity(), ()), photos, ()), tmp_path)
    layers = nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)
    files.add("own", Own(*layers).eval(), {}, int8="own int8")
    files.add("known", nn.Sequential(*layers).eval(), {})
    files.write()
    own, known = (OnnxModel(files.paths[name])(photos) for name in ("own", "known"))
    assert torch.equal(own, known)
    assert files.paths["own int8"].is_file()
    assert "own is written in this process" in capsys.readouterr().err


def test_distillation_is_described() -> None:
    facts = {"epochs": 28.0, "images": 57728, "seconds": 204, "trained_on": "a card", "lr": 0.001, "tried": []}
    text = table.distillation({"rows": [row("dense", 1, (0, 0, 0)), row("distilled", 0.5, (0, 0, 0), **facts)]})
    assert "28 epochs of 57,728 images, 204 seconds with" in text and "on a card; learning rate 0.001." in text
    tried = [{"divergence": 0.5}, {"lr": 0.001, "divergence": 0.25}, {"lr": 0.01, "divergence": 0.75}]
    assert "0.001 (0.25), 0.01 (0.75)" in table.distillation(
        {"rows": [row("distilled", 0.5, (0, 0, 0), **facts | {"tried": tried})]}
    )
    assert table.distillation({"rows": [row("dense", 1, (0, 0, 0))]}) == ""


def test_the_page_is_what_was_measured() -> None:
    place = record.RESULTS / "stacked.json"
    assert place.is_file()
    text = (ROOT / "docs" / "results" / "demonstration.md").read_text(encoding="utf-8")
    assert text == table.page(record.read("stacked"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.short(record.read("stacked")["tables"]["demo"]) in readme


# What a user names. --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("named")
    (place / "net.py").write_text(NET)
    torch.save(network.state_dict(), place / "net.pt")
    (place / "photos").mkdir()
    rng = np.random.default_rng(0)
    for k in range(40):
        Image.fromarray(rng.integers(0, 255, (30, 30, 3), dtype=np.uint8)).save(place / "photos" / f"{k}.png")
    return place


def test_photos_without_classes_are_split_to_judge_agreement_by(folder: Path) -> None:
    case = named(f"{folder / 'net.py'}:net", str(folder / "net.pt"), str(folder / "photos"), None)
    assert (len(case.photos), len(case.judged[0].images), case.judged[0].labels) == (32, 8, None)
    assert case.at is not None
    assert case.at(16)[0].shape == (32, 3, 16, 16)


def test_photos_are_not_judged_by(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="40 of the images of --val are among those of --photos"):
        named(f"{folder / 'net.py'}:net", str(folder / "net.pt"), *[str(folder / "photos")] * 2)


def test_random_weights_are_no_demonstration(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="has no trained weights here"):
        named("squeezenet1_1", "random", str(folder / "photos"), None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("--photos", "nowhere"), "--photos"), (("--weights", "net.pt"), "give a folder of photos with --photos")],
)
def test_what_is_missing_is_told_in_a_sentence(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    demo = str(ROOT / "scripts" / "demo.py")
    done = run_python(folder, demo, "--model", "net.py:net", "--weights", "net.pt", *arguments)
    assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
