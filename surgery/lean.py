"""Cheaper captures: what `torch.export` does besides capturing, left undone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx.experimental import proxy_tensor


@contextmanager
def lean() -> Iterator[None]:
    """Keep `torch.export`, within the block, from work that nobody here reads: a third of the time of a capture.

    That is Python code for every intermediate graph, now made for those that are called; strides and memory formats
    beside every value; and Python's collector, which goes through the growing graph over and over.
    """
    recompile, private = torch.fx.GraphModule.recompile, "_extract_tensor_metadata"
    describe = getattr(proxy_tensor, private, None)

    def later(graph: torch.fx.GraphModule) -> None:
        def forward(module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            recompile(module)
            return module.forward(*args, **kwargs)

        type(graph).forward = forward  # each graph module has a class of its own
        structure = getattr(graph.graph._codegen, "pytree_info", None)
        if structure is not None:  # what else `recompile` leaves behind, and other passes read
            graph._in_spec, graph._out_spec = structure.in_spec, structure.out_spec

    collects = gc.isenabled()
    try:
        gc.disable()
        torch.fx.GraphModule.recompile = later  # type: ignore[method-assign, assignment]
        if describe is not None:
            setattr(proxy_tensor, private, lambda *_, **__: None)
        yield
    finally:
        if collects:
            gc.enable()
        torch.fx.GraphModule.recompile = recompile  # type: ignore[method-assign]
        if describe is not None:
            setattr(proxy_tensor, private, describe)
