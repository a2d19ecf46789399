"""How long the compiler takes, stage by stage, and how much memory: torchvision networks, and chains of blocks.

`chain1000` is a thousand residual blocks of one width, with random weights like all the others: what grows faster than
the number of operators shows there.

Each network is compiled in a process of its own, so that one's caches and memory do not show in another's figures.
Memory is the process's largest resident set, Python and torch themselves included.

Run: ``python -m benchmarks.studies.compile_time``; writes ``results/compile_time.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
"""Network → seconds that trace to check may take on two cores."""
SIDE, CHAIN_SIDE = 224, 32


def memory_limit(weights_bytes: int) -> int:
    """Return how much memory a run may take: three times the dense weights plus 2 GiB."""
    return 3 * weights_bytes + 2 * 2**30


def measure(network: str, *, macs: float, threads: int) -> dict[str, Any]:
    """Compile one network in this process, which should be a fresh one.

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
    """A network, and its example inputs."""
    import torch

    from benchmarks.studies.networks import Chain
    from surgery.inputs import load_model

    if network.startswith("chain"):
        torch.manual_seed(0)
        return Chain(int(network.removeprefix("chain"))).eval(), torch.randn(1, 3, CHAIN_SIDE, CHAIN_SIDE)
    loaded = load_model(network, weights="random", input_shape=(1, 3, SIDE, SIDE))
    return loaded.module, loaded.example_inputs


def in_fresh_process(network: str, *, macs: float, threads: int) -> dict[str, Any]:
    """Return what `measure` returns in a new process.

    Raises:
        CalledProcessError: it failed; what it wrote to standard error has been passed on.
    """
    command = [sys.executable, "-m", "benchmarks.studies.compile_time", "--only", network]
    command += ["--macs", str(macs), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the rows as a table, with the limits where there are any."""
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
def main(networks: tuple[str, ...], macs: float, threads: int, only: str | None) -> None:
    """Measure NETWORKS (torchvision names, chainN for N blocks); writes results/compile_time.json."""
    if only:
        click.echo(json.dumps(measure(only, macs=macs, threads=threads)))
        return
    rows = [in_fresh_process(name, macs=macs, threads=threads) for name in networks or NETWORKS]
    console = Console()
    show(rows, console)
    command = record.command("benchmarks.studies.compile_time")
    described = {"command": command, "machine": record.machine(threads), "macs": macs, "side": SIDE, "rows": rows}
    console.print(f"written: {record.write('compile_time', described)}")


if __name__ == "__main__":
    main()
