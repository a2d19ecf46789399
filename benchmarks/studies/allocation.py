"""The search of `surgery.planning.latency_search` against an exact solver, on the same problems.

A problem is to choose one level per ladder of channel counts and a set of residual blocks to drop, with the least
importance lost within a time. The time of a kernel depends on one ladder or on two, so a mixed-integer program with one
variable per pair of levels states it exactly (Sun et al. 2024, MDP, arXiv:2406.12079). It is solved by HiGHS through
SciPy, which also returns a bound on any solution.

Run: ``python -m benchmarks.studies.allocation``; writes ``results/allocation.json``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from typing import Any

import click
import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from benchmarks.studies import data, record
from surgery.capture import trace
from surgery.core import Program
from surgery.coupling import couple, find_blocks
from surgery.errors import InvalidInput
from surgery.importance import score, signal_of, weights_of
from surgery.inputs import load_model
from surgery.latency import Conditions, table_source
from surgery.planning import Forecast, ImportanceLoss, State, WidthSearch, lower, predicted_ms, search

NETWORKS = ("resnet18", "vgg16_bn", "mobilenet_v2", "resnet50")
TRAINED = ("resnet20", "resnet56")
TARGETS = (0.7, 0.5, 0.35)
SECONDS = 60.0
MOST_PAIRS = 20_000
"""Largest number of combinations of levels of one set of kernels that is written out."""


@dataclass(frozen=True, slots=True)
class Row:
    """One problem: importance lost and time taken, by the search and by the solver.

    Attributes:
        variables: of the mixed-integer program; 0 if it was not written because kernels depend on too many ladders.
        bound: no solution loses less, by the solver.
        solved: whether the solver proved its solution the best, to a thousandth.
    """

    network: str
    target: float
    lost: float
    ms: float
    seconds: float
    variables: int = 0
    solver_lost: float | None = None
    solver_ms: float | None = None
    solver_seconds: float | None = None
    bound: float | None = None
    solved: bool = False


class Mixed:
    """A mixed-integer program that is built incrementally: minimise ``cost @ x`` under linear constraints."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.whole: list[int] = []
        self._entries: list[tuple[int, int, float]] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def variable(self, cost: float = 0.0, *, whole: bool = False) -> int:
        """Add a variable between 0 and 1; returns its number."""
        self.cost.append(cost)
        self.whole.append(int(whole))
        return len(self.cost) - 1

    def constrain(self, terms: Sequence[tuple[int, float]], low: float, high: float) -> None:
        """Add ``low <= sum of factor * variable <= high``."""
        row = len(self._low)
        self._entries += [(row, variable, factor) for variable, factor in terms]
        self._low.append(low)
        self._high.append(high)

    def solve(self, seconds: float) -> Any:
        """Solve with HiGHS within a time limit; its presolve (scipy 1.17) removes the optimum of some problems."""
        rows, columns, factors = zip(*self._entries, strict=True)
        matrix = csr_array((factors, (rows, columns)), shape=(len(self._low), len(self.cost)))
        return milp(
            np.array(self.cost),
            integrality=np.array(self.whole),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, self._low, self._high),
            options={"time_limit": seconds, "mip_rel_gap": 1e-3, "presolve": False},
        )


class Exact:
    """A problem of `search`, written out. Raises InvalidInput where kernels depend on too many ladders at once."""

    def __init__(self, forecast: Forecast, loss: ImportanceLoss, target_ms: float) -> None:
        self.program = Mixed()
        self._dense = [0] * len(loss.ladders)
        self._times: list[tuple[int, float]] = []
        self._gone = [self.program.variable(lost, whole=True) for lost in loss.blocks]
        self._levels = [[self.program.variable(whole=True) for _ in lost] for lost in loss.ladders]
        for levels in self._levels:
            self.program.constrain([(v, 1.0) for v in levels], 1.0, 1.0)
        for k, lost in enumerate(loss.ladders):
            inside = [b for b, ladders in enumerate(loss.inside) if k in ladders]
            for (level,), variable in self._together((k,), inside).items():
                self.program.cost[variable] += lost[level]
        for b, parts in enumerate(loss.within):
            for part in parts:
                self.program.constrain([(self._gone[b], 1.0), (self._gone[part], 1.0)], -np.inf, 1.0)
        self._kernels(forecast)
        self.program.constrain(self._times, -np.inf, target_ms)

    def solve(self, seconds: float) -> tuple[State | None, Any]:
        """Return the best state found, and the solver's result."""
        found = self.program.solve(seconds)
        if found.x is None:
            return None, found
        levels = tuple(int(np.argmax(found.x[variables])) for variables in self._levels)
        return State(levels, frozenset(b for b, v in enumerate(self._gone) if found.x[v] > 0.5)), found

    def _kernels(self, forecast: Forecast) -> None:
        alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
        for k, owners in enumerate(forecast._depends):
            alike[tuple(owners), tuple(b for b, gone in enumerate(forecast._gone) if k in gone)].append(k)
        for (ladders, blocks), kernels in alike.items():
            for combination, variable in self._together(ladders, blocks).items():
                levels = list(self._dense)
                for ladder, level in zip(ladders, combination, strict=True):
                    levels[ladder] = level
                self._times.append((variable, sum(forecast.kernel(k, State(tuple(levels))) for k in kernels)))

    def _together(self, ladders: Sequence[int], blocks: Sequence[int]) -> dict[tuple[int, ...], int]:
        """Variables for each combination of levels; all zero if a block is dropped."""
        own = [self._levels[k] for k in ladders]
        if len(own) == 1 and not blocks:
            return {(level,): variable for level, variable in enumerate(own[0])}
        if prod(len(levels) for levels in own) > MOST_PAIRS:
            raise InvalidInput(f"kernels depend on {len(own)} ladders at once")
        found = {c: self.program.variable() for c in product(*(range(len(levels)) for levels in own))}
        there = [(variable, 1.0) for variable in found.values()]
        gone = [(self._gone[b], 1.0) for b in blocks]
        self.program.constrain([*there, *gone], 1.0, float(max(1, len(blocks))))
        self.program.constrain(there, 0.0, 1.0)
        for b in blocks:
            self.program.constrain([*there, (self._gone[b], 1.0)], -np.inf, 1.0)
        for place, levels in enumerate(own):
            for level, variable in enumerate(levels):
                with_it = [(v, 1.0) for combination, v in found.items() if combination[place] == level]
                self.program.constrain([*with_it, (variable, -1.0)], -np.inf, 0.0)
        return found


