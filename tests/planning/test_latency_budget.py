"""Budgets of time: plans by a table, on stair edges, with reasons; the loop that measuring closes; the command line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from processes import run_surgery
from stairs import STEP, table_of
from torch import nn

import surgery
from surgery import cli
from surgery.capture.tracing import trace
from surgery.core.ir import Plan
from surgery.coupling.coupler import couple
from surgery.errors import BudgetUnreachable, InvalidInput
from surgery.latency.ratio import PROCESSES, Ratio
from surgery.latency.tables import LatencyTable
from surgery.planning.choice import RefinementLog
from surgery.planning.latency_search import predicted_ms
from surgery.planning.lowering import lower
from surgery.planning.refinement import CLOSE, ITERATIONS, refine
from surgery.registry import CRITERIA

ROOT = Path(__file__).resolve().parents[2]
IMAGE = torch.randn(2, 3, 16, 16)


def net() -> nn.Module:
    torch.manual_seed(0)
    widths = [(3, 64), (64, 128), (128, 64)]
    layers = [x for i, o in widths for x in (nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    program = trace(net(), IMAGE)
    return table_of(program, couple(program))


def shrunk(table: LatencyTable, budget: surgery.Budget, **asked: object) -> surgery.Result:
    return surgery.shrink(net(), IMAGE, surgery.recipe(budget=budget, latency_table=table, **asked))  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [0.75, 0.5, 0.2])
def test_the_plan_takes_the_time_that_the_table_tells(table: LatencyTable, fraction: float) -> None:
    result = shrunk(table, surgery.Budget(latency=fraction))
    told = result.report["latency"]
    assert told["predicted_ms"] <= fraction * told["predicted_dense_ms"]
    low = lower(result.program, result.coupling)
    again = predicted_ms(low.points(result.plan.dead), table)
    assert again == pytest.approx(told["predicted_ms"])
    assert told["met"] is None
    assert result.check.error_float64 <= 1e-10


def test_widths_stand_on_stair_edges_and_say_why(table: LatencyTable) -> None:
    plan = shrunk(table, surgery.Budget(latency=0.5)).plan
    left = {name: size - len(plan.dead.get(name, ())) for name, size in plan.sizes.items()}
    assert plan.dead
    assert all(width % STEP == 0 for width in left.values())
    for name, width in left.items():
        assert plan.reasons[name].startswith(f"{width} of {plan.sizes[name]}: its kernels take ")
        assert f"{width} → {width - 1} would be slower" in plan.reasons[name]
    assert Plan.from_json(plan.to_json()) == plan


def test_the_same_model_seed_and_table_give_the_same_plan_to_the_byte(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.json")
    first = shrunk(table, surgery.Budget(latency=0.5), correct=False)
    second = surgery.shrink(net(), IMAGE, surgery.recipe(latency=0.5, latency_table=tmp_path / "t.json", correct=False))
    assert first.plan.to_json() == second.plan.to_json()


@pytest.mark.parametrize("criterion", [name for name in CRITERIA.names() if "images" not in CRITERIA[name].needs])
def test_every_criterion_goes_with_time(table: LatencyTable, criterion: str) -> None:
    result = shrunk(table, surgery.Budget(latency=0.5), criterion=criterion)
    assert result.report["latency"]["predicted_ms"] <= 0.5 * result.report["latency"]["predicted_dense_ms"]


def test_what_is_kept_stays_and_a_part_is_planned_by_itself(table: LatencyTable) -> None:
    kept = shrunk(table, surgery.Budget(latency=0.75), keep=("3",))
    assert kept.model.get_submodule("3").weight.shape[0] == 128  # type: ignore[union-attr, index]
    whole = nn.Sequential(net(), nn.Softmax(1)).eval()
    part = surgery.shrink(whole, IMAGE, surgery.recipe(latency=0.5, submodule="0", latency_table=table, correct=False))
    assert part.plan.dead
    assert part.report["part"]["name"] == "0"


def test_milliseconds_are_taken_of_the_tables_dense_model(table: LatencyTable) -> None:
    dense = shrunk(table, surgery.Budget(latency=0.5)).report["latency"]["predicted_dense_ms"]
    result = shrunk(table, surgery.Budget(latency_ms=0.4 * dense))
    assert result.report["latency"]["predicted_ms"] <= 0.4 * dense
    with pytest.raises(InvalidInput, match=r"takes .* ms already"):
        shrunk(table, surgery.Budget(latency_ms=2 * dense))


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"round_to": 8}, "round_to"), ({"scope": "uniform"}, "scope"), ({"tracer": "torch-pruning"}, "torch.export")],
)
def test_what_the_clock_decides_is_refused_beside_it(table: LatencyTable, asked: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        shrunk(table, surgery.Budget(latency=0.5), **asked)


def test_a_time_that_cannot_be_had_says_what_can(table: LatencyTable) -> None:
    with pytest.raises(BudgetUnreachable, match="ms are predicted"):
        shrunk(table, surgery.Budget(latency=0.01))


@pytest.mark.parametrize(
    "budget", [{"latency": 1.0}, {"latency": 0.0}, {"latency_ms": 0.0}, {"latency_ms": float("inf")}]
)
def test_budgets_of_time_out_of_range_are_refused(budget: dict[str, float]) -> None:
    with pytest.raises(InvalidInput):
        surgery.Budget(**budget)


def test_a_table_of_other_threads_is_said_to_be_one(table: LatencyTable) -> None:
    planned = surgery.shrink(net(), IMAGE, surgery.recipe(latency=0.5, latency_table=table, threads=2))
    assert any("--threads 1" in note and "--threads 2" in note for note in planned.report["notes"])


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read latency table"):
        shrunk(tmp_path / "missing.json", surgery.Budget(latency=0.5))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="cannot read latency table 3"):
        shrunk(3, surgery.Budget(latency=0.5))  # type: ignore[arg-type]


# The loop. -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aimed:
    """A plan that does nothing but remember what it aimed at."""

    plan: Plan
    refinement: RefinementLog


class Machine:
    """A made-up bench: what a plan takes is a function of what it aimed at."""

    def __init__(self, truth: Callable[[float], float]) -> None:
        self.truth = truth

    def export(self, module: object, name: str) -> float:
        return float(module)  # type: ignore[arg-type]

    def ratio(self, compact: float, *, processes: int = PROCESSES, first: int = 0) -> Ratio:
        ratio = self.truth(compact)
        return Ratio(((ratio, 10.0, 10.0 * ratio),) * processes)


def aimed(fraction: float, step: float = 0.0) -> Aimed:
    fraction = round(fraction / step) * step if step else fraction
    plan = Plan({"g": (round(1e6 * fraction),)}, {}, (), "", ())
    return Aimed(plan, RefinementLog(0.5, None, 1.0, fraction))


def refined(plan: Callable[[float], Aimed], machine: Machine, first: Aimed | None = None) -> RefinementLog:
    taken = refine(first or plan(0.5), plan, lambda a: a.refinement.predicted_ms, machine)  # type: ignore[arg-type, return-value]
    assert taken.refinement is not None
    return taken.refinement


def close(truth: Callable[[float], float], *, step: float = 0.0) -> tuple[RefinementLog, Machine]:
    machine = Machine(truth)
    return refined(lambda fraction: aimed(fraction, step), machine), machine


def unreachable(fraction: float) -> Aimed:
    raise BudgetUnreachable("smallest")


@pytest.mark.parametrize("bias", [0.8, 1.0, 1.3])
def test_a_plan_is_corrected_until_the_measured_time_is_met(bias: float) -> None:
    log, _ = close(lambda aim: bias * aim)
    assert log.met
    assert abs(log.iterations[log.taken].measured / 0.5 - 1) <= CLOSE
    assert len(log.iterations) <= ITERATIONS
    assert len(log.iterations[log.taken].ratios) == PROCESSES
    assert log.predicted_ms == pytest.approx(0.5 / bias)
    assert log.verdict.startswith("target 50 % of the dense latency: reached ")


def test_what_stays_out_of_reach_is_said() -> None:
    log = refined(unreachable, Machine(lambda aim: 0.7), first=aimed(0.5))
    assert log.met is False
    assert "every group is at its smallest" in log.verdict
    assert len(log.iterations[0].ratios) == PROCESSES


def test_coarse_steps_end_the_loop_at_the_nearest_plan() -> None:
    log, _ = close(lambda aim: 1.1 * aim, step=0.1)
    assert len(log.iterations) <= ITERATIONS
    assert log.predicted_ms == pytest.approx(0.5)
    assert log.met is False
    assert "no plan was found between" in log.verdict
    assert sorted(r.measured for r in log.iterations) == pytest.approx([0.44, 0.55])


def test_a_correction_across_a_stair_is_followed_by_one_between() -> None:
    """Taken in proportion, it would go back and forth between the two sides."""
    log, _ = close(lambda aim: 0.7 if aim > 0.45 else 0.5 if aim > 0.4 else 0.29)
    assert log.met
    assert [r.measured for r in log.iterations] == [0.7, 0.29, 0.5]
    assert 0.4 < log.predicted_ms <= 0.45


def test_what_is_faster_than_asked_for_is_told() -> None:
    log, _ = close(lambda aim: 0.8 if aim > 0.4 else 0.4)
    assert log.met is False
    assert log.verdict.startswith("NOT met: target 50 % of the dense latency: reached 40 %")
    assert "more was cut than necessary" in log.verdict


@pytest.mark.parametrize(
    ("widths", "bias", "why", "aims"),
    [
        ([0.45, 0.6], 1.2, "every group is at its smallest", [0.5]),
        ([0.3], 1.0, "no slower plan was found", [0.5]),
        ([0.48, 0.9], 0.8, "no plan was found between", [0.5, 0.999]),
    ],
)
def test_where_few_widths_can_be_had_the_reason_is_told(
    widths: list[float], bias: float, why: str, aims: list[float]
) -> None:
    def plan(fraction: float) -> Aimed:
        below = [width for width in widths if width <= fraction]
        if not below:
            raise BudgetUnreachable("smallest")
        return aimed(max(below))

    log = refined(plan, Machine(lambda width: bias * width))
    assert log.met is False
    assert why in log.verdict
    assert [r.aim for r in log.iterations] == aims


def test_a_log_is_plain_json() -> None:
    log, _ = close(lambda aim: aim)
    assert json.loads(json.dumps(log.to_dict()))["met"] is True
    assert replace(log, taken=-1).met is None


# The command line. ---------------------------------------------------------------------------------------------------

NETS = """
import torch
from torch import nn

