"""The user's own class at the new sizes: slice its tensors, and update attributes that repeat their sizes.

Standard torch modules are updated from their tensors. A user's class may store sizes that are literals in the program,
such as `self.num_heads`: if a literal of a call in that module changed and an integer attribute of the module equals
it, the attribute is changed too. This guess is safe, because the class is only used if it computes the same as the
rewritten program. Trainers, `isinstance` checks and methods then continue to work.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from surgery.capture import evaluating, module_of
from surgery.core import (
    TOLERANCE,
    Callee,
    Executor,
    Program,
    copied,
    empty_caches,
    first_line,
    flat_outputs,
    other_sizes,
    sample_inputs,
    well_conditioned,
)
from surgery.coupling import (
    CompactGraph,
    Cut,
    InDouble,
)


@dataclass(frozen=True, slots=True)
class Literal:
    """A size in a call: its old and new value (None if the operator was replaced), and its location."""

    module: str
    before: int | None
    after: int | None
    where: str


def own_class(
    cut: Cut, graph: CompactGraph, sliced: Mapping[str, Tensor], literals: list[Literal]
) -> tuple[nn.Module | None, str, str]:
    """Return the user's class with sliced submodules if it computes the same as the rewritten program.

    Returns:
        The module or None; the reason; and the submodule whose forward does not run at the new sizes, "" if none.
    """
    program = cut.program
    if isinstance(program.model, torch.fx.GraphModule):
        return None, program.why_graph or "the model is a graph already", ""
    if program.materialised:
        weight = next(iter(program.materialised))
        return None, f"forward computes the weight '{weight}' from others, at its old size", ""
    named = _named(program.model)
    stray = [c.tensor for c in cut.plan.cuts if c.tensor not in named]
    if stray:
        return None, f"forward builds the tensor '{stray[0]}' itself, at a size that would have to change", ""
    module, repaired = transplant(program.model, sliced, literals, _group_counts(graph))
    why, stuck = _differs(cut, graph, module)
    why, stuck = why or _fails_in_training(program, module), stuck or next(iter(repaired), "")
    return (None, why, stuck) if why else (module, "its forward computes the same at the new sizes", "")


def _named(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}


def _differs(cut: Cut, graph: CompactGraph, module: nn.Module) -> tuple[str | None, str]:
    """Return why the user's class differs from the rewritten program (None if it does not), and in which submodule."""
    program = cut.program
    state = cut.kept(well_conditioned(program))
    named = {k: state[k] for k, _ in module.named_parameters() if k in state}
    callee = Callee.of(program, module)
    for sizes, inputs, wanted in _runs(program, graph, state):
        args, kwargs = callee.arguments(inputs)
        # forward may write to its buffers
        named |= {k: state.get(k, buffer).clone() for k, buffer in module.named_buffers()}
        try:
            with torch.no_grad(), evaluating(module), InDouble():
                got = flat_outputs(torch.func.functional_call(module, named, args, kwargs))
        except Exception as error:  # any exception the user's forward raises at unexpected sizes
            return f"its forward does not run at {sizes}: {first_line(error)}", raised_in(error, module)
        if [t.shape for t in got] != [t.shape for t in wanted]:
            return f"its forward returns other shapes at {sizes}", ""
        worst = max((_apart(a, b) for a, b in zip(got, wanted, strict=True)), default=0.0)
        if not worst <= TOLERANCE[torch.float64]:
            return f"its forward computes something else at {sizes} (relative difference {worst:.1e})", ""
    return None, ""


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def _runs(
    program: Program, graph: CompactGraph, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Run the rewritten program at the example's sizes, and on one sample of other sizes if dynamic.

    Yields:
        Description of the sizes, the inputs, the outputs.
    """

    def outputs(inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad(), evaluating(graph):
            return flat_outputs(Executor(graph, state, dtype=torch.float64).run(*inputs))

    inputs = sample_inputs(program, seed=7, dtype=torch.float64)
    yield "the new sizes", inputs, outputs(inputs)
    batched = all(0 in spec.dynamic for spec in program.inputs)
    for by in (*other_sizes(program), 0):
        given = sample_inputs(program, seed=7, dtype=torch.float64, by=by)
        single = [x[:1] if batched and isinstance(x, Tensor) else x for x in given]
        if any(isinstance(x, Tensor) and x.shape != y.shape for x, y in zip(single, inputs, strict=True)):
            with suppress(Exception):  # the dense model may not accept this size either
                yield "the new sizes, for another batch or image", single, outputs(single)
                return


def _fails_in_training(program: Program, module: nn.Module) -> str | None:
    """Return why forward fails in training mode, whose branches were not traced."""
    unseen = _unseen(program)
    if not unseen:
        return None
    trial = copied(module)
    for m in trial.modules():
        m.training = True
    try:
        with torch.no_grad():
            trial(*program.example_args, **program.example_kwargs)
    except Exception as error:  # any exception the user's forward raises
        return f"its forward in training mode also runs '{unseen[0]}', which was not traced: {first_line(error)}"
    return None


def _unseen(program: Program) -> list[str]:
    seen = {str(n.target) for n in program.graph.graph.nodes if n.op == "get_attr"}
    seen |= {name for sources in program.materialised.values() for name in sources}
    return [n for n, _ in program.model.named_parameters() if n not in seen]


@lru_cache(maxsize=256)
def _reads_training(kind: type[nn.Module]) -> bool:
    """Return whether the source of forward mentions the mode, whose branches were traced only in eval mode."""
    try:
        return "self.training" in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False


def lost_in_training(program: Program) -> tuple[str, ...]:
    """Return training-time behaviour that the traced program loses, since eval mode does not run it."""
    lost = []
    traced = {module_of(n) for n in program.graph.graph.nodes if "dropout" in str(n.target)}
    for name, module in program.model.named_modules():
        kind = type(module).__name__
        rate = next(
            (float(r) for a in ("p", "drop_prob") if isinstance(r := getattr(module, a, None), (int, float))), 0.0
        )
        if ("Drop" in kind or "StochasticDepth" in kind) and rate > 0 and name not in traced:
            lost.append(f"{kind} '{name}'")
        if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
            lost.append(f"attention dropout of '{name}'")
        if isinstance(module, _BatchNorm) and module.momentum is None and module.track_running_stats:
            lost.append(f"cumulative statistics of '{name}' (momentum None)")
        if not type(module).__module__.startswith("torch.nn.") and _reads_training(type(module)):  # type: ignore[arg-type]
            lost.append(f"what forward of '{name or type(module).__name__}' does only where self.training is set")
    if any(isinstance(m, _BatchNorm) for m in program.model.modules()):
        lost.append("num_batches_tracked, which batch norms count up")
    lost += [f"the computation of '{name}' from {', '.join(s)}" for name, s in program.materialised.items()]
    heads = dict.fromkeys(name.split(".")[0] for name in _unseen(program))
    return (*lost, *(f"'{head}', which evaluation mode does not run" for head in heads))


# -- slicing a module -------------------------------------------------------------------------------------------------


def transplant(
    model: nn.Module,
    sliced: Mapping[str, Tensor],
    literals: Sequence[Literal],
    groups: Mapping[str, int],
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a copy of `model` with the sliced tensors, and the submodules in which a size was guessed.

    Args:
        model: the dense module, left unchanged.
        sliced: every parameter and buffer, at its new size.
        literals: the sizes that changed in calls.
        groups: weight name → remaining groups of its convolution or normalisation.
    """
    with_tensors = _copy_around(model, sliced)
    for name, module in with_tensors.named_modules():
        _update(module, groups.get(f"{name}.weight"))
    return with_tensors, _repair(with_tensors, literals)


def raised_in(error: BaseException, model: nn.Module) -> str:
    """Return the path of the innermost non-torch module in whose code the error was raised; "" if none."""
    paths: dict[int, str] = {id(module): path for path, module in model.named_modules()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and not type(module).__module__.startswith("torch.nn.modules."):
            return paths.get(id(module), "")
    return ""


def _copy_around(model: nn.Module, sliced: Mapping[str, Tensor]) -> nn.Module:
    memo: dict[int, Any] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        memo[id(tensor)] = sliced[name]
    for name, buffer in model.named_buffers(remove_duplicate=False):
        memo[id(buffer)] = sliced[name]
    duplicate = copied(model, memo)
    empty_caches(duplicate)
    return duplicate


def _group_counts(graph: torch.fx.GraphModule) -> dict[str, int]:
    """Return weight name → groups of the convolution or normalisation that reads it."""
    counts: dict[str, int] = {}
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        names = [a.name for a in schema.arguments]
        for argument in ("groups", "num_groups"):
            if argument in names and "weight" in names:
                at, weight_at = names.index(argument), names.index("weight")
                value = node.args[at] if at < len(node.args) else node.kwargs.get(argument, 1)
                weight = node.args[weight_at] if weight_at < len(node.args) else node.kwargs.get("weight")
                if isinstance(weight, torch.fx.Node) and isinstance(value, int):
                    counts[str(weight.target)] = value
    return counts


def _update(module: nn.Module, groups: int | None) -> None:
    """Update the size attributes of a standard module from its tensors."""
    weight = module._parameters.get("weight")
    if isinstance(module, _ConvNd) and weight is not None:
        module.groups = groups or module.groups
        first, second = weight.shape[0], weight.shape[1] * module.groups
        if module.transposed:
            module.in_channels, module.out_channels = first, second
        else:
            module.out_channels, module.in_channels = first, second
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _NormBase):
        sized = weight if weight is not None else module._buffers.get("running_mean")
        module.num_features = sized.shape[0] if sized is not None else module.num_features
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_groups, module.num_channels = groups or module.num_groups, weight.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]


def _repair(model: nn.Module, literals: Sequence[Literal]) -> tuple[str, ...]:
    """Update integer attributes from the literals of calls in their module; returns the changed modules."""
    wanted: dict[tuple[str, int], set[int]] = {}
    for literal in literals:
        if literal.before is not None and literal.after is not None:
            wanted.setdefault((literal.module, literal.before), set()).add(literal.after)
    modules, repaired = dict(model.named_modules()), []
    for (path, before), after in wanted.items():
        module = modules.get(path)
        if module is None or len(after) > 1 or type(module).__module__.startswith("torch.nn.modules.conv"):
            continue
        for name, value in list(vars(module).items()):
            if type(value) is int and value == before and not name.startswith("_"):
                setattr(module, name, next(iter(after)))
                repaired.append(path)
    return tuple(dict.fromkeys(repaired))
