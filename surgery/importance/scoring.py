"""Score all units by one criterion, with checks of its inputs and results.

Scores are comparable between groups; the lowest are removed first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core import Coupling, Group, Program, Scores, all_tensors, first_line, state_of, user_line
from surgery.errors import InvalidInput, PlanMismatch
from surgery.importance.evidence import Evidence, GroupCriterion
from surgery.registry import CRITERIA, Criterion


def score(
    program: Program,
    coupling: Coupling,
    criterion: str | GroupCriterion = "l1",
    *,
    seed: int = 0,
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    images: Sequence[Sequence[Tensor]] | None = None,
    macs: int = 0,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Scores:
    """Return the importance of every unit of every group.

    Args:
        program: the dense program; `program.model` holds the weights.
        coupling: its groups.
        criterion: a name of `CRITERIA`, or a callable ``(group, weights) -> score per unit`` whose scores are
            comparable between groups (if in doubt, divide by the group's mean).
        seed: seed of all random draws.
        prepare: transforms the weights first (head order).
        images: batches of the program's inputs, for criteria that need images.
        macs: MACs of one image, which limit the number of images for measurements; 0: no limit.
        progress: called with the completed fraction.

    Returns:
        Group name → finite score of each unit.

    Raises:
        InvalidInput: the criterion is unknown, its images or graph are missing, weights are not finite, or it does not
        return one finite number per unit.
        PlanMismatch: the coupling was made for another model.
    """
    entry = _entry(criterion)
    _validate_needs(entry, program, images)
    weights = prepare(weights_of(program, coupling))
    if entry.needs <= {"seed"}:
        return {group.name: score_group(entry, group, weights, seed) for group in coupling.groups}
    state = prepare(state_of(program)) if "graph" in entry.needs else {}
    found = entry.function(Evidence(program, coupling, weights, state, images or (), macs, seed, progress))
    return {g.name: _numbers(found.get(g.name), g, f"criterion {entry.name}") for g in coupling.groups}


def measures_losses(criterion: object) -> bool:
    """Return whether a criterion's scores are losses of the whole model, to be divided by each unit's cost."""
    return isinstance(criterion, str) and "costs" in CRITERIA[criterion].needs


def score_members(group: Group, weights: Mapping[str, Tensor], criterion: str, *, seed: int) -> tuple[float, ...]:
    """Return the importance of the members of heads; the group's sites are axes of these weights.

    Criteria that need more than weights are replaced by their `head_members` function, or by l1.
    """
    entry = CRITERIA[criterion]
    if entry.head_members is not None:
        entry = Criterion(entry.name, entry.head_members)
    return score_group(entry if entry.needs <= {"seed"} else CRITERIA["l1"], group, weights, seed)


def score_group(entry: Criterion, group: Group, weights: Mapping[str, Tensor], seed: int) -> tuple[float, ...]:
    """Return the importance of every unit of one group by a criterion that needs only weights and a seed."""
    drawn = {"seed": seed} if "seed" in entry.needs else {}
    try:
        with torch.no_grad():
            values = entry.function(group, weights, **drawn)
    except Exception as error:  # the user's callable may raise any exception
        said = f"{type(error).__name__}: {first_line(error)}{user_line(error)}"
        raise InvalidInput(f"criterion {entry.name} on group '{group.name}' failed: {said}") from error
    return _numbers(values, group, f"criterion {entry.name}")


def _numbers(values: Any, group: Group, who: str) -> tuple[float, ...]:
    """Return one finite number per unit; raise InvalidInput otherwise."""
    where = f"{who} on group '{group.name}'"
    try:
        numbers = tuple(float(value) for value in (values.tolist() if isinstance(values, Tensor) else values))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{where}: expected {group.size} numbers, got {type(values).__name__} ({error})") from error
    if len(numbers) != group.size:
        raise InvalidInput(f"{where}: expected {group.size} numbers, one per unit, got {len(numbers)}")
    wrong = next((k for k, number in enumerate(numbers) if not math.isfinite(number)), None)
    if wrong is not None:
        raise InvalidInput(f"{where}: the score of unit {wrong} is {numbers[wrong]}; scores must be finite numbers")
    return numbers


def _entry(criterion: str | GroupCriterion) -> Criterion:
    if isinstance(criterion, str):
        return CRITERIA[criterion]
    if not callable(criterion):
        raise InvalidInput(f"criterion {criterion!r}: give a name ({', '.join(CRITERIA.names())}) or a callable")
    return Criterion(getattr(criterion, "__name__", "callable"), criterion)


def _validate_needs(entry: Criterion, program: Program, images: Sequence[Sequence[Tensor]] | None) -> None:
    if "images" in entry.needs and images is None:
        raise InvalidInput(f"criterion {entry.name} looks at images: give some (--data, or `data` in Python)")
    if "graph" in entry.needs and not program.has_graph:
        raise InvalidInput(
            f"criterion {entry.name} looks at the operators that torch.export captures; with tracer torch-pruning "
            "choose l1, l2, bn-gamma, lamp or fpgm"
        )


def weights_of(program: Program, coupling: Coupling) -> dict[str, Tensor]:
    """Return detached parameters by name, and buffers called `weight` (scales of frozen batch norms), on the CPU.

    Shared parameters are listed under all names, since a site may use any of them.
    """
    tensors = all_tensors(program)
    parameters = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    buffers = {name: tensor for name, tensor in tensors.items() if name not in parameters}
    for name, tensor in {**parameters, **buffers}.items():
        shape, traced = tuple(tensor.shape), coupling.shapes.get(name)
        if traced is not None and tuple(traced) != shape:
            raise PlanMismatch(f"{name} has shape {shape}, but {tuple(traced)} in the coupling: couple this model")
        _validate_finite(name, tensor, infinite=name in parameters)
    known = parameters.keys() | buffers.keys()
    for group in coupling.groups:
        if not any(site.tensor in known for site in group.sites):
            raise PlanMismatch(f"group '{group.name}' touches no tensor of this model: couple this model")
    scales = {name: buffer for name, buffer in buffers.items() if name.rpartition(".")[2] == "weight"}
    return {name: tensor.detach().cpu() for name, tensor in {**scales, **parameters}.items()}


def _validate_finite(name: str, tensor: Tensor, *, infinite: bool) -> None:
    """Raise InvalidInput for NaN, or infinite parameters; buffers may be infinite (attention masks)."""
    if not tensor.numel() or not tensor.is_floating_point():
        return
    extremes = torch.stack(torch.aminmax(tensor.detach()))  # NaN if the tensor contains one; makes no copy
    if extremes.isnan().any() or (infinite and not extremes.isfinite().all()):
        what = "NaN" if extremes.isnan().any() else "infinite values"
        raise InvalidInput(f"{name} holds {what}: such weights cannot be ranked; check the checkpoint it came from")
