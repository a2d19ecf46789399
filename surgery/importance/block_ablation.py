"""Block ablation: the error of the outputs on calibration images when blocks are removed.

Blocks that compensate for each other look redundant individually. They are therefore removed one at a time, each time
the one that adds least to the error given those already removed.

Source: after Wang and Wu 2022, PRACTISE (arXiv:2202.07861), whose recoverability is the outputs' error after training
inserted layers; here nothing is inserted, and blocks are removed in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from math import log1p
from typing import Any

import torch
from torch import Tensor

from surgery.core import Block, Executor, Program, digest_of, flat_outputs, remembered, state_of
from surgery.importance.scoring import Batches

MOST_ERROR = 1.0  # blocks are removed in turn until the error of the outputs is as large as their variance
NEAR = 1.2  # a block is removed immediately if no other can be better by more than this factor
WORK_MACS, FEWEST = 1.5e12, 8  # limit on the multiply-adds of all runs together, and the minimum number of images


def block_losses(
    program: Program,
    blocks: Sequence[Block],
    batches: Batches,
    *,
    macs: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, float]:
    """Return the loss of each block, in addition to the blocks that are removed before it.

    The loss is the increase of ``log(1 + error)``. Near zero it agrees with ``-log(1 - error)`` as in `signal.loss_of`,
    but it is also defined for errors above 1.

    `batches` are inputs of the traced program, limited by `macs`, the MACs of one image (0: no limit).
    """
    if not blocks:
        return {}
    most = max(FEWEST, int(WORK_MACS / (4 * len(blocks) * macs))) if macs else None
    used, names = first(batches, most), [block.name for block in blocks]
    given = digest_of([*state_of(program).values(), *chain.from_iterable(used)])
    compute = partial(_block_losses, program, blocks, used, progress)
    losses: dict[str, float] = remembered("ablation", (names, str(program.graph.graph), given), compute)
    return losses


def _block_losses(
    program: Program, blocks: Sequence[Block], batches: Batches, progress: Callable[[float], None]
) -> dict[str, float]:
    ablation = BlockAblation(program, blocks, batches, progress)
    found: dict[str, float] = {}
    before, least = 0.0, 0.0
    for name, error in ablation.in_turn():
        progress(0.5 + 0.5 * min(1.0, error / MOST_ERROR))
        least = max(least, log1p(error) - log1p(before), 1e-6)
        found[name], before = least, error
    for name in ablation.alone.keys() - found.keys():
        found[name] = max(least, log1p(ablation.alone[name]))
    return {block.name: float(f"{found[block.name]:.6g}") for block in blocks}


class BlockAblation:
    """A network without some blocks; errors are squared errors of the outputs over their variance."""

    def __init__(
        self,
        program: Program,
        blocks: Sequence[Block],
        batches: Batches,
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        self._progress = progress
        self._graph, self._state, self._batches = program.graph, state_of(program), batches
        self._blocks = {block.name: block for block in blocks}
        self._dense = list(self._outputs(()))
        self._variations = variations(self._dense)
        self.alone = self._alone()  # of single blocks

    def error(self, removed: Collection[str]) -> float:
        """Return the error without these blocks, the mean over outputs."""
        return self._mean(squared_errors(*pair) for pair in zip(self._outputs(removed), self._dense, strict=True))

    def _mean(self, errors: Iterable[Tensor]) -> float:
        return float((sum(errors) / self._variations).mean()) if len(self._variations) else 0.0

    @torch.no_grad()
    def _alone(self) -> dict[str, float]:
        """Return the error without each single block; runs are shared up to the start of the block."""
        whole = self._without(())
        starts = {name: min(whole.place[node] for node in (*b.nodes, b.sum)) for name, b in self._blocks.items()}
        errors: dict[str, list[Tensor]] = {name: [] for name in self._blocks}
        for k, (batch, dense) in enumerate(zip(self._batches, self._dense, strict=True)):
            self._progress(0.5 * k / len(self._batches))
            run = whole.start(batch)
            for name in sorted(starts, key=starts.__getitem__):
                run = whole.advance(run, starts[name])
                errors[name].append(squared_errors(flat_outputs(self._without((name,)).output(run)), dense))
        return {name: self._mean(found) for name, found in errors.items()}

    def _without(self, removed: Collection[str]) -> Executor:
        return Executor(self._graph, self._state, partial(_without, [self._blocks[name] for name in removed]))

    @torch.no_grad()
    def _outputs(self, removed: Collection[str]) -> Iterator[list[Tensor]]:
        executor = self._without(removed)
        for batch in self._batches:
            yield flat_outputs(executor.output(executor.start(batch)))

    def in_turn(self, most: float = MOST_ERROR) -> Iterator[tuple[str, float]]:
        """Yield blocks in order of removal, each with the error without it and all previous ones.

        A block's contribution to the error rarely decreases as others are removed, so only blocks with the lowest last
        known contribution are measured again (lazy greedy, Minoux 1978).
        """
        adds, so_far = dict(self.alone), 0.0
        removed: list[str] = []
        while adds and so_far < most:
            measured: set[str] = set() if removed else set(adds)
            while (name := min(adds, key=adds.__getitem__)) not in measured:
                adds[name] = self.error([*removed, name]) - so_far
                measured.add(name)
                if adds[name] <= NEAR * min(adds.values()):
                    break
            so_far += adds.pop(name)
            removed.append(name)
            yield name, so_far


def _without(removed: Sequence[Block], node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
    """Skip the branches of these blocks, and pass the other operand of their sums, or a layer's input, on."""
    if any(node.name in block.nodes for block in removed if not block.is_layer):
        return None
    for block in removed:
        if node.name in block.nodes or (node.name == block.sum and block.is_layer):
            return args[0]
        if node.name == block.sum:
            return args[[getattr(source, "name", "") for source in node.args].index(block.stays)]
    return NotImplemented


def first(batches: Batches, most: int | None) -> Batches:
    """Return the first batches with at most this many images in total, but at least one batch."""
    ends = list(accumulate(len(batch[0]) for batch in batches))
    return [batch for k, batch in enumerate(batches) if not k or most is None or ends[k] <= most]


def squared_errors(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the sum of squared differences of each output: (outputs,)."""
    each = [(a.double() - b.double()).square().sum() for a, b in zip(outputs, wanted, strict=True)]
    return torch.stack(each) if each else torch.zeros(0, dtype=torch.float64)


def variations(outputs: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the sum of squared deviations of each output from its mean over images: (outputs,).

    For a constant output, or a single image, it is the sum of squares. `outputs`: those of each batch.
    """
    found = []
    for batches in zip(*outputs, strict=True):
        rows = torch.cat([x.double().reshape(len(x) if x.dim() else 1, -1) for x in batches])
        squares, deviations = rows.square().sum(), (rows - rows.mean(0)).square().sum()
        found.append((deviations if deviations > 1e-9 * squares else squares).clamp_min(1e-30))
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)
