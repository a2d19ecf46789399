"""The roof: the list of stages on one screen.

`decide` goes from a module to a plan and `realise` on to a checked compact module; `shrink` is both, and `apply` brings
a plan to another copy of the dense model. Each stage is a pure function that can be called alone; nothing here knows
how any of them works. What is done with a result, exporting, timing and writing files, is in `deliver`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from surgery import part as parts
from surgery import report
from surgery.allocate import allocate
from surgery.arrange import arrange, settled
from surgery.check import check
from surgery.copies import buffers_kept
from surgery.cost import batch_size, cost_functions
from surgery.couple import couple
from surgery.cut import cut
from surgery.errors import InvalidInput, PlanMismatch, UnsupportedModel
from surgery.fvcount import count_macs, count_params
from surgery.ir import Budget, CheckResult, CompactModel, CostFn, Coupling, Plan, Program
from surgery.lean import rare_collections
from surgery.moves import arranged, moves_of
from surgery.score import score
from surgery.trace import trace

Progress = Callable[[str, float], None]
"""Told what is being done, and the fraction of it behind us (0 to 1)."""


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages that depend on how the model was captured."""

    trace: Callable[..., Program]
    couple: Callable[..., Coupling]
    cost_functions: Callable[..., Mapping[str, CostFn]]
    cut: Callable[..., CompactModel]
    check: Callable[..., CheckResult]
    reference: Callable[..., torch.nn.Module]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. The fields are the keyword arguments of `shrink`, and the options of the command line."""

    budget: Budget = field(default_factory=lambda: Budget(macs=0.5))
    criterion: Any = "l1"
    scope: str = "global"
    round_to: int = 1
    inexact: str = "if-needed"
    keep: tuple[str, ...] = ()
    own_class: bool = False
    part: str | None = None
    tracer: str = "export"
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Return what a plan records, so that it can be applied again: JSON values, without the budget."""
        values = {key: value for key, value in asdict(self).items() if key != "budget"}
        criterion = self.criterion if isinstance(self.criterion, str) else getattr(self.criterion, "__name__", "custom")
        return {**values, "criterion": criterion, "keep": list(self.keep)}


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What would be cut, and why.

    Attributes:
        request: what was asked for.
        program: the traced dense model.
        coupling: its groups.
        plan: which units die.
        costs: ``params``, ``macs``, ``channels`` → (dense, kept).
        stages_s: seconds each stage took.
        whole: where a part is shrunk, the dense model that it belongs to.
    """

    request: Request
    program: Program
    coupling: Coupling
    plan: Plan
    costs: Mapping[str, tuple[int, int]]
    stages_s: Mapping[str, float]
    whole: parts.Whole | None = None

    @property
    def report(self) -> dict[str, Any]:
        """What report.json would hold, before anything is cut."""
        data = report.describe(self.program, self.coupling, self.plan, costs=self.costs)
        return {**data, "stages_s": dict(self.stages_s)}


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A checked compact model and everything that led to it.

    Attributes:
        model: the compact `nn.Module`: the dense model's call signature, trainable.
        kind: `module` for the user's own class, `graph` for the rewritten program.
        plan: which units died; `apply(plan, copy_of_the_dense_model)` does it again.
        check: what the oracle found.
        report: what report.json holds; without files and times, which `save` adds.
        program: the traced dense model.
        coupling: its groups.
        compact: the compact model, with the reason for its kind; where a part was shrunk, the part alone.
        whole: where a part was shrunk, the dense model that it belongs to; `model` is then the whole compact one.
    """

    model: torch.nn.Module = field(repr=False)
    kind: str
    plan: Plan = field(repr=False)
    check: CheckResult
    report: Mapping[str, Any] = field(repr=False)
    program: Program = field(repr=False)
    coupling: Coupling = field(repr=False)
    compact: CompactModel = field(repr=False)
    whole: parts.Whole | None = field(default=None, repr=False)


# The stages. ---------------------------------------------------------------------------------------------------------


