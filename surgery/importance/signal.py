"""How much of a network's signal each unit and each block carries, told from the weights alone.

Forward, the mean and variance of every value are followed from the norms' own statistics (`moments`). Backward, *heard*
says how much of what a value says still counts at the outputs: all of it there; at a sum or a concatenation an operand
counts as much as its share of the energy; a value that several read is heard by all of them together, once at most.
What a layer loses with some of its inputs is the share of its weights' energy that reads them, as much as it is heard.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.core import Block, Coupling, Group, Program, Site, all_tensors, bind, interpret, shapes_of
from surgery.coupling import likeness
from surgery.ops import Moments, Rule, compressed, rules, through

_LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class Reader:
    """A layer that reads a group's units.

    Attributes:
        name: of the weight that it reads them with.
        heard: how much of what the layer says counts at the outputs, 0 to 1.
        shares: of its energy, for each unit of the group.
    """

    name: str
    heard: float
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Signal:
    """What is known of a network's signal.

    Attributes:
        readers: group name → the layers that read its units.
        blocks: block name → what is lost with it.
        losses: group name → what is lost with each unit as it goes in turn, where images told; else None.
    """

    readers: Mapping[str, tuple[Reader, ...]]
    blocks: Mapping[str, float]
    losses: Mapping[str, Sequence[float]] | None = None

    def scores(self, group: Group) -> tuple[float, ...]:
        """Return for each unit what all layers that read it lose with it."""
        readers = self.readers[group.name]
        return tuple(sum(r.heard * r.shares[unit] for r in readers) for unit in range(group.size))

    def ranked(self, scores: Mapping[str, Sequence[float]]) -> Signal:
        """Return the same with shares by other scores: a unit's is its part of its group's."""
        readers = {}
        for name, values in scores.items():
            kept = [max(0.0, float(v)) for v in values]
            whole = sum(kept) or 1.0
            shares = tuple(v / whole for v in kept)
            readers[name] = tuple(replace(r, shares=shares) for r in self.readers[name])
        return replace(self, readers=readers)


def loss_of(heard: float, share: float) -> float:
    """Return what is lost where a layer no longer reads a share of what it read.

    Layers pass on what they get: what is left of the signal is a product over layers, and its negative logarithm a sum.
    """
    return -heard * math.log(max(_LEAST, 1.0 - share))


def signal_of(
    program: Program, coupling: Coupling, parameters: Mapping[str, Tensor], blocks: Sequence[Block] = ()
) -> Signal:
    """Return how the signal spreads over units and blocks.

    Args:
        program: whose graph is followed; without one, all layers count as heard.
        coupling: its groups.
        parameters: weights by name, on the CPU.
        blocks: to be judged.
    """
    with torch.no_grad():
        known = moments_of(program) if program.has_graph else {}
        heard = _heard(program, known) if program.has_graph else {}
        layers = _layers(program, known) if known else {}
        readers = {group.name: _readers(group, parameters, layers, heard) for group in coupling.groups}
        return Signal(readers, {block.name: _block_lost(program, known, block) for block in blocks})


def block_worth(program: Program, blocks: Sequence[Block]) -> dict[str, float]:
    """Return what is lost with each block: a branch's part of its sum's variance, what a layer makes of its input."""
    with torch.no_grad():
        known = moments_of(program) if blocks else {}
        return {block.name: _block_lost(program, known, block) for block in blocks}


def _block_lost(program: Program, known: Mapping[str, Any], block: Block) -> float:
    if block.is_layer:
        return loss_of(1.0, 1.0 - likeness(program, block, known))
    branch, stays = (known[name].variance for name in (block.branch, block.stays))
    if branch == 0:  # it does not vary with the input; what it gives counts nevertheless
        branch, stays = (known[name].energy for name in (block.branch, block.stays))
    whole = branch + stays
    return loss_of(1.0, branch / whole if whole > 0 else 0.5)


# Forward: moments. ---------------------------------------------------------------------------------------------------


def moments_of(program: Program) -> dict[str, Any]:
    """Return the moments of every value of a program by node name; of several outputs, a tuple of them."""
    tensors, table = all_tensors(program), rules()

    def call(node: torch.fx.Node, known: Mapping[str, Any]) -> Any:
        return _result(node, shapes_of(node.meta.get("val")), known, table.get(str(node.target)))

    return interpret(
        program.graph.graph,
        placeholder=lambda node: _standard(shapes_of(node.meta.get("val"))),
        parameter=lambda name: Moments.of(tensors[name]),
        call=call,
    )


def _standard(shape: Any) -> Any:
    if not isinstance(shape, tuple):
        return shape
    one = torch.ones([1] * len(shape), dtype=torch.float64)
    return Moments(torch.zeros_like(one), one, shape)


def _result(node: torch.fx.Node, shape: Any, known: Mapping[str, Any], rule: Rule | None) -> Any:
    """By the operator's own rule, else by its family; where neither tells, what goes in comes out."""
    given = dict(bind(node, lambda n: known[n.name]).concrete)
    if node.target is operator.getitem:
        whole = given["0"]
        return whole[given["1"]] if isinstance(whole, tuple) else _stood_in([whole], shape)
    inputs = [x for x in _flat(given.values()) if isinstance(x, Moments)]
    try:
        found = _told(node, given, inputs, rule)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError):  # an operator's own limits
        found = None
    if isinstance(shape, tuple):
        return _fitted(found, shape) or _stood_in(inputs, shape)
    if isinstance(shape, list):
        many = found if isinstance(found, tuple) and len(found) == len(shape) else [None] * len(shape)
        return tuple(_fitted(m, s) or _stood_in(inputs, s) for m, s in zip(many, shape, strict=True))
    return shape


