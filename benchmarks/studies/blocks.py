"""Which residual blocks had best go: a trained CIFAR-10 network loses some by each score, and is evaluated.

ResNet-56 loses its 3, 6 and 9 lowest blocks, with no recovery of any kind, by the score that reads weights alone, by
the one that runs calibration images, with and without what a scale and a shift give back, and at random (the mean of
three draws). Calibration: the first training images; accuracy: 932 test images (standard error about one point).

Run: ``python -m benchmarks.studies.blocks``; writes ``results/blocks.json``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks.studies import data, record
from surgery.blocks import drop, find_blocks
from surgery.images import BATCH, read
from surgery.ir import Block, Program
from surgery.practise import missing
from surgery.score import block_worth
from surgery.trace import trace

NETWORK = "resnet56"
COUNTS = (3, 6, 9)
IMAGES = 256
DRAWS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """Accuracy of the network without its `COUNTS` lowest blocks, by one score; with the blocks in that order."""

    score: str
    accuracies: tuple[float, ...]
    order: tuple[str, ...]


def orders(program: Program, blocks: Sequence[Block], images: Tensor) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each score, and the names of the blocks, the least important first."""
    batches = [(part,) for part in torch.split(images, BATCH)]
    scores = {
        "weights alone": block_worth(program, blocks),
        f"{len(images)} images": missing(program, blocks, batches),
        f"{len(images)} images, nothing given back": missing(program, blocks, batches, compensated=False),
        "32 images": missing(program, blocks, batches[: 32 // BATCH]),
    }
    for name, worth in scores.items():
        yield name, sorted(worth, key=worth.__getitem__)
    for draw in range(DRAWS):
        names = [block.name for block in blocks]
        random.Random(draw).shuffle(names)
        yield f"random {draw}", names


def study(root: Path) -> Iterator[Row]:
    """Evaluate the network without blocks, by each score; the dense one first."""
    images = data.exact_images(root)
    model = data.trained(root, NETWORK)
    program = trace(model, images.pixels[:2])
    blocks = find_blocks(program)
    calibration = read(root / "cifar10" / "train_lossless_7728.npz", (1, 3, 32, 32))[:IMAGES]
    yield Row("dense", (_accuracy(program, blocks, (), images),) * len(COUNTS), ())
    for name, order in orders(program, blocks, calibration):
        found = tuple(_accuracy(program, blocks, order[:count], images) for count in COUNTS)
        yield Row(name, found, tuple(order))


def _accuracy(program: Program, blocks: Sequence[Block], gone: Sequence[str], images: data.Images) -> float:
    model = drop(program, dict.fromkeys(gone, ()), blocks).model.eval()
    return round(float(np.mean((data.predictions(model, images) == images.labels).numpy())), 4)


def markdown(rows: Sequence[Any]) -> str:
    """Return the table of docs/latency-budgets.md."""
    lines = [f"| score | {' | '.join(f'{count} blocks' for count in COUNTS)} |", "|---|" + "---|" * len(COUNTS)]
    drawn = [row["accuracies"] for row in rows if row["score"].startswith("random")]
    told = [(row["score"], row["accuracies"]) for row in rows if not row["score"].startswith("random")]
    told.append((f"at random, mean of {len(drawn)}", [float(x) for x in np.mean(drawn, axis=0)]))
    lines += [f"| {name} | {' | '.join(f'{x:.1%}' for x in found)} |" for name, found in told]
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
