"""Depthwise layers that keep their shape and can be replaced by their input.

Such a layer ties its outputs to its inputs channel by channel, so removing it changes no shape, whatever is cut. Other
layers with equal numbers of outputs and inputs belong to two groups, which may be cut differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from surgery.capture import module_of, source_of
from surgery.core import Block, Program, all_tensors, arguments_of, hint
from surgery.coupling.placeholders import shared_path
from surgery.ops import rules

_NORM = "aten.batch_norm.default"
_CONVOLUTIONS = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")


def depthwise_layers(program: Program) -> Iterator[Block]:
    """Yield, without names, depthwise convolutions that keep their shape, each with its norm and activation."""
    if not program.has_graph:
        return
    for node in program.graph.graph.nodes:
        if _keeps_shape(node):
            yield _block([node, *_followers(node)])


def input_correlation(program: Program, block: Block, known: Mapping[str, Any]) -> float:
    """Return the squared correlation of a depthwise layer's output with its input.

    Neighbouring pixels are assumed to be independent, so that a channel correlates with its input through the central
    weight; activations are assumed not to change the correlation.

    Args:
        program: the program of the block.
        block: one of `depthwise_layers`.
        known: moments of every value, by node name.
    """
    nodes = {node.name: node for node in program.graph.graph.nodes}
    tensors = all_tensors(program)
    layer = [nodes[name] for name in (*block.nodes, block.sum)]
    weight = _tensor(layer[0], "weight", tensors)
    if weight is None or any(size % 2 == 0 for size in weight.shape[2:]):
        return 0.0
    taps = weight.flatten(1)
    alike = taps[:, taps.shape[1] // 2] / taps.norm(dim=1).clamp_min(1e-30)
    for node in layer[1:]:
        scale = _tensor(node, "weight", tensors) if str(node.target) == _NORM else None
        alike = alike * (scale.sign() if scale is not None else 1.0)
    before, after = (_variances(known[name], len(alike)) for name in (block.stays, block.sum))
    whole = float(before.sum() * after.sum())
    return float((alike * (before * after).sqrt()).sum().clamp_min(0)) ** 2 / whole if whole > 0 else 0.0


def _keeps_shape(node: torch.fx.Node) -> bool:
    if node.op != "call_function" or str(node.target) not in _CONVOLUTIONS:
        return False
    raw = arguments_of(node)
    weight: Tensor | None
    image: Tensor | None
    weight, image = (raw[name].meta.get("val") for name in ("weight", "input"))
    if not isinstance(weight, Tensor) or not isinstance(image, Tensor) or raw["weight"].op != "get_attr":
        return False
    channels = weight.shape[0]
    own = weight.shape[1] == 1 and raw.get("groups", 1) == channels > 1 and image.dim() == weight.dim()
    return own and node.args[:1] == (raw["input"],) and _like(image, node)


def _like(image: Tensor, node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != image.dtype:
        return False
    return [hint(s) for s in value.shape] == [hint(s) for s in image.shape]


def _followers(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Return the norm and the activations after the layer, each the only user of its predecessor."""

    def readers(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
        while len(node.users) == 1:
            yield (node := next(iter(node.users)))

    return takewhile(lambda reader: _goes_along(reader, node), readers(node))


def _goes_along(reader: torch.fx.Node, node: torch.fx.Node) -> bool:
    rule = rules().get(str(reader.target)) if reader.op == "call_function" else None
    computed = [n for n in reader.all_input_nodes if n.op != "get_attr"]
    unary = rule is not None and rule.family == "element-wise" and len(reader.all_input_nodes) == 1
    along = unary or str(reader.target) == _NORM
    return along and len(computed) == 1 and reader.args[:1] == (computed[0],) and _like(node.meta["val"], reader)


def _block(layer: list[torch.fx.Node]) -> Block:
    *inside, last = layer
    stays = layer[0].args[0]
    assert isinstance(stays, torch.fx.Node)
    own = [n for node in layer for n in node.all_input_nodes if n.op == "get_attr" and set(n.users) <= set(layer)]
    tensors = tuple(dict.fromkeys(str(n.target) for n in own))
    return Block(
        "",
        shared_path(map(module_of, layer)),
        last.name,
        stays.name,
        "",
        tuple(n.name for n in inside),
        tensors,
        source_of(layer[0]),
        True,
    )


def _tensor(node: torch.fx.Node, name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    given = arguments_of(node).get(name)
    return tensors[str(given.target)].detach().cpu().double() if isinstance(given, torch.fx.Node) else None


def _variances(moments: Any, channels: int) -> Tensor:
    """Return the variance of each channel over its positions."""
    variances: Tensor = moments.var
    rows = variances.movedim(1, 0).flatten(1).mean(1) if variances.dim() > 1 else variances.reshape(-1)
    return rows.expand(channels)
