"""Layers that can be refitted: contractions with their own weights, and the norm and sum that follow.

A contraction is a convolution or a linear layer, together with the following batch norm if there is no other user in
between. A separate batch norm also counts, as a contraction of each channel with itself. If the result is added to a
value that depends neither on it nor on a later contraction, the target is the sum, so that the fit also compensates for
errors of the other operand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from surgery.core import arguments_of

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    getattr(getattr(aten, f"conv{d}d"), overload) for d in (1, 2, 3) for overload in ("default", "padding")
)
LINEAR = aten.linear.default
NORM = aten.batch_norm.default
SUMS = (aten.add.Tensor, aten.add_.Tensor)


@dataclass(frozen=True, slots=True)
class Contraction:
    """One layer.

    Attributes:
        node: name of its operation.
        weight: name of its weight; empty for a separate norm.
        bias: name of its bias, or empty.
        norm: name of the following batch norm's operation (or its own), or empty.
        norm_names: names of that norm's scale, shift, running mean and running variance; empty without a norm.
        aim: name of the target operation: the sum, the norm, or its own.
        other: name of the sum's other operand; empty if the target is not a sum.
    """

    node: str
    weight: str
    bias: str
    norm: str
    norm_names: tuple[str, ...]
    aim: str
    other: str = ""


def find_contractions(graph: torch.fx.GraphModule, known: Collection[str]) -> list[Contraction]:
    """Return the layers of a graph that can be fitted, in graph order.

    Args:
        graph: functional ATen graph that reads parameters by name.
        known: names of possible target operations: those of the dense program.
    """
    nodes = list(graph.graph.nodes)
    places = {node: k for k, node in enumerate(nodes)}
    reads: dict[str, int] = {}
    for node in nodes:
        if node.op == "get_attr":
            reads[str(node.target)] = reads.get(str(node.target), 0) + len(node.users)
    drafts: dict[torch.fx.Node, tuple[Contraction, torch.fx.Node]] = {}
    behind: set[torch.fx.Node] = set()
    for node in nodes:
        if node.op == "call_function" and node.name in known and node not in behind:
            found = _draft(node, reads, known)
            if found is not None:
                drafts[node] = found
                behind.add(found[1])
    return [_with_sum(draft, node, end, drafts.keys(), places, known) for node, (draft, end) in drafts.items()]


def _draft(
    node: torch.fx.Node, reads: Mapping[str, int], known: Collection[str]
) -> tuple[Contraction, torch.fx.Node] | None:
    """Return the layer that starts at a node, and its last operation."""
    if node.target in CONVOLUTIONS or node.target == LINEAR:
        raw = arguments_of(node)
        weight, bias = _own(raw.get("weight"), reads), _own(raw.get("bias"), reads)
        x = raw.get("input")
        if not weight or (raw.get("bias") is not None and not bias) or not isinstance(x, torch.fx.Node):
            return None
        follower = _only_user(node)
        if follower is not None and follower.target == NORM and follower.args[0] is node and follower.name in known:
            names = _norm_names(follower, reads)
            if names:
                return Contraction(node.name, weight, bias, follower.name, names, follower.name), follower
        return Contraction(node.name, weight, bias, "", (), node.name), node
    if node.target == NORM and (names := _norm_names(node, reads)):
        return Contraction(node.name, "", "", node.name, names, node.name), node
    return None


def _own(node: object, reads: Mapping[str, int]) -> str:
    """Return a parameter's name if it has no other user."""
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr" or reads[str(node.target)] != 1:
        return ""
    return str(node.target)


def _norm_names(node: torch.fx.Node, reads: Mapping[str, int]) -> tuple[str, ...]:
    """Return names of scale, shift, mean and variance; empty unless the norm is their only user and in eval mode."""
    raw = arguments_of(node)
    names = tuple(_own(raw.get(name), reads) for name in ("weight", "bias", "running_mean", "running_var"))
    return names if all(names) and not raw.get("training") else ()


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _with_sum(
    draft: Contraction,
    node: torch.fx.Node,
    end: torch.fx.Node,
    fitted: Collection[torch.fx.Node],
    places: Mapping[torch.fx.Node, int],
    known: Collection[str],
) -> Contraction:
    """Return the layer with a sum as target, if there is one whose other operand is available earlier."""
    total = _only_user(end)
    if total is None or total.target not in SUMS or total.name not in known or total.kwargs.get("alpha", 1) != 1:
        return draft
    operands = [x for x in total.args[:2] if isinstance(x, torch.fx.Node) and x.op != "get_attr"]
    others = [x for x in operands if x is not end]
    if len(operands) != 2 or len(others) != 1 or _waits(others[0], places[node], fitted, places):
        return draft
    return replace(draft, aim=total.name, other=others[0].name)


def _waits(
    value: torch.fx.Node, since: int, fitted: Collection[torch.fx.Node], places: Mapping[torch.fx.Node, int]
) -> bool:
    """Return whether a value depends on a layer that is fitted at `since` or later."""
    pending, seen = [value], set[torch.fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen or places[node] < since:
            continue
        if node in fitted:
            return True
        seen.add(node)
        pending.extend(node.all_input_nodes)
    return False
