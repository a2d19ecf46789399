"""From a module to a plan: traced, coupled, scored, and given what the budget allows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from surgery.core import Arrangement, Block, Clock, CostFn, Coupling, Plan, Program, Progress, Scores
from surgery.coupling import arranged, dead_blocks, drop, find_blocks, kept_costs, kept_names, moves_of, priced
from surgery.cutting import Stages, stages_of, submodule as parts
from surgery.errors import BudgetUnreachable, InvalidInput, UnsupportedModel
from surgery.importance import PRICED, Signal, arrange, practised_worth, score, settled, signal_of, weights_of
from surgery.inputs import seen_by
from surgery.planning import refinement as race
from surgery.planning.acceptance import acceptance_of
from surgery.planning.allocation import allocate
from surgery.planning.forecast import widths_of
from surgery.planning.latency_planner import Planner, Timed, carried
from surgery.planning.lowering import lower
from surgery.planning.refinement import Loop
from surgery.planning.staircases import Staircase, staircases
from surgery.recovery import refuse_lesson
from surgery.report import content as report
from surgery.request import DEPLOYED, Request


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A plan, and for a budget of time how to make another.

    Attributes:
        program: what is left of the traced program without the blocks that go.
        coupling: its groups.
        plan: which units die.
        costs: ``params``, ``macs``, ``channels`` → (dense, kept).
        replan: for a budget of time: fraction of the dense model's time by the table → choice; else None.
        loop: what the table tells of the plan; None for other budgets.
        live: whether the times are this machine's, so that the compact model can be timed against them.
        warnings: what the user should know of the table.
        stairs: the costliest kernels' times over their widths; empty for other budgets.
    """

    program: Program
    coupling: Coupling
    plan: Plan
    costs: Mapping[str, tuple[int, int]]
    replan: Callable[[float], Choice] | None = None
    loop: Loop | None = None
    live: bool = False
    warnings: tuple[str, ...] = ()
    stairs: tuple[Staircase, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What would be cut, and why.

    Attributes:
        request: what was asked for.
        choice: the plan, with the program that it is for, and its costs.
        stages_s: seconds each stage took.
        whole: where a part is shrunk, the dense model that it belongs to.
    """

    request: Request
    choice: Choice
    stages_s: Mapping[str, float]
    whole: parts.Whole | None

    @property
    def report(self) -> dict[str, Any]:
        """What report.json would hold, before anything is cut."""
        choice = self.choice
        data = report.describe(choice.program, choice.coupling, choice.plan, costs=choice.costs, loop=choice.loop)
        return {**data, "notes": [*data["notes"], *choice.warnings], "stages_s": dict(self.stages_s)}


def decide(
    model: torch.nn.Module,
    example_inputs: Any,
    request: Request,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Return what would be cut from the model, which stays as it is; arguments and errors are those of `shrink`."""
    if request.goal.is_latency:
        _refuse_what_the_clock_decides(request)
    else:
        _refuse_what_is_for_the_clock(request)
    if request.deploy not in DEPLOYED:
        raise InvalidInput(f"deploy={request.deploy!r}: there are {', '.join(DEPLOYED)}")
    for name in ("threads", "batch"):
        if getattr(request, name) < 1:
            raise InvalidInput(f"{name}={getattr(request, name)}: give a whole number of 1 or more")
    acceptance_of(request)  # refused before the long work
    run = Clock(progress)
    stages = stages_of(request.tracer)
    with run("trace"):
        whole = parts.reach(model, request.part, example_inputs, example_kwargs) if request.part is not None else None
        program = stages.trace(*(whole.call if whole else (model, example_inputs, example_kwargs)))
    if request.data is not None:
        with run("read images"):
            request = replace(request, seen=seen_by(request.data, program, whole, request.images, request.seed))
    refuse_lesson(program, whole, request)
    choice = _chosen(stages, program, request, run)
    while request.own_class and (module := _in_the_way(stages, choice, request, run)):
        request = replace(request, keep=(*request.keep, module))
        choice = _chosen(stages, program, request, run)
    return Decision(request, choice, run.seconds, whole)


@dataclass(frozen=True, slots=True, eq=False)
class _Ground:
    """A program without some of its blocks, ready to be planned for."""

    program: Program
    coupling: Coupling
    scored: Callable[[], Scores]
    orders: tuple[Arrangement, ...]
    costs: Mapping[str, CostFn]

    @property
    def scores(self) -> Scores:
        """Worked out when they are first asked for: a plan that is carried over to a program needs none of it."""
        return self.scored()


def _prepared(stages: Stages, program: Program, request: Request, run: Clock) -> _Ground:
    with run("couple"):
        coupling = stages.couple(program, keep=request.keep)
    with run("score"):
        orders, costs = (
            arrange(program, coupling, request.ranking, seed=request.seed),
            stages.cost_functions(program, coupling),
        )
        moves = moves_of(coupling, orders)

    @cache
    def scored() -> Scores:
        with run("score"):
            found = score(
                program,
                coupling,
                request.ranking,
                seed=request.seed,
                prepare=lambda weights: arranged(weights, moves),
                images=request.seen.batches if request.seen is not None else None,
                macs=costs["macs"]({}),
                progress=lambda fraction: run.progress("score", fraction),
            )
            if request.ranking in PRICED and request.goal.kind in costs:
                return priced(found, coupling, costs[request.goal.kind])
            return found

    return _Ground(program, coupling, scored, orders, costs)


def _chosen(stages: Stages, program: Program, request: Request, run: Clock) -> Choice:
    blocks = _droppable(program, request)
    dead, notes = _dead(program, blocks)
    ground = _prepared(stages, drop(program, dead, blocks), request, run)
    settings = {**request.settings(), **parts.plain_arguments(program)}
    if request.goal.is_latency:
        return _Clockwork(stages, program, request, run, ground, blocks, dead, settings).choice(notes)
    whole = ground if not dead else _prepared(stages, program, request, run)
    cost = ground.costs.get(request.goal.kind)
    with run("allocate"):
        plan = allocate(
            ground.coupling,
            ground.scores,
            request.goal,
            cost=cost,
            dense=whole.costs[request.goal.kind]({}) if cost and dead else None,
            fingerprint=program.fingerprint,
            inputs=program.inputs,
            scope=request.scope,
            round_to=request.round_to,
            inexact=request.inexact,
            settings=settings,
        )
    plan = settled(plan, ground.orders)
    plan = replace(plan, dropped=dead, notes=(*plan.notes, *notes))
    return Choice(ground.program, ground.coupling, plan, _kept(whole, ground, plan))


def _droppable(program: Program, request: Request) -> tuple[Block, ...]:
    """The blocks that may go: none of whose tensors is to be kept."""
    if not request.drop_layers or program.graph is None:
        return ()
    kept = kept_names(program, request.keep)
    return tuple(block for block in find_blocks(program) if not kept.keys() & set(block.tensors))


def _dead(program: Program, blocks: Sequence[Block]) -> tuple[dict[str, tuple[float, ...]], list[str]]:
    """Blocks that are dead already, with the constants that they leave; and what to say of them."""
    dead = dead_blocks(program, blocks)
    if dead and len(dead) == sum(not block.is_layer for block in find_blocks(program)):
        return {}, [f"all {len(dead)} residual branches give a constant, as before training: they stay"]
    at = {block.name: block.source for block in blocks}
    said = {name: "a constant per channel, which stays" if dead[name] else "nothing" for name in dead}
    return dead, [f"dead: the branch of '{name}' ({at[name]}) gives {said[name]}" for name in dead]


class _Clockwork:
    """Plans by a latency table; one that is not given is measured on this machine.

    Blocks and widths are searched together, on the program without its dead blocks; the plan is then carried over to
    the program without those that go as well.
    """

    def __init__(
        self,
        stages: Stages,
        program: Program,
        request: Request,
        run: Clock,
        ground: _Ground,
        blocks: Sequence[Block],
        dead: Mapping[str, tuple[float, ...]],
        settings: Mapping[str, Any],
    ) -> None:
        self._stages, self._program, self._request, self._run = stages, program, request, run
        self._blocks, self._dead, self._settings = blocks, dict(dead), settings
        self._grounds = {frozenset(dead): ground}
        self._warnings: list[str] = []
        self._worth: Mapping[str, float] | None = None
        self._source = race.source_of(
            request.latency_table,
            race.conditions_of(program, request),
            seed=request.seed,
            progress=run.progress,
            warn=self._warn,
        )

    def _warn(self, sentence: str) -> None:
        self._warnings.append(sentence)

    def choice(self, notes: Sequence[str]) -> Choice:
        """Return the plan for the request, with what it takes to make others."""
        request = self._request
        whole = self._ground(frozenset())
        with self._run("measure kernels"):
            predicted = self._planner(whole, ()).dense_ms()
        if predicted <= 0:
            raise InvalidInput(
                "the latency table tells no time at all for this model; make it anew with surgery profile"
            )
        measured = predicted
        if request.goal.latency_ms is not None and request.correct and self._source.live:
            measured = _timed_dense(self._program, request, self._run)
        accepted = acceptance_of(request)
        if accepted is not None:
            accepted.refuse_others(self._source.device, self._program.fingerprint, request.batch)
            measured = accepted.dense_ms
        target = race.target_of(request.goal, measured)

        def replan(fraction: float) -> Choice:
            with self._run("allocate"):
                ground, timed = self._plan(fraction * predicted)
            told = {"predicted_latency_ratio": round(timed.kept_ms / predicted, 6)}
            plan = replace(timed.plan, notes=(*timed.plan.notes, *notes), settings={**timed.plan.settings, **told})
            loop = race.open_loop(timed.kept_ms, predicted, target, self._source.device)
            return Choice(
                ground.program,
                ground.coupling,
                plan,
                _kept(whole, ground, plan),
                replan,
                loop,
                self._source.live,
                tuple(self._warnings),
                self._stairs(ground, plan),
            )

        if accepted is None and request.max_drop is None:
            return replan(target)
        if accepted is None:
            try:
                return replan(target)
            except BudgetUnreachable as error:
                raise BudgetUnreachable(f"--max-drop: nothing can be cut that takes time ({error})") from error
        aim = accepted.aim(target)
        notes = [*notes, accepted.told(aim)]
        return replan(aim)

    def _stairs(self, ground: _Ground, plan: Plan) -> tuple[Staircase, ...]:
        lowered, labelled = lower(ground.program, ground.coupling, batch=self._request.batch), ground.coupling.labelled
        table = self._source.cover(widths_of(lowered, labelled, {}))
        return staircases(lowered, labelled, table, plan.dead)

    def _plan(self, target_ms: float) -> tuple[_Ground, Timed]:
        ground = self._ground(frozenset(self._dead))
        free = self._still_there(ground.program)
        timed = self._planner(ground, free).plan(target_ms)
        constants = {**self._dead, **dict.fromkeys(timed.dropped, ())}
        if timed.dropped:
            ground = self._ground(frozenset(constants))
            timed = replace(timed, plan=carried(timed.plan, ground.coupling))
        return ground, replace(timed, plan=replace(settled(timed.plan, ground.orders), dropped=constants))

    def _still_there(self, program: Program) -> tuple[Block, ...]:
        """The blocks that may go of what is left, under their names: what stays in their place may be another value."""
        left = {block.sum: block for block in (find_blocks(program) if self._blocks else ())}
        alive = (block for block in self._blocks if block.name not in self._dead and block.sum in left)
        return tuple(replace(left[block.sum], name=block.name) for block in alive)

    def _ground(self, dropped: frozenset[str]) -> _Ground:
        if dropped not in self._grounds:
            constants = {b.name: self._dead.get(b.name, ()) for b in self._blocks if b.name in dropped}
            program = drop(self._program, constants, self._blocks)
            self._grounds[dropped] = _prepared(self._stages, program, self._request, self._run)
        return self._grounds[dropped]

    def _planner(self, ground: _Ground, blocks: tuple[Block, ...]) -> Planner:
        return Planner(
            coupling=ground.coupling,
            scores=ground.scores,
            lowered=lower(ground.program, ground.coupling, batch=self._request.batch),
            source=self._source,
            inexact=self._request.inexact,
            fingerprint=self._program.fingerprint,
            inputs=self._program.inputs,
            settings=self._settings,
            budget=self._request.goal,
            blocks=blocks,
            signal=self._signal(ground, blocks),
        )

    def _signal(self, ground: _Ground, blocks: tuple[Block, ...]) -> Signal:
        """Who reads the units; how much a unit counts among its like is the criterion's to tell."""
        parameters = arranged(weights_of(ground.program, ground.coupling), moves_of(ground.coupling, ground.orders))
        signal = signal_of(ground.program, ground.coupling, parameters, blocks)
        if self._request.seen is not None and blocks:
            signal = replace(signal, blocks=self._practised(ground.program, blocks))
        if self._request.ranking in PRICED:
            return replace(signal, losses=ground.scores)
        return signal if self._request.ranking == "signal" else signal.ranked(ground.scores)

    def _practised(self, program: Program, blocks: tuple[Block, ...]) -> Mapping[str, float]:
        """What is lost with blocks as seen on images, once for all plans."""
        assert self._request.seen is not None
        if self._worth is None:
            with self._run("calibrate"):
                macs = self._grounds[frozenset(self._dead)].costs["macs"]({})
                self._worth = practised_worth(
                    program, blocks, self._request.seen.batches, macs=macs, compensated=self._request.ranking in PRICED
                )
        return self._worth


def _timed_dense(program: Program, request: Request, run: Clock) -> float:
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        return race.track_of(program, Path(folder), request, run.progress).dense_ms()


def _refuse_what_the_clock_decides(request: Request) -> None:
    if request.tracer == "torch-pruning":
        raise InvalidInput(
            "a latency budget needs the operators that torch.export captures; with tracer torch-pruning give a budget "
            "of macs, params or channels"
        )
    if request.round_to != 1:
        raise InvalidInput(
            "round_to does not go with a latency budget: widths go by the device's own steps; give a budget of "
            "macs, params or channels with it"
        )
    if request.scope != "global":
        raise InvalidInput(
            f"scope={request.scope!r} does not go with a latency budget: the clock weighs all groups; give a budget of "
            "macs, params or channels with it"
        )


def _refuse_what_is_for_the_clock(request: Request) -> None:
    given = {
        "--latency-table": request.latency_table is not None,
        "--acceptance": request.acceptance is not None,
        "--no-correct": not request.correct,
        f"--deploy {request.deploy}": request.deploy != DEPLOYED[0],
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise InvalidInput(
            f"{name} is for budgets of time, this one is of {request.goal.kind}: leave it out, or give --latency"
        )


def _in_the_way(stages: Stages, choice: Choice, request: Request, run: Clock) -> str:
    """Return the submodule that has to stay whole for the model's own class to fit, or "" where the class fits."""
    program = choice.program
    with run("fit"):
        compact = stages.cut(program, choice.plan, coupling=choice.coupling)
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


def _kept(whole: _Ground, ground: _Ground, plan: Plan) -> dict[str, tuple[int, int]]:
    return kept_costs(whole.coupling, whole.costs, ground.coupling, ground.costs, plan)
