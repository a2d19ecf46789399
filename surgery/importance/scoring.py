"""Importance of each unit: small functions ``(group, parameters) -> score per unit`` in one registry.

What a unit owns is written in its group's sites: the output slices of its producers, the norms it passes, the input
slices of its consumers. Scores compare between groups and the lowest goes first. Biases are left out (they shift an
output by a constant, whatever the input: no signal is lost with them), and so are statistics such as `running_mean`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from surgery.core import Coupling, Group, Program, Scores, Site, all_tensors, first_line, state_of, user_line
from surgery.errors import InvalidInput, PlanMismatch
from surgery.importance import second_order
from surgery.importance.signal import signal_of

Criterion = Callable[[Group, Mapping[str, Tensor]], Sequence[float] | Tensor]
"""A group and the model's parameters by name (detached; not to be written to) → one score per unit of the group."""


def score(
    program: Program,
    coupling: Coupling,
    criterion: str | Criterion = "l1",
    *,
    seed: int = 0,
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    images: Sequence[Sequence[Tensor]] | None = None,
    macs: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Scores:
    """Return the importance of every unit of every group.

    Args:
        program: of the dense model; `program.model` holds the weights.
        coupling: its groups.
        criterion: a name of `CRITERIA`, or a callable ``(group, parameters) -> score per unit`` whose scores compare
            between groups (divide by the group's mean where in doubt).
        seed: for criteria that draw at random.
        prepare: what is done to the parameters before they are looked at: heads' members put in order.
        images: batches of the program's inputs, for the criteria that look at images (`second_order.NAMES`).
        macs: of one image, by which what those criteria measure is limited; 0: it is not.
        progress: told the fraction that is done.

    Returns:
        Group name → finite score of each unit.

    Raises:
        InvalidInput: no such criterion, weights that are not finite, or a callable that does not return one finite
            number per unit.
        PlanMismatch: the coupling was made for another model.
    """
    if isinstance(criterion, str) and criterion in second_order.NAMES and images is not None:
        parameters = prepare(weights_of(program, coupling))
        known = signal_of(program, coupling, parameters)
        return second_order.scored(
            criterion,
            program,
            coupling,
            prepare(state_of(program)) if program.has_graph else {},
            images,
            heard={reader.name: reader.heard for readers in known.readers.values() for reader in readers},
            order={group.name: known.scores(group) for group in coupling.groups},
            macs=macs,
            seed=seed,
            progress=progress,
        )
    function = _resolve(criterion, seed)
    parameters = prepare(weights_of(program, coupling))
    if criterion == "signal":
        known = signal_of(program, coupling, parameters)
        return {group.name: known.scores(group) for group in coupling.groups}
    with torch.no_grad():
        return {group.name: _scored(function, group, parameters) for group in coupling.groups}


def score_group(
    group: Group, parameters: Mapping[str, Tensor], criterion: str | Criterion, *, seed: int = 0
) -> tuple[float, ...]:
    """Return the importance of every unit of one group, whose sites are axes of these parameters; see `score`."""
    with torch.no_grad():
        return _scored(_resolve(criterion, seed), group, parameters)


def l1(group: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """Sum of the magnitudes of all weights the unit owns, over the group's mean."""
    return _over_mean(_sum_over_sites(group, parameters, order=1))


def l2(group: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm of all weights the unit owns, over the group's mean."""
    return _over_mean(_sum_over_sites(group, parameters, order=2).sqrt())


def bn_gamma(group: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """Sum of the magnitudes of the batch-norm scales the unit passes, over the group's mean.

    Groups that no batch norm sees, or only some of whose units pass one, are scored by `l1`.
    Source: Liu et al. 2017, Network Slimming (arXiv:1708.06519).
    """
    total, passed = torch.zeros(group.size, dtype=torch.float64), torch.zeros(group.size, dtype=torch.bool)
    for site, weight in _owned(group, parameters):
        if _is_batch_norm_scale(site, group):
            positions, units = _positions(site)
            total.index_add_(0, units, weight.double().abs()[positions])
            passed[units] = True
    return _over_mean(total) if passed.all() else l1(group, parameters)


def lamp(group: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """Squared norm of the unit over the sum of squared norms of all units of the group that are no smaller.

    Source: Lee et al. 2020, Layer-adaptive sparsity (arXiv:2010.07611), with units in the place of single weights.
    """
    squares = _sum_over_sites(group, parameters, order=2)
    ranked, order = torch.sort(squares, stable=True)
    survivors = ranked.flip(0).cumsum(0).flip(0)  # at each rank: what would be left, the unit included
    shares = torch.where(survivors > 0, ranked / survivors.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return torch.empty_like(squares).index_copy_(0, order, shares)


def fpgm(group: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """Sum of the distances to the other units' weights, over the group's mean: low near the geometric median.

    Source: He et al. 2019, Filter pruning via geometric median (arXiv:1811.00250), over all weights the unit owns.
    """
    squared = torch.zeros(group.size, group.size, dtype=torch.float64)
    for site, weight in _owned(group, parameters):
        rows = _rows_per_unit(site, weight)  # (units, weights of a unit)
        rows = rows - rows.mean(0)  # distances stay, rounding shrinks
        gram = rows @ rows.T
        norms = gram.diagonal()
        squared += norms[:, None] + norms[None, :] - 2 * gram
    return _over_mean(squared.clamp_min(0).fill_diagonal_(0).sqrt().sum(1))


def signal(group: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """How much of the energy of the weights that read the unit is its own, over all layers that read it.

    `score` weighs each of these layers by how much of what it says counts at the outputs; see `signal`.
    """
    owned = list(_owned(group, parameters))
    read = [(site, weight) for site, weight in owned if site.axis == 1] or owned
    total = torch.zeros(group.size, dtype=torch.float64)
    for site, weight in read:
        whole = weight.double().square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        total += _per_unit(site, weight, order=2, size=group.size) / whole
    return total


def uniform_random(group: Group, parameters: Mapping[str, Tensor], *, seed: int = 0) -> Sequence[float]:
    """Uniform on [0, 1): the same for the same seed and group name, whatever else the model holds."""
    digest = hashlib.sha256(f"{seed}:{group.name}".encode()).digest()
    return [float(value) for value in np.random.default_rng(int.from_bytes(digest, "big")).random(group.size)]


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "l1": l1,
        "l2": l2,
        "bn-gamma": bn_gamma,
        "lamp": lamp,
        "fpgm": fpgm,
        "signal": signal,
        "random": uniform_random,
    }
)


# What a unit owns. ---------------------------------------------------------------------------------------------------


def _owned(group: Group, parameters: Mapping[str, Tensor]) -> Iterator[tuple[Site, Tensor]]:
    """The sites that count: weights, neither biases nor buffers that are not weights."""
    for site in group.sites:
        if site.tensor in parameters and not _is_bias(site.tensor):
            yield site, parameters[site.tensor]


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last.endswith("bias") or last == "beta"


def _is_batch_norm_scale(site: Site, group: Group) -> bool:
    """A norm with running statistics has them cut along with its scale: they are sites of the same group."""
    module, _, last = site.tensor.rpartition(".")
    return last == "weight" and any(other.tensor == f"{module}.running_var".lstrip(".") for other in group.sites)


def _positions(site: Site) -> tuple[Tensor, Tensor]:
    """Positions along the site's axis, and beside each the unit that owns it; both of shape (positions,)."""
    lengths = torch.tensor([len(owned) for owned in site.index])
    positions = torch.tensor([position for owned in site.index for position in owned], dtype=torch.long)
    return positions, torch.repeat_interleave(torch.arange(len(site.index)), lengths)


def _sum_over_sites(group: Group, parameters: Mapping[str, Tensor], *, order: int) -> Tensor:
    """Per unit the sum of ``|w| ** order`` over all weights it owns: (units,), float64."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for site, weight in _owned(group, parameters):
        total += _per_unit(site, weight, order=order, size=group.size)
    return total


def _per_unit(site: Site, weight: Tensor, *, order: int, size: int) -> Tensor:
    """Sum of ``|w| ** order`` over what each unit owns of one weight: (units,), float64."""
    others = [axis for axis in range(weight.ndim) if axis != site.axis]
    if others:
        per_position = torch.linalg.vector_norm(weight, ord=order, dim=others, dtype=torch.float64)
    else:
        per_position = weight.double().abs()
    positions, units = _positions(site)
    return torch.zeros(size, dtype=torch.float64).index_add_(0, units, per_position.pow(order)[positions])


def _rows_per_unit(site: Site, weight: Tensor) -> Tensor:
    """(units, weights of a unit), float64; units with fewer positions than others are padded with zeros."""
    slices = weight.double().movedim(site.axis, 0).flatten(1) if weight.ndim > 1 else weight.double()[:, None]
    widest = max(len(owned) for owned in site.index)
    rows = torch.zeros(len(site.index), widest, slices.shape[1], dtype=torch.float64)
    positions, units = _positions(site)
    ranks = torch.tensor([rank for owned in site.index for rank in range(len(owned))], dtype=torch.long)
    rows[units, ranks] = slices[positions]
    return rows.flatten(1)


def _over_mean(values: Tensor) -> Tensor:
    """Divide by the mean, so that layers compare; where all are zero, they stay so."""
    mean = values.mean()
    return values / mean if mean > 0 else values


# Checking what comes in. ---------------------------------------------------------------------------------------------


def _resolve(criterion: str | Criterion, seed: int) -> Criterion:
    names = ", ".join((*CRITERIA, *second_order.NAMES))
    if not isinstance(criterion, str):
        if not callable(criterion):
            raise InvalidInput(f"criterion {criterion!r}: give a name ({names}) or a callable")
        return criterion
    if criterion in second_order.NAMES:
        raise InvalidInput(f"criterion {criterion} looks at images: give some (--data, or `data` in Python)")
    if criterion not in CRITERIA:
        raise InvalidInput(f"no criterion '{criterion}'; there are {names}, or pass a callable")
    return partial(uniform_random, seed=seed) if criterion == "random" else CRITERIA[criterion]


def weights_of(program: Program, coupling: Coupling) -> dict[str, Tensor]:
    """Return detached parameters by name, and buffers called `weight` (scales of frozen batch norms), on the CPU.

    Both names of a shared parameter are there: a site may bear either.
    """
    tensors = all_tensors(program)
    parameters = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    buffers = {name: tensor for name, tensor in tensors.items() if name not in parameters}
    for name, tensor in {**parameters, **buffers}.items():
        shape, traced = tuple(tensor.shape), coupling.shapes.get(name)
        if traced is not None and tuple(traced) != shape:
            raise PlanMismatch(f"{name} has shape {shape}, but {tuple(traced)} in the coupling: couple this model anew")
        _refuse_non_finite(name, tensor, infinite=name in parameters)
    known = parameters.keys() | buffers.keys()
    for group in coupling.groups:
        if not any(site.tensor in known for site in group.sites):
            raise PlanMismatch(f"group '{group.name}' touches no tensor of this model: couple this model anew")
    scales = {name: buffer for name, buffer in buffers.items() if name.rpartition(".")[2] == "weight"}
    return {name: tensor.detach().cpu() for name, tensor in {**scales, **parameters}.items()}


def _refuse_non_finite(name: str, tensor: Tensor, *, infinite: bool) -> None:
    """Buffers may hold infinities (attention masks); nothing may hold NaN."""
    if not tensor.numel() or not tensor.is_floating_point():
        return
    extremes = torch.stack(torch.aminmax(tensor.detach()))  # NaN wherever the tensor holds one; no copy is made
    if extremes.isnan().any() or (infinite and not extremes.isfinite().all()):
        what = "NaN" if extremes.isnan().any() else "infinite values"
        raise InvalidInput(f"{name} holds {what}: such weights cannot be ranked; check the checkpoint it came from")


def _scored(criterion: Criterion, group: Group, parameters: Mapping[str, Tensor]) -> tuple[float, ...]:
    """One finite number per unit, or InvalidInput."""
    who = f"criterion {getattr(criterion, '__name__', 'callable')} on group '{group.name}'"
    try:
        values = criterion(group, parameters)
    except Exception as error:  # a callable of the user's: anything may come
        raise InvalidInput(f"{who} failed: {type(error).__name__}: {first_line(error)}{user_line(error)}") from error
    try:
        numbers = tuple(float(value) for value in (values.tolist() if isinstance(values, Tensor) else values))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{who}: expected {group.size} numbers, got {type(values).__name__} ({error})") from error
    if len(numbers) != group.size:
        raise InvalidInput(f"{who}: expected {group.size} numbers, one per unit, got {len(numbers)}")
    wrong = next((k for k, number in enumerate(numbers) if not math.isfinite(number)), None)
    if wrong is not None:
        raise InvalidInput(f"{who}: the score of unit {wrong} is {numbers[wrong]}; every score must be a finite number")
    return numbers
