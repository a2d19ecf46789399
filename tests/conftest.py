"""Helpers that several test files share: the stages driven by hand, with random plans."""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.capture.tracing import trace
from surgery.core.ir import Arrangement, CheckResult, CompactModel, Coupling, Plan, Program
from surgery.coupling.coupler import couple
from surgery.coupling.plans import Cut, plan_from_dead
from surgery.cutting import check, cut
from surgery.importance.head_selection import arrange, settled
from surgery.inputs import import_torchvision

gc.set_threshold(100_000, 50, 100)  # graphs are many objects, which live long
torch.set_num_threads(1)  # the networks here are tiny: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so in the processes that tests start


def pytest_configure(config: pytest.Config) -> None:
    """One cache of latency tables for all tests and workers of a session; it is the user's own otherwise."""
    if not hasattr(config, "workerinput") and "SURGERY_CACHE" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="surgery-tests-")
        os.environ["SURGERY_CACHE"] = cache.name
        config.add_cleanup(cache.cleanup)


LONG = ("test_own_folders", "test_deploy", "test_cli", "test_recover", "test_stacked", "test_profile", "test_house")
"""Files with tests of half a minute and more."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Draw the same weights and inputs in every run, whatever ran before: tests that need more values say so."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long tests first, so that all workers end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@dataclass(frozen=True)
class Cutting:
    """One model on its way through the stages."""

    program: Program
    coupling: Coupling
    plan: Plan
    compact: CompactModel

    @property
    def cut(self) -> Cut:
        """The plan applied to the program."""
        return Cut(self.program, self.coupling, self.plan)

    def check(self) -> CheckResult:
        """Let the oracle compare; raises CheckFailed."""
        return check(self.program, self.plan, self.compact, coupling=self.coupling)


def random_dead(coupling: Coupling, seed: int, fractions: Sequence[float] = (0.3, 0.5)) -> dict[str, list[int]]:
    """Remove a random part of every group, at least one unit of each."""
    rng = random.Random(seed)
    return {
        group.name: sorted(rng.sample(range(group.size), min(group.size - 1, max(1, int(group.size * share)))))
        for group in coupling.groups
        if (share := rng.choice(fractions))
    }


def make_plan(program: Program, coupling: Coupling, dead: Mapping[str, Sequence[int]]) -> Plan:
    """A plan for this program that removes `dead`."""
    return plan_from_dead(program, coupling, dead)


def cut_model(
    model: nn.Module,
    inputs: Any,
    *,
    dead: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> Cutting:
    """Trace, couple and cut by `dead`, or by a random plan over all groups."""
    program = trace(model, inputs, kwargs)
    coupling = couple(program)
    return apply_plan(program, coupling, random_dead(coupling, seed) if dead is None else dead)


def apply_plan(
    program: Program, coupling: Coupling, dead: Mapping[str, Sequence[int]], arrangements: Sequence[Arrangement] = ()
) -> Cutting:
    """Cut a traced program by `dead`, heads' members in the order of the arrangements."""
    plan = settled(make_plan(program, coupling, dead), arrangements)
    return Cutting(program, coupling, plan, cut(program, plan, coupling=coupling))


def sound(model: nn.Module, inputs: Any, *, plans: int = 1, kwargs: Mapping[str, Any] | None = None) -> Cutting:
    """Cut by random plans and check each; raises CheckFailed where a result is not what it should be.

    Heads keep members of their own wherever the compiler says they may.
    """
    program = trace(model, inputs, kwargs)
    coupling = couple(program)
    arrangements = arrange(program, coupling, "random")
    for seed in range(plans):
        cutting = apply_plan(program, coupling, random_dead(coupling, seed), arrangements)
        cutting.check()
    return cutting


def vit() -> nn.Module:
    """A vision transformer of torchvision's, for images of 224 pixels, with three narrow layers."""
    transformer = import_torchvision().models.VisionTransformer
    model: nn.Module = transformer(
        image_size=224, patch_size=32, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    return model


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output."""
    return [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)]
