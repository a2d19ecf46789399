"""Time per stage and memory of the compiler, for torchvision networks and chains of blocks with random weights.

`chain1000` has a thousand residual blocks of one width; it shows what grows faster than the number of operators. Each
network is compiled in a process of its own, so that caches and memory do not affect the next one. Memory is the peak
resident set of the process, Python and torch included.

Run: ``python -m benchmarks.studies.compile_time``; writes ``results/compile_time.json``. With ``--against CHECKOUT``,
this checkout is compared with another one instead, in interleaved runs, and nothing is written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.studies import record
from surgery.latency import peak_bytes

STAGES = ("trace", "couple", "score", "allocate", "cut", "check")
NETWORKS = ("resnet18", "resnet152", "densenet201", "swin_t", "maxvit_t", "chain250", "chain500", "chain1000")
LIMITS_S: Mapping[str, float] = MappingProxyType(
    {"resnet18": 15.0, "resnet152": 90.0, "swin_t": 30.0, "chain1000": 60.0}
)
"""Network → limit in seconds for all stages on two cores."""
SIDE, CHAIN_SIDE = 224, 32


def memory_limit(weights_bytes: int) -> int:
    """Return the memory limit of a run: three times the dense weights plus 2 GiB."""
    return 3 * weights_bytes + 2 * 2**30


def measure(network: str, *, macs: float, threads: int) -> dict[str, Any]:
    """Compile one network in this process, which should be fresh.

    Returns:
        `stages_s`, `total_s`, `weights_bytes` of the dense model, `floor_bytes` resident before the first stage, and
        `peak_bytes`.
    """
    import torch

    import surgery

    torch.set_num_threads(threads)
    model, inputs = _built(network)
    floor = peak_bytes()
    result = surgery.shrink(model, inputs, surgery.recipe(macs=macs))
    stages = {stage: float(result.report["stages_s"][stage]) for stage in STAGES}
    return {
        "network": network,
        "stages_s": stages,
        "total_s": round(sum(stages.values()), 3),
        "operators": sum(n.op == "call_function" for n in result.program.graph.graph.nodes),
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "floor_bytes": floor,
        "peak_bytes": peak_bytes(),
    }


def _built(network: str) -> tuple[Any, Any]:
    """Return a network and its example inputs."""
    import torch

    from benchmarks.studies.networks import Chain
    from surgery.inputs import load_model

    if network.startswith("chain"):
        torch.manual_seed(0)
        return Chain(int(network.removeprefix("chain"))).eval(), torch.randn(1, 3, CHAIN_SIDE, CHAIN_SIDE)
    loaded = load_model(network, weights="random", input_shape=(1, 3, SIDE, SIDE))
    return loaded.module, loaded.example_inputs


def in_fresh_process(network: str, *, macs: float, threads: int, checkout: Path | None = None) -> dict[str, Any]:
    """Run `measure` in a new process, with the code of a checkout if given.

    Raises:
        CalledProcessError: the process failed; its standard error has been passed on.
    """
    command = [sys.executable, "-m", "benchmarks.studies.compile_time", "--only", network]
    command += ["--macs", str(macs), "--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)} if checkout else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=checkout, env=environment)
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def compare(network: str, against: Path, *, macs: float, threads: int, repeats: int) -> None:
    """Print the median time per stage of another checkout and of this one, and their ratio, from interleaved runs."""
    found: dict[Path, list[dict[str, Any]]] = {against: [], Path(__file__).resolve().parents[2]: []}
    for _ in range(repeats):
        for checkout, rows in found.items():
            rows.append(in_fresh_process(network, macs=macs, threads=threads, checkout=checkout))
    before, after = ({s: median(row["stages_s"][s] for row in rows) for s in STAGES} for rows in found.values())
    totals = [median(row["total_s"] for row in rows) for rows in found.values()]
    stages = ", ".join(f"{stage} {before[stage]:.2f} → {after[stage]:.2f}" for stage in STAGES)
    click.echo(f"{network}: {totals[0]:.2f} → {totals[1]:.2f} s, ratio {totals[1] / totals[0]:.3f} ({stages})")


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(title=f"Seconds per stage, {SIDE}x{SIDE}, chains {CHAIN_SIDE}x{CHAIN_SIDE}")
    for heading in ("network", "operators", *STAGES, "total", "limit", "peak memory", "limit"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in rows:
        limit = LIMITS_S.get(row["network"])
        table.add_row(
            row["network"],
            str(row["operators"]),
            *(f"{row['stages_s'][stage]:.2f}" for stage in STAGES),
            f"{row['total_s']:.2f}",
            f"{limit:.0f}" if limit else "",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{memory_limit(row['weights_bytes']) / 2**20:,.0f} MiB",
        )
    console.print(table)


@click.command()
@click.argument("networks", nargs=-1)
@click.option("--macs", default=0.5, show_default=True, help="Fraction of the MACs to keep.")
@click.option("--threads", default=min(2, os.cpu_count() or 1), show_default=True, help="Threads of torch.")
@click.option("--only", hidden=True, help="Measure this network in this process and print one line of JSON.")
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Another checkout.")
@click.option("--repeats", default=3, show_default=True, help="Runs per network and checkout, with --against.")
def main(
    networks: tuple[str, ...], macs: float, threads: int, only: str | None, against: Path | None, repeats: int
) -> None:
    """Measure NETWORKS (torchvision names, chainN for N blocks); writes results/compile_time.json."""
    if only:
        click.echo(json.dumps(measure(only, macs=macs, threads=threads)))
        return
    if against:
        for name in networks or NETWORKS:
            compare(name, against.resolve(), macs=macs, threads=threads, repeats=repeats)
        return
    rows = [in_fresh_process(name, macs=macs, threads=threads) for name in networks or NETWORKS]
    console = Console()
    show(rows, console)
    command = record.command("benchmarks.studies.compile_time")
    described = {"command": command, "machine": record.machine(threads), "macs": macs, "side": SIDE, "rows": rows}
    console.print(f"written: {record.write('compile_time', described)}")


if __name__ == "__main__":
    main()
