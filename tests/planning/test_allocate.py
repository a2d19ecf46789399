"""Plans meet their budget by no more than the last step, and turn units into positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from surgery.config import Budget, Selection
from surgery.core.ir import AxisCut, CostFn, Coupling, Frozen, Group, InputSpec, Plan, Program, Scores, Site
from surgery.coupling.plans import plan_from_dead
from surgery.errors import BudgetUnreachable, IllegalCut, InvalidInput, PlanMismatch
from surgery.planning.allocation import allocate

INPUTS = (InputSpec("x", (2, 3, 8, 8), "float32", (0,)),)
PROGRAM = Program(None, INPUTS, (), {}, "f", (), None)


def singles(size: int, start: int = 0) -> tuple[tuple[int, ...], ...]:
    return tuple((start + k,) for k in range(size))


def chain(widths: Sequence[int], inexact: Sequence[int] = ()) -> Coupling:
    """Linear layers 3 → widths[0] → widths[1] → .. → 5: one group between each two layers."""
    sizes = [3, *widths, 5]
    shapes = {f"l{k}.weight": (sizes[k + 1], sizes[k]) for k in range(len(sizes) - 1)}
    groups = [
        Group(
            name=f"l{k}.weight:0",
            units=tuple(range(100 * k, 100 * k + width)),
            sites=(Site(f"l{k}.weight", 0, singles(width)), Site(f"l{k + 1}.weight", 1, singles(width))),
            inexact="layer norm" if k in inexact else None,
        )
        for k, width in enumerate(widths)
    ]
    last = f"l{len(widths)}.weight"
    frozen = (Frozen("l0.weight", 1, "network input"), Frozen(last, 0, "network output"))
    return Coupling(groups=tuple(groups), frozen=frozen, shapes=shapes)


def weights_left(coupling: Coupling) -> CostFn:
    """Parameters of `chain`: products of the widths that are left."""

    def cost(dead: Mapping[str, Sequence[int]]) -> int:
        widths = [3, *(group.size - len(dead.get(group.name, ())) for group in coupling.groups), 5]
        return sum(a * b for a, b in pairwise(widths))

    return cost


def rising(coupling: Coupling, factor: float = 1.0) -> Scores:
    return {g.name: tuple(factor * (k + 1) / g.size for k in range(g.size)) for g in coupling.groups}


def plan_for(coupling: Coupling, budget: Budget, scores: Scores | None = None, **options: object) -> Plan:
    cost = None if budget.kind == "channels" else weights_left(coupling)
    given = {name: options.pop(name) for name in ("scope", "round_to", "inexact") if name in options}
    selection = Selection(**given)  # type: ignore[arg-type]
    scores = scores or rising(coupling)
    return allocate(PROGRAM, coupling, scores, budget, cost=cost, selection=selection, **options)  # type: ignore[arg-type]


def sizes_left(plan: Plan) -> list[int]:
    return [size - len(plan.dead.get(name, ())) for name, size in plan.sizes.items()]


# Budgets. ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    fraction=st.floats(0.05, 0.95),
    draw=st.randoms(use_true_random=False),
)
def test_global_equals_removing_the_least_important_unit_until_the_budget_is_met(
    widths: list[int], fraction: float, draw: Random
) -> None:
    coupling = chain(widths)
    scores = {g.name: tuple(float(draw.randint(0, 5)) for _ in g.units) for g in coupling.groups}
    cost = weights_left(coupling)
    dead: dict[str, list[int]] = {g.name: [] for g in coupling.groups}
    while cost(dead) / cost({}) > fraction:
        removable = [
            (scores[g.name][k], index, k)
            for index, g in enumerate(coupling.groups)
            for k in range(g.size)
            if k not in dead[g.name] and len(dead[g.name]) < g.size - 1
        ]
        if not removable:
            with pytest.raises(BudgetUnreachable):
                plan_for(coupling, Budget(params=fraction), scores)
            return
        _, index, k = min(removable)
        dead[coupling.groups[index].name].append(k)
    plan = plan_for(coupling, Budget(params=fraction), scores)
    assert plan.dead == {name: tuple(sorted(units)) for name, units in dead.items() if units}


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_kept_meets_the_budget_and_the_last_step_was_needed(scope: str, round_to: int, fraction: float) -> None:
    coupling = chain([16, 24, 10])
    cost = weights_left(coupling)
    plan = plan_for(coupling, Budget(params=fraction), scope=scope, round_to=round_to)
    looser = [
        plan_for(coupling, Budget(params=r / 1000), scope=scope, round_to=round_to)
        for r in range(int(fraction * 1000), 1000, 4)
    ]
    assert cost(plan.dead) <= fraction * cost({})
    larger = [p for p in looser if cost(p.dead) > cost(plan.dead)]
    assert larger and all(cost(p.dead) > fraction * cost({}) for p in larger)
    assert all(
        left % round_to == 0 for left, name in zip(sizes_left(plan), plan.sizes, strict=True) if name in plan.dead
    )
    assert min(sizes_left(plan)) >= 1


def test_channels_count_units_and_hit_the_fraction_exactly() -> None:
    plan = plan_for(chain([40, 60]), Budget(channels=0.29))
    assert sum(sizes_left(plan)) == 29  # 0.29 * 100 is a little less than 29 in floating point


def test_lowest_scores_go_first_and_ties_go_in_order() -> None:
    coupling = chain([4, 4])
    scores = {"l0.weight:0": (3.0, 1.0, 1.0, 2.0), "l1.weight:0": (1.0, 9.0, 9.0, 9.0)}
    assert plan_for(coupling, Budget(channels=0.75), scores).dead == {"l0.weight:0": (1, 2)}
    assert plan_for(coupling, Budget(channels=0.6), scores).dead == {"l0.weight:0": (1, 2, 3), "l1.weight:0": (0,)}


def test_every_group_keeps_a_unit_however_unimportant() -> None:
    coupling = chain([4, 20])
    scores = {"l0.weight:0": (0.0,) * 4, "l1.weight:0": (1.0,) * 20}
    assert sizes_left(plan_for(coupling, Budget(channels=0.5), scores)) == [1, 11]


def test_uniform_keeps_one_fraction_everywhere() -> None:
    coupling = chain([10, 20, 40])
    plan = plan_for(coupling, Budget(channels=0.5), rising(coupling), scope="uniform")
    assert sizes_left(plan) == [5, 10, 20]
    assert plan.dead["l1.weight:0"] == tuple(range(10))
    rounded = plan_for(coupling, Budget(channels=0.5), rising(coupling), scope="uniform", round_to=4)
    assert sizes_left(rounded) == [4, 8, 16]  # one level up, [8, 12, 20] is 40 of 70


def test_rounding_first_brings_a_group_to_a_multiple_and_leaves_one_multiple() -> None:
    coupling = chain([10, 3])
    cheap_tail = {"l0.weight:0": tuple(float(k) for k in range(10)), "l1.weight:0": (0.0, 0.0, 0.0)}
    assert sizes_left(plan_for(coupling, Budget(channels=0.9), cheap_tail, round_to=4)) == [8, 3]
    smallest = plan_for(coupling, Budget(channels=0.6), cheap_tail, round_to=4)
    assert sizes_left(smallest) == [4, 3]
    assert any("since there is no smaller multiple of 4: l1.weight:0" in note for note in smallest.notes)
    with pytest.raises(BudgetUnreachable, match="round to less than 4"):
        plan_for(coupling, Budget(channels=0.4), cheap_tail, round_to=4)


def test_rounding_counts_positions_of_the_widest_first_axis() -> None:
    heads = tuple(tuple(range(8 * k, 8 * k + 8)) for k in range(6))  # six heads of eight
    flat = tuple(tuple(range(16 * k, 16 * k + 16)) for k in range(10))  # ten channels of 4 x 4
    coupling = Coupling(
        groups=(
            Group("q:0", tuple(range(6)), (Site("table", 1, singles(6)), Site("q", 0, heads))),
            Group("conv:0", tuple(range(10, 20)), (Site("conv", 0, singles(10)), Site("fc", 1, flat))),
        ),
        frozen=(),
        shapes={"q": (48, 3), "table": (9, 6), "conv": (10, 3, 5, 5), "fc": (5, 160)},
    )
    scores = {"q:0": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0), "conv:0": tuple(float(k) for k in range(10))}
    plan = plan_for(coupling, Budget(channels=0.8), scores, round_to=4)
    assert sizes_left(plan) == [4, 8]  # single heads (eight positions each), and channels two then four at a time
    assert AxisCut("q", 0, 48, tuple(range(16))) in plan.cuts
    assert AxisCut("fc", 1, 160, tuple(range(32))) in plan.cuts


# Inexact groups. -----------------------------------------------------------------------------------------------------


def test_inexact_groups_stay_whole_while_the_exact_ones_suffice() -> None:
    coupling = chain([10, 10], inexact=[0])
    scores = {"l0.weight:0": (0.0,) * 10, "l1.weight:0": (1.0,) * 10}
    plan = plan_for(coupling, Budget(channels=0.6), scores)
    assert sizes_left(plan) == [10, 2]
    assert any("1 inexact groups left whole, as exact groups sufficed: layer norm" in note for note in plan.notes)


def test_inexact_groups_are_ranked_with_the_others_once_they_are_needed() -> None:
    coupling = chain([10, 10], inexact=[0])
    scores = {"l0.weight:0": (0.0,) * 10, "l1.weight:0": (1.0,) * 10}
    plan = plan_for(coupling, Budget(channels=0.5), scores)
    assert sizes_left(plan) == [1, 9]
    assert any("with 1 of 2 groups at their smallest, 11 of 20 channels (55 %) remain" in note for note in plan.notes)


def test_inexact_groups_can_be_ruled_in_or_out() -> None:
    coupling = chain([10, 10], inexact=[0])
    scores = {"l0.weight:0": (0.0,) * 10, "l1.weight:0": (1.0,) * 10}
    assert sizes_left(plan_for(coupling, Budget(channels=0.9), scores, inexact="always")) == [8, 10]
    assert sizes_left(plan_for(coupling, Budget(channels=0.9), scores, inexact="never")) == [10, 8]
    with pytest.raises(BudgetUnreachable, match="allow inexact groups"):
        plan_for(coupling, Budget(channels=0.5), scores, inexact="never")


# Refusals. -----------------------------------------------------------------------------------------------------------


def test_an_unreachable_budget_says_what_was_reachable_and_what_is_frozen() -> None:
    with pytest.raises(BudgetUnreachable) as caught:
        plan_for(chain([10, 10]), Budget(params=0.01))
    message = str(caught.value)
    assert "cannot get down to 1 % of the params" in message
    assert "9 of 180 params (5 %) remain" in message
    assert "network output (50 parameters: l2.weight)" in message
    assert message.index("network output") < message.index("network input")  # most parameters first
    assert caught.value.exit_code == 5


def test_a_model_without_groups_is_unreachable() -> None:
    for budget in (Budget(params=0.5), Budget(channels=0.5)):
        with pytest.raises(BudgetUnreachable):
            plan_for(chain([]), budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "local"}, "scope='local': give one of global, uniform"),
        ({"inexact": "maybe"}, "inexact='maybe': give one of never, if-needed, always"),
        ({"round_to": 0}, "round_to=0"),
        ({"scores": {"l0.weight:0": (1.0,)}}, "3 units and 1 scores"),
        ({"scores": {"l0.weight:0": (1.0, float("nan"), 1.0)}}, "not finite"),
    ],
)
def test_options_and_scores_that_cannot_be_used(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan_for(chain([3]), Budget(channels=0.5), **options)  # type: ignore[arg-type]


def test_a_budget_on_macs_needs_a_cost_function() -> None:
    coupling = chain([3])
    with pytest.raises(InvalidInput, match="cost function"):
        allocate(PROGRAM, coupling, rising(coupling), Budget(macs=0.5), cost=None)


# Plans. --------------------------------------------------------------------------------------------------------------


def test_the_plan_is_self_contained_and_the_same_every_time() -> None:
    coupling = chain([10, 20])
    first, second = (plan_for(coupling, Budget(params=0.5), settings={"seed": 3}) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert Plan.from_json(first.to_json()) == first
    assert first.settings == {"seed": 3} and first.inputs == INPUTS and first.budget == Budget(params=0.5)
    kept = weights_left(coupling)(first.dead)
    assert f"kept {kept} of 330 params ({100 * kept / 330:.4g} %)" in first.notes


def test_a_few_cost_calls_suffice() -> None:
    coupling, calls = chain([400, 400, 400]), []

    def cost(dead: Mapping[str, Sequence[int]]) -> int:
        calls.append(1)
        return weights_left(coupling)(dead)

    allocate(PROGRAM, coupling, rising(coupling), Budget(params=0.5), cost=cost)
    assert len(calls) < 20


def test_units_become_positions_of_every_tensor_the_group_touches() -> None:
    coupling = chain([3, 4])
    plan = plan_from_dead(PROGRAM, coupling, {"l1.weight:0": [3, 1, 3], "l0.weight:0": []})
    assert plan.dead == {"l1.weight:0": (1, 3)}
    assert plan.sizes == {"l0.weight:0": 3, "l1.weight:0": 4}
    assert plan.cuts == (AxisCut("l1.weight", 0, 4, (1, 3)), AxisCut("l2.weight", 1, 4, (1, 3)))
    assert plan_from_dead(PROGRAM, coupling, {}).cuts == ()


def heads_by_dimensions() -> Coupling:
    """Three heads of four dimensions on one axis: each position belongs to a head and to a dimension."""
    heads = tuple(tuple(range(4 * h, 4 * h + 4)) for h in range(3))
    dimensions = tuple(tuple(range(d, 12, 4)) for d in range(4))
    groups = (Group("q:0", (1, 2, 3), (Site("q", 0, heads),)), Group("k:0", (4, 5, 6, 7), (Site("q", 0, dimensions),)))
    return Coupling(groups=groups, frozen=(), shapes={"q": (12, 8)})


def test_a_position_with_two_owners_dies_with_either() -> None:
    plan = plan_from_dead(PROGRAM, heads_by_dimensions(), {"q:0": [1], "k:0": [0]})
    assert plan.cuts == (AxisCut("q", 0, 12, (0, 4, 5, 6, 7, 8)),)


def test_an_axis_is_never_emptied() -> None:
    halves = (Group("a:0", (1, 2), (Site("w", 0, ((0,), (1,))),)), Group("b:0", (3, 4), (Site("w", 0, ((1,), (0,))),)))
    coupling = Coupling(groups=halves, frozen=(), shapes={"w": (2, 2)})
    with pytest.raises(IllegalCut, match="axis 0 of w"):
        plan_from_dead(PROGRAM, coupling, {"a:0": [0], "b:0": [0]})


@pytest.mark.parametrize(
    ("dead", "error", "message"),
    [
        ({"nowhere:0": [0]}, PlanMismatch, "no group 'nowhere:0'"),
        ({"l0.weight:0": [3]}, PlanMismatch, "units 0 to 2, the plan removes unit 3"),
        ({"l0.weight:0": [-1]}, PlanMismatch, "removes unit -1"),
        ({"l0.weight:0": ["1"]}, PlanMismatch, "whole numbers"),
        ({"l0.weight:0": [0, 1, 2]}, IllegalCut, "at least one must remain"),
    ],
)
def test_hand_made_plans_that_do_not_fit(dead: dict[str, list[int]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_from_dead(PROGRAM, chain([3, 4]), dead)
