"""Accuracy and latency after pruning to a MAC budget, on trained CIFAR-10 networks and real images.

ResNet-20 and ResNet-56 are pruned in one shot, without any recovery, to several budgets, with every criterion and both
scopes. Each compact model is verified, then evaluated on 932 lossless test images (standard error of an accuracy: about
one point; models are compared on the same images). Models of the default criterion are also timed in ONNX Runtime.

Run: ``python -m benchmarks.studies.cifar``; writes ``results/cifar.json``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.studies import data, record
from exporters import onnx
from surgery.capture import trace
from surgery.config import Budget, Selection
from surgery.coupling import cost_functions, couple
from surgery.cutting import check, cut
from surgery.importance import score
from surgery.latency import Limits, Settings, ort
from surgery.planning import allocate

CRITERIA = ("l1", "l2", "bn-gamma", "lamp", "fpgm", "random")
BUDGETS = (0.7, 0.5)
TIMED_CRITERION = "l1"
ROUNDINGS = (1, 4)
"""Kept channels are multiples of these: ONNX Runtime's fast layout on x86 needs multiples of 4."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to cut: `budget` is the fraction of MACs to keep."""

    budget: float
    criterion: str
    scope: str
    round_to: int

    @property
    def label(self) -> str:
        """A short name, unique among the settings of one network."""
        return f"{self.budget:g} {self.criterion} {self.scope} {self.round_to}"


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one setting.

    Attributes:
        network: `resnet20` or `resnet56`.
        setting: None for the dense network.
        params: parameters.
        macs: multiply-adds per image.
        kind: `module` or `graph`; see `surgery.core.ir.CompactModel`.
        accuracy: share of the images classified correctly.
        agreement: share of the images classified as by the dense network.
        timing: p50, p90 and speedup with its interval; None where not timed.
    """

    network: str
    setting: Setting | None
    params: int
    macs: int
    kind: str
    accuracy: float
    agreement: float
    timing: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model to be timed under `label`, and its row."""

    label: str
    module: nn.Module
    row: Row


def settings() -> Iterator[Setting]:
    """Every setting of the study."""
    for budget in BUDGETS:
        for scope in ("global", "uniform"):
            for criterion in CRITERIA:
                for round_to in ROUNDINGS if criterion == TIMED_CRITERION else ROUNDINGS[:1]:
                    yield Setting(budget, criterion, scope, round_to)


def study(network: str, root: Path, images: data.Images) -> list[Subject]:
    """Cut one network in every way, the dense one first; each compact model has passed the check."""
    dense = data.trained(root, network)
    wanted = data.predictions(dense, images)
    program = trace(dense, images.pixels[:2])
    coupling = couple(program)
    costs = cost_functions(program, coupling)
    params, macs = costs["params"], costs["macs"]
    first = Row(network, None, params({}), macs({}), "module", _share(wanted, images.labels), 1.0)
    subjects = [Subject("dense", dense, first)]
    for setting in settings():
        plan = allocate(
            program,
            coupling,
            score(program, coupling, setting.criterion),
            Budget(macs=setting.budget),
            cost=macs,
            selection=Selection(scope=setting.scope, round_to=setting.round_to),
        )
        compact = cut(program, plan, coupling=coupling)
        check(program, plan, compact, coupling=coupling)
        found = data.predictions(compact.module, images)
        accuracy, agreement = _share(found, images.labels), _share(found, wanted)
        row = Row(network, setting, params(plan.dead), macs(plan.dead), compact.kind, accuracy, agreement)
        subjects.append(Subject(setting.label, compact.module, row))
    return subjects


def _share(found: Tensor, wanted: Tensor) -> float:
    return round(float((found == wanted).double().mean()), 4)


