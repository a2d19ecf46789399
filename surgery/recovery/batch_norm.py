"""Batch-norm re-estimation on images; parameters are unchanged.

As in training, each norm uses batch statistics; the average of mean and mean square over all batches becomes the
running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from surgery.capture import evaluating
from surgery.core import CompactModel, Executor, arguments_of, with_values
from surgery.importance import NORM
from surgery.recovery.reconstruction import tensors_of

Batches = Sequence[Sequence[Tensor]]
Progress = Callable[[float], None]


def estimate_norms(
    compact: CompactModel, batches: Batches, *, call: Callable[[Sequence[Tensor]], Any], progress: Progress
) -> int:
    """Re-estimate the running statistics of all batch norms in place; return how many there are.

    Args:
        compact: its graph and module share their tensors; without a graph, the module's own norms are run.
        batches: batches of the model's inputs.
        call: runs the module on a batch if there is no graph.
        progress: called with the completed fraction.
    """
    if not compact.has_graph:
        return _of_module(compact.module, batches, call, progress)
    tape = _Estimating(compact.graph, tensors_of(compact.graph))
    with torch.no_grad(), evaluating(compact.graph):  # dropouts are off
        for k, batch in enumerate(batches):
            progress(k / len(batches))
            tape.output(tape.start(batch))
    progress(1.0)
    tape.write()
    return len(tape.sums)


class _Estimating(Executor):
    """Norms use batch statistics, which are accumulated."""

    def __init__(self, graph: torch.fx.GraphModule, state: Mapping[str, Tensor]) -> None:
        super().__init__(graph, state)
        self.sums: dict[tuple[str, str], tuple[int, Tensor, Tensor]] = {}

    def call(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], **changed: Any) -> Any:
        """Run one node."""
        if node.target != NORM:
            return super().call(node, values, **changed)
        raw = arguments_of(node)
        given = with_values(raw, lambda n: self.value(n, values))
        names = [str(v.target) if isinstance(v := raw[k], torch.fx.Node) else "" for k in _STATISTICS]
        if all(names):
            x: Tensor = given["input"].double().movedim(1, 0).flatten(1)
            count, mean, square = self.sums.get((names[0], names[1]), (0, torch.zeros(1), torch.zeros(1)))
            found = x.mean(1), x.square().mean(1)
            share = x.shape[1] / (count + x.shape[1])
            self.sums[names[0], names[1]] = (
                count + x.shape[1],
                mean + share * (found[0] - mean),
                square + share * (found[1] - square),
            )
        affine = given["weight"], given["bias"]
        return torch.nn.functional.batch_norm(given["input"], None, None, *affine, training=True, eps=given["eps"])

    def write(self) -> None:
        for (mean_name, var_name), (count, mean, square) in self.sums.items():
            unbiased = count / max(1, count - 1)
            self.state[mean_name].copy_(mean)
            self.state[var_name].copy_((square - mean.square()).clamp_min(0) * unbiased)


_STATISTICS = ("running_mean", "running_var")


def _of_module(module: nn.Module, batches: Batches, call: Callable[[Sequence[Tensor]], Any], progress: Progress) -> int:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [(m, m.momentum) for m in norms]
    with evaluating(module), torch.no_grad():
        for norm in norms:
            norm.training, norm.momentum = True, None
            norm.reset_running_stats()
        try:
            for k, batch in enumerate(batches):
                progress(k / len(batches))
                call(batch)
        finally:
            for norm, momentum in before:
                norm.training, norm.momentum = False, momentum
    progress(1.0)
    return len(norms)
