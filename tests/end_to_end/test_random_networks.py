"""Random networks times random plans: every cut is sound, two cuts equal one, and the empty plan changes nothing."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from conftest import Cutting, apply_plan, cut_model, random_dead
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn

from surgery.capture.tracing import trace
from surgery.core.ir import Coupling, Group
from surgery.coupling.coupler import couple

SETTINGS = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
STEPS = (
    "conv",
    "norm",
    "relu",
    "depthwise",
    "grouped",
    "residual",
    "concat",
    "twice",
    "swap",
    "gate",
    "shuffle",
    "pool",
    "excite",
    "flip",
)


class RandomNet(nn.Module):
    """A stem, the given steps, and a classifier of two linear layers behind a view or a mean."""

    def __init__(self, steps: list[str], width: int, *, view: bool) -> None:
        super().__init__()
        self.steps, self.view = steps, view
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.ModuleList()
        channels, size = width, 8
        for step in steps:
            layer, channels = _layer(step, channels)
            self.layers.append(layer)
            size = max(2, size // 2) if step == "pool" else size
        self.size = size
        self.flat = channels * size * size if view else channels
        self.hidden, self.head = nn.Linear(self.flat, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step, layer in zip(self.steps, self.layers, strict=True):
            x = _apply(step, layer, x)
        x = x.reshape(-1, self.flat) if self.view else x.mean((2, 3))
        y: Tensor = self.head(torch.relu(self.hidden(x)))
        return y


def _layer(step: str, c: int) -> tuple[nn.Module, int]:
    conv = nn.Conv2d
    table: dict[str, tuple[Any, int]] = {
        "conv": (lambda: conv(c, 12, 3, padding=1), 12),
        "norm": (lambda: nn.BatchNorm2d(c), c),
        "depthwise": (lambda: conv(c, c, 3, padding=1, groups=c), c),
        "grouped": (lambda: conv(c, 12, 3, padding=1, groups=2), 12),
        "residual": (lambda: nn.Sequential(conv(c, 6, 1), nn.ReLU(), conv(6, c, 3, padding=1)), c),
        "concat": (lambda: conv(c, 4, 1), c + 4),
        "twice": (lambda: conv(2 * c, 8, 1), 8),
        "gate": (nn.Identity, c // 2),
        "excite": (lambda: nn.Sequential(conv(c, 4, 1), nn.ReLU(), conv(4, c, 1)), c),
    }
    make, channels = table.get(step, (nn.Identity, c))
    return make(), channels if channels % 2 == 0 and channels >= 4 else c


def _apply(step: str, layer: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y: Tensor = x
    if step in ("conv", "norm", "depthwise", "grouped"):
        y = layer(x)
    elif step == "relu":
        y = torch.relu(x)
    elif step == "residual":
        y = x + layer(x)
    elif step == "concat":
        y = torch.cat([layer(x), x], 1)
    elif step == "twice":
        y = layer(torch.cat([x, torch.tanh(x)], 1))
    elif step == "swap":
        y = torch.cat(x.chunk(2, 1)[::-1], 1)
    elif step == "gate" and c // 2 >= 4 and (c // 2) % 2 == 0:
        left, right = x.chunk(2, 1)
        y = left * torch.sigmoid(right)
    elif step == "shuffle":
        y = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
    elif step == "pool" and h > 2:
        y = nn.functional.max_pool2d(x, 2)
    elif step == "excite":
        y = x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))
    elif step == "flip":
        y = x + x.flip(1)
    return y


networks = st.builds(
    RandomNet, st.lists(st.sampled_from(STEPS), min_size=2, max_size=6), st.sampled_from([8, 12]), view=st.booleans()
)
seeds = st.integers(0, 1000)
INPUT = (2, 3, 8, 8)


@SETTINGS
@given(networks, seeds)
def test_random_cuts_of_random_networks_are_sound(model: RandomNet, seed: int) -> None:
    cutting = cut_model(model, torch.randn(INPUT), seed=seed)
    result = cutting.check()
    assert result.error_float64 <= 1e-10
    assert cutting.plan.dead
    assert cutting.compact.module.eval()(torch.randn(7, *INPUT[1:])).shape == (7, 4)


@SETTINGS
@given(networks)
def test_the_empty_plan_is_the_identity(model: RandomNet) -> None:
    cutting = cut_model(model.eval(), torch.randn(INPUT), dead={})
    cutting.check()
    compact = cutting.compact.module
    assert cutting.compact.kind == "module"
    assert_equal(compact.state_dict(), model.state_dict())
    x = torch.randn(INPUT)
    with torch.no_grad():
        assert torch.equal(compact(x), model(x))
        assert torch.equal(cutting.compact.graph.eval()(x), model(x))


@SETTINGS
@given(networks, seeds)
def test_cutting_twice_equals_cutting_the_union(model: RandomNet, seed: int) -> None:
    program = trace(model, torch.randn(INPUT))
    coupling = couple(program)
    once = {g: u for g, u in random_dead(coupling, seed, (0.3,)).items() if coupling.group(g).size - len(u) >= 3}
    more = _some_more(coupling, once, seed)
    union = {name: sorted({*once.get(name, ()), *more.get(name, ())}) for name in {*once, *more}}
    wanted = apply_plan(program, coupling, union)
    first = apply_plan(program, coupling, once)
    again = trace(first.compact.module, torch.randn(INPUT))
    second = couple(again)
    got = apply_plan(again, second, _renamed(first, second, more))
    got.check()
    assert_equal(got.compact.module.state_dict(), wanted.compact.module.state_dict())


def _some_more(coupling: Coupling, once: Mapping[str, list[int]], seed: int) -> dict[str, list[int]]:
    """One more unit of every group that has at least three left."""
    rng = random.Random(seed)
    alive = {g.name: [k for k in range(g.size) if k not in once.get(g.name, ())] for g in coupling.groups}
    return {name: [rng.choice(units)] for name, units in alive.items() if len(units) >= 3}


def _renamed(first: Cutting, second: Coupling, dead: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The same units as the groups of the already cut model call them."""
    gone = {(c.tensor, c.axis): c.dead for c in first.plan.cuts}
    found: dict[str, list[int]] = {}
    for name, units in dead.items():
        site = first.coupling.group(name).sites[0]
        removed = gone.get((site.tensor, site.axis), ())
        for unit in units:
            alive = [p for p in site.index[unit] if p not in removed]
            positions = {p - sum(q < p for q in removed) for p in alive}
            group, number = _owner(second, site.tensor, site.axis, positions)
            found.setdefault(group.name, []).append(number)
    return found


def _owner(coupling: Coupling, tensor: str, axis: int, positions: set[int]) -> tuple[Group, int]:
    for group in coupling.groups:
        for site in group.sites:
            if (site.tensor, site.axis) == (tensor, axis):
                for number, owned in enumerate(site.index):
                    if set(owned) == positions:
                        return group, number
    raise AssertionError(f"no unit of the cut model owns {sorted(positions)} of {tensor}:{axis}")


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