def timed(subjects: Sequence[Subject], *, threads: int, seconds: float) -> tuple[list[Row], dict[str, Any]]:
    """Time the dense network and the default criterion's compact ones; return all rows, and what the timer says.

    Raises:
        UnsupportedModel: a model cannot be exported.
    """
    chosen = [s for s in subjects if s.row.setting is None or s.row.setting.criterion == TIMED_CRITERION]
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, subject in enumerate(chosen):
            files[subject.label] = Path(folder, f"{number}.onnx")
            onnx.export(subject.module, torch.zeros(2, 3, 32, 32), files[subject.label])
        timing = ort.time(
            files, Settings(threads=threads), Limits(max_runs=20000, max_seconds=seconds), baseline="dense"
        )
    figures = {
        row.name: {"p50_ms": row.p50_ms, "p90_ms": row.p90_ms, "speedup": asdict(row.speedup), "bytes": row.file_bytes}
        for row in timing.rows
    }
    rows = [replace(subject.row, timing=figures.get(subject.label)) for subject in subjects]
    facts = {key: timing.environment[key] for key in ("other_processes", "disturbed_rounds")}
    quality = {"reliable": timing.reliable, "why": timing.why, "rounds": timing.rounds, "stopped": timing.stopped}
    return rows, {**quality, **facts}


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(title="CIFAR-10, one-shot, no recovery, 932 test images")
    for heading in ("network", "MACs kept", "criterion", "scope", "multiple of"):
        table.add_column(heading)
    for heading in ("params", "MACs", "accuracy", "agrees", "p50 ms", "speedup"):
        table.add_column(heading, justify="right")
    for row in rows:
        s, t = row.setting, row.timing
        how = (f"{s.budget:g}", s.criterion, s.scope, str(s.round_to)) if s else ("dense", "", "", "")
        clock = (f"{t['p50_ms']:.2f}", _interval(t["speedup"])) if t else ("", "")
        counts = (f"{row.params:,}", f"{row.macs / 1e6:.1f} M", f"{row.accuracy:.1%}", f"{row.agreement:.1%}")
        table.add_row(row.network, *how, *counts, *clock)
    console.print(table)


def _interval(speedup: Mapping[str, float]) -> str:
    return f"{speedup['value']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}]"


def markdown(results: Mapping[str, Any]) -> str:
    """Return the timed rows of global scope in a results file as a Markdown table.

    Times that the timer itself calls unreliable are left out.
    """
    lines = [
        "| network | MACs kept | multiples of | parameters | accuracy | p50 | speedup (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        s, t = row["setting"], row["timing"]
        if t is None or (s and s["scope"] != "global"):
            continue
        how = f"{s['budget']:g} | {s['round_to']}" if s else "dense |"
        clock = f"{t['p50_ms']:.2f} ms | {_interval(t['speedup']) if s else '1'}"
        if not results["timers"][row["network"]]["reliable"]:
            clock = "unreliable | unreliable"
        lines.append(f"| {row['network']} | {how} | {row['params']:,} | {row['accuracy']:.1%} | {clock} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--data-root", type=click.Path(), help=f"Data folder.  [default: ${data.VARIABLE}]")
@click.option("--threads", default=1, show_default=True, help="Threads of ONNX Runtime.")
@click.option("--seconds", default=90.0, show_default=True, help="Limit on the timing of one network.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Only print the table from the results file.")
def main(data_root: str | None, threads: int, seconds: float, as_markdown: bool) -> None:
    """Measure accuracy and latency of compact CIFAR-10 networks; writes results/cifar.json."""
    if as_markdown:
        click.echo(markdown(record.read("cifar")), nl=False)
        return
    root = data.find_root(data_root)
    images = data.exact_images(root)
    console = Console()
    rows: list[Row] = []
    timers = {}
    for network in data.NETWORKS:
        found, timers[network] = timed(study(network, root, images), threads=threads, seconds=seconds)
        rows += found
        show(found, console)
    path = record.write(
        "cifar",
        {
            "command": record.command("benchmarks.studies.cifar"),
            "machine": record.machine(threads),
            "images": len(images.labels),
            "timers": timers,
            "rows": [asdict(row) for row in rows],
        },
    )
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
