"""`nn.MultiheadAttention` whose heads are narrower, or fewer, than its input's width requires."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.core import AxisCut


class SlicedAttention(nn.MultiheadAttention):
    """Multi-head attention after pruning, with the parameters' names and the call of `nn.MultiheadAttention`.

    `num_heads` heads have `head_dim` units in queries and keys and `value_dim` in values, independently of `embed_dim`,
    the width of input and output. Scores are scaled by `scale`, which is the dense model's.
    """

    value_dim: int
    scale: float

    def forward(  # the signature is torch's
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, on request, the attention weights; arguments and shapes are those of torch."""
        one, batch_axis = query.dim() == 2, 0 if self.batch_first else 1
        q, k, v = (x.unsqueeze(batch_axis) if one else x for x in (query, key, value))
        q, k, v = (x if self.batch_first else x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (self._heads(F.linear(x, *own)) for x, own in zip((q, k, v), self._projections(), strict=True))
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        out = out if self.batch_first else out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (out.squeeze(batch_axis), weights if weights is None else weights.squeeze(0)) if one else (out, weights)

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        widths = [self.num_heads * width for width in (self.head_dim, self.head_dim, self.value_dim)]
        own: tuple[Any, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = own if self.in_proj_weight is None else torch.split(self.in_proj_weight, widths)
        biases = (None,) * 3 if self.in_proj_bias is None else torch.split(self.in_proj_bias, widths)
        return list(zip(weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)  # (N, L, H * D) → (N, H, L, D)

    def _mask(self, q: Tensor, k: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Return what is added to the scores, broadcastable to (N, H, L, S); masks are True or -inf where ignored."""
        total = None
        if attention is not None:
            total = _added(attention, q)
            total = total.view(-1, self.num_heads, *total.shape[1:]) if total.dim() == 3 else total
        if padding is not None:
            ignored = _added(padding.view(-1, 1, 1, k.shape[-2]), q)
            total = ignored if total is None else total + ignored
        return total


def _added(mask: Tensor, like: Tensor) -> Tensor:
    added = like.new_zeros(mask.shape)
    return added.masked_fill(mask, float("-inf")) if not mask.is_floating_point() else added + mask


def resize_attention(made: nn.Module, cuts: Iterable[AxisCut]) -> None:
    """Set the sizes of attention modules with sliced tensors, and make `SlicedAttention` of those that need it.

    Modules whose remaining units are not the same number of heads of one width are left as they are.
    """
    dead = {(cut.tensor, cut.axis): list(cut.dead) for cut in cuts}
    for path, module in made.named_modules():
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
            _resize(module, f"{path}." if path else "", dead)


def _resize(module: nn.MultiheadAttention, prefix: str, dead: dict[tuple[str, int], list[int]]) -> None:
    dense, stacked = module.head_dim, module.in_proj_weight is not None
    alive = np.ones((3, module.num_heads * dense), bool)
    if stacked:
        alive.reshape(-1)[dead.get((f"{prefix}in_proj_weight", 0), [])] = False
    for row, name in zip(alive, () if stacked else ("q", "k", "v"), strict=False):
        row[dead.get((f"{prefix}{name}_proj_weight", 0), [])] = False
    widths = [{int(w) for w in part.reshape(-1, dense).sum(1) if w} for part in alive]
    heads = {int(part.reshape(-1, dense).any(1).sum()) for part in alive}
    if len(heads) > 1 or any(len(found) != 1 for found in widths) or widths[0] != widths[1]:
        return
    (module.num_heads,), (module.head_dim,), _, (value_dim,) = heads, *widths
    own = [module.in_proj_weight] * 3 if stacked else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    module.embed_dim, module.kdim, module.vdim = (weight.shape[1] for weight in own)
    if (module.head_dim, value_dim) != (dense, dense) or module.num_heads * dense != module.embed_dim:
        module.__class__ = SlicedAttention
        module.value_dim, module.scale = value_dim, 1 / sqrt(dense)  # type: ignore[assignment]
        module._qkv_same_embed_dim = False  # torch's fused encoder layers use the weights at their former sizes
