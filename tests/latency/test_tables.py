"""Latency tables: interpolation, files, the cache on disk."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surgery.core.kernels import Kernel, Operand, Widths, step
from surgery.errors import InvalidInput
from surgery.latency import cache, fill, probe
from surgery.latency.fill import Timer
from surgery.latency.probe import Conditions
from surgery.latency.tables import Entry, LatencyTable, Stairs, kind_of

CONV = Kernel(
    (step("Conv", "x0", "w1", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]), step("Relu", "%0")),
    (Operand("x0", (1, "a", 8, 8), "image"), Operand("w1", ("b", "a", 3, 3), "weight")),
    (1, "b", 8, 8),
    True,
)
DEVICE = {"cpu": "made up"}


def table(**entries: Entry) -> LatencyTable:
    return LatencyTable(
        DEVICE, {"conv": Stairs(16, {16: 1.0, 32: 4.0})}, 0.001, {CONV.key: next(iter(entries.values()))}
    )


def grid() -> LatencyTable:
    return table(e=Entry(((16, 32), (16, 64)), (1.0, 4.0, 2.0, 8.0)))


def test_a_kernel_survives_its_key() -> None:
    assert Kernel.from_key(CONV.key) == CONV
    assert CONV.letters == ("a", "b")
    assert kind_of(CONV) == "conv"
    with pytest.raises(ValueError, match="kernel"):
        Kernel.from_key("[]")


@pytest.mark.parametrize(
    ("widths", "ms"),
    [
        ((16, 16), 1.0),
        ((32, 64), 8.0),
        ((16, 32), 2.0),  # between the lines of the second width
        ((32, 48), 6.0),
        ((17, 16), 2.0),  # off an edge: paid like the next one
        ((16, 33), 3.0),
        ((8, 16), 1.0),
    ],
)
def test_time_runs_straight_between_edges_and_jumps_at_them(widths: tuple[int, int], ms: float) -> None:
    assert grid().ms(CONV, widths) == pytest.approx(ms)


def test_a_point_that_was_measured_wins_over_the_grid() -> None:
    finer = grid().with_entries({CONV.key: Entry((), (), {(16, 32): 9.0})})
    assert finer.ms(CONV, (16, 32)) == 9.0
    assert finer.ms(CONV, (16, 16)) == 1.0
    assert grid().ms(Kernel.from_key(CONV.key.replace("Relu", "Tanh")), (16, 16)) is None


def test_a_kernel_with_a_fixed_width_is_found_among_those_with_open_ones() -> None:
    fixed = Kernel.from_key(CONV.key.replace('"b"', "64"))
    assert fixed.letters == ("a",)
    assert grid().ms(fixed, (16,)) == 4.0
    assert grid().covers(fixed, (32,))
    assert not grid().covers(Kernel.from_key(CONV.key.replace('"b"', "128")), (32,))
    assert grid().ms(Kernel.from_key(CONV.key.replace('[1,"a",8,8]', '[1,"a",9,9]')), (16, 16)) is None


def test_a_kernel_with_open_widths_is_not_covered_by_one_where_they_are_fixed() -> None:
    fixed = Kernel.from_key(CONV.key.replace('"b"', "64"))
    held = replace(grid(), entries={fixed.key: Entry(((16, 32),), (1.0, 2.0))})
    assert held.covers(fixed, (32,))
    assert held.ms(CONV, (32, 64)) == 2.0
    assert not held.covers(CONV, (32, 64))


def test_the_wider_grid_stays_whichever_comes_first() -> None:
    narrow = Entry(((16,), (16, 32)), (1.0, 2.0), {(16, 24): 5.0})
    for first, second in ((grid().entries[CONV.key], narrow), (narrow, grid().entries[CONV.key])):
        merged = table(e=first).with_entries({CONV.key: second}).entries[CONV.key]
        assert merged.axes == ((16, 32), (16, 64))
        assert merged.points == {(16, 24): 5.0}


def test_a_table_is_the_same_after_a_trip_through_its_file(tmp_path: Path) -> None:
    grid().save(tmp_path / "t.json")
    again = LatencyTable.load(tmp_path / "t.json")
    assert again.to_json() == grid().to_json()
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_steps_are_measured_until_measurements_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[str]] = []

    def measure(timer: Timer, points: list[tuple[Kernel, Widths]]) -> dict[tuple[str, Widths], float]:
        measured.append(sorted({kind_of(kernel) for kernel, _ in points}))
        step = {"matmul": 1 if len(measured) == 1 else 8, "conv": 16}  # matmul is disturbed once
        sizes = {k.key: step.get(kind_of(k), 8) for k, _ in points}
        return {(k.key, ws): float(-(-ws[0] // sizes[k.key]) * sizes[k.key]) for k, ws in points}

    monkeypatch.setattr(Timer, "measure", measure)
    monkeypatch.setattr(probe, "processor", lambda: ("", ["avx2", "avx"]))
    monkeypatch.setattr(fill, "overhead_ms", lambda threads: 0.001)
    table = fill.new_table(Timer(Conditions(1)))
    kinds = ["conv", "conv 1x1", "depthwise", "matmul"]
    assert [again for again in measured if again] == [kinds, kinds, ["conv", "matmul"]]
    assert {kind: stairs.step for kind, stairs in table.stairs.items()} == {**dict.fromkeys(kinds, 8), "conv": 16}


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"schema": 1}', "nonsense", '{"schema": 1, "kernels": {"x": 1}}', "[" * 100_000]
)
def test_what_is_no_table_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InvalidInput, match="surgery profile") as caught:
        LatencyTable.load(tmp_path / "t.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"overhead_ms": float("nan")},
        {"overhead_ms": -1.0},
        {"stairs": {"conv": {"step": 0, "curve": [[16, 1.0]]}}},
        {"stairs": {"conv": {"step": -4, "curve": [[16, 1.0]]}}},
        {"stairs": {"conv": {"step": "8", "curve": [[16, 1.0]]}}},
        {"stairs": {"conv": {"step": 10**9, "curve": [[16, 1.0]]}}},
        {"kernels": {CONV.key: {"axes": [[16], [16]], "grid": [1e308], "points": []}}},
        {"kernels": {CONV.key: {"axes": [[32, 16], [16]], "grid": [1.0, 2.0], "points": []}}},
        {"kernels": {CONV.key: {"axes": [[16], [16]], "grid": [1.0], "points": [[[16, 8], float("inf")]]}}},
        {"kernels": {CONV.key: {"axes": [[float("inf")], [16]], "grid": [1.0], "points": []}}},
        {"kernels": {CONV.key: {"axes": [[-16], [16]], "grid": [1.0], "points": []}}},
        {"kernels": {CONV.key: {"axes": [[], [16]], "grid": [], "points": []}}},
        {"kernels": {CONV.key: {"axes": [[16], [16]], "grid": [1.0], "points": [[[16, float("inf")], 1.0]]}}},
        {"stairs": {"conv": {"step": 4, "curve": [[float("inf"), 1.0]]}}},
    ],
)
def test_figures_that_are_no_times_are_refused(damage: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="damaged"):
        LatencyTable.from_json(json.dumps({**json.loads(grid().to_json()), **damage}))


def test_files_that_are_no_text_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "table.json", tmp_path):
        with pytest.raises(InvalidInput, match="surgery profile --out"):
            LatencyTable.load(path)


def test_a_damaged_grid_and_another_schema_are_refused() -> None:
    data = json.loads(grid().to_json())
    data["kernels"][CONV.key]["grid"] = [1.0]
    with pytest.raises(ValueError, match="damaged"):
        LatencyTable.from_json(json.dumps(data))
    with pytest.raises(ValueError, match="schema 99"):
        LatencyTable.from_json(json.dumps({**data, "schema": 99}))


# Stairs. -------------------------------------------------------------------------------------------------------------


def curve(step: int, *, off_four: float = 1.0, noise: float = 0.0) -> dict[int, float]:
    """Time of square kernels on stairs of a step; widths off multiples of 4 cost more where asked."""
    wobble = [1.0 + noise * (((7 * w) % 5) - 2) / 2 for w in fill.PROBED]
    padded = [-(-w // step) * step for w in fill.PROBED]
    price = [1.0 if w % 4 == 0 else off_four for w in fill.PROBED]
    return {w: p * p * q * z for w, p, q, z in zip(fill.PROBED, padded, price, wobble, strict=True)}


@pytest.mark.parametrize("step", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("off_four", [1.0, 1.6])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_step_of_stairs_is_found(step: int, off_four: float, noise: float) -> None:
    expected = 4 if step == 1 and off_four > 1 else step
    assert fill.step_of(curve(step, off_four=off_four, noise=noise)) == expected


# On disk. ------------------------------------------------------------------------------------------------------------


class Fakes:
    """No measurements: every kernel takes as long as its widths say."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.measured: list[tuple[str, tuple[int, ...]]] = []
        patch.setenv("SURGERY_CACHE", str(folder))
        patch.setattr(probe, "describe", lambda conditions: {**DEVICE, "threads": conditions.threads})
        patch.setattr(fill.Timer, "measure", lambda timer, points: self.measure(points))
        patch.setattr(fill, "new_table", lambda timer: LatencyTable({**DEVICE, "threads": 1}, {}, 0.001, {}))

    def measure(self, points):  # type: ignore[no-untyped-def]
        self.measured += [(kernel.key, widths) for kernel, widths in points]
        return {(kernel.key, widths): float(sum(widths)) for kernel, widths in points}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fakes:
    return Fakes(monkeypatch, tmp_path)