def compared(network: str, program: Program, seconds: float) -> Iterator[Row]:
    """Yield a row per target: the search and the solver on one problem, by this machine's table."""
    coupling, blocks = couple(program), find_blocks(program)
    searched = WidthSearch(
        coupling,
        score(program, coupling, "signal"),
        lower(program, coupling),
        table_source(None, Conditions(1, 24)),
        signal_of(program, coupling, weights_of(program, coupling), blocks),
        blocks=blocks,
    )
    table = searched.table()
    dense_ms = predicted_ms(searched.lowered.points(), table)
    for target in TARGETS:
        problem = next(searched.problems(table))
        started = time.perf_counter()
        state = search(problem.forecast, problem.loss, target * dense_ms)
        took = time.perf_counter() - started
        if state is None:
            continue
        ms = problem.forecast.total(state)
        row = Row(network, target, problem.loss.of(state), ms, took)
        yield Row(**{**asdict(row), **_solved(problem.forecast, problem.loss, target * dense_ms, seconds)})


def _solved(forecast: Forecast, loss: ImportanceLoss, target_ms: float, seconds: float) -> Mapping[str, Any]:
    try:
        exact = Exact(forecast, loss, target_ms)
    except InvalidInput:
        return {}
    started = time.perf_counter()
    state, found = exact.solve(seconds)
    took = {"variables": len(exact.program.cost), "solver_seconds": time.perf_counter() - started}
    bound = getattr(found, "mip_dual_bound", None)
    if state is None:
        return {**took, "bound": bound}
    return {
        **took,
        "solver_lost": loss.of(state),
        "solver_ms": forecast.total(state),
        "bound": bound,
        "solved": found.status == 0,
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/explanation/latency-budgets.md."""
    heads = ("network", "target", "lost, search", "lost, solver", "lower bound", "search, s", "solver, s")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        solver = "not written" if not row["variables"] else "none found"
        if row["solver_lost"] is not None:
            solver = f"{row['solver_lost']:.3f}{'' if row['solved'] else ' (stopped)'}"
        bound = f"{row['bound']:.3f}" if row["bound"] is not None else ""
        took = f"{row['solver_seconds']:.1f}" if row["solver_seconds"] is not None else ""
        cells = (row["network"], row["target"], f"{row['lost']:.3f}", solver, bound, f"{row['seconds']:.2f}", took)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def programs(root: str | None) -> Iterator[tuple[str, Program]]:
    """Yield the networks: trained ones if the data folder exists, others with random weights."""
    try:
        folder = data.find_root(root)
        for name in TRAINED:
            yield name, trace(data.trained(folder, name), torch.zeros(1, 3, 32, 32))
    except InvalidInput as error:
        click.echo(f"without trained networks: {error}", err=True)
    for name in NETWORKS:
        loaded = load_model(name, weights="random")
        yield name, trace(loaded.module, loaded.example_inputs)


@click.command()
@click.option("--data-root", type=click.Path(), help=f"Data folder.  [default: ${data.VARIABLE}]")
@click.option("--seconds", default=SECONDS, show_default=True, help="Time limit of the solver per problem.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Only print the table from the results file.")
def main(data_root: str | None, seconds: float, as_markdown: bool) -> None:
    """Compare the search with an exact solver; writes results/allocation.json."""
    if not as_markdown:
        rows = []
        for name, program in programs(data_root):
            for row in compared(name, program, seconds):
                click.echo(f"{row.network} {row.target:g}: {row.lost:.3f} against {row.solver_lost}", err=True)
                rows.append(asdict(row))
        command = record.command("benchmarks.studies.allocation")
        record.write("allocation", {"command": command, "machine": record.machine(1), "rows": rows})
    click.echo(markdown(record.read("allocation")["rows"]), nl=False)


if __name__ == "__main__":
    main()
