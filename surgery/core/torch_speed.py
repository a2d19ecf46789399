"""Changes to torch's internals that make captures faster. Nothing else in the package patches torch for speed.

`benchmarks/studies/capture_time.py` measures each. Together they bring `trace` of MobileNetV2 from 3.6 to 1.4 CPU
seconds.
"""

from __future__ import annotations

import gc
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from math import inf
from time import process_time
from typing import Any
from unittest import mock

import psutil
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._export import utils as _export_utils
from torch._prims_common import suggest_memory_format
from torch._subclasses import fake_impls, fake_tensor
from torch.fx import proxy
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.sym_node import SymNode

from surgery.core.blame import foreign

ONE_AT_A_TIME = threading.RLock()  # held while process-wide state is changed: torch's functions, streams, logging


@contextmanager
def lean(limits: CaptureLimits | None = None) -> Iterator[None]:
    """Make `torch.export` faster within the block; raises LongSizes where solving for sizes exceeds the limits."""
    with ONE_AT_A_TIME, ExitStack() as stack:
        for patch in _patches(limits or CaptureLimits()).values():
            stack.enter_context(patch)
        if gc.isenabled():  # graphs are large, and live long
            gc.disable()
            stack.callback(gc.enable)
        yield


def _patches(limits: CaptureLimits) -> Mapping[str, AbstractContextManager[Any]]:
    """Patches of `lean`; comments give the CPU seconds each saves in `trace` of MobileNetV2."""
    replaced = partial(mock.patch.object, create=True)  # no error where a version of torch lacks it
    return {
        **{f"sizes: {name}": replaced(SymNode, name, _once(name, {})) for name in _ARITHMETIC},  # 0.4 together
        "code of graphs": replaced(torch.fx.GraphModule, "recompile", _later(torch.fx.GraphModule.recompile)),  # 0.3
        "shapes of activations": _same_shape(),  # 1.5
        "stack traces": replaced(proxy, "CapturedTraceback", _OwnFrames),  # 0.3
        "tensor metadata": replaced(proxy_tensor, "_extract_tensor_metadata", lambda *_, **__: None),  # 0.2
        "memory formats": replaced(fake_tensor, "suggest_memory_format", partial(_memory_format, limits)),  # 0.2
        # Torch looks for new composite operators in each of its namespaces, several times in each export.
        "composite operators": replaced(_export_utils, _LISTING, cache(getattr(_export_utils, _LISTING, bool))),  # 0.1
    }


_ARITHMETIC = ("add", "sub", "mul", "eq", "ne", "ge", "gt", "le", "lt")


def _once(name: str, known: dict[Any, Any]) -> Any:
    """Cache arithmetic on symbolic sizes, except where the calculation itself is captured."""
    compute = getattr(SymNode, name)

    def cached(left: Any, right: Any) -> Any:
        if proxy_tensor.get_proxy_mode():
            return compute(left, right)
        key = left.shape_env, left._expr, right._expr, left.pytype, right.pytype
        if key not in known:
            known[key] = compute(left, right)
        return known[key]

    return cached


