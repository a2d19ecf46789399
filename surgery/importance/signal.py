"""The share of a network's signal in each unit and block, computed from the weights alone.

The forward pass computes mean and variance of every value from the statistics of norms (`moments_of`). The backward
pass computes the *output relevance* of a value, its share of the outputs: it starts at 1; each operand of a sum or
concatenation receives its share of the energy; a value with several consumers receives the sum of theirs, at most 1.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.core import Block, Coupling, Group, Program, Site, all_tensors, arguments_of, interpret, shapes_of
from surgery.ops import Moments, Rule, compressed, rules, through


@dataclass(frozen=True, slots=True)
class Consumer:
    """A layer that consumes a group's units."""

    name: str  # of its weight
    relevance: float  # output relevance of its result, 0 to 1
    shares: tuple[float, ...]  # share of its weight's energy for each unit of the group


@dataclass(frozen=True, slots=True, eq=False)
class Signal:
    """Result of the signal analysis of a network: the consumers of each group, and losses by block and by group."""

    consumers: Mapping[str, tuple[Consumer, ...]]
    blocks: Mapping[str, float]  # loss if it is removed
    losses: Mapping[str, Sequence[float]] | None = None  # of each unit after those below it, if measured on images

    def scores(self, group: Group) -> tuple[float, ...]:
        """Return, for each unit, the loss of all its consumers."""
        consumers = self.consumers[group.name]
        return tuple(sum(c.relevance * c.shares[unit] for c in consumers) for unit in range(group.size))

    def ranked(self, scores: Mapping[str, Sequence[float]]) -> Signal:
        """Return a copy with shares proportional to other scores within each group."""
        consumers = {}
        for name, values in scores.items():
            kept = [max(0.0, float(v)) for v in values]
            whole = sum(kept) or 1.0
            shares = tuple(v / whole for v in kept)
            consumers[name] = tuple(replace(c, shares=shares) for c in self.consumers[name])
        return replace(self, consumers=consumers)


def loss_of(relevance: float, share: float) -> float:
    """Return the loss if a layer no longer consumes a share of its inputs.

    The remaining signal is a product over layers, so its negative logarithm is a sum.
    """
    return -relevance * math.log(max(1e-9, 1.0 - share))


def signal_of(
    program: Program, coupling: Coupling, parameters: Mapping[str, Tensor], blocks: Sequence[Block] = ()
) -> Signal:
    """Return the distribution of the signal over units and blocks; without a graph, all relevances are 1."""
    with torch.no_grad():
        known = moments_of(program) if program.has_graph else {}
        layers = _layers(program, known) if known else {}
        consumers = {group.name: _consumers(group, parameters, layers) for group in coupling.groups}
        return Signal(consumers, {block.name: _block_lost(program, known, block) for block in blocks})


def _block_lost(program: Program, known: Mapping[str, Any], block: Block) -> float:
    if block.is_layer:
        return loss_of(1.0, 1.0 - _input_correlation(program, block, known))
    branch, stays = (known[name].variance for name in (block.branch, block.stays))
    if branch == 0:  # it does not vary with the input, but its constant counts
        branch, stays = (known[name].energy for name in (block.branch, block.stays))
    return loss_of(1.0, branch / (branch + stays) if branch + stays > 0 else 0.5)