def _told(node: torch.fx.Node, given: dict[str, Any], inputs: Sequence[Moments], rule: Rule | None) -> Any:
    if rule is None:
        return None
    if rule.moments is not None:
        return rule.moments(given)
    if len(inputs) != 1:
        return None
    names = [name for name, x in given.items() if x is inputs[0]]
    run: Callable[[Tensor], Any] = lambda t: node.target(**{**given, names[0]: t})  # type: ignore[operator]  # noqa: E731
    if rule.family == "element-wise":
        return through(run, inputs[0])
    if rule.family == "movement":
        mean, var = (run(t.expand(inputs[0].shape)) for t in (inputs[0].mean, inputs[0].var))
        if isinstance(mean, Tensor):
            return Moments(compressed(mean), compressed(var))
        return tuple(Moments(compressed(m), compressed(v)) for m, v in zip(mean, var, strict=True))
    return None


def _flat(values: Any) -> list[Any]:
    return [x for value in values for x in (value if isinstance(value, (list, tuple)) else (value,))]


def _fitted(found: Any, shape: Any) -> Moments | None:
    """The moments with the value's shape, if they broadcast to it and are numbers."""
    if not isinstance(found, Moments) or not isinstance(shape, tuple):
        return None
    for values in (found.mean, found.var):
        sizes = [1] * (len(shape) - values.dim()) + list(values.shape)
        if len(sizes) != len(shape) or any(a not in (1, b) for a, b in zip(sizes, shape, strict=True)):
            return None
        if not bool(torch.isfinite(values).all()):
            return None
    return replace(found, shape=shape)


def _stood_in(inputs: Sequence[Any], shape: Any) -> Any:
    """What goes in comes out, position by position where the shapes allow, else on average."""
    if not isinstance(shape, tuple):
        return shape
    varying = [x for x in inputs if isinstance(x, Moments)]
    first = next((x for x in varying if bool(x.var.any())), varying[0] if varying else None)
    if first is None:
        return _standard(shape)
    same = _fitted(first, shape) if len(first.shape) == len(shape) else None
    average = Moments(first.mean.mean().reshape(1), first.var.mean().reshape(1))
    return same or _fitted(average, shape) or _standard(shape)


# Backward: what is heard. --------------------------------------------------------------------------------------------


def _heard(program: Program, known: Mapping[str, Any]) -> dict[str, float]:
    """How much of each value counts at the outputs."""
    table, heard = rules(), dict[str, float]()
    for node in reversed(program.graph.graph.nodes):
        by = sum(_passed(node, user, heard, known, table.get(str(user.target))) for user in node.users)
        heard[node.name] = 1.0 if node.op == "output" else min(1.0, by)
    return heard


def _passed(
    node: torch.fx.Node, user: torch.fx.Node, heard: Mapping[str, float], known: Mapping[str, Any], rule: Rule | None
) -> float:
    if rule is None or not rule.mixes:
        return heard[user.name]
    energies = {n: m.energy for n in user.all_input_nodes if isinstance(m := known.get(n.name), Moments)}
    whole = sum(energies.values())
    return heard[user.name] * (energies.get(node, 0.0) / whole if whole > 0 else 1.0)


