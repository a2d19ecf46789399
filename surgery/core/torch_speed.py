"""Cheaper captures, what `torch.export` does besides capturing left undone; and fewer walks of Python's collector."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses import fake_impls, fake_tensor
from torch.fx import proxy
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.sym_node import SymNode

from surgery.core.blame import foreign

ONE_AT_A_TIME = threading.RLock()
"""Held where state of the whole process is changed for a while: torch's own functions, streams, logging."""


@contextmanager
def lean() -> Iterator[None]:
    """Keep `torch.export`, within the block, from work that nobody here reads: a good part of the time of a capture.

    That is Python code for every intermediate graph, now made for those that are called; strides and memory formats
    beside every value; of each operator's stack trace, the frames that are not the user's; sums and comparisons of the
    same symbolic sizes, now worked out once; a search for sizes that depend on values, now made where there are such;
    the shape that an activation or a batch norm comes to, worked out through its parts; and Python's collector, which
    goes through the growing graph over and over. A torch that has one of these no more is left as it is.
    """
    from torch.export import _trace as exporting  # Here: importing it takes seconds.

    graphs, formats, bindings = torch.fx.GraphModule, "suggest_memory_format", "_replace_unbacked_bindings"
    known: dict[Any, Any] = {}
    with ONE_AT_A_TIME, ExitStack() as stack:
        for owner, name, value in (
            (graphs, "recompile", _later(graphs.recompile)),
            (proxy_tensor, "_extract_tensor_metadata", lambda *_, **__: None),
            (proxy, "CapturedTraceback", _OwnFrames),
            (fake_tensor, formats, _memory_format(getattr(fake_tensor, formats, None))),
            (fake_tensor, "is_sparse_any", _unseen(getattr(fake_tensor, "is_sparse_any", None))),
            (proxy_tensor, "is_sparse_any", _unseen(getattr(proxy_tensor, "is_sparse_any", None))),
            (exporting, bindings, _where_bound(getattr(exporting, bindings, None))),
            *((SymNode, name, _once(name, known)) for name in _ARITHMETIC),
        ):
            stack.enter_context(instead(owner, name, value))
        stack.enter_context(_same_shape())
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


_OBJECTS = 100_000