def _input_correlation(program: Program, block: Block, known: Mapping[str, Any]) -> float:
    """Return the squared correlation of a depthwise layer's output with its input, taking neighbours as independent."""
    nodes, tensors = {node.name: node for node in program.graph.graph.nodes}, all_tensors(program)
    layer = [nodes[name] for name in (*block.nodes, block.sum)]

    def weight_of(node: torch.fx.Node) -> Tensor | None:
        given = arguments_of(node).get("weight")
        return tensors[str(given.target)].detach().cpu().double() if isinstance(given, torch.fx.Node) else None

    def variances(name: str) -> Tensor:
        """Return the variance of each channel over its positions."""
        var: Tensor = known[name].var
        rows = var.movedim(1, 0).flatten(1).mean(1) if var.dim() > 1 else var.reshape(-1)
        return rows.expand(len(alike))

    weight = weight_of(layer[0])
    if weight is None or any(size % 2 == 0 for size in weight.shape[2:]):
        return 0.0
    taps = weight.flatten(1)
    alike = taps[:, taps.shape[1] // 2] / taps.norm(dim=1).clamp_min(1e-30)
    for node in layer[1:]:
        scale = weight_of(node) if node.target is torch.ops.aten.batch_norm.default else None
        alike = alike * (scale.sign() if scale is not None else 1.0)
    before, after = variances(block.stays), variances(block.sum)
    whole = float(before.sum() * after.sum())
    return float((alike * (before * after).sqrt()).sum().clamp_min(0)) ** 2 / whole if whole > 0 else 0.0


# Forward: moments. ---------------------------------------------------------------------------------------------------


def moments_of(program: Program) -> dict[str, Any]:
    """Return the moments of every value of a program by node name; of several outputs, a tuple of them."""
    tensors, table = all_tensors(program), rules()
    return interpret(
        program.graph.graph,
        placeholder=lambda node: _standard(shapes_of(node.meta.get("val"))),
        parameter=lambda name: Moments.of(tensors[name]),
        call=lambda node, known: _result(node, known, table.get(str(node.target))),
    )


def _standard(shape: Any) -> Any:
    if not isinstance(shape, tuple):
        return shape
    one = torch.ones([1] * len(shape), dtype=torch.float64)
    return Moments(torch.zeros_like(one), one, shape)


def _result(node: torch.fx.Node, known: Mapping[str, Any], rule: Rule | None) -> Any:
    """Apply the operator's rule, else that of its family; otherwise pass the inputs' moments on."""
    shape, given = shapes_of(node.meta.get("val")), torch.fx.map_arg(arguments_of(node), lambda n: known[n.name])
    if node.target is operator.getitem:
        whole = given["0"]
        return whole[given["1"]] if isinstance(whole, tuple) else _passed_on([whole], shape)
    items = (x for value in given.values() for x in (value if isinstance(value, (list, tuple)) else (value,)))
    inputs = [x for x in items if isinstance(x, Moments)]
    found = None
    if rule is not None:
        try:
            found = rule.moments(given) if rule.moments is not None else _by_family(node, given, inputs, rule.family)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):  # an operator's own limits
            found = None
    if isinstance(shape, tuple):
        return _with_shape(found, shape) or _passed_on(inputs, shape)
    if isinstance(shape, list):
        many = found if isinstance(found, tuple) and len(found) == len(shape) else [None] * len(shape)
        return tuple(_with_shape(m, s) or _passed_on(inputs, s) for m, s in zip(many, shape, strict=True))
    return shape


def _by_family(node: torch.fx.Node, given: dict[str, Any], inputs: Sequence[Moments], family: str) -> Any:
    """Run an operator with a single tensor argument on its mean and variance, if its family permits."""
    if len(inputs) != 1:
        return None
    x = inputs[0]
    name = next(name for name, value in given.items() if value is x)

    def run(t: Tensor) -> Any:
        return node.target(**{**given, name: t})  # type: ignore[operator]

    if family == "element-wise":
        return through(run, x)
    if family == "movement":
        mean, var = (run(t.expand(x.shape)) for t in (x.mean, x.var))
        if isinstance(mean, Tensor):
            return Moments(compressed(mean), compressed(var))
        return tuple(Moments(compressed(m), compressed(v)) for m, v in zip(mean, var, strict=True))
    return None


def _with_shape(found: Any, shape: Any) -> Moments | None:
    """Return the moments with the value's shape, if they broadcast to it and are not NaN."""
    if not isinstance(found, Moments) or not isinstance(shape, tuple):
        return None
    for values in (found.mean, found.var):
        sizes = [1] * (len(shape) - values.dim()) + list(values.shape)
        if len(sizes) != len(shape) or any(a not in (1, b) for a, b in zip(sizes, shape, strict=True)):
            return None
        if not bool(torch.isfinite(values).all()):
            return None
    return replace(found, shape=shape)


def _passed_on(inputs: Sequence[Any], shape: Any) -> Any:
    """Pass the input's moments on, position by position if the shapes allow, else on average."""
    varying = [x for x in inputs if isinstance(x, Moments)]
    first = next((x for x in varying if bool(x.var.any())), varying[0] if varying else None)
    if not isinstance(shape, tuple) or first is None:
        return _standard(shape)
    same = _with_shape(first, shape) if len(first.shape) == len(shape) else None
    average = Moments(first.mean.mean().reshape(1), first.var.mean().reshape(1))
    return same or _with_shape(average, shape) or _standard(shape)


# Backward: output relevance. -----------------------------------------------------------------------------------------


def _relevance(program: Program, known: Mapping[str, Any]) -> dict[str, float]:
    table, relevance = rules(), dict[str, float]()

    def share_of(node: torch.fx.Node, user: torch.fx.Node) -> float:
        """Return one operand's share of the energy that an operator sums or concatenates; else 1."""
        rule = table.get(str(user.target))
        if rule is None or not rule.is_sum:
            return 1.0
        energies = {n: m.energy for n in user.all_input_nodes if isinstance(m := known.get(n.name), Moments)}
        whole = sum(energies.values())
        return energies.get(node, 0.0) / whole if whole > 0 else 1.0

    for node in reversed(program.graph.graph.nodes):
        by_users = (relevance[user.name] * share_of(node, user) for user in node.users)
        relevance[node.name] = 1.0 if node.op == "output" else min(1.0, sum(by_users))
    return relevance


