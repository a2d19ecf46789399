"""Stages: their names and times, and results kept between runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from surgery.core import Clock, remembered


def test_a_stage_has_the_time_that_no_stage_within_it_has() -> None:
    told: list[str] = []
    clock = Clock(lambda stage, fraction: told.append(stage))
    start = time.perf_counter()
    with clock("plan"):
        time.sleep(0.02)
        for _ in range(2):
            with clock("measure"):
                time.sleep(0.04)
    whole = time.perf_counter() - start
    assert clock.seconds["measure"] >= 0.08
    assert 0.02 <= clock.seconds["plan"] <= whole - 0.08 + 0.001
    assert told[-2:] == ["plan", "plan"], "a stage is named again when one within it has ended"
    with pytest.raises(ZeroDivisionError), clock("plan"), clock("fail"):
        1 / 0  # noqa: B018
    with clock("after"):
        pass
    assert told[-2:] == ["after", "after"], "an error ends the stages it leaves"


def test_results_are_computed_once_for_the_same_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    calls: list[int] = []

    def compute() -> dict[str, list[float]]:
        calls.append(0)
        return {"a": [0.1 + 0.2, 1e-300]}

    first = remembered("scores", ("l1", 0), compute)
    assert remembered("scores", ("l1", 0), compute) == first == {"a": [0.1 + 0.2, 1e-300]}
    assert len(calls) == 1
    remembered("scores", ("l1", 1), compute)
    assert len(calls) == 2
    next(tmp_path.glob("scores-*.json")).write_text("{", "utf-8")  # cut off
    remembered("scores", ("l1", 0), compute)
    remembered("scores", ("l1", 1), compute)
    assert len(calls) == 3
    (tmp_path / "file").touch()
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "file"))  # cannot be written
    assert remembered("scores", ("l1", 0), compute) == first
