"""The latency study's own arithmetic: which rows, which setting of a rival counts, how sure a difference is."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.studies.latency import isolated, rows, table
from benchmarks.studies.latency.compare import at_equal_latency, best, gap, nearest_above
from benchmarks.studies.latency.jobs import LIMIT_S, Job, chosen, every_job
from benchmarks.studies.latency.rivals import PLAIN, DoesNotRun, Setting, Subject, Uniform, by_torch_pruning, to_macs
from benchmarks.studies.latency.search import MOST, Point, guess_from, nearest, reach
from benchmarks.studies.latency.trained import has_batch_norms, reestimated
from surgery.capture.tracing import trace
from surgery.coupling.compact_graph import CompactGraph

# Which rows. ---------------------------------------------------------------------------------------------------------


def test_rows_have_keys_of_their_own_and_a_limit() -> None:
    jobs = every_job()
    assert len({job.key for job in jobs}) == len(jobs) == 48
    assert all(job.part in LIMIT_S for job in jobs)


def test_a_call_names_rows_by_part_and_pattern() -> None:
    jobs = every_job()
    assert [j.key for j in chosen(("accuracy",), ("resnet20 0.7",), jobs)] == ["accuracy resnet20 0.7 1"]
    assert {j.network for j in chosen((), ("squeezenet",), jobs)} == {"squeezenet"}
    assert {j.part for j in chosen(("prediction",), (), jobs)} == {"speed"}
    assert "densenet121" not in {j.network for j in chosen(("prediction",), (), jobs)}


def test_a_row_is_done_until_versions_change() -> None:
    job = Job("speed", "resnet18", 0.5)
    row = rows.signed({"entries": {}}, job, 1.0)
    assert rows.is_done(row, stale=True)
    assert not rows.is_done({**row, "made_with": "something else"}, stale=False)
    older = {**row, "source": "another digest"}
    assert rows.is_done(older, stale=False) and not rows.is_done(older, stale=True)
    assert not rows.is_done(None, stale=False)
    assert not rows.is_done({**row, "failed": "limit", "message": ""}, stale=False)


def test_a_process_that_dies_or_lingers_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for code, limit_s, failed in (("exit 3", 20.0, "exit 3"), ("sleep 60", 0.3, "limit")):
        python = tmp_path / code.replace(" ", "")
        python.write_text(f"#!/bin/sh\n{code}\n", encoding="utf-8")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        assert isolated.limited(Job("speed", "none"), {}, seconds=limit_s)["failed"] == failed


# Searches. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0.9, 0.5, 0.2])
def test_a_smooth_curve_is_followed_in_few_steps(wanted: float) -> None:
    tried: list[float] = []

    def curve(share: float) -> float:
        tried.append(share)
        return 0.1 + 0.9 * (1 - share) ** 1.5

    point = reach(curve, wanted, tolerance=0.01, most=6)
    assert abs(point.ratio / wanted - 1) <= 0.01 and len(tried) <= 5


def test_steps_end_at_the_one_below() -> None:
    point = reach(lambda share: 1 - math.floor(share * 4) / 4, 0.6, tolerance=0.02, most=8)
    assert point.ratio == 0.5


def test_what_cannot_be_reached_is_told_by_its_nearest() -> None:
    point = reach(lambda share: 1 - 0.2 * share, 0.5, tolerance=0.01, most=5)
    assert point.ratio == pytest.approx(1 - 0.2 * MOST, abs=0.02)
    assert nearest([Point(0.1, 0.8), Point(0.2, 0.52), Point(0.3, 0.4)], 0.5, tolerance=0.02).ratio == 0.4


def test_earlier_points_tell_where_to_begin() -> None:
    assert guess_from([], 0.5) is None
    assert guess_from([Point(0.4, 0.6), Point(0.6, 0.4)], 0.5) == pytest.approx(0.5)
    assert guess_from([Point(0.4, 0.6)], 0.8) == pytest.approx(0.2)
    beyond = guess_from([Point(0.4, 0.6)], 0.5)
    assert beyond is not None and 0.4 < beyond < MOST


# Comparisons. --------------------------------------------------------------------------------------------------------


def test_a_difference_has_an_interval_that_covers_it() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(900) < 0.9, rng.random(900) < 0.8
    found = gap(ours, theirs)
    assert found["value"] == pytest.approx(ours.mean() - theirs.mean())
    assert 0 < found["low"] < found["value"] < found["high"]
    spread = math.sqrt((0.9 * 0.1 + 0.8 * 0.2) / 900)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert gap(ours, ours) == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found == gap(ours, theirs)


def scored(setting: str, latency: float, top1: float, rival: str = "torch-pruning") -> dict[str, Any]:
    gaps = {"value": 0.1, "low": 0.05, "high": 0.15}
    scores = {"top1": top1, "agreement": top1, "top1_gap": gaps, "agreement_gap": gaps}
    interval = {"value": latency, "low": latency - 0.01, "high": latency + 0.01}
    common = {"rival": rival, "setting": setting, "criterion": "l1", "macs": 0.5, "latency": interval}
    return {**common, "before": scores, "after": scores, "efficiency": 1.0, "reached": latency <= 0.51}


def test_a_rivals_best_is_at_our_latency_or_below() -> None:
    entries = [scored("slow", 0.6, 0.9), scored("a", 0.50, 0.5), scored("b", 0.509, 0.6), {"failed": "DoesNotRun"}]
    assert [e["setting"] for e in at_equal_latency(entries, 0.5)] == ["a", "b"]
    chosen = best(entries, 0.5, when="after", what="top1")
    assert chosen is not None and chosen["setting"] == "b"
    assert best(entries, 0.4, when="after", what="top1") is None
    near = nearest_above(entries, 0.4)
    assert near is not None and near["setting"] == "a"


# Rivals. -------------------------------------------------------------------------------------------------------------


def network() -> Subject:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3)]
    module = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(32 * 16, 4)).eval()
    return Subject(module, (torch.randn(1, 3, 8, 8),))


def test_torch_pruning_is_brought_to_the_macs_and_the_dense_network_stays() -> None:
    subject = network()
    before = {name: value.clone() for name, value in subject.module.state_dict().items()}
    module, point = to_macs(subject, PLAIN, 0.5)
    assert subject.kept(module) == point.ratio == pytest.approx(0.5, abs=0.03)
    rounded = by_torch_pruning(subject, Setting("to 8", round_to=8), 0.3)
    assert rounded[0].out_channels % 8 == 0
    assert all(torch.equal(value, before[name]) for name, value in subject.module.state_dict().items())


def test_a_tool_that_fails_says_so() -> None:
    with pytest.raises(DoesNotRun, match="torch-pruning"):
        by_torch_pruning(Subject(network().module, (torch.randn(1, 5, 8, 8),)), PLAIN, 0.3)


def test_uniform_width_keeps_the_macs_asked_for() -> None:
    subject = network()
    assert subject.kept(Uniform(subject).cut(0.5)) == pytest.approx(0.48, abs=0.04)


def test_norms_are_estimated_on_a_copy() -> None:
    module = network().module
    images = 3 + torch.randn(20, 3, 8, 8)
    found = reestimated(module, images)
    with torch.no_grad():
        mean = module[0](images).mean((0, 2, 3))
    assert torch.allclose(found[1].running_mean, mean, atol=1e-4)
    assert torch.equal(module[1].running_mean, torch.zeros(32)) and not found.training
    program = trace(module, (images,))
    graph = CompactGraph(module, program.graph.graph)
    assert has_batch_norms(graph)
    again = torch.randn(60, 3, 8, 8)
    assert torch.allclose(reestimated(graph, again)(again), reestimated(module, again)(again), atol=1e-5)


# Tables. -------------------------------------------------------------------------------------------------------------


def made_up() -> dict[str, dict[str, Any]]:
    ours = {**scored("ours", 0.5, 0.8), "met": True}
    rounds = [
        {"predicted_ms": 8.0, "measured_ms": 10.0, "measured": 0.55, "processes": 1},
        {"predicted_ms": 9.0, "measured_ms": 9.2, "measured": 0.51, "processes": 3},
    ]
    loop = {"rounds": rounds, "taken": 1, "dense_ms": 18.0, "predicted_dense_ms": 17.0, "measured": 0.51}
    rivals = [scored("torch-pruning", 0.50, 0.5), scored("uniform", 0.7, 0.4, "uniform")]
    timer = {"reliable": False, "why": "only 3 rounds"}
    failed = {"failed": "DoesNotRun", "message": "a | b"}
    data = {
        Job("accuracy", "resnet20", 0.5): {
            "ours": ours, "rivals": [*rivals, {"rival": "torch-pruning", **failed}], "dense": {"top1": 0.9},
            "loop": loop, "timer": timer,
        },
        Job("speed", "resnet18", 0.5): {
            "entries": {"ours": ours, "uniform @ latency": {**rivals[1], "to": "latency"}, "onnxsim @ MACs": failed},
            "loop": loop,
        },
        Job("channels", "resnet18", 0.3): {"entries": {"torch-pruning": rivals[0], "ours": ours}, "gain": 1.4},
        Job("profile", "resnet18"): {
            "runs": {"cold": {"seconds": 100.0, "measured": 0.5, "stages_s": {"refine plan": 60.0, "cut": 0.1}}},
            "apart": 0.012,
        },
        Job("speed", "vgg16_bn", 0.5): {"failed": "limit", "message": "over 900 s"},
    }  # fmt: skip
    return {job.key: rows.signed(row, job, 1.0) for job, row in data.items()}


def test_tables_say_what_the_rows_hold() -> None:
    text = table.render(made_up())
    assert "| resnet20, 0.5 (dense 90.0%) | ours |  | 0.500 [0.490, 0.510] | 0.500 | 80.0% |" in text
    assert "|  | torch-pruning | plain, l1 | 0.500" in text and "+10.0 [+5.0, +15.0]" in text
    assert "plain, l1: nearest, does not reach our latency" in text
    assert "1.40x | yes" in text
    assert "met: 0.510" in text and "DoesNotRun: a \\| b" in text
    assert "| resnet18 | 1.0 |  | 17.00 ms | 18.00 ms | -5.6% | yes |" in text
    assert "| resnet18 | 0.5 | first plan, 1 process | 8.00 ms | 10.00 ms | -20.0% | no |" in text
    assert "refine plan 60" in text and "1.2%" in text
    assert "speed vgg16_bn 0.5 1 | limit: over 900 s" in text and "only 3 rounds" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| resnet20")}
    assert widths == {12}


def test_no_rows_no_tables() -> None:
    assert table.render({}) == ""