# Consumers. ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """An operator with a weight: output relevance of its result, and the contracted axis of the weight.

    `energies` are mean squares of the values contracted with it; None if groups share the axis, or if they are unknown,
    since only norms record statistics of trained values.
    """

    relevance: float
    axis: int
    energies: Tensor | None


Layers = Mapping[str, Sequence[_Layer]]
"""Weight name → the operators that contract with it."""


def _layers(program: Program, known: Mapping[str, Any]) -> Layers:
    table, found, normed = rules(), dict[str, list[_Layer]](), set[torch.fx.Node]()
    relevance = _relevance(program, known)
    for node in program.graph.graph.nodes:
        rule = table.get(str(node.target))
        if node.op != "call_function" or rule is None:
            continue
        if rule.family == "norm" or normed.intersection(node.all_input_nodes):
            normed.add(node)
        raw = arguments_of(node)
        for argument, axis in rule.contracts.items():
            weight, x = raw.get(argument), raw.get(rule.masked[0])
            if isinstance(weight, torch.fx.Node) and weight.op == "get_attr":
                energies = None
                if x in normed:
                    value, own = known[x.name], known[weight.name].shape
                    channel = len(value.shape) - (len(own) - 1 if rule.family == "convolution" else 1)
                    energies = value.energies(channel) if value.shape[channel] == own[axis] else None
                found.setdefault(str(weight.target), []).append(_Layer(relevance[node.name], axis, energies))
    return found


def _consumers(group: Group, parameters: Mapping[str, Tensor], layers: Layers) -> tuple[Consumer, ...]:
    found = []
    for site in group.sites:
        weight = parameters.get(site.tensor)
        for layer in layers.get(site.tensor, ()):
            if weight is not None and site.axis == layer.axis:
                found.append(Consumer(site.tensor, layer.relevance, _shares(weight, site, layer.energies)))
    if found:
        return tuple(found)
    # If no layer contracts the units (queries and keys), their producers are used instead.
    made = [site for site in group.sites if site.tensor in layers and site.tensor in parameters]
    sites = made or [s for s in group.sites if s.tensor in parameters]
    highest = max((layer.relevance for site in made for layer in layers[site.tensor]), default=1.0)
    energy = torch.zeros(group.size, dtype=torch.float64)
    for site in sites:
        energy += power_sum(site, parameters[site.tensor], order=2)
    return (Consumer(sites[0].tensor if sites else "", highest, tuple(_over(energy, energy.sum()).tolist())),)


def _shares(weight: Tensor, site: Site, energies: Tensor | None) -> tuple[float, ...]:
    """Average the shares of the weight's energy (lost once norms are re-estimated) and of output energy (before)."""
    own = _over(power_sum(site, weight, order=2), weight.double().square().sum())
    if energies is None or not bool(energies.any()):
        return tuple(own.tolist())
    scaled = weight.double() * energies.sqrt().reshape([-1 if a == site.axis else 1 for a in range(weight.dim())])
    read = _over(power_sum(site, scaled, order=2), scaled.square().sum())
    return tuple(((own + read) / 2).tolist())


def _over(energy: Tensor, whole: Tensor) -> Tensor:
    return energy / whole if bool(whole > 0) else torch.full_like(energy, 1.0 / len(energy))


def positions_of(site: Site) -> tuple[Tensor, Tensor]:
    """Return positions along the site's axis and the unit that owns each, both of shape (positions,)."""
    owners = [unit for unit, owned in enumerate(site.index) for _ in owned]
    positions = [position for owned in site.index for position in owned]
    return torch.tensor(positions, dtype=torch.long), torch.tensor(owners, dtype=torch.long)


def power_sum(site: Site, weight: Tensor, *, order: int) -> Tensor:
    """Return per unit the sum of ``|w| ** order`` over its slices of one weight: (units,), float64."""
    others = [axis for axis in range(weight.ndim) if axis != site.axis]
    norm = torch.linalg.vector_norm
    per_position = norm(weight, order, dim=others, dtype=torch.float64) if others else weight.double().abs()
    positions, units = positions_of(site)
    total = torch.zeros(len(site.index), dtype=torch.float64)
    return total.index_add_(0, units, per_position.pow(order)[positions])
