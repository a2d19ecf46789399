"""Well-conditioned weights and inputs for comparisons, also at other batch and image sizes; tolerances.

A comparison on default weights detects nothing: a vision transformer's head is all zero, and permuting channels of a
deep network may change its output by 1e-6. So every parameter gets distinct values of moderate magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod, sqrt
from types import MappingProxyType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.core.graphs import Executor, all_tensors, state_of
from surgery.core.ir import Program

aten = torch.ops.aten

TOLERANCE = MappingProxyType({torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2})
"""By dtype, the largest error at which results count as equal, relative to the part that varies with the input."""

BLIND = 1e-3  # if less than this share of the output varies with the input, a comparison is inconclusive

ROUNDINGS = 16
"""On the real weights, the error accepted as rounding, as a multiple of the effect of one ulp in every weight."""


def narrowest(program: Program) -> torch.dtype:
    """Return the lowest-precision floating dtype among the program's weights and values."""
    values = pytree.tree_leaves([n.meta.get("val") for n in program.graph.graph.nodes])
    found = {x.dtype for x in (*values, *state_of(program).values()) if isinstance(x, Tensor)} & TOLERANCE.keys()
    return max(found, key=lambda dtype: TOLERANCE[dtype], default=torch.float32)


def sample_inputs(
    program: Program, *, seed: int, dtype: torch.dtype | None = None, by: int = 0, other_batch: bool = False
) -> list[Tensor]:
    """Return random inputs in the order of the graph's placeholders; integer inputs keep the example's values.

    Each sample gets its own contrast, offset per channel and coarse pattern, since deep networks map all white noise to
    the same output. `by`: pixels added to dynamic height and width; `other_batch`: repeat the first sample.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves, specs = pytree.tree_leaves((program.example_args, dict(program.example_kwargs))), iter(program.inputs)
    out: list[Any] = []
    for leaf in leaves:
        spec = next(specs, None) if isinstance(leaf, Tensor) else None
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            free = {2, 3} & set(spec.dynamic if spec is not None else ())
            shape = [size + by if a in free else size for a, size in enumerate(leaf.shape)]
            out.append(_textured(shape, generator).to(dtype or leaf.dtype))
        else:
            out.append(leaf.cpu() if isinstance(leaf, Tensor) else leaf)
    return [torch.cat([x, x[:1]]) if other_batch and isinstance(x, Tensor) else x for x in out]


T = TypeVar("T")


def elsewhere(program: Program, attempt: Callable[[bool, int], T | None]) -> list[T | None]:
    """Try another batch size, and another height and width, where dynamic: together if that runs, else each.

    `attempt` is called with whether to change the batch, and the change of height and width in pixels; its result is
    None if the model does not run at this size, which is returned if no size works.
    """
    free = [spec.shape[a] for spec in program.inputs for a in (2, 3) if a in spec.dynamic and "float" in spec.dtype]
    smaller = min(free, default=0) // 64 * 32  # 32 is the stride of most networks; half the size is the cheapest
    changes = [by for by in (-smaller, 32) if by] if free else []
    if program.any_batch and changes and (both := attempt(True, changes[0])) is not None:
        return [both]
    found = [attempt(True, 0)] if program.any_batch else []
    if changes:
        found.append(next((x for by in changes if (x := attempt(False, by)) is not None), None))
    return found


def _textured(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    noise = normal(*shape)
    if len(shape) < 2:
        return noise
    ones = [1] * (len(shape) - 2)
    contrast = torch.exp(0.7 * normal(shape[0], 1, *ones))
    if len(shape) == 4:
        coarse = normal(*shape[:2], min(4, shape[2]), min(4, shape[3]))
        noise = 0.5 * noise + torch.nn.functional.interpolate(coarse, tuple(shape[2:]), mode="bilinear")
    return contrast * noise + normal(*shape[:2], *ones)


def well_conditioned(program: Program, *, seed: int = 0) -> dict[str, Tensor]:
    """Return distinct float64 values for every floating parameter and buffer the graph reads.

    Batch-norm statistics are taken from a run over two random samples (data-dependent initialisation, Mishkin 2016,
    arXiv:1511.06422), so that activations neither vanish nor explode.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = all_tensors(program)
    made: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in state_of(program).items():
        tied = id(tensors[name])
        if tied not in made:
            made[tied] = conditioned(name, tensors[name], generator) if tensor.is_floating_point() else tensor
        state[name] = made[tied]
    return state | _settled(program, state, seed)


def _settled(program: Program, state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Running statistics of the batch norms, by name; cached as long as the program exists."""
    known = _SETTLED.setdefault(program.graph, {})
    if seed in known:
        return known[seed]
    own = dict(state)

    def settle(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target is not aten.batch_norm.default or args[3] is None:
            return NotImplemented
        x: Tensor = args[0]
        dims = [a for a in range(x.dim()) if a != 1]
        mean, var = x.mean(dims), x.var(dims, unbiased=False)
        names = [str(n.target) for n in node.args[3:5]]  # type: ignore[union-attr]
        own[names[0]] = mean + 0.1 * var.sqrt() * own[names[0]]
        own[names[1]] = var * own[names[1]] + 0.1 * var.mean() + 1e-6  # avoid exploding a channel by chance
        return node.target(*args[:3], *(own[name] for name in names), *args[5:], **kwargs)

    if any(n.target is aten.batch_norm.default for n in program.graph.graph.nodes):
        inputs = sample_inputs(program, seed=seed + 1, dtype=torch.float64)
        with torch.no_grad():
            Executor(program.graph, own, settle, torch.float64).run(*inputs)
    known[seed] = {name: tensor for name, tensor in own.items() if tensor is not state[name]}
    return known[seed]


_SETTLED: WeakKeyDictionary[torch.fx.GraphModule, dict[int, dict[str, Tensor]]] = WeakKeyDictionary()


def conditioned(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return float64 values by name and shape: kernels of variance 2 / fan-in, scales in [0.5, 1.5], small shifts."""

    def normal(scale: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).double() * scale

    leaf = name.rpartition(".")[2]
    if leaf == "running_mean" or leaf.endswith("bias"):
        return normal(0.1)
    parameter, table = isinstance(tensor, torch.nn.Parameter), tensor.dim() >= 2 and max(tensor.shape) != tensor.numel()
    if table and (parameter or not bool((tensor > 0).all())):
        return normal(sqrt(2.0 / max(1, prod(tensor.shape[1:]))))
    if parameter or leaf == "running_var" or table:  # positive values may be variances
        return torch.rand(tensor.shape, generator=generator).double() + 0.5
    return tensor.double()
