"""Traced graphs run in stretches: a run goes on from where it was, and norms may be folded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from surgery.capture.tracing import trace
from surgery.core import Executor, state_of
from surgery.importance.folding import Folded


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


@pytest.mark.parametrize("kind", [Executor, Folded])
def test_a_run_in_stretches_gives_what_the_model_gives(kind: type[Executor]) -> None:
    torch.manual_seed(0)
    model, x = _Norms().eval(), torch.randn(4, 3, 9, 9)
    program = trace(model, x)
    tape = kind(program.graph, state_of(program))
    with torch.no_grad():
        run = tape.start([x])
        for to in range(0, len(tape.nodes) - 1, 3):
            run = tape.advance(run, to)
            assert torch.allclose(tape.output(run), model(x), atol=1e-5)


def test_a_folded_norm_goes_by_the_parameters_of_the_moment() -> None:
    torch.manual_seed(0)
    model, x = _Norms().eval(), torch.randn(4, 3, 9, 9)
    program = trace(model, x)
    tape = Folded(program.graph, {name: tensor.clone() for name, tensor in state_of(program).items()})
    with torch.no_grad():
        tape.state["norms.0.weight"].mul_(2)  # type: ignore[attr-defined]
        model.norms[0].weight.mul_(2)
        assert torch.allclose(tape.output(tape.start([x])), model(x), atol=1e-5)


def test_norms_of_more_precision_than_their_layers_are_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3).bfloat16(), nn.BatchNorm2d(8)).eval()
    x = torch.randn(4, 3, 9, 9).bfloat16()
    program = trace(model, x)
    tape = Folded(program.graph, state_of(program))
    with torch.no_grad():
        found, wanted = tape.output(tape.start([x])), model(x)
    assert found.dtype == wanted.dtype
    assert torch.allclose(found.float(), wanted.float(), atol=0.05)


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


def test_norms_of_images_without_a_batch_are_not_folded() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(3, 7, 3), nn.BatchNorm1d(7)).eval(), torch.randn(3, 9)
    nn.init.normal_(model[1].running_mean)  # type: ignore[arg-type]
    program = trace(model, x)
    tape = Folded(program.graph, state_of(program))
    with torch.no_grad():
        assert torch.allclose(tape.output(tape.start([x])), model(x), atol=1e-5)


def test_a_small_epsilon_counts_in_half_precision() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-8)).half().eval(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0], model[1].running_var[0] = 0, 0, 0  # type: ignore[index, union-attr, operator]
        program = trace(model, x.half())
        tape = Folded(program.graph, state_of(program))
        assert bool(torch.isfinite(tape.output(tape.start([x.half()]))).all())
