"""Remaining error in the consumers of a unit after their other weights are refitted."""

from __future__ import annotations

from surgery.core import Scores
from surgery.importance.elimination import eliminations
from surgery.importance.evidence import Evidence, criterion


@criterion("reconstruction", needs=["images", "graph", "consumers"])
def reconstruction(evidence: Evidence) -> Scores:
    """Loss of the unit's consumers when it is removed after the units before it; see `elimination`."""
    orders, _ = eliminations(evidence)
    return {name: order.scores(order.losses) for name, order in orders.items()}