_within: list[tuple[int, int, int]] = []
"""Thresholds before the outermost block, once for every block that is open, in any thread."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let Python's collector look, within the block, once in so many new objects: graphs are large, and no garbage."""
    before = _within[0] if _within else gc.get_threshold()
    _within.append(before)
    gc.set_threshold(max(before[0], _OBJECTS) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        _within.pop()
        if not _within:
            gc.set_threshold(*before)


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put a value in the place of an attribute within the block, where there is one."""
    before = inspect.getattr_static(owner, name, None)
    if before is not None:
        setattr(owner, name, value)
    try:
        yield
    finally:
        if before is not None:
            setattr(owner, name, before)


def _later(recompile: Any) -> Any:
    """Write a graph's Python code once somebody calls it."""

    def deferred(graph: torch.fx.GraphModule) -> None:
        def forward(module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            recompile(module)
            return module.forward(*args, **kwargs)

        type(graph).forward = forward  # each graph module has a class of its own
        structure = getattr(graph.graph._codegen, "pytree_info", None)
        if structure is not None:  # what else `recompile` leaves behind, and other passes read
            graph._in_spec, graph._out_spec = structure.in_spec, structure.out_spec

    return deferred


_ACTIVATIONS = ("hardtanh", "hardswish", "hardsigmoid", "relu", "silu", "leaky_relu", "gelu", "elu", "mish")
_NORM = "_native_batch_norm_legit_no_training"


@contextmanager
def _same_shape() -> Iterator[None]:
    """Tell the shape of an activation or a batch norm from its input's, where torch asks for the shape alone.

    Else it works through all the parts that the operator can be taken apart into, each with its symbolic sizes. Of
    those in place it asks before it puts the operator that copies there: what is written to is what comes of it.
    """
    with ExitStack() as stack:
        meta = torch._C.DispatchKey.Meta
        for op in _overloads(f"{name}_" for name in _ACTIVATIONS):
            if meta in getattr(op, "py_kernels", ()):
                stack.callback(op._dispatch_cache.clear)  # of the kernels that were in use: here and, last, at the end
                stack.enter_context(_entry(op.py_kernels, meta, lambda x, *_, **__: x))
                op._dispatch_cache.clear()
        known: dict[Any, Any] = getattr(fake_impls, "get_fast_op_impls", dict)()
        for op in _overloads((*_ACTIVATIONS, _NORM)):
            if op in decomposition_table and op not in known:
                stack.enter_context(_entry(known, op, _like_input(op)))
        yield


def _overloads(names: Iterable[str]) -> list[Any]:
    return [getattr(torch.ops.aten, name).default for name in names if hasattr(torch.ops.aten, name)]


def _like_input(op: Any) -> Any:
    """The shape alone of what an operator gives, of floating tensors on the CPU; of others as torch finds it."""

    def shape(mode: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with mode:
            if not x.is_floating_point() or x.device.type != "cpu":
                return decomposition_table[op](x, *args, **kwargs)
            found = torch.empty_like(x)
            return found if op.name() != f"aten::{_NORM}" else (found, x.new_empty(0), x.new_empty(0))

    return shape


@contextmanager
def _entry(table: dict[Any, Any], key: Any, value: Any) -> Iterator[None]:
    """Put a value into a dictionary within the block."""
    missing = object()
    before = table.get(key, missing)
    table[key] = value
    try:
        yield
    finally:
        if before is missing:
            del table[key]
        else:
            table[key] = before


_ARITHMETIC = ("add", "sub", "mul", "eq", "ne", "ge", "gt", "le", "lt")


def _once(name: str, known: dict[Any, Any]) -> Any:
    """Remember what comes of symbolic sizes, except where the calculation itself is captured."""
    work_out = getattr(SymNode, name, None)

    def magic(left: Any, right: Any) -> Any:
        if proxy_tensor.get_proxy_mode():
            return work_out(left, right)  # type: ignore[misc]
        key = name, left.shape_env, left._expr, right._expr, left.pytype, right.pytype
        if key not in known:
            known[key] = work_out(left, right)  # type: ignore[misc]
        return known[key]

    return magic


def _unseen(question: Any) -> Any:
    """Ask about a tensor without telling the modes that record what is done to it."""

    def ask(x: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return question(x)

    return ask


def _where_bound(name_again: Any) -> Any:
    """Go through all sizes for those that depend on values only where an operator has made one."""

    def search(graph: torch.fx.GraphModule) -> None:
        if any("unbacked_bindings" in node.meta for node in graph.graph.nodes):
            name_again(graph)

    return search


class LongSizes(Exception):
    """Sizes are computed from the input's in so many steps that solving for them takes minutes."""


_STEPS = 100
"""Operations in a symbolic size. Padding to a multiple of the stride, the input's size over it rounded up, triples them
at every stride; other networks have a dozen."""


def _memory_format(suggested: Any) -> Any:
    """Spare the reasoning about symbolic strides: torch drops what comes of it. Raises LongSizes."""

    def of(x: Tensor) -> torch.memory_format:
        if not x._has_symbolic_sizes_strides:
            found: torch.memory_format = suggested(x)
            return found
        if any(isinstance(size, torch.SymInt) and _steps(size.node.expr) > _STEPS for size in x.shape):
            raise LongSizes(f"a size is computed from the input's in more than {_STEPS} steps")
        return torch.contiguous_format

    return of


@lru_cache(maxsize=4096)
def _steps(size: Any) -> int:
    return int(size.count_ops())


class _OwnFrames:
    """Stands in for torch's captured traceback: frames of the user's own, and those that torch looks for."""

    def __init__(self) -> None:
        self._found: list[tuple[str, int, str]] = []

    @classmethod
    def extract(cls, **_: Any) -> _OwnFrames:
        """Look at the stack that this is called from."""
        frames, frame = cls(), sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward" or not foreign(code.co_filename):
                frames._found.append((code.co_filename, frame.f_lineno, code.co_name))
            frame = frame.f_back  # type: ignore[assignment]
        return frames

    def summary(self) -> traceback.StackSummary:
        """The frames, outermost first."""
        found = [traceback.FrameSummary(*frame, lookup_line=False) for frame in reversed(self._found)]
        return traceback.StackSummary.from_list(found)
