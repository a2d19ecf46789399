"""The recovery study: which of a rival's settings are shown, and which are tried again where all take too long."""

from __future__ import annotations

from typing import Any

from benchmarks.studies.recovery.table import at_latency
from benchmarks.studies.recovery.timed import best_of, rounded, settings, shortlist


def row(criterion: str, ranks_globally: bool, recovery: str, drop: float) -> dict[str, Any]:
    told = {"tool": "torch-pruning", "criterion": criterion, "global": ranks_globally, "recovery": recovery}
    return {**told, "judged": [{"drop": drop}]}


ROWS = [
    row("l1", False, "none", 60.0),
    row("l1", False, "bn", 40.0),
    row("l2", True, "none", 30.0),
    row("l2", True, "bn", 12.0),
    row("lamp", True, "none", 20.0),
    row("lamp", True, "bn", 14.0),
    row("fpgm", False, "none", 50.0),
    row("fpgm", False, "bn", 11.0),
    {"tool": "torch-pruning", "criterion": "taylor", "global": True, "failed": "does not run"},
]


def test_the_default_and_the_best_are_shown() -> None:
    shown = [(r["criterion"], r["recovery"]) for r in best_of(ROWS)]
    assert shown == [("l1", "none"), ("lamp", "none"), ("l1", "bn"), ("fpgm", "bn")]


def test_the_shortlist_has_the_default_and_what_lost_least_by_each_recovery() -> None:
    named = {(s.criterion, s.ranks_globally) for s in shortlist(ROWS)}
    assert named == {("l1", False), ("lamp", True), ("l2", True), ("fpgm", False)}
    assert {(s.criterion, s.ranks_globally) for s in shortlist(ROWS, 1)} == {
        ("l1", False),
        ("lamp", True),
        ("fpgm", False),
    }
    assert set(map(str, shortlist(ROWS))) <= set(map(str, settings()))


def test_widths_in_steps_are_told_beside_those_as_they_come() -> None:
    stepped = rounded(shortlist(ROWS, 1), 8)
    assert {(s.criterion, s.round_to) for s in stepped} == {("l1", 8), ("lamp", 8), ("fpgm", 8)}
    assert len({s.name for s in stepped} | {s.name for s in shortlist(ROWS, 1)}) == 6
    figures = {"accuracy": 30.0, "low": 1.0, "high": 2.0, "match": 50.0, "divergence": 1.0, "images": "odd"}
    rows = [
        {**r, "macs": 0.5, "latency": {"value": 0.7}, "judged": [{**r["judged"][0], **figures}]}
        for r in ROWS
        if "failed" not in r
    ]
    found = {"part": "equal latency", "network": "mobilenet_v2", "amount": 0.7, "threads": 1}
    told = at_latency([{**found, "rows": rows}, {**found, "rows": [{**r, "round_to": 8} for r in rows]}])
    assert "| torch-pruning l1 | bn |" in told
    assert "| torch-pruning l1, round_to 8 | bn |" in told
