"""The Python interface: one call from a module to a checked compact one, and plans that travel to other copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.delivery import validate_output, weights_bytes
from surgery.errors import InvalidInput, PlanMismatch, UnsupportedModel


class Net(nn.Module):
    """A stem, a residual layer, a neck, a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, padding=1)
        self.neck = nn.Conv2d(width, 10, 1)
        self.head = nn.Linear(10, 5)

    def forward(self, image: Tensor, scale: Tensor | None = None) -> Tensor:
        x = torch.relu(self.norm(self.stem(image)))
        x = x + torch.relu(self.inner(x))
        x = torch.relu(self.neck(x)).mean((2, 3))
        return self.head(x if scale is None else x * scale)


def net(seed: int = 0, width: int = 12) -> Net:
    torch.manual_seed(seed)
    return Net(width)


HALF = surgery.Budget(macs=0.5)
IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def result() -> Any:
    return surgery.shrink(net(), IMAGE, surgery.recipe(budget=HALF))


@pytest.fixture(scope="module")
def saved(result: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("api") / "net"
    surgery.save(result, out, surgery.recipe(runs=3))
    return out


def test_shrink_gives_the_users_own_class_smaller(result: Any) -> None:
    dense = sum(p.numel() for p in net().parameters())
    assert isinstance(result.model, Net)
    assert result.kind == "module"
    assert sum(p.numel() for p in result.model.parameters()) < dense
    assert result.report["budget"]["kept_fraction"] <= 0.5


def test_the_report_counts_what_fvcore_counts_on_the_modules(result: Any) -> None:
    from surgery.core.counting import count_macs, count_params

    dense, _, compact = result.report["models"]
    assert dense["macs"] == count_macs(net(), (IMAGE,))
    assert compact["macs"] == count_macs(result.model, (IMAGE,))
    assert compact["parameters"] == count_params(result.model)


def test_every_stage_is_timed_and_told() -> None:
    told: list[str] = []
    result = surgery.shrink(
        net(), IMAGE, surgery.recipe(budget=HALF), progress=lambda stage, fraction: told.append(stage)
    )
    stages = ["trace", "couple", "score", "allocate", "cut", "check", "count"]
    assert list(dict.fromkeys(told)) == stages
    assert list(result.report["stages_s"]) == stages


def test_the_same_seed_and_arguments_give_the_same_bytes(result: Any) -> None:
    again = surgery.shrink(net(), IMAGE, surgery.recipe(budget=HALF))
    assert again.plan.to_json() == result.plan.to_json()
    assert weights_bytes(again.model) == weights_bytes(result.model)


def test_another_budget_gives_another_plan(result: Any) -> None:
    smaller = surgery.shrink(net(), IMAGE, surgery.recipe(params=0.25, criterion="l2", scope="uniform"))
    assert smaller.report["budget"]["kind"] == "params"
    assert smaller.report["budget"]["kept_fraction"] <= 0.25
    assert smaller.plan.digest != result.plan.digest


def test_a_users_criterion_is_named_in_the_plan() -> None:
    def first_units_go(group: Any, parameters: Any) -> list[float]:
        return [float(k) for k in range(group.size)]

    made = surgery.shrink(net(), IMAGE, surgery.recipe(budget=HALF, criterion=first_units_go))
    assert made.plan.settings["criterion"] == "first_units_go"
    assert all(dead == tuple(range(len(dead))) for dead in made.plan.dead.values())


def test_a_plan_travels_to_another_copy_of_the_dense_model(result: Any, tmp_path: Path) -> None:
    result.plan.save(tmp_path / "plan.json")
    other = net(seed=7)
    before = copy.deepcopy(other.state_dict())
    compact = surgery.apply(surgery.Plan.load(tmp_path / "plan.json"), other)
    assert compact(IMAGE).shape == (1, 5)
    kept = [k for k in range(12) if k not in result.plan.dead["stem.weight:0"]]
    assert torch.equal(compact.stem.weight, other.stem.weight[kept])
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_keyword_inputs_are_made_again_from_the_plan() -> None:
    scaled = {"scale": torch.ones(1, 1)}
    made = surgery.shrink(net(), IMAGE, surgery.recipe(budget=HALF), example_kwargs=scaled)
    compact = surgery.apply(made.plan, net())
    assert torch.equal(compact(IMAGE, **scaled), made.model(IMAGE, **scaled))


def test_a_plan_for_another_architecture_is_refused(result: Any) -> None:
    with pytest.raises(PlanMismatch, match="another architecture"):
        surgery.apply(result.plan, net(width=16))


def test_what_keep_protects_stays_whole_when_the_plan_is_applied() -> None:
    made = surgery.shrink(net(), IMAGE, surgery.recipe(channels=0.9, keep="inner"))
    assert made.model.inner.weight.shape == (12, 12, 3, 3)
    assert made.model.neck.weight.shape[0] < 10
    assert surgery.apply(made.plan, net()).inner.weight.shape == made.model.inner.weight.shape


def test_a_saved_set_loads_with_its_weights(result: Any, saved: Path) -> None:
    compact = surgery.load(saved, net(seed=9))
    result.model.eval()
    assert torch.equal(compact.eval()(IMAGE), result.model(IMAGE))


def test_the_saved_program_runs_at_other_batches(result: Any, saved: Path) -> None:
    program = torch.export.load(str(saved / "compact.pt2")).module()
    images = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(program(images), result.model.eval()(images), atol=1e-6)


def test_the_digests_in_the_report_are_those_of_the_files(saved: Path) -> None:
    import hashlib
    import json

    listed = json.loads((saved / "report.json").read_text())["files"]
    assert {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in listed} == listed
    files = {"dense.onnx", "compact.onnx", "compact.pt2", "compact.safetensors", "plan.json", "recipe.toml"}
    assert set(listed) == files


def test_weights_that_are_missing_or_of_another_plan_are_one_sentence(result: Any, tmp_path: Path) -> None:
    result.plan.save(tmp_path / "plan.json")
    with pytest.raises(InvalidInput, match=r"compact\.safetensors"):
        surgery.load(tmp_path, net())
    (tmp_path / "compact.safetensors").write_bytes(weights_bytes(net()))
    with pytest.raises(InvalidInput, match="shrink it again"):
        surgery.load(tmp_path, net())


def test_more_threads_than_cores_are_refused_before_any_work() -> None:
    with pytest.raises(InvalidInput, match="threads"):
        validate_output(surgery.recipe(threads=100_000))
    with pytest.raises(InvalidInput, match="--threads 100000: this process may use"):
        surgery.shrink(net(), IMAGE, surgery.recipe(latency=0.5, threads=100_000))


@pytest.mark.parametrize("asked", [{"tracer": "no-such-tracer"}])
def test_an_unknown_tracer_is_refused(asked: dict[str, str]) -> None:
    with pytest.raises((UnsupportedModel, InvalidInput), match="no-such-tracer"):
        surgery.shrink(net(), IMAGE, surgery.recipe(**asked))


class Told(nn.Module):
    """Takes what is no tensor, and returns a scalar beside its map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor, scale: float = 1.0, bent: bool = True) -> dict[str, Tensor]:
        y = self.a(x) * scale
        y = self.b(y.relu()) if bent else self.b(y)
        return {"map": y, "energy": y.square().mean()}


def test_arguments_that_are_no_tensors_are_in_the_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Told().eval(), torch.randn(1, 3, 12, 12)
    result = surgery.shrink(model, x, surgery.recipe(budget=HALF), example_kwargs={"scale": 2.0, "bent": False})
    assert result.check.error_float64 <= 1e-10
    result.plan.save(tmp_path / "plan.json")
    plan = surgery.Plan.load(tmp_path / "plan.json")
    for again in (surgery.apply(plan, model), surgery.apply(plan, model, x)):
        same = again(x, scale=2.0, bent=False), result.model(x, scale=2.0, bent=False)
        assert torch.equal(same[0]["map"], same[1]["map"]) and torch.equal(same[0]["energy"], same[1]["energy"])
    with pytest.raises(PlanMismatch):
        surgery.apply(plan, model, x, example_kwargs={"bent": True})


def test_a_compiled_model_is_shrunk_as_the_model_that_it_wraps() -> None:
    result = surgery.shrink(torch.compile(net()), IMAGE, surgery.recipe(macs=0.5, recover="none"))
    assert type(result.model) is type(net())


def test_a_compiled_model_from_a_file_is_not_compiled_to_be_loaded(tmp_path: Path) -> None:
    source = "import torch\n\ndef never(graph, inputs):\n    raise RuntimeError('it was compiled')\n\ndef make():\n"
    (tmp_path / "net.py").write_text(source + "    return torch.compile(torch.nn.Conv2d(3, 8, 3), backend=never)\n")
    loaded = surgery.load_model(f"{tmp_path / 'net.py'}:make", input_shape=(1, 3, 8, 8))
    assert type(loaded.module) is nn.Conv2d
