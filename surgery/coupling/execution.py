"""Run traced programs on numbers: well-conditioned values to check with, and the masked meaning of the dense model.

A vision transformer's default head is all zero, and permuting channels of a deep net with default weights may move its
output by one part in a million: on such values a comparison is blind. So every parameter gets distinct values
of sane size, and the running statistics of batch norms are those of the signal that arrives there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod, sqrt
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from surgery.capture import mutates
from surgery.core import ONE_AT_A_TIME, TOLERANCE, LabelledGraph, Masks, Program, Value
from surgery.coupling.labelled_graph import all_tensors
from surgery.ops import Dead, rules

aten = torch.ops.aten


def state_of(program: Program) -> dict[str, Tensor]:
    """Parameters and buffers that the graph reads, by name (tied ones under each name), on the CPU."""
    tensors = all_tensors(program)
    read = {id(tensors[str(n.target)]) for n in program.graph.graph.nodes if n.op == "get_attr"}
    return {name: tensor.detach().cpu() for name, tensor in sorted(tensors.items()) if id(tensor) in read}


def sample_inputs(program: Program, *, seed: int, dtype: torch.dtype | None = None, by: int = 0) -> list[Tensor]:
    """Random inputs in the order of the graph's placeholders; integer inputs keep the example's values.

    White noise looks the same everywhere, and deep networks map it to the same output; so each sample gets a contrast,
    an offset per channel and a coarse pattern of its own. `by`: pixels more, or less, where height and width are free.
    """
    generator = torch.Generator().manual_seed(seed)
    leaves = pytree.tree_leaves((program.example_args, dict(program.example_kwargs)))
    if by:
        leaves = _resized(leaves, program, by)
    return [
        _textured(leaf, generator).to(dtype or leaf.dtype)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        else (leaf.cpu() if isinstance(leaf, Tensor) else leaf)
        for leaf in leaves
    ]


def other_sizes(program: Program) -> list[int]:
    """Changes of height and width to compare at, by preference, in pixels: where these are free.

    Multiples of 32, the stride of most networks; about half the size is the cheapest.
    """
    free = [spec.shape[a] for spec in program.inputs for a in (2, 3) if a in spec.dynamic and "float" in spec.dtype]
    if not free:
        return []
    smaller = min(free) // 64 * 32
    return [-smaller, 32] if smaller else [32]


T = TypeVar("T")


def elsewhere(program: Program, run: Callable[[list[Tensor]], T], *, seed: int) -> list[tuple[list[Tensor], T]] | None:
    """Run something at another batch and another height and width, where these are free.

    Args:
        program: whose inputs they are.
        run: what is done with them, float64; it may raise where a network does not take them.
        seed: of the inputs.

    Returns:
        Each input with what came of it; nothing where no size is free, None where there is one and nothing ran.
    """

    def attempt(batch: bool, by: int) -> list[tuple[list[Tensor], T]] | None:
        inputs = sample_inputs(program, seed=seed, dtype=torch.float64, by=by)
        inputs = [torch.cat([x, x[:1]]) if batch and isinstance(x, Tensor) else x for x in inputs]
        try:
            return [(inputs, run(inputs))]
        except Exception:  # whatever operators raise at a size that they do not take
            return None

    batch = bool(program.inputs) and all(0 in spec.dynamic for spec in program.inputs)
    changes = other_sizes(program)
    if batch and changes and (both := attempt(True, changes[0])) is not None:
        return both
    ways = [[(True, 0)]] * batch + [[(False, by) for by in changes]] * bool(changes)
    found = [next((x for way in each if (x := attempt(*way)) is not None), None) for each in ways]
    return None if any(x is None for x in found) else [pair for x in found for pair in x or ()]


def _resized(leaves: list[Any], program: Program, by: int) -> list[Any]:
    specs = iter(program.inputs)
    out = []
    for leaf in leaves:
        spec = next(specs) if isinstance(leaf, Tensor) else None
        if spec is not None and {2, 3} & set(spec.dynamic) and leaf.is_floating_point():
            shape = [size + by if a in (2, 3) and a in spec.dynamic else size for a, size in enumerate(leaf.shape)]
            leaf = leaf.new_zeros(shape)
        out.append(leaf)
    return out


def _textured(like: Tensor, generator: torch.Generator) -> Tensor:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    noise = normal(*like.shape)
    if like.dim() < 2:
        return noise
    lead = (*like.shape[:2], *[1] * (like.dim() - 2))
    contrast = torch.exp(0.7 * normal(like.shape[0], *[1] * (like.dim() - 1)))
    if like.dim() == 4:
        coarse = normal(*like.shape[:2], min(4, like.shape[2]), min(4, like.shape[3]))
        noise = 0.5 * noise + torch.nn.functional.interpolate(coarse, like.shape[2:], mode="bilinear")
    return contrast * noise + normal(*lead)


Override = Callable[[torch.fx.Node, Any, Any], Any]
"""Takes a call over by returning a value: of the node and its arguments; else NotImplemented."""


class Run(torch.fx.Interpreter):
    """Run a graph on given parameters; `override` may take calls over."""

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        state: Mapping[str, Tensor],
        override: Override | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self._state = state
        self._override = override
        self._dtype = dtype

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Parameters and buffers that it runs on."""
        return self._state

    def on(self, state: Mapping[str, Tensor]) -> Run:
        """The same run with other parameters."""
        return Run(self.module, state, self._override, self._dtype)  # type: ignore[arg-type]

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Take a copy of an input: the program may write into it."""
        value = super().placeholder(target, args, kwargs)
        return value.clone() if isinstance(value, Tensor) else value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Look a parameter up in the given state first."""
        if target in self._state:
            return self._state[target]
        return super().get_attr(target, args, kwargs)

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run one call on the CPU, with dtype literals of the traced program raised to the dtype of the run."""
        if n.op != "call_function":
            value = super().run_node(n)  # a buffer that counts calls, say, is written into
            return value.clone() if n.op == "get_attr" and any(map(mutates, n.users)) else value
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = tuple(map(self._here, args)), {name: self._here(x) for name, x in kwargs.items()}
        made = not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves((args, kwargs)))
        result = NotImplemented if self._override is None else self._override(n, args, kwargs)
        if result is NotImplemented:
            result = n.target(*args, **kwargs)  # type: ignore[operator]
        return self._raised(result) if made else result

    def _raised(self, x: Any) -> Any:
        """What an operator made of nothing, in the default dtype, in that of the run."""
        floating = isinstance(x, torch.Tensor) and x.is_floating_point() and self._dtype is not None
        return x.to(self._dtype) if floating else x

    def _here(self, x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        return self._dtype if isinstance(x, torch.dtype) and x.is_floating_point and self._dtype is not None else x


def narrowest(program: Program) -> torch.dtype:
    """Return the floating dtype of least precision among the program's weights and values."""
    values = pytree.tree_leaves([n.meta.get("val") for n in program.graph.graph.nodes])
    found = {x.dtype for x in (*values, *state_of(program).values()) if isinstance(x, Tensor)} & TOLERANCE.keys()
    return max(found, key=lambda dtype: TOLERANCE[dtype], default=torch.float32)


