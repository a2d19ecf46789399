"""Every operator rule, by enumeration: its example is traced, cut by random plans and checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import cut_model, make_plan, random_dead
from torch import Tensor, nn

from surgery.capture.tracing import trace
from surgery.coupling.coupler import couple
from surgery.cutting import check, cut
from surgery.ops import Call, Rule, register, rules
from surgery.report import operators_as_json, operators_as_markdown

ALIKE = ("element-wise", "pooling and resizing", "reduction")  # families whose members share one rule


@pytest.mark.parametrize("op", sorted(rules()))
def test_example_of_every_rule_is_cut_soundly(op: str) -> None:
    rule = rules()[op]
    torch.manual_seed(0)
    model, inputs = rule.example()
    program = trace(model, inputs)
    assert op in {str(node.target) for node in program.graph.graph.nodes}, "the example does not reach the operator"
    coupling = couple(program)
    assert coupling.groups, "the example leaves nothing to cut"
    for seed in range(1 if rule.family in ALIKE else 2):
        plan = make_plan(program, coupling, random_dead(coupling, seed))
        result = check(program, plan, cut(program, plan, coupling=coupling), coupling=coupling)
        assert result.replayed > 2
        assert result.error_float64 <= 1e-10


def test_every_rule_says_what_it_does() -> None:
    assert [rule.op for rule in rules().values() if not (rule.summary and rule.family)] == []


def test_registering_an_operator_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register(rules()["aten.relu.default"])


@torch.library.custom_op("toy::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@double.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(double(self.before(x)))
        return y


def test_operator_without_a_rule_freezes_what_flows_into_it() -> None:
    coupling = couple(trace(Toy(), torch.randn(1, 3, 9, 9)))
    assert coupling.groups == ()
    reasons = [f.reason for f in coupling.frozen if f.tensor == "before.weight"]
    assert any("toy.double" in r and "no rule" in r and "test_ops.py" in r for r in reasons)


def test_a_rule_from_outside_the_package_makes_its_operator_cuttable(monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(call: Call) -> object:
        x = call.value("x")
        return call.out({axis: call.passed(x, axis) for axis in range(len(x.shape))})

    monkeypatch.setattr("surgery.ops.registry._RULES", dict(rules()))
    register(Rule("toy.double.default", "toy", passes, lambda: (Toy(), (torch.randn(1, 3, 9, 9),)), summary="passes"))
    cutting = cut_model(Toy(), torch.randn(1, 3, 9, 9))
    assert [g.name for g in cutting.coupling.groups] == ["before.weight:0"]
    assert cutting.check().error_float64 <= 1e-10
    assert cutting.compact.module.before.out_channels < 8


def test_the_table_of_operators_in_the_documents_is_the_registrys() -> None:
    document = Path(__file__).parents[2] / "docs" / "reference" / "operators.md"
    assert document.read_text(encoding="utf-8") == operators_as_markdown(), "surgery ops --markdown"
    listed = json.loads(operators_as_json())
    assert {entry["operator"] for entry in listed} == set(rules())
    assert all(entry["means"] and entry["family"] for entry in listed)
