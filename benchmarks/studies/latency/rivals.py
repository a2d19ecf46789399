"""Other ways to make a network smaller: torch-pruning in its settings, and one fraction of every width."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.coverage.tools import output_layers, products
from benchmarks.studies.latency.search import MOST, Point, reach
from surgery.capture import trace
from surgery.config import Budget, Selection
from surgery.core import Program
from surgery.coupling import cost_functions, couple
from surgery.cutting import cut
from surgery.errors import SurgeryError
from surgery.importance import score
from surgery.planning import allocate


class DoesNotRun(SurgeryError):
    """A tool made a model that fails on its own example input, or made none."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A dense network.

    Attributes:
        module: in eval mode; left unchanged.
        inputs: of one call, (1, 3, H, W).
        spared: patterns of layers that torch-pruning has to leave alone, or its model does not run.
        labelled: images (N, 3, H, W) and their classes (N,), for criteria that take slopes of the loss.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    spared: tuple[str, ...] = ()
    labelled: tuple[Tensor, Tensor] | None = None

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and matrix products."""
        return products(self.module, self.inputs)[0]

    def kept(self, module: nn.Module) -> float:
        """Return a smaller network's multiply-adds as a fraction of the dense one's; DoesNotRun where it does not."""
        count, why = products(module, self.inputs)
        if why:
            raise DoesNotRun(why)
        return count / self.macs


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of torch-pruning; `round_to` 0 is its default, no rounding."""

    name: str
    round_to: int = 0
    ranks_globally: bool = False
    criterion: str = "l1"


PLAIN = Setting("torch-pruning")
SETTINGS = (
    PLAIN,
    Setting("torch-pruning, round_to 8", round_to=8),
    Setting("torch-pruning, round_to 16", round_to=16),
    Setting("torch-pruning, global", ranks_globally=True),
)
CRITERIA: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "l1": ("GroupMagnitudeImportance", {"p": 1}),
        "l2": ("GroupMagnitudeImportance", {"p": 2}),
        "lamp": ("LAMPImportance", {}),
        "fpgm": ("FPGMImportance", {}),
        "bn-scale": ("BNScaleImportance", {}),
    }
)
"""Those of torch-pruning's that need neither labels nor gradients → class and arguments."""
SLOPES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {"taylor": ("GroupTaylorImportance", {}), "hessian": ("GroupHessianImportance", {})}
)
"""Those that need both."""


def by_torch_pruning(subject: Subject, setting: Setting, share: float) -> nn.Module:
    """Return a copy from which torch-pruning has removed this share of the channels.

    Raises:
        DoesNotRun: it fails, or its result does not run.
    """
    import torch_pruning as tp

    module = copy.deepcopy(subject.module)
    spared = [m for name, m in module.named_modules() if any(fnmatch(name, p) for p in subject.spared)]
    kind, arguments = {**CRITERIA, **SLOPES}[setting.criterion]
    if setting.criterion in SLOPES:
        _fill_slopes(module, subject, squared=setting.criterion == "hessian")
    try:
        pruner = tp.pruner.BasePruner(
            module,
            example_inputs=subject.inputs,
            importance=getattr(tp.importance, kind)(**arguments),
            global_pruning=setting.ranks_globally,
            pruning_ratio=share,
            max_pruning_ratio=MOST,
            round_to=setting.round_to or None,
            ignored_layers=[*output_layers(module, subject.inputs), *spared],
            # Its defaults are one dictionary for all pruners of a process.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        pruner.step()
        with torch.no_grad():
            module(*subject.inputs)
    except Exception as error:  # a peer may fail in any way
        said = str(error).strip().splitlines() or [""]
        raise DoesNotRun(f"{setting.name}: {type(error).__name__}: {said[0][:200]}") from error
    module.zero_grad()
    return module.eval()


def _fill_slopes(module: nn.Module, subject: Subject, *, squared: bool) -> None:
    """Leave in each parameter's `grad` the mean slope of the loss, or the mean of each image's slope squared.

    The squares are taken here because torch-pruning 1.6.0 keeps those of the last image alone.
    """
    if subject.labelled is None:
        raise DoesNotRun("its criterion takes slopes, and there are no labelled images")
    images, labels = subject.labelled
    parameters = list(module.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    size = 1 if squared else len(images)
    for part, classes in zip(torch.split(images, size), torch.split(labels, size), strict=True):
        loss = nn.functional.cross_entropy(module(part), classes)
        for total, slope in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            total += slope.square() if squared else slope
    for p, total in zip(parameters, sums, strict=True):
        p.grad = total / len(images) if squared else total


@dataclass(frozen=True, eq=False)
class Uniform:
    """The same fraction of every group, by this compiler: uniform width reduction."""

    subject: Subject
    criterion: str = "l1"
    _traced: dict[str, Any] = field(default_factory=dict)

    def cut(self, share: float) -> nn.Module:
        """Return the network without this share of its MACs, or a little more."""
        program = self._program()
        coupling = couple(program)
        plan = allocate(
            program,
            coupling,
            score(program, coupling, self.criterion),
            Budget(macs=1 - share),
            cost=cost_functions(program, coupling)["macs"],
            selection=Selection(scope="uniform"),
        )
        module: nn.Module = cut(program, plan, coupling=coupling).module
        return module

    def _program(self) -> Program:
        if "program" not in self._traced:
            self._traced["program"] = trace(self.subject.module, self.subject.inputs)
        program: Program = self._traced["program"]
        return program


def to_macs(subject: Subject, setting: Setting, wanted: float) -> tuple[nn.Module, Point]:
    """Return torch-pruning's network of about these MACs, and the share of channels that it lost.

    Raises:
        DoesNotRun: as of `by_torch_pruning`.
    """
    made: dict[float, nn.Module] = {}

    def ratio_of(share: float) -> float:
        made.clear()  # one at a time: they are large
        made[share] = by_torch_pruning(subject, setting, share)
        return subject.kept(made[share])

    point = reach(ratio_of, wanted, tolerance=0.01, most=6)
    module = made.get(point.share)
    return by_torch_pruning(subject, setting, point.share) if module is None else module, point