def names_dtype(program: Program) -> bool:
    """Whether forward casts to a floating dtype of its own choice: it then has that precision whatever the weights."""
    given = pytree.tree_leaves([(n.args, dict(n.kwargs)) for n in program.graph.graph.nodes])
    return any(isinstance(x, torch.dtype) and x.is_floating_point for x in given)


def flat_outputs(result: Any) -> list[Tensor]:
    """Floating tensors among a model's outputs, in order."""
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]


class InDouble(TorchFunctionMode):
    """Within the block a model's own code computes in float64 wherever it names another floating dtype, or none."""

    def __enter__(self) -> InDouble:
        ONE_AT_A_TIME.acquire()  # the default dtype is every thread's
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._before)
        ONE_AT_A_TIME.release()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call with float64 in the place of every floating dtype."""
        if func in _CASTS:
            func = Tensor.double
        return func(*map(_double, args), **{name: _double(x) for name, x in (kwargs or {}).items()})


_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


def _double(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


# -- well-conditioned values -----------------------------------------------------------------------------------------


def well_conditioned(program: Program, *, seed: int = 0) -> dict[str, Tensor]:
    """Return distinct float64 values for every floating parameter and buffer the graph reads.

    Matrices and kernels are normal with variance 2 / fan-in, scales uniform in [0.5, 1.5], shifts normal with deviation
    0.1; batch-norm statistics are then taken from a run over two random samples (as in data-dependent initialisation,
    Mishkin 2016, arXiv:1511.06422), so that no signal dies or explodes on its way.
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
    """Running statistics of the batch norms, by name: small, and remembered as long as the program is."""
    known = _SETTLED.setdefault(program.graph, {})
    if seed not in known:
        own = dict(state)
        if any(n.target is aten.batch_norm.default for n in program.graph.graph.nodes):
            inputs = sample_inputs(program, seed=seed + 1, dtype=torch.float64)
            with torch.no_grad():
                Run(program.graph, own, _settle_statistics(own), torch.float64).run(*inputs)
        known[seed] = {name: tensor for name, tensor in own.items() if tensor is not state[name]}
    return known[seed]