# Who reads what. -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """An operator with a weight; `axis` of it is contracted, with values whose energies these are.

    None where they are not known: nothing but a norm tells what trained values are like.
    """

    node: str
    axis: int
    energies: Tensor | None


def _layers(program: Program, known: Mapping[str, Any]) -> dict[str, list[_Layer]]:
    """Weight name → the operators that contract with it."""
    table, found, normed = rules(), dict[str, list[_Layer]](), set[torch.fx.Node]()
    for node in program.graph.graph.nodes:
        rule = table.get(str(node.target))
        if node.op != "call_function" or rule is None:
            continue
        if rule.family == "norm" or normed.intersection(node.all_input_nodes):
            normed.add(node)
        raw = bind(node, lambda n: n).raw
        for argument, axis in rule.contracts.items():
            weight, x = raw.get(argument), raw.get(rule.masked[0])
            if isinstance(weight, torch.fx.Node) and weight.op == "get_attr":
                energies = _read(known[x.name], known[weight.name], axis, rule) if x in normed else None
                found.setdefault(str(weight.target), []).append(_Layer(node.name, axis, energies))
    return found


def _read(x: Moments, weight: Moments, axis: int, rule: Rule) -> Tensor | None:
    """Mean squares of what is contracted along an axis of a weight; None where groups share the axis."""
    channel = len(x.shape) - len(weight.shape) + 1 if rule.family == "convolution" else len(x.shape) - 1
    return x.energies(channel) if x.shape[channel] == weight.shape[axis] else None


def _readers(
    group: Group,
    parameters: Mapping[str, Tensor],
    layers: Mapping[str, Sequence[_Layer]],
    heard: Mapping[str, float],
) -> tuple[Reader, ...]:
    found = []
    for site in group.sites:
        weight = parameters.get(site.tensor)
        for layer in layers.get(site.tensor, ()):
            if weight is not None and site.axis == layer.axis:
                shares = _shares(weight, site, group.size, layer.energies)
                found.append(Reader(site.tensor, heard.get(layer.node, 1.0), shares))
    return tuple(found) or (_written(group, parameters, layers, heard),)


def _written(
    group: Group,
    parameters: Mapping[str, Tensor],
    layers: Mapping[str, Sequence[_Layer]],
    heard: Mapping[str, float],
) -> Reader:
    """Where no layer contracts the units, those that make them stand in: of queries and keys, say."""
    made = [site for site in group.sites if site.tensor in layers and site.tensor in parameters]
    known = made or [s for s in group.sites if s.tensor in parameters]
    loudest = max((heard.get(layer.node, 1.0) for site in made for layer in layers[site.tensor]), default=1.0)
    energy = torch.zeros(group.size, dtype=torch.float64)
    for site in known:
        energy += _energies(parameters[site.tensor], site, group.size)
    return Reader(known[0].tensor if known else "", loudest, _normed(energy))


def _shares(weight: Tensor, site: Site, size: int, energies: Tensor | None) -> tuple[float, ...]:
    """Each unit's part of the energy of the whole weight, and of what it makes of what it reads; the mean of the two.

    The first tells what is lost once norms have been estimated anew, the second what is lost before, by shifted means.
    """
    own = _part(_energies(weight, site, size), weight)
    if energies is None or not bool(energies.any()):
        return tuple(own.tolist())
    scaled = weight.double() * energies.sqrt().reshape([-1 if a == site.axis else 1 for a in range(weight.dim())])
    read = _part(_energies(scaled, site, size), scaled)
    return tuple(((own + read) / 2).tolist())


def _part(energy: Tensor, weight: Tensor) -> Tensor:
    whole = weight.double().square().sum()
    return energy / whole if bool(whole > 0) else torch.full_like(energy, 1.0 / len(energy))


def _normed(energy: Tensor) -> tuple[float, ...]:
    whole = float(energy.sum())
    return tuple((energy / whole).tolist() if whole > 0 else [1.0 / len(energy)] * len(energy))


def _energies(weight: Tensor, site: Site, size: int) -> Tensor:
    others = [axis for axis in range(weight.dim()) if axis != site.axis]
    squares = weight.double().square().sum(others) if others else weight.double().square()
    lengths = torch.tensor([len(owned) for owned in site.index])
    positions = torch.tensor([position for owned in site.index for position in owned], dtype=torch.long)
    units = torch.repeat_interleave(torch.arange(len(site.index)), lengths)
    return torch.zeros(size, dtype=torch.float64).index_add_(0, units, squares[positions])
