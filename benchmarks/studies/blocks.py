"""Which residual blocks are least important: accuracy of a trained network without them, by several scores.

ResNet-56 loses its 3, 6 and 9 least important blocks: by the score that uses weights alone, by block ablation on
calibration images (individually or greedily), and at random (mean of three draws). Each network is evaluated without
recovery, and after batch-norm re-estimation on 7,728 training images. Accuracy: 932 test images (standard error about
one point).

Run: ``python -m benchmarks.studies.blocks``; writes ``results/blocks.json``.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.studies import data, record
from surgery.capture import trace
from surgery.core import Block, Program
from surgery.coupling import couple, drop, find_blocks
from surgery.importance import BlockAblation, signal_of, weights_of

BATCH = 8
NETWORK = "resnet56"
COUNTS = (3, 6, 9)
IMAGES = 64
DRAWS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one score.

    Attributes:
        score: its name.
        accuracies: of the network without its `COUNTS` least important blocks.
        settled: the same after batch-norm re-estimation.
        order: names of the blocks, the least important first.
    """

    score: str
    accuracies: tuple[float, ...]
    settled: tuple[float, ...]
    order: tuple[str, ...]


def orders(program: Program, blocks: Sequence[Block], images: Tensor) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each score, and the names of the blocks, the least important first."""
    coupling = couple(program)
    worth = signal_of(program, coupling, weights_of(program, coupling), blocks).blocks
    yield "weights alone", _rising(worth)
    ablation = BlockAblation(program, blocks, [(part,) for part in torch.split(images, BATCH)])
    yield f"{len(images)} images: individually", _rising(ablation.alone)
    yield f"{len(images)} images: greedy", [name for name, _ in ablation.in_turn(float("inf"))]
    for draw in range(DRAWS):
        names = [block.name for block in blocks]
        random.Random(draw).shuffle(names)
        yield f"random {draw}", names


def _rising(worth: Mapping[str, float]) -> list[str]:
    return sorted(worth, key=worth.__getitem__)


def study(root: Path) -> Iterator[Row]:
    """Evaluate the network without blocks, by each score; the dense one first."""
    images = data.exact_images(root)
    program = trace(data.trained(root, NETWORK), images.pixels[:2])
    blocks = find_blocks(program)
    with np.load(root / "cifar10" / "train_lossless_7728.npz") as archive:
        known = data.normalised(archive["images"])
    found = [("dense", list[str]()), *orders(program, blocks, known[:: len(known) // IMAGES][:IMAGES])]
    for name, order in found:
        models = [drop(program, dict.fromkeys(order[:count], ()), blocks).model for count in COUNTS]
        accuracies = tuple(_accuracy(model, images) for model in models)
        yield Row(name, accuracies, tuple(_accuracy(_reestimated(m, known), images) for m in models), tuple(order))


def _accuracy(model: nn.Module, images: data.Images) -> float:
    return round(float((data.predictions(model.eval(), images) == images.labels).double().mean()), 4)


def _reestimated(model: nn.Module, pixels: Tensor) -> nn.Module:
    """Return a copy with batch-norm statistics of these images."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for part in torch.split(pixels, 64):
            model(part)
    return model


def markdown(rows: Sequence[Any]) -> str:
    """Return the table of docs/explanation/latency-budgets.md."""
    heads = [f"{count} blocks" for count in COUNTS]
    lines = [f"| score | {' | '.join((*heads, *(f'{head}, batch norms re-estimated' for head in heads)))} |"]
    lines += ["|---|" + "---|" * 2 * len(COUNTS)]
    accuracies = [(row["score"], [*row["accuracies"], *row["settled"]]) for row in rows]
    drawn = [values for name, values in accuracies if name.startswith("random")]
    shown = [pair for pair in accuracies if not pair[0].startswith("random")]
    shown.append((f"at random, mean of {len(drawn)}", [float(x) for x in np.mean(drawn, axis=0)]))
    lines += [f"| {name} | {' | '.join(f'{x:.1%}' for x in values)} |" for name, values in shown]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--data-root", type=click.Path(), help=f"Data folder.  [default: ${data.VARIABLE}]")
@click.option("--markdown", "as_markdown", is_flag=True, help="Only print the table from the results file.")
def main(data_root: str | None, as_markdown: bool) -> None:
    """Rank the blocks of a trained CIFAR-10 network by several scores; writes results/blocks.json."""
    if not as_markdown:
        rows = [asdict(row) for row in study(data.find_root(data_root))]
        command = record.command("benchmarks.studies.blocks")
        record.write("blocks", {"command": command, "machine": record.machine(1), "rows": rows})
    click.echo(markdown(record.read("blocks")["rows"]), nl=False)


if __name__ == "__main__":
    main()