def test_what_was_measured_once_is_not_measured_again(fakes: Fakes) -> None:
    first = cache.Measured(Conditions(1))
    first.cover([(CONV, (32, 32))])
    first.refine([(CONV, (20, 20))])
    assert fakes.measured
    fakes.measured.clear()
    second = cache.Measured(Conditions(1))
    table = second.cover([(CONV, (32, 32))])
    assert table.ms(CONV, (20, 20)) == 40.0
    assert second.refine([(CONV, (20, 20))]) is None
    assert not fakes.measured


def test_another_number_of_threads_has_a_table_of_its_own(fakes: Fakes) -> None:
    assert cache.Measured(Conditions(1)).path != cache.Measured(Conditions(2)).path


@pytest.mark.parametrize("damage", ["", "no json", '{"schema": 1}'])
def test_a_corrupted_file_is_measured_again_with_one_sentence(fakes: Fakes, damage: str) -> None:
    cache.Measured(Conditions(1)).cover([(CONV, (32, 32))])
    path = cache.Measured(Conditions(1)).path
    path.write_text(damage)
    said: list[str] = []
    source = cache.Measured(Conditions(1), warn=said.append)
    source.cover([(CONV, (32, 32))])
    assert len(said) == 1
    assert "measured again" in said[0]
    assert LatencyTable.load(path).ms(CONV, (32, 32)) == 64.0


