"""Which residual blocks had best go: a trained CIFAR-10 network loses some by each score, and is evaluated.

ResNet-56 loses its 3, 6 and 9 lowest blocks, with no recovery, by the score that reads weights alone, by
the one that runs calibration images, block by block or in turn, with and without what a scale and a shift give back,
and at random (the mean of three draws); and once more with the statistics of batch norms taken anew on 7,728 training
images. Accuracy: 932 test images (standard error about one point).

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
from surgery.coupling import drop, find_blocks
from surgery.importance import Trial, block_worth

BATCH = 8
NETWORK = "resnet56"
COUNTS = (3, 6, 9)
IMAGES = 64
DRAWS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """What one score came to.

    Attributes:
        score: its name.
        accuracies: of the network without its `COUNTS` lowest blocks.
        settled: likewise, once batch norms have taken their statistics anew.
        order: names of the blocks, the lowest first.
    """

    score: str
    accuracies: tuple[float, ...]
    settled: tuple[float, ...]
    order: tuple[str, ...]


def orders(program: Program, blocks: Sequence[Block], images: Tensor) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each score, and the names of the blocks, the least important first."""
    worth = block_worth(program, blocks)
    yield "weights alone", _rising(worth)
    for count, compensated in ((len(images), True), (len(images), False), (32, True)):
        batches = [(part,) for part in torch.split(images[:: len(images) // count], BATCH)]
        trial = Trial(program, blocks, batches, compensated=compensated)
        told = f"{count} images" + ("" if compensated else ", nothing given back")
        yield f"{told}: one by one", _rising(trial.alone)
        yield f"{told}: in turn", [name for name, _ in trial.in_turn(float("inf"))]
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
        yield Row(name, accuracies, tuple(_accuracy(_settled(m, known), images) for m in models), tuple(order))


def _accuracy(model: nn.Module, images: data.Images) -> float:
    return round(float((data.predictions(model.eval(), images) == images.labels).double().mean()), 4)


def _settled(model: nn.Module, pixels: Tensor) -> nn.Module:
    """A copy whose batch norms hold the statistics of these images."""
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
    """Return the table of docs/latency-budgets.md."""
    heads = [f"{count} blocks" for count in COUNTS]
    lines = [f"| score | {' | '.join((*heads, *(f'{head}, norms anew' for head in heads)))} |"]
    lines += ["|---|" + "---|" * 2 * len(COUNTS)]
    told = [(row["score"], [*row["accuracies"], *row["settled"]]) for row in rows]
    drawn = [figures for name, figures in told if name.startswith("random")]
    told = [pair for pair in told if not pair[0].startswith("random")]
    told.append((f"at random, mean of {len(drawn)}", [float(x) for x in np.mean(drawn, axis=0)]))
    lines += [f"| {name} | {' | '.join(f'{x:.1%}' for x in figures)} |" for name, figures in told]
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--data-root", type=click.Path(), help=f"Data folder.  [default: ${data.VARIABLE}]")
@click.option("--markdown", "as_markdown", is_flag=True, help="Measure nothing: print the document's table again.")
def main(data_root: str | None, as_markdown: bool) -> None:
    """Measure what blocks are worth on a trained CIFAR-10 network; writes results/blocks.json."""
    if not as_markdown:
        rows = [asdict(row) for row in study(data.find_root(data_root))]
        command = record.command("benchmarks.studies.blocks")
        record.write("blocks", {"command": command, "machine": record.machine(1), "rows": rows})
    click.echo(markdown(record.read("blocks")["rows"]), nl=False)


if __name__ == "__main__":
    main()
