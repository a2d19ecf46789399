"""The recovery study: which of a rival's settings are shown, and which are tried again where all take too long."""

from __future__ import annotations

from typing import Any

from benchmarks.studies.recovery.timed import best_of, settings, shortlist


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