def _later(recompile: Callable[[torch.fx.GraphModule], Any]) -> Callable[[torch.fx.GraphModule], None]:
    """Write a graph's Python code when it is first called."""

    def deferred(graph: torch.fx.GraphModule) -> None:
        def forward(module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            recompile(module)
            return module.forward(*args, **kwargs)

        type(graph).forward = forward  # each graph module has a class of its own
        structure = getattr(graph.graph._codegen, "pytree_info", None)
        if structure is not None:  # torch's passes read these
            graph._in_spec, graph._out_spec = structure.in_spec, structure.out_spec

    return deferred


_LISTING = "_materialize_cpp_cia_ops"
_ACTIVATIONS = ("hardtanh", "hardswish", "hardsigmoid", "relu", "silu", "leaky_relu", "gelu", "elu", "mish")
_NORM = "_native_batch_norm_legit_no_training"


@contextmanager
def _same_shape() -> Iterator[None]:
    """Take the shape of an activation or a batch norm from its input, instead of running the whole decomposition.

    In-place operators are asked before torch inserts the copying ones; their result is what they write to.
    """
    with ExitStack() as stack:
        meta = torch._C.DispatchKey.Meta
        for op in _overloads(f"{name}_" for name in _ACTIVATIONS):
            if meta in (kernels := getattr(op, "py_kernels", {})):
                stack.callback(op._dispatch_cache.clear)  # kernels are cached: clear them now and at the end
                stack.callback(kernels.__setitem__, meta, kernels[meta])
                kernels[meta] = lambda x, *_, **__: x
                op._dispatch_cache.clear()
        known: dict[Any, Any] = getattr(fake_impls, "get_fast_op_impls", dict)()
        for op in _overloads((*_ACTIVATIONS, _NORM)):
            if op in decomposition_table and op not in known:
                stack.callback(known.pop, op)
                known[op] = _like_input(op)
        yield


def _overloads(names: Iterable[str]) -> list[Any]:
    return [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]


def _like_input(op: Any) -> Any:
    """Return the shape of an operator's result: the input's for floating CPU tensors, otherwise torch's own."""

    def shape(mode: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with mode:
            if not x.is_floating_point() or x.device.type != "cpu":
                return decomposition_table[op](x, *args, **kwargs)
            found = torch.empty_like(x)
            return found if op.name() != f"aten::{_NORM}" else (found, x.new_empty(0), x.new_empty(0))

    return shape


class LongSizes(Exception):
    """Sizes depend on the input's through so many steps that solving for them would take minutes."""


_STEPS = 100
"""Operations in a symbolic size. Padding to a multiple of the stride triples them at every stride; most networks need a
dozen."""


@dataclass(slots=True)
class CaptureLimits:
    """Limits of a capture with symbolic sizes, from its construction on."""

    cpu_s: float = inf
    bytes: float = inf
    next_s: float = 0.0  # CPU time of the next check
    start_s: float = field(default_factory=process_time)
    start_bytes: int = field(default_factory=lambda: int(psutil.Process().memory_info().rss))

    def check(self) -> None:
        """Raise LongSizes if a limit is exceeded."""
        if self.cpu_s == inf or (used_s := process_time() - self.start_s) < self.next_s:
            return
        self.next_s = used_s + 0.5
        if used_s > self.cpu_s:
            raise LongSizes(f"solving for the sizes takes more than {self.cpu_s:g} s of CPU time")
        if psutil.Process().memory_info().rss - self.start_bytes > self.bytes:
            raise LongSizes(f"solving for the sizes takes more than {self.bytes / 2**30:g} GiB of memory")


def _memory_format(limits: CaptureLimits, x: Tensor) -> torch.memory_format:
    """Skip the analysis of symbolic strides, whose result torch discards. Raises LongSizes."""
    if not x._has_symbolic_sizes_strides:
        return suggest_memory_format(x)
    if any(isinstance(size, torch.SymInt) and _steps(size.node.expr) > _STEPS for size in x.shape):
        raise LongSizes(f"a size is computed from the input's in more than {_STEPS} steps")
    limits.check()
    return torch.contiguous_format


@lru_cache(maxsize=4096)
def _steps(size: Any) -> int:
    return int(size.count_ops())


class _OwnFrames:
    """Replacement for torch's captured traceback: the user's frames, and those named `forward`, which torch needs."""

    def __init__(self) -> None:
        calls = ((frame.f_code, line) for frame, line in traceback.walk_stack(sys._getframe(2)))
        self._found = [
            (code.co_filename, line, code.co_name)
            for code, line in calls
            if code.co_name == "forward" or not foreign(code.co_filename)
        ]

    @classmethod
    def extract(cls, **_: Any) -> _OwnFrames:
        """Record the calling stack."""
        return cls()

    def summary(self) -> traceback.StackSummary:
        """Return the frames, outermost first."""
        found = [traceback.FrameSummary(*frame, lookup_line=False) for frame in reversed(self._found)]
        return traceback.StackSummary.from_list(found)