_SETTLED: WeakKeyDictionary[torch.fx.GraphModule, dict[int, dict[str, Tensor]]] = WeakKeyDictionary()


def conditioned(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Float64 values for one parameter or buffer, by its name and shape."""

    def normal(scale: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).double() * scale

    leaf = name.rpartition(".")[2]
    if leaf == "running_mean" or leaf.endswith("bias"):
        return normal(0.1)
    parameter, table = isinstance(tensor, torch.nn.Parameter), tensor.dim() >= 2 and max(tensor.shape) != tensor.numel()
    if table and (parameter or not bool((tensor > 0).all())):
        return normal(sqrt(2.0 / max(1, prod(tensor.shape[1:]))))
    if parameter or leaf == "running_var" or table:  # a table of positive numbers may be one of variances
        return torch.rand(tensor.shape, generator=generator).double() + 0.5
    return tensor.double()


def _settle_statistics(state: dict[str, Tensor]) -> Override:
    def override(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target is aten.batch_norm.default and args[3] is not None:
            x: Tensor = args[0]
            dims = [a for a in range(x.dim()) if a != 1]
            mean, var = x.mean(dims), x.var(dims, unbiased=False)
            names = [str(n.target) for n in node.args[3:5]]  # type: ignore[union-attr]
            state[names[0]] = mean + 0.1 * var.sqrt() * state[names[0]]
            state[names[1]] = var * state[names[1]] + 0.1 * var.mean() + 1e-6  # no channel is blown up by chance
            args = (*args[:3], state[names[0]], state[names[1]], *args[5:])
            return node.target(*args, **kwargs)
        return NotImplemented

    return override


# -- the masked dense model ------------------------------------------------------------------------------------------


def masked_run(
    program: Program,
    labelled: LabelledGraph,
    masks: Masks,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    batch: int | None = None,
) -> Run:
    """An interpreter of the dense program in which removed units count as removed.

    Nothing but `masking` is touched: whatever a batch norm or an activation emits on dead channels must not matter.
    `dtype`: what calls that name a floating dtype use in its place. `batch`: of the inputs, where not the trace's.
    """
    return Run(program.graph, state, masking(program, labelled, masks, batch), dtype)


def masking(program: Program, labelled: LabelledGraph, masks: Masks, batch: int | None = None) -> Override:
    """An override: operators that contract an axis see its dead slices as zero, those that average skip them."""
    table = rules()
    traced = program.inputs[0].shape[0] if program.inputs and program.inputs[0].shape else 1

    def override(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        rule = table.get(str(node.target))
        if rule is None or not (rule.masked or rule.reference):
            return NotImplemented
        alive = _alive(labelled.calls[node.name], masks)
        if not alive:
            return NotImplemented
        names = (a.name for a in node.target._schema.arguments)  # type: ignore[union-attr]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        bound = {k: given.get(k, v) for k, v in labelled.calls[node.name].items()}
        if batch is not None:
            folded = {key: bound[key[0]].shape[key[1]] != len(mask) for key, mask in alive.items()}
            alive = {key: _at_batch(mask, traced, batch) if folded[key] else mask for key, mask in alive.items()}
        dead = Dead(node.target, bound, alive)
        if rule.reference is not None:
            return rule.reference(dead)
        changed = {name: dead.zeroed(name) for name in rule.masked}
        return dead.run(**changed)

    return override


def _at_batch(mask: Tensor, traced: int, batch: int) -> Tensor:
    """The mask of an axis into which a batch of `traced` is folded, at another batch."""
    each = len(mask) // traced
    for outer in (1, *range(each, 1, -1)):
        if len(mask) == each * traced and each % outer == 0:
            folded = mask.reshape(outer, traced, each // outer)
            if bool((folded == folded[:, :1]).all()):  # the same for all samples: and so for more
                return folded[:, :1].expand(outer, batch, each // outer).reshape(-1)
    return mask


def _alive(bound: Mapping[str, Any], masks: Masks) -> dict[tuple[str, int], Tensor]:
    alive: dict[tuple[str, int], Tensor] = {}
    for name, value in bound.items():
        if isinstance(value, Value):
            for axis, layers in enumerate(value.axes):
                if layers:
                    mask = masks(value, axis)
                    if not mask.all():
                        alive[name, axis] = torch.from_numpy(mask)
    return alive
