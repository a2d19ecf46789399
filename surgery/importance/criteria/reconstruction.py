"""Error that is left in the consumers of a unit once their other weights are refitted."""

from __future__ import annotations

from surgery.core import Scores
from surgery.importance.elimination import eliminations
from surgery.importance.evidence import Evidence, criterion


@criterion("reconstruction", needs=["images", "graph", "consumers"])
def reconstruction(evidence: Evidence) -> Scores:
    """What the unit's consumers lose with it, those before it removed; see `elimination`."""
    orders, _ = eliminations(evidence)
    return {name: order.scores(order.losses) for name, order in orders.items()}