def net():
    layers = [nn.Conv2d(3, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.randn(1, 3, 16, 16)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("latency")
    (place / "nets.py").write_text(NETS)
    scope: dict[str, object] = {}
    exec(NETS, scope)
    model, example = scope["net"]()  # type: ignore[operator]
    program = trace(model.eval(), example)
    table_of(program, couple(program)).save(place / "table.json")
    return place


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return run_surgery(folder, *args, "--quiet", env={"SURGERY_CACHE": str(folder / "cache")})


def test_the_command_line_plans_by_a_table(folder: Path) -> None:
    done = run(
        folder, "shrink", "nets.py:net", "--latency-table", "table.json", "--latency", "0.5", "--runs", "3", "--json"
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["latency"]["target"] == 0.5
    assert data["latency"]["device"]["cpu"] == "made up"
    assert [row["name"] for row in data["models"]] == ["dense", "masked", "compact"]
    assert data["budget"] is None
    assert not (folder / "cache").exists()


def test_files_that_do_not_meet_the_budget_go_elsewhere(table: LatencyTable, tmp_path: Path) -> None:
    """The last race decides: nothing takes a ten-thousandth of the dense latency."""
    result = shrunk(table, surgery.Budget(latency=0.5))
    measured = {"taken": 0, "rounds": [{"measured": 0.5}], "target": 1e-4, "met": True}
    result = replace(result, report={**result.report, "latency": {**result.report["latency"], **measured}})
    out, fast = tmp_path / "out", surgery.recipe(runs=3)
    with pytest.raises(BudgetUnreachable, match=r"its files are in .*out\.unmet; accept them with --best-effort"):
        surgery.save(result, out, fast)
    assert not out.exists()
    told = json.loads((tmp_path / "out.unmet" / "report.json").read_text())["latency"]
    assert told["met"] is False and told["final"] > 1e-3
    report = surgery.save(result, out, fast.but(best_effort=True))
    assert report.data["latency"]["met"] is False and (out / "compact.onnx").is_file()
    assert "target 0.01 % of the dense latency: NOT MET" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--latency", "0.5", "--macs", "0.5"], 2, "--latency and --macs"),
        (["--latency", "0.5", "--round-to", "8"], 2, "round_to"),
        (["--macs", "0.5", "--latency-table", "table.json"], 2, "--latency-table is for budgets of time"),
        (["--macs", "0.5", "--no-correct"], 2, "--no-correct is for budgets of time"),
        (["--latency-table", "table.json", "--mean", "0.5,0.5,0.5"], 2, "--mean is for images"),
        (["--latency-table", "table.json", "--keep", "*"], 5, "nothing of the model may be cut"),
        (["--latency-table", "nowhere.json"], 2, "cannot read latency table"),
        (["--latency-table", "nets.py"], 2, "cannot read latency table nets.py"),
        (["--latency-table", "table.json", "--latency", "0.001"], 5, "ms are predicted"),
    ],
)
def test_what_goes_wrong_is_said_in_one_sentence(
    folder: Path,
    args: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["show", "nets.py:net", *args, "--quiet"]) == code
    stderr = capfd.readouterr().err
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert cli.main(["show", "nets.py:net", *args, "--quiet", "--json"]) == code
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["exit_code"] == code and said in error["message"]
    assert bool(error["figures"]) is (code == 5)
