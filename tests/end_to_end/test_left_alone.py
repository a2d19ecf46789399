"""What a shrink leaves as it found it: the user's inputs and buffers, torch itself, streams and settings of Python."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.sym_node import SymNode

import surgery


class Net(nn.Module):
    """Two convolutions, and a way of its own between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.n = nn.Buffer(torch.zeros(1))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, x))


def writing(net: Any, x: Tensor) -> Tensor:
    x.sub_(0.5).div_(0.25)
    return net.first(x)


def counting(net: Any, x: Tensor) -> Tensor:
    net.n += 1
    return net.first(x)


@pytest.mark.parametrize("between", [writing, counting])
def test_inputs_and_buffers(between: Any) -> None:
    net, x = Net(between), torch.randn(2, 3, 8, 8)
    before = x.clone()
    surgery.shrink(net, x, surgery.recipe(macs=0.5))
    assert torch.equal(x, before)
    assert float(net.n) == 0


def _process() -> tuple[Any, ...]:
    patched = (SymNode.add, torch.fx.GraphModule.recompile)
    return (*patched, sys.stdout, sys.stderr, gc.isenabled(), gc.get_threshold())


def test_the_process_after_several_threads() -> None:
    before, results = _process(), []

    def work() -> None:
        net = Net(lambda net, x: net.first(x).relu())
        results.append(surgery.shrink(net, torch.randn(2, 3, 8, 8), surgery.recipe(macs=0.5)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert _process() == before


def test_the_process_after_a_failure() -> None:
    before = _process()
    with pytest.raises(surgery.errors.SurgeryError):
        surgery.shrink(Net(lambda net, x: net.first(x)[:, :: int(x.sum())]), torch.randn(2, 3, 8, 8))
    assert _process() == before
