"""What is asked for, and what the stages stand on: options, tracers, clocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from surgery.core import Budget, Plan

DEPLOYED = ("fp32", "int8")
"""Precisions that a budget of time may be of."""
DEFAULT_BUDGET = Budget(latency=0.5)
MILDEST = Budget(latency=0.95)
"""Where a search over latencies gives up: what cannot be cut so little is not cut."""
WITHOUT_PROGRAM = Budget(macs=0.5)
"""The default where nothing tells a runtime's operators: models that `torch.export` cannot capture."""


_NOT_OF_THE_PLAN = frozenset(
    (
        *("budget", "latency_table", "acceptance", "correct", "data", "seen", "images", "recover", "val", "training"),
        *("share", "evaluate", "max_drop", "between", "int8"),
    )
)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. The fields are the keyword arguments of `shrink`, and the options of the command line.

    `seen` is what was read of `data`, once they were. `between` are the steps of recovery of the models on the way,
    where there are several. `share` is told the plan and the compact model before that is trained, where other
    processes take part. `int8` is how files in int8 are made, an `exporters.quantize.Int8`.
    """

    budget: Budget | None = None
    criterion: Any = None
    scope: str = "global"
    round_to: int = 1
    inexact: str = "if-needed"
    keep: tuple[str, ...] = ()
    own_class: bool = False
    part: str | None = None
    tracer: str = "export"
    seed: int = 0
    threads: int = 1
    batch: int = 1
    deploy: str = "fp32"
    int8: Any = None
    latency_table: Any = None
    correct: bool = True
    drop_layers: bool = True
    acceptance: Any = None
    data: Any = None
    images: int = 512
    recover: str | None = None
    val: Any = None
    training: Any = None
    seen: Any = None
    evaluate: Callable[[Any], Mapping[str, float]] | None = None
    max_drop: float | None = None
    steps: int = 1
    between: tuple[Any, ...] = ()
    share: Callable[[Plan, torch.nn.Module], None] | None = None

    @property
    def goal(self) -> Budget:
        """The budget: half of the latency by default; the mildest that there is where the drop is what counts."""
        if self.max_drop is not None and self.budget is None:
            return MILDEST
        if self.budget is not None:
            return self.budget
        return WITHOUT_PROGRAM if self.tracer == "torch-pruning" else DEFAULT_BUDGET

    @property
    def ranking(self) -> Any:
        """The criterion: `second-order` where there are images, else `signal` for a budget of time, else `l1`."""
        if self.criterion is not None:
            return self.criterion
        if self.data is not None and self.tracer == "export":
            return "second-order"
        return "signal" if self.goal.is_latency else "l1"

    def settings(self) -> dict[str, Any]:
        """Return what a plan records, so that it can be applied again: JSON values, without the budget."""
        clocked = () if self.goal.is_latency else ("threads", "batch", "deploy")
        left_out = {*_NOT_OF_THE_PLAN, *clocked}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        ranking = self.ranking
        criterion = ranking if isinstance(ranking, str) else getattr(ranking, "__name__", "custom")
        seen = {"data": self.seen.described()} if self.seen is not None else {}
        made = {"int8": {**asdict(self.int8), "keep": list(self.int8.keep)}} if self._quantises else {}
        return {**values, "criterion": criterion, "keep": list(self.keep), **seen, **made}

    @property
    def _quantises(self) -> bool:
        return self.goal.is_latency and self.deploy == "int8" and self.int8 is not None
