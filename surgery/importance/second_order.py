"""Importance of units told by images, without labels: criteria that look at what the network computes on them.

Every layer that reads a group's units is looked at: the second moments of what it reads tell what is lost with a unit
once the layer's other weights have made up for it. Between groups nothing but the outputs can compare: each group is
cut by itself, at a few widths and with its readers fitted anew, and what is then missing from the outputs is measured.

Source: block optimal brain surgeon after Hassibi and Stork 1993 and Frantar and Alistarh 2022 (arXiv:2208.11580), with
units as blocks and all readers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from surgery.core import Coupling, Executor, Group, Masks, Program, Scores, Site, flat_outputs
from surgery.coupling import masked_run
from surgery.errors import InvalidInput
from surgery.importance.folding import Folded
from surgery.importance.observe import Batches, Reader, by_activation, observed, read_by, share, taylor

Progress = Callable[[float], None]

NAMES = ("activation", "reconstruction", "taylor", "second-order")
"""The criteria that look at images."""
PRICED = frozenset({"taylor", "second-order"})
"""Those that tell what the outputs lose: what a unit costs is to be set against that."""
RIDGE = 1e-3
STEPS = 96
"""Units of a group go one by one, or in so many steps."""
CUT = (0.25, 0.5, 0.75)
"""Parts of each group that are cut to measure what is missing."""
SHARED = 4.0
"""What several layers read is missed more than it seems while nothing else is cut, by about so much."""
APART = 4
"""Every fourth batch is measured on, and not looked at before: what was fitted to few images misses others more."""
WORK_MACS, FEWEST = 8e11, 24
"""What all measurements together may take, and on how few images they are made for that."""


def scored(
    criterion: str,
    program: Program,
    coupling: Coupling,
    state: Mapping[str, Tensor],
    batches: Batches,
    *,
    heard: Mapping[str, float],
    order: Scores,
    macs: int = 0,
    seed: int = 0,
    progress: Progress = lambda fraction: None,
) -> Scores:
    """Return the importance of every unit by one of `NAMES`.

    Args:
        criterion: its name.
        program: dense, with a graph.
        coupling: its groups.
        state: parameters and buffers that the graph reads, by name.
        batches: of its inputs.
        heard: weight name → how much of what its layer says counts at the outputs.
        order: scores by which units rank where no layer that can be looked at reads them.
        macs: of one image, by which measurements are limited; 0: they are not.
        seed: of all that is drawn.
        progress: told the fraction that is done.

    Raises:
        InvalidInput: there is no graph to look at.
    """
    if not program.has_graph:
        raise InvalidInput(
            f"criterion {criterion} looks at the operators that torch.export captures; with tracer torch-pruning "
            "choose l1, l2, bn-gamma, lamp or fpgm"
        )
    if criterion == "taylor":
        return taylor(program, coupling, state, batches, seed)
    aside = [batch for k, batch in enumerate(batches) if k % APART == APART - 1]
    looked = [batch for k, batch in enumerate(batches) if k % APART < APART - 1] if aside else batches
    readers = observed(program, state, looked, heard=heard, seed=seed)
    if criterion == "activation":
        return {g.name: by_activation(g, readers) or share(order[g.name]) for g in coupling.groups}
    orders = {g.name: _eliminated(g, readers) or _ranked(g, order[g.name]) for g in coupling.groups}
    if criterion == "reconstruction":
        return {name: found.scores(found.lost) for name, found in orders.items()}
    return _measured(program, coupling, state, aside or batches, readers, orders, macs, progress)


@dataclass(frozen=True, slots=True)
class Order:
    """In which order a group's units go, and what is lost with each, those before it gone.

    Attributes:
        units: all of them; the last stays.
        lost: with each, in that order; never falls.
        weights: number of units gone → weights of each reader, fitted anew, of the shape of `Reader.weight`.
    """

    units: tuple[int, ...]
    lost: tuple[float, ...]
    weights: Mapping[int, tuple[Tensor, ...]]

    def scores(self, lost: Sequence[float]) -> tuple[float, ...]:
        """Return these losses by unit, made never to fall along the order."""
        out, least = [0.0] * len(self.units), 0.0
        for unit, value in zip(self.units, lost, strict=True):
            out[unit] = least = max(least, value)
        return tuple(out)


def _cuts(size: int) -> list[int]:
    """Numbers of units that are cut to measure what is missing."""
    return sorted({min(size - 1, max(1, round(part * size))) for part in CUT} - {0})


def _ranked(group: Group, scores: Sequence[float]) -> Order:
    units = tuple(sorted(range(group.size), key=lambda unit: scores[unit]))
    whole = sum(scores) or 1.0
    return Order(units, tuple(scores[unit] / whole for unit in units), {})


def _eliminated(group: Group, readers: Mapping[str, Reader]) -> Order | None:
    """Units in the order in which they are missed least; None where no layer reads them that can be looked at."""
    found = read_by(group, readers)
    parts = [_Part(reader, site.index) for reader, site in found]
    if not parts:
        return None
    cuts = iter(_cuts(group.size))
    cut = next(cuts, 0)
    units: list[int] = []
    lost: list[float] = []
    weights: dict[int, tuple[Tensor, ...]] = {}
    step = max(1, group.size // STEPS)
    while len(units) < group.size - 1:
        each = torch.stack([part.lost() for part in parts]).sum(0)
        each[units] = float("inf")
        most = min(step, group.size - 1 - len(units), cut - len(units) if cut else step)
        going = each.argsort(stable=True)[:most].tolist()
        units += going
        lost += [float(each[unit]) for unit in going]
        for part in parts:
            part.remove(going)
        if len(units) == cut:
            weights[cut] = tuple(part.fitted() for part in parts)
            cut = next(cuts, 0)
    units += sorted(set(range(group.size)) - set(units))
    lost.append(2 * lost[-1] if lost else 1.0)
    return Order(tuple(units), tuple(lost), weights)


class _Part:
    """One reader of a group as units go: the inverse of its second moments, and its weights fitted anew each time."""

    def __init__(self, reader: Reader, owned: Sequence[Sequence[int]]) -> None:
        matrix = reader.moments.xx / reader.moments.count
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        scale = diagonal[:, :-1]
        scale += RIDGE * scale + 1e-6 * scale.mean(-1, keepdim=True) + 1e-12
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        self._weight, self._counts = reader.weight.clone(), reader.counts
        longest = max(map(len, owned)) * reader.kernel
        self._index = torch.zeros(len(owned), longest, dtype=torch.long)
        self._mask = torch.zeros(len(owned), longest, dtype=torch.bool)
        for unit, positions in enumerate(owned):
            at = [p * reader.kernel + j for p in positions for j in range(reader.kernel)]
            self._index[unit, : len(at)] = torch.tensor(at)
            self._mask[unit, : len(at)] = True

    def fitted(self) -> Tensor:
        return self._weight.clone()

    def lost(self) -> Tensor:
        """(units,): what is lost with each unit, were it the next to go."""
        total = torch.zeros(len(self._index), dtype=torch.float64)
        if self._index.shape[1] == 1:  # blocks of one
            at = self._index[:, 0]
            for inverse, weight in zip(self._inverse, self._weight, strict=True):
                total += weight[at].square().sum(1) / inverse.diagonal()[at]
            return total * self._counts
        both = self._mask[:, :, None] & self._mask[:, None, :]
        eye = torch.eye(self._index.shape[1], dtype=torch.float64)
        for inverse, weight in zip(self._inverse, self._weight, strict=True):
            block = torch.where(both, inverse[self._index[:, :, None], self._index[:, None, :]], eye)
            own = weight[self._index] * self._mask.unsqueeze(-1)
            total += (own * torch.linalg.solve(block, own)).sum((1, 2))
        return total * self._counts

    def remove(self, units: Sequence[int]) -> None:
        at = torch.cat([self._index[u][self._mask[u]] for u in units])
        for inverse, weight in zip(self._inverse, self._weight, strict=True):
            columns = inverse[:, at]
            block = columns[at]
            weight -= columns @ torch.linalg.solve(block, weight[at])
            inverse -= columns @ torch.linalg.solve(block, columns.T)
            weight[at] = 0.0
            inverse[at], inverse[:, at] = 0.0, 0.0
            inverse[at, at] = 1.0


# Measured at the outputs. --------------------------------------------------------------------------------------------


def _measured(
    program: Program,
    coupling: Coupling,
    state: Mapping[str, Tensor],
    batches: Batches,
    readers: Mapping[str, Reader],
    orders: Mapping[str, Order],
    macs: int,
    progress: Progress,
) -> dict[str, tuple[float, ...]]:
    """What units lose by `orders`, brought to scale by what is missing from the outputs with some of them gone."""
    runs = sum(len(_cuts(group.size)) for group in coupling.groups)
    most = max(FEWEST, int(WORK_MACS / (max(1, runs) * macs))) if macs else None
    seen = _first(batches, most)
    tape = Folded(program.graph, dict(state))
    found = {group.name: read_by(group, readers) if orders[group.name].weights else [] for group in coupling.groups}
    starts = {
        name: min((tape.place[reader.layer.node] for reader, _ in each), default=0) for name, each in found.items()
    }
    wrong = {group.name: dict.fromkeys(_cuts(group.size), 0.0) for group in coupling.groups}
    labelled = coupling.labelled
    groups = sorted(coupling.groups, key=lambda group: starts[group.name])
    outputs = list[list[Tensor]]()
    with torch.no_grad():
        for k, batch in enumerate(seen):
            run = tape.start(batch)
            wanted = flat_outputs(tape.output(run))
            outputs.append(wanted)
            for j, group in enumerate(groups):
                progress((k + j / len(groups)) / len(seen))
                order, name = orders[group.name], group.name
                run = tape.advance(run, starts[name])  # the same for all groups that are read from here on
                for cut in wrong[name]:
                    if order.weights:
                        with _fitted(tape, found[name], order.weights[cut]):
                            given = tape.output(run)
                    else:
                        masks = Masks(labelled, labelled.dead_roots({name: order.units[:cut]}))
                        given = masked_run(program, labelled, masks, state).run(*batch)
                    wrong[name][cut] += _apart(flat_outputs(given), wanted)
    varies = _variation(outputs) or 1.0
    out = {}
    for group in coupling.groups:
        points = {0: 0.0}
        for cut, apart in wrong[group.name].items():
            points[cut] = max(max(points.values()), apart / varies)
        order = orders[group.name]
        shared = SHARED if len(read_by(group, readers)) > 1 else 1.0
        out[group.name] = order.scores([shared * x for x in _to_scale(order.lost, points)])
    progress(1.0)
    return out


def _apart(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return sum(float((a.double() - b.double()).square().sum()) for a, b in zip(given, wanted, strict=True))


def _variation(outputs: Sequence[Sequence[Tensor]]) -> float:
    """Sum over outputs of squared deviations from the mean over images; of squares where none varies."""
    whole = (torch.cat([_rows(x) for x in each]) for each in zip(*outputs, strict=True))
    return sum(float((x - x.mean(0)).square().sum()) or float(x.square().sum()) for x in whole)


def _rows(x: Tensor) -> Tensor:
    return x.double().reshape(len(x) if x.dim() else 1, -1)


def _first(batches: Batches, most: int | None) -> list[Sequence[Tensor]]:
    seen: list[Sequence[Tensor]] = []
    count = 0
    for batch in batches:
        if seen and most is not None and count >= most:
            break
        seen.append(batch)
        count += len(batch[0])
    return seen


@contextmanager
def _fitted(tape: Executor, found: Sequence[tuple[Reader, Site]], weights: Sequence[Tensor]) -> Iterator[None]:
    """The tape with these weights in the place of the readers' own."""
    state = dict(tape.state)
    changed = dict(state)
    for (reader, _), fitted in zip(found, weights, strict=True):
        layer, own = reader.layer, state[reader.layer.weight]
        scale = torch.where(reader.scale.abs() > 1e-8, reader.scale, 1.0).unsqueeze(1)
        changed[layer.weight] = (fitted[:, :-1] / scale).transpose(1, 2).reshape(own.shape).to(own.dtype)
        shifted = layer.norm_names[1] if layer.norm else layer.bias
        if shifted:
            changed[shifted] = (state[shifted].double() + fitted[:, -1].flatten()).to(state[shifted].dtype)
    tape.state = changed
    try:
        yield
    finally:
        tape.state = state


def _to_scale(lost: Sequence[float], points: Mapping[int, float]) -> list[float]:
    """Losses unit by unit whose sums go through measured points; beyond the last one they go on as they did."""
    out, factor = list(lost), 1.0
    for before, after in pairwise(sorted(points)):
        between = sum(lost[before:after])
        factor = (points[after] - points[before]) / between if between > 0 else 0.0
        out[before:after] = [factor * x for x in lost[before:after]]
        end = after
    return [*out[:end], *(factor * x for x in lost[end:])] if len(points) > 1 else out
