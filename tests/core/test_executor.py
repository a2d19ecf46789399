"""Traced graphs run in stretches: a run goes on from where it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.capture.tracing import trace
from surgery.core import Executor, state_of


class _Norms(nn.Module):
    """Norms behind convolutions with a bias and without one, in groups, behind a sum, and one that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.three, self.four = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8, eps=1e-3) for _ in range(4))
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 8, H - 2, W - 2)."""
        x = torch.relu(self.norms[0](self.one(x)))
        y = self.norms[1](self.two(x))
        z = self.three(x + y)
        out: Tensor = self.norms[3](self.four(torch.relu(self.norms[2](z) + z)) + x)
        return out


def test_a_run_in_stretches_gives_what_the_model_gives() -> None:
    torch.manual_seed(0)
    model, x = _Norms().eval(), torch.randn(4, 3, 9, 9)
    program = trace(model, x)
    tape = Executor(program.graph, state_of(program))
    with torch.no_grad():
        run = tape.start([x])
        for to in range(0, len(tape.nodes) - 1, 3):
            run = tape.advance(run, to)
            assert torch.allclose(tape.output(run), model(x), atol=1e-5)


def test_an_input_that_the_model_writes_into_stays() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """(N, 3) to (N, 3), the input twice itself."""
            x.mul_(2)
            return x + 1

    x = torch.randn(2, 3)
    program = trace(Writes().eval(), x.clone())
    before = x.clone()
    tape = Executor(program.graph, state_of(program))
    assert torch.equal(tape.output(tape.start([x])), 2 * before + 1)
    assert torch.equal(x, before)
    run = tape.start([x])
    assert torch.equal(tape.output(run), tape.output(run))
