"""Kernels: what programs become for a runtime, and the small models that are timed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import vit
from torch import nn

from surgery.capture.tracing import trace
from surgery.core.ir import Coupling, Program
from surgery.core.kernels import Kernel, Operand, Widths, resolved, step
from surgery.coupling.coupler import couple
from surgery.inputs import import_torchvision
from surgery.latency import probe
from surgery.latency.fill import REFERENCE, Timer, fill
from surgery.latency.micro import chain_bytes, model_bytes
from surgery.latency.tables import LatencyTable
from surgery.ops.registry import rules
from surgery.planning.lowering import Lowered, lower


def lowered(model: nn.Module, x: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[Program, Coupling, Lowered]:
    program = trace(model.eval(), x)
    coupling = couple(program)
    return program, coupling, lower(program, coupling)


def run_kernel(kernel: Kernel, widths: Widths) -> tuple[int, ...]:
    """Check a kernel's model, run it, and return the shape of what comes out."""
    content = model_bytes(kernel, widths)
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
    return tuple(session.run(None, given)[0].shape)


TIMED = sorted(op for op, rule in rules().items() if rule.onnx is not None)


@pytest.mark.parametrize("op", TIMED)
def test_every_rule_that_is_timed_makes_kernels_that_run(op: str) -> None:
    model, inputs = rules()[op].example()
    program, _, low = lowered(model, inputs)
    nodes = list(program.graph.graph.nodes)
    assert any(str(node.target) == op for node in nodes)
    assert op not in {str(node.target) for node in nodes if node.name in low.untimed}
    for kernel, widths in low.points():
        sizes = dict(zip(kernel.letters, widths, strict=True))
        assert run_kernel(kernel, widths) == resolved(kernel.shape, sizes)
        assert Kernel.from_key(kernel.key) == kernel


def test_batch_norms_are_folded_and_activations_join_the_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.SiLU()
    )
    _, _, low = lowered(model, torch.randn(1, 3, 12, 12))
    assert [[s.op for s in placed.kernel.steps] for placed in low.placed] == [
        ["Conv", "Relu"],
        ["Conv", "Sigmoid", "Mul"],
    ]
    first, second = (placed.kernel for placed in low.placed)
    assert [o.kind for o in first.operands] == ["value", "weight", "weight"]
    assert [o.kind for o in second.operands] == ["image", "weight", "weight"]
    assert low.untimed == ()
    assert low.points()[1][1] == (16,)


def test_what_several_read_is_not_fused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(torch.relu(y)) + y

    _, _, low = lowered(Twice(), torch.randn(1, 3, 8, 8))
    assert [[s.op for s in p.kernel.steps] for p in low.placed] == [["Conv"], ["Relu"], ["Conv", "Add"]]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "vit", "shufflenet_v2_x0_5"])
def test_networks_are_timed_whole(name: str) -> None:
    model = vit() if name == "vit" else import_torchvision().models.get_model(name, weights=None)
    program, coupling, low = lowered(model, torch.randn(1, 3, 224, 224))
    contracting = {op for op, rule in rules().items() if rule.macs is not None and rule.masked}
    nodes = list(program.graph.graph.nodes)
    contractions = Counter(str(node.target) for node in nodes if str(node.target) in contracting)
    untimed = Counter(str(node.target) for node in nodes if node.name in low.untimed)
    assert contractions
    assert not contractions.keys() & untimed.keys()
    dense = low.points()
    group = max(coupling.groups, key=lambda g: g.size)
    cut = low.points({group.name: range(group.size // 2)})
    changed = [(a, b) for (_, a), (_, b) in zip(dense, cut, strict=True) if a != b]
    assert changed
    assert all(x >= y for a, b in changed for x, y in zip(a, b, strict=True))


def test_the_batch_is_the_one_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(1), nn.Linear(8 * 36, 4))
    program = trace(model.eval(), torch.randn(1, 3, 8, 8))
    for batch in (1, 5):
        placed = lower(program, couple(program), batch=batch).placed
        assert {p.kernel.shape[0] for p in placed} == {batch}


def test_only_the_kernel_is_timed_and_not_what_stands_around_it() -> None:
    """Events as ONNX Runtime's profiler gives them: of a context, changes of layout at the ends, and the kernel."""
    run = [
        ("ReorderInput", "ReorderInput_kernel_time", 100),
        ("Conv", "context_x0_conv_nchwc_kernel_time", 100),
        ("MaxPool", "context_x0_nchwc_kernel_time", 100),
        ("Conv", "s0_nchwc_kernel_time", 7),
        ("ReorderOutput", "ReorderOutput_token_3_kernel_time", 2),
        ("HardSwish", "kernel_s1_kernel_time", 3),
        ("ReorderInput", "ReorderInput_token_4_kernel_time", 1),
        ("Conv", "context_out_conv_nchwc_kernel_time", 100),
        ("MaxPool", "context_out_nchwc_kernel_time", 100),
        ("ReorderOutput", "ReorderOutput_kernel_time", 100),
    ]
    nodes = [{"cat": "Node", "name": name, "dur": us, "args": {"op_name": op}} for op, name, us in run]
    events = [*nodes, {"cat": "Session", "name": "model_run", "dur": 1}]
    assert [probe.own_ms(run) for run in probe.operators_by_run(events * 2)] == pytest.approx([0.013, 0.013])
    assert probe.kernel_ms(chain_bytes(3), 1, np.zeros(1, np.float32)) > 0


def test_what_does_not_run_by_itself_counts_as_nothing() -> None:
    strange = Kernel.from_key(REFERENCE[0].key.replace('"Conv"', '"NoSuchOperator"'))
    table = LatencyTable({}, {}, 0.0, {})
    filled = fill(table, [(strange, (16, 16)), (REFERENCE[0], (16, 16))], Timer(probe.Conditions(), rounds=1))
    assert set(filled.entries[strange.key].grid) == {0.0}
    assert min(filled.entries[REFERENCE[0].key].grid) > 0


def test_what_is_joined_is_as_long_as_its_pieces() -> None:
    pieces = tuple(Operand(name, (1, letter, 4, 4), "image") for name, letter in (("x0", "a"), ("x1", "b")))
    joined = Kernel((step("Concat", "x0", "x1", axis=1),), pieces, (1, "c", 4, 4), True)
    assert run_kernel(joined, (14, 15, 30)) == (1, 29, 4, 4)
