"""The report says the same figures in JSON, on the terminal and in Markdown, and never a speedup before its verdict."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from surgery import report
from surgery.core.ir import (
    AxisCut,
    Budget,
    CheckResult,
    CompactModel,
    Coupling,
    Frozen,
    Group,
    InputSpec,
    Plan,
    Program,
    Site,
)
from surgery.inputs import LoadedModel
from surgery.report import sections
from surgery.report.data import SCHEMA


@dataclass
class Net:
    """Stands for the user's module: the report needs its class name only."""


def group(name: str, size: int, inexact: str | None = None) -> Group:
    site = Site(name.rsplit(":", 1)[0], 0, tuple((k,) for k in range(size)))
    return Group(name=name, units=tuple(range(size)), sites=(site,), inexact=inexact)


@pytest.fixture
def data() -> dict[str, Any]:
    inputs = (InputSpec("x", (2, 3, 8, 8), "float32", (0,)),)
    program = Program(
        graph=None, inputs=inputs, example_args=(), example_kwargs={}, fingerprint="f" * 64,
        notes=("height and width are fixed",), model=Net(),
    )  # fmt: skip
    groups = (group("conv1.weight:0", 16), group("fc.weight:0", 8, "layer norm at net.py:7"), group("last.weight:0", 4))
    frozen = tuple(Frozen(f"head.{k}.weight", 0, "network output") for k in range(3))
    coupling = Coupling(groups, (*frozen, Frozen("stem.weight", 1, "network input")), {})
    plan = Plan(
        dead={"conv1.weight:0": (0, 3), "fc.weight:0": (1,)},
        sizes={g.name: g.size for g in groups},
        cuts=(AxisCut("conv1.weight", 0, 16, (0, 3)),),
        fingerprint="f" * 64,
        inputs=inputs,
        budget=Budget(macs=0.5),
        settings={"criterion": "l1"},
    )
    compact = CompactModel(None, "graph", "view(-1, 320) at net.py:9 is literal", None, ("stochastic depth",))
    costs = {"params": (1000, 480), "macs": (2_000_000, 990_000), "channels": (28, 25)}
    cut: Any = SimpleNamespace(program=program, coupling=coupling, plan=plan)
    verdict = CheckResult(40, 1e-14, 2e-7, 0.5, "the dense model with dead slices zeroed")
    return report.describe(cut, costs, compact=compact, verdict=verdict)


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def timed(data: dict[str, Any], *, reliable: bool = True) -> dict[str, Any]:
    rows = [
        {"name": name, "p50_ms": p50, "p90_ms": p50 * 1.1, "p99_ms": None, "throughput_per_s": 1000 / p50,
         "ratio": interval(p50 / 10),
         "speedup": interval(10 / p50), "peak_memory_bytes": 123_000_000, "quantiles_ms": [p50] * 21}
        for name, p50 in (("dense", 10.0), ("masked", 10.0), ("compact", 5.0))
    ]  # fmt: skip
    timing = {
        "rows": rows, "aa": interval(1.0), "reliable": reliable, "why": "the baseline came out at 1.000", "rounds": 12,
        "environment": {"onnxruntime": "1.31", "cpu": "a processor", "cores": 2, "instruction_sets": ["AVX2"],
                        "system": "Linux", "python": "3.11", "provider": "CPU"},
        "settings": {"threads": 1, "batch": 1},
    }  # fmt: skip
    sizes = {"dense": 4000, "masked": 4000, "compact": 2000}
    models = [{**row, "onnx_bytes": sizes.get(row["name"])} for row in data["models"]]
    files, notes = {"plan.json": "ab"}, [*data["notes"], "a note"]
    return {**data, "models": models, "timing": timing, "files": files, "notes": notes}


def loaded(name: str, weights: str) -> LoadedModel:
    return LoadedModel(nn.Identity(), (), {}, name, weights)


def terminal(data: dict[str, Any], width: int = 110) -> str:
    stream = io.StringIO()
    report.Report(data).print(Console(file=stream, width=width))
    return stream.getvalue()


def test_the_report_is_json_and_comes_back_equal(data: dict[str, Any]) -> None:
    full = timed(data)
    assert json.loads(json.dumps(full)) == full
    assert full["schema"] == SCHEMA


def test_the_budget_is_reported_with_what_was_kept(data: dict[str, Any]) -> None:
    assert data["budget"] == {
        "kind": "macs", "fraction": 0.5, "dense": 2_000_000, "kept": 990_000, "kept_fraction": 0.495,
    }  # fmt: skip


def test_masking_removes_nothing(data: dict[str, Any]) -> None:
    dense, masked, compact = data["models"]
    assert {**masked, "name": "dense"} == dense
    assert (compact["parameters"], compact["macs"]) == (480, 990_000)


def test_every_group_is_listed_cut_or_not(data: dict[str, Any]) -> None:
    sizes = {g["name"]: (g["from"], g["to"]) for g in data["groups"]}
    assert sizes == {"conv1.weight:0": (16, 14), "fc.weight:0": (8, 7), "last.weight:0": (4, 4)}


