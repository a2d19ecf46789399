"""Gradient of the outputs' log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.core import Executor, Scores, flat_outputs
from surgery.importance.scoring import Evidence, criterion


@criterion("taylor", needs=["images", "graph", "gradients", "costs"])
def taylor(evidence: Evidence) -> Scores:
    """Mean squared derivative of the log-likelihood of sampled outputs with respect to a scale of the unit.

    The derivative is along the unit's weights in its consumers, or else in its first producer.
    Source: after Molchanov et al. 2019 (arXiv:1906.10771), with outputs sampled from the model's own distribution
    instead of labels.
    """
    groups = evidence.coupling.groups
    touched = {site.tensor for group in groups for site in group.sites}
    floating = {name: t.detach().clone() for name, t in evidence.state.items() if t.is_floating_point()}
    wanted = {name: t.requires_grad_() for name, t in floating.items() if name in touched and "running_" not in name}
    executor = Executor(evidence.program.graph, {**evidence.state, **floating})
    sums = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    generator, images = torch.Generator().manual_seed(evidence.seed), 0
    for batch in evidence.images:
        for k in range(0, len(batch[0]), 4):  # small batches, so that gradients cancel less
            part = [x[k : k + 4] if len(x) == len(batch[0]) else x for x in batch] if len(batch[0]) > 4 else batch
            images += len(part[0])
            likelihood = _drawn_log_likelihood(flat_outputs(executor.output(executor.start(part))), generator)
            slopes = torch.autograd.grad(likelihood, list(wanted.values()), allow_unused=True)
            by_name = {name: g for name, g in zip(wanted, slopes, strict=True) if g is not None}
            for group in groups:
                sites = [s for s in group.sites if s.tensor in by_name and floating[s.tensor].dim() > 1]
                total = torch.zeros(group.size, dtype=torch.float64)
                for s in [s for s in sites if s.axis == 1] or [s for s in sites if s.axis == 0][:1]:
                    weight = floating[s.tensor].detach()
                    others = [axis for axis in range(weight.dim()) if axis != s.axis]
                    along = (weight * by_name[s.tensor]).double().sum(others)
                    total += torch.stack([along[list(owned)].sum() for owned in s.index])
                sums[group.name] += total.square()
    return {name: tuple((total / (2 * images)).tolist()) for name, total in sums.items()}


def _drawn_log_likelihood(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Return the log-likelihood of outputs drawn from logits (N, classes), or from normal distributions."""
    total = outputs[0].new_zeros(())
    for out in outputs:
        if out.dim() == 2 and out.shape[1] > 1:
            logs = out.log_softmax(1)
            chosen = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            total = total + logs.gather(1, chosen).sum()
        else:
            spread = float(out.detach().std(correction=0)) or 1.0
            noise = torch.randn(out.shape, generator=generator, dtype=out.dtype)
            total = total + (out * noise).sum() / (spread * max(1, out[0].numel()) ** 0.5)
    return total