def test_a_cache_that_cannot_be_written_is_said_and_nothing_more(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "file" / "below"))
    said: list[str] = []
    table = cache.Measured(Conditions(1), warn=said.append).cover([(CONV, (32, 32))])
    assert table.ms(CONV, (32, 32)) == 64.0
    assert len(said) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, entry: entry.update(axes=[[16]], grid=[1.0]),
        lambda data, entry: entry.update(points=[[[16], 1.0]]),
        lambda data, entry: entry["axes"][0].insert(0, float("inf")),
        lambda data, entry: data["kernels"].update({'[[[5,[],{}]],[["a",[1,"b"],"weight"]],[1],true]': entry}),
        lambda data, entry: data["kernels"].update({'[[["Conv",[],{}]],[],[1,"a"],true]': entry}),
        lambda data, entry: data["kernels"].update({"[" * 5000: entry}),
        lambda data, entry: data["kernels"].update({CONV.key.replace("8,8]", "8,-8]"): entry}),
        lambda data, entry: data.update(device=[]),
        lambda data, entry: data["device"].update(threads={}),
        lambda data, entry: data["device"].update(precision=["int8"]),
    ],
)
def test_a_table_that_was_tampered_with_is_refused(tmp_path: Path, damage: Callable[[Any, Any], None]) -> None:
    data = json.loads(grid().to_json())
    damage(data, data["kernels"][CONV.key])
    (tmp_path / "table.json").write_text(json.dumps(data))
    with pytest.raises(InvalidInput, match="cannot read latency table"):
        LatencyTable.load(tmp_path / "table.json")


def _fill_one(folder: str, size: int) -> None:
    patch = pytest.MonkeyPatch()
    Fakes(patch, Path(folder))
    key = CONV.key.replace("[1,1,1,1]", f"[{size},1,1,1]")
    cache.Measured(Conditions(1)).cover([(Kernel.from_key(key), (32, 32))])


def test_processes_that_fill_one_table_at_once_lose_nothing(fakes: Fakes, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill_one, args=(str(tmp_path), size)) for size in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(LatencyTable.load(cache.Measured(Conditions(1)).path).entries) == 8


def test_a_given_table_that_lacks_kernels_is_refused_with_what_to_do() -> None:
    given = cache.Given(grid(), "table.json")
    assert given.cover([(CONV, (32, 64))]).ms(CONV, (32, 64)) == 8.0
    with pytest.raises(InvalidInput, match=r"surgery profile MODEL --out table\.json"):
        cache.Given(grid(), "table.json").cover([(CONV, (64, 64))])