def decide(
    model: torch.nn.Module,
    example_inputs: Any,
    request: Request,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Return what would be cut from the model, which stays as it is; arguments and errors are those of `shrink`."""
    run = Clock(progress)
    stages = _stages(request.tracer)
    with run("trace"):
        whole = parts.reach(model, request.part, example_inputs, example_kwargs) if request.part is not None else None
        program = stages.trace(*(whole.call if whole else (model, example_inputs, example_kwargs)))
    coupling, plan, costs = _chosen(stages, program, request, run)
    while request.own_class and (module := _in_the_way(stages, program, plan, coupling, request, run)):
        request = replace(request, keep=(*request.keep, module))
        coupling, plan, costs = _chosen(stages, program, request, run)
    return Decision(request, program, coupling, plan, _kept(costs, coupling, plan), run.seconds, whole)


def _chosen(
    stages: Stages, program: Program, request: Request, run: Clock
) -> tuple[Coupling, Plan, Mapping[str, CostFn]]:
    with run("couple"):
        coupling = stages.couple(program, keep=request.keep)
    with run("score"):
        orders = arrange(program, coupling, request.criterion, seed=request.seed)
        moves = moves_of(coupling, orders)
        scores = score(
            program, coupling, request.criterion, seed=request.seed, prepare=lambda weights: arranged(weights, moves)
        )
    with run("allocate"):
        costs = stages.cost_functions(program, coupling)
        plan = allocate(
            coupling,
            scores,
            request.budget,
            cost=costs.get(request.budget.kind),
            fingerprint=program.fingerprint,
            inputs=program.inputs,
            scope=request.scope,
            round_to=request.round_to,
            inexact=request.inexact,
            settings={**request.settings(), **parts.plain_arguments(program)},
        )
    return coupling, settled(plan, orders), costs


def _in_the_way(stages: Stages, program: Program, plan: Plan, coupling: Coupling, request: Request, run: Clock) -> str:
    """Return the submodule that has to stay whole for the model's own class to fit, or "" where the class fits."""
    with run("fit"):
        compact = stages.cut(program, plan, coupling=coupling)
    if compact.kind == "module":
        return ""
    module = compact.stuck
    while module and module in request.keep:
        module = module.rpartition(".")[0]
    if not module:
        raise UnsupportedModel(
            f"{type(program.model).__name__} cannot hold a cut model: {compact.why}; "
            "do without --own-class, and the rewritten program comes back in its place"
        )
    return module


def realise(decision: Decision, *, progress: Progress | None = None) -> Result:
    """Cut what was decided and check it; raises CheckFailed where the compact model is not the masked dense one."""
    program, coupling, plan = decision.program, decision.coupling, decision.plan
    run = Clock(progress)
    stages, whole = _stages(program.tracer), decision.whole
    with run("cut"):
        compact = stages.cut(program, plan, coupling=coupling)
        model = whole.around(compact.module) if whole else compact.module
    with run("check"):
        verdict = stages.check(program, plan, compact, coupling=coupling, seed=decision.request.seed)
        if whole is not None:
            verdict = parts.check(whole, stages.reference(program, plan, coupling), model, verdict, program)
    with run("count"), buffers_kept(compact.module):
        costs, notes = _counted(decision, compact)
    data = report.describe(program, coupling, plan, compact=compact, verdict=verdict, costs=costs)
    if whole is not None:
        data["part"] = parts.describe(whole, model, verdict)
        notes = [*notes, *parts.notes(data["part"])]
    data = {**data, "notes": [*data["notes"], *notes], "stages_s": {**decision.stages_s, **run.seconds}}
    return Result(
        model=model,
        kind=compact.kind,
        plan=plan,
        check=verdict,
        report=data,
        program=program,
        coupling=coupling,
        compact=compact,
        whole=whole,
    )


def shrink(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    budget: Budget | None = None,
    criterion: str | Callable[..., Any] = "l1",
    scope: str = "global",
    round_to: int = 1,
    inexact: str = "if-needed",
    keep: Sequence[str] = (),
    own_class: bool = False,
    part: str | None = None,
    tracer: str = "export",
    seed: int = 0,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Return a physically smaller, checked copy of the model.

    Args:
        model: the dense model; bit-identical afterwards.
        example_inputs: a tensor, or a tuple of forward's positional arguments; (N, C, H, W) for most vision models.
        budget: what to keep; half of the MACs by default.
        criterion: name of a criterion of `surgery.score`, or a callable ``(group, parameters) -> score per unit``.
        scope: `global` ranks all units together, `uniform` keeps the same share of every group.
        round_to: kept units per group are multiples of this.
        inexact: `never`, `if-needed` or `always` cut units whose removal is not the same as zeros (`Group.inexact`).
        keep: patterns (``*``, ``?``) of module or parameter names that stay whole.
        own_class: keep submodules whole whose own code does not run at other sizes, so that the model's class fits;
            the plan's settings then list them under `keep`.
        part: dotted name of the submodule to shrink, or None for the whole model.
        tracer: `export`, or `torch-pruning` for models that `torch.export` cannot capture.
        seed: of everything drawn at random; same model, seed and arguments give the same plan.
        example_kwargs: forward's keyword arguments.
        progress: called with a stage's name and 0.0 as it begins, 1.0 when it is done.

    Returns:
        The compact model, its plan, and the report on both.

    Raises:
        InvalidInput: arguments, shapes or weights that cannot be used.
        UnsupportedModel: the model cannot be traced or cut; the message names the source line. Or, with `own_class`,
            the class cannot hold any cut model.
        BudgetUnreachable: the message says what was reachable, and what is frozen.
        CheckFailed: the compact model does not compute what the masked dense model computes.
    """
    _require_types(keep=keep, part=part, seed=seed, example_kwargs=example_kwargs)
    request = Request(
        budget=budget if budget is not None else Budget(macs=0.5),
        criterion=criterion,
        scope=scope,
        round_to=round_to,
        inexact=inexact,
        keep=(keep,) if isinstance(keep, str) else tuple(keep),
        own_class=own_class,
        part=part,
        tracer=tracer,
        seed=seed,
    )
    if not isinstance(request.budget, Budget):
        raise InvalidInput(f"budget is {budget!r}; pass for example surgery.Budget(macs=0.5)")
    with torch.random.fork_rng(devices=()), buffers_kept(model):
        decision = decide(model, example_inputs, request, example_kwargs=example_kwargs, progress=progress)
        return realise(decision, progress=progress)


def _require_types(*, keep: Any, part: Any, seed: Any, example_kwargs: Any) -> None:
    patterns = (keep,) if isinstance(keep, str) else keep
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidInput(f"keep={keep!r}: give patterns of names, such as keep=('fc', 'layer4.*')")
    if part is not None and not isinstance(part, str):
        raise InvalidInput(f"part={part!r:.60}: give the submodule's dotted name, such as 'backbone'")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidInput(f"seed={seed!r}: give a whole number of at least 0")
    if example_kwargs is not None and not isinstance(example_kwargs, Mapping):
        raise InvalidInput(f"example_kwargs is of type {type(example_kwargs).__name__}: give a dictionary of inputs")


def apply(
    plan: Plan,
    dense_model: torch.nn.Module,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Return the compact model of another copy of the dense model.

    Args:
        plan: what `shrink` decided, or `Plan.load` read.
        dense_model: same architecture as the plan was made for, any weights; left unchanged.
        example_inputs: as for `shrink`; None: made from the plan's input signature.
        example_kwargs: as for `shrink`; numbers, strings and flags are in the plan.

    Raises:
        PlanMismatch: the plan was made for another architecture.
        InvalidInput: the plan's inputs cannot be rebuilt; pass `example_inputs`.
    """
    if not isinstance(plan, Plan):
        raise InvalidInput(f"the plan is of type {type(plan).__name__}; read one with surgery.Plan.load(path)")
    if not isinstance(dense_model, torch.nn.Module):
        raise InvalidInput(f"the dense model is of type {type(dense_model).__name__}, not a torch.nn.Module")
    stages = _stages(plan.settings.get("tracer", "export"))
    whole = parts.of_plan(plan, dense_model, example_inputs)
    if whole is not None:
        call = whole.call
    elif example_inputs is not None:
        call = dense_model, example_inputs, {**plan.settings.get("arguments", {}), **(example_kwargs or {})}
    else:
        call = dense_model, *parts.inputs_of(plan, dense_model)
    program = stages.trace(*call)
    if program.fingerprint != plan.fingerprint:
        raise PlanMismatch(
            f"the plan was made for another architecture than this {type(dense_model).__name__} "
            f"(fingerprint {plan.fingerprint[:12]}, here {program.fingerprint[:12]}); make a new plan"
        )
    coupling = stages.couple(program, keep=tuple(plan.settings.get("keep", ())))
    module: torch.nn.Module = stages.cut(program, plan, coupling=coupling).module
    return whole.around(module) if whole else module


# What the stages stand on. -------------------------------------------------------------------------------------------


class Clock:
    """Tells `progress` of stages and keeps the seconds that each took, in `seconds`."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress or (lambda stage, fraction: None)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block as one stage."""
        self.progress(stage, 0.0)
        start = time.perf_counter()
        with rare_collections():
            yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
        self.progress(stage, 1.0)


def _stages(tracer: str) -> Stages:
    """Return what belongs to a tracer; raises InvalidInput where there is none of that name."""
    if tracer == "export":
        return Stages(trace, couple, cost_functions, cut, check, parts.reference_module)
    if tracer == "torch-pruning":
        from surgery import eager, torch_pruning  # Here: importing torch-pruning takes seconds.

        return Stages(
            eager.trace, torch_pruning.couple, eager.cost_functions, eager.cut, eager.check, eager.reference_module
        )
    raise InvalidInput(f"no tracer '{tracer}'; there are export and torch-pruning")


def _kept(costs: Mapping[str, CostFn], coupling: Coupling, plan: Plan) -> dict[str, tuple[int, int]]:
    """Return parameters, MACs and units as (dense, kept)."""
    units = sum(group.size for group in coupling.groups)
    removed = sum(len(dead) for dead in plan.dead.values())
    return {**{kind: (cost({}), cost(plan.dead)) for kind, cost in costs.items()}, "channels": (units, units - removed)}


def _counted(decision: Decision, compact: CompactModel) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Return the costs as counted on the two modules themselves, by fvcore, and a note where the plan's differ."""
    program = decision.program
    args, kwargs, batch = program.example_args, program.example_kwargs, batch_size(program)
    modules = (program.model, compact.module)
    try:
        dense, kept = (count_macs(module, args, kwargs, batch=batch) for module in modules)
    except UnsupportedModel as error:
        return dict(decision.costs), [f"MACs are the plan's own count, fvcore has none: {error}"]
    macs, params = (dense, kept), (count_params(modules[0]), count_params(modules[1]))
    planned = decision.costs["macs"]
    notes = [f"the plan was made with {planned[0]:,} → {planned[1]:,} MACs"] if macs != planned else []
    return {**decision.costs, "macs": macs, "params": params}, notes