def test_the_first_line_everywhere_is_the_verdict_and_the_next_command(data: dict[str, Any]) -> None:
    command = "python -i -c 'import surgery [not markup]'"
    full = timed(report.with_origin(data, loaded("net", "random"), next_command=command))
    verdict = "accuracy unknown: not fit to deploy"
    assert terminal(full, width=60).splitlines()[0] == f"{verdict}; next: {command}"
    assert report.Report(full).to_markdown().splitlines()[0] == f"{verdict}; next: `{command}`"


def test_the_terminal_names_what_was_cut_what_is_frozen_and_what_is_inexact(data: dict[str, Any]) -> None:
    text = terminal(timed(data))
    assert "16 → 14" in text
    assert "last.weight" not in text
    assert "network output: head.0.weight:0 and 2 more" in text
    assert "fc.weight:0: layer norm at net.py:7" in text
    assert "view(-1, 320) at net.py:9 is literal" in text
    assert "stochastic depth" in text


def test_the_table_has_the_four_rows_and_leaves_out_what_nobody_measured(data: dict[str, Any]) -> None:
    (table,) = (part for part in sections._models(timed(data)) if isinstance(part, report.Table))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["dense", "masked", "compact", "A/A"]
    assert rows["compact"]["speedup"] == "2.00x"
    assert rows["compact"]["95% interval"] == "1.99-2.01"
    assert rows["compact"]["ONNX"] == "2 kB"
    assert rows["compact"]["p99 ms"] == "-"
    assert "p99" in terminal(timed(data))
    assert "p50" in terminal(timed(data))
    assert "p50" not in terminal(data)


def test_an_unreliable_measurement_says_so(data: dict[str, Any]) -> None:
    assert "UNRELIABLE" in terminal(timed(data, reliable=False))
    assert "UNRELIABLE" not in terminal(timed(data))


def test_long_lists_are_summarised_on_the_terminal_and_complete_in_markdown(data: dict[str, Any]) -> None:
    extra = [{"name": f"block{k}.weight:0", "from": 8, "to": 4, "inexact": None, "sites": []} for k in range(40)]
    full = {**data, "groups": extra}
    assert "block39.weight:0" not in terminal(full)
    assert "and 16 more" in terminal(full)
    assert "block39.weight:0" in report.Report(full).to_markdown()


def test_markdown_holds_the_table_and_the_notes(data: dict[str, Any]) -> None:
    text = report.Report(timed(data)).to_markdown()
    assert "| compact | 480 | 990 k | 2 kB | 5 | 5.5 | - | 200 | 2.00x | 1.99-2.01 | 123 MB |" in text
    assert "- height and width are fixed" in text
    assert "- a note" in text
    assert "| plan.json | ab |" in text


def test_targets_are_reported_in_percent_with_what_was_reached(data: dict[str, Any]) -> None:
    assert "target 50 % of the MACs: reached 49.50 % (990 k of 2 M)" in terminal(data)
    latency = {
        "target": 0.6, "taken": 0, "rounds": [{"measured": 0.601}], "met": True, "verdict": "too slow", "device": {},
        "predicted_ms": 5.9, "predicted_dense_ms": 10.0,
    }  # fmt: skip
    text = terminal({**data, "budget": None, "latency": latency})
    assert "target 60 % of the dense latency: reached 60.1 %; latency table: 5.9 of 10 ms" in text
    text = terminal({**data, "budget": None, "latency": {**latency, "met": False, "final": 0.65}})
    assert "target 60 % of the dense latency: NOT MET: 65.0 % (too slow); latency table" in text


def test_a_section_from_outside_the_package_is_in_every_rendering(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "_REGISTRY", dict(sections._REGISTRY))

    @report.section("Energy")
    def energy(found: sections.Data) -> Iterator[report.Part]:
        yield f"{found['schema']} mJ per image"
        yield report.Table(("model", "mJ"), [("dense", "3.25")])
        yield report.Chart("energy by model", (3, 2), lambda axes: axes.bar(["dense"], [3.25]))

    full = report.Report(data)
    for text in (terminal(data), full.to_markdown(), full.to_html()):
        assert all(wanted in text for wanted in ("Energy", "1 mJ per image", "3.25"))
    assert 'aria-label="energy by model"' in full.to_html()
    with pytest.raises(ValueError, match="'Energy' already"):
        report.section("Energy")(energy)


def test_names_are_neither_markup_nor_control_characters_in_any_rendering(data: dict[str, Any]) -> None:
    evil = "[red]<script>alert(1)</script>|`*x*\x1b[2J\u202e\nend $a$"
    data["groups"][0]["name"] = data["groups"][1]["name"] = data["frozen"][0]["reason"] = evil
    data["settings"][evil] = data["model"]["name"] = data["model"]["weights"] = evil
    data["layers"] = [{"name": evil, "dense": [4, 1], "compact": [2, 1]}]
    data["notes"] = [evil, "a < b & 'c'"]
    full = report.Report(timed(report.with_origin(data, loaded(evil, evil), next_command=evil, command=evil)))
    html, markdown = full.to_html(), full.to_markdown()
    for text in (terminal(dict(full.data), width=200), markdown, html):
        assert "\x1b" not in text and "\u202e" not in text and "\\x1b[2J" in text.replace("\\[", "[")
    assert "<script" not in html and "a &lt; b &amp;" in html
    assert "[red]<script>" in terminal(dict(full.data), width=200)
    assert r"- \[red]\<script>alert(1)\</script>\|\`\*x\*".replace("]", "\\]") in markdown
