"""From a module to a plan: traced, coupled, scored, and given what the budget allows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from surgery.config import Recipe, validate
from surgery.core import Arrangement, Block, Clock, CostFn, Coupling, Plan, Program, Progress, Scores
from surgery.coupling import Cut, dead_blocks, drop, find_blocks, kept_costs, kept_names, priced, reordered, reorderings
from surgery.cutting import Tracer, submodule as parts, tracer_of
from surgery.errors import BudgetUnreachable, InvalidInput, UnsupportedModel
from surgery.importance import PRICED, Signal, arrange, practised_worth, score, settled, signal_of, weights_of
from surgery.inputs import Calibration, seen_by
from surgery.planning import refinement as race
from surgery.planning.acceptance import acceptance_of
from surgery.planning.allocation import allocate
from surgery.planning.forecast import widths_of
from surgery.planning.latency_planner import Planner, Timed, carried
from surgery.planning.lowering import lower
from surgery.planning.refinement import Loop
from surgery.planning.staircases import Staircase, staircases
from surgery.recovery import Step, refuse_lesson
from surgery.report import describe


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

    @property
    def cut(self) -> Cut:
        """The plan applied to its program."""
        return Cut(self.program, self.coupling, self.plan)


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What would be cut, and why.

    Attributes:
        recipe: what was asked for, with the data opened.
        choice: the plan, with the program that it is for, and its costs.
        stages_s: seconds each stage took.
        whole: where a part is shrunk, the dense model that it belongs to.
        seen: the images of `data` that were looked at; None without data.
        between: steps of recovery of the models on the way, where it is cut in several steps.
    """

    recipe: Recipe
    choice: Choice
    stages_s: Mapping[str, float]
    whole: parts.Whole | None
    seen: Calibration | None = None
    between: tuple[Step, ...] = ()

    @property
    def report(self) -> dict[str, Any]:
        """What report.json would hold, before anything is cut."""
        choice = self.choice
        data = describe(choice.program, choice.coupling, choice.plan, costs=choice.costs, loop=choice.loop)
        return {**data, "notes": [*data["notes"], *choice.warnings], "stages_s": dict(self.stages_s)}


def decide(
    model: torch.nn.Module,
    example_inputs: Any,
    recipe: Recipe,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Return what would be cut from the model, which stays as it is; arguments and errors are those of `shrink`."""
    validate(recipe)
    acceptance_of(recipe)  # refused before the long work
    run = Clock(progress)
    tracer = tracer_of(recipe.selection.tracer)
    with run("trace"):
        part = recipe.selection.submodule
        whole = parts.reach(model, part, example_inputs, example_kwargs) if part is not None else None
        program = tracer.trace(*(whole.call if whole else (model, example_inputs, example_kwargs)))
    seen = None
    if recipe.data.data is not None:
        with run("read images"):
            seen = seen_by(recipe.data.data, program, whole, recipe.data.max_images, recipe.selection.seed)
    refuse_lesson(program, whole, recipe, seen)
    choice = _chosen(tracer, program, recipe, seen, run)
    while recipe.selection.own_class and (module := _in_the_way(tracer, choice, recipe, run)):
        recipe = recipe.but(keep=(*recipe.selection.keep, module))
        choice = _chosen(tracer, program, recipe, seen, run)
    return Decision(recipe, choice, run.seconds, whole, seen)


def plan_settings(recipe: Recipe, seen: Calibration | None) -> dict[str, Any]:
    """Return what a plan records, so that it can be applied again: JSON values, without the budget."""
    selection, target, criterion = recipe.selection, recipe.target, recipe.criterion
    found: dict[str, Any] = {
        "criterion": criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom"),
        "keep": list(selection.keep),
        "part": selection.submodule,
    }
    for name in ("scope", "round_to", "inexact", "own_class", "tracer", "seed", "drop_layers", "steps"):
        found[name] = getattr(selection, name)
    if recipe.goal.is_latency:
        found |= {"threads": target.threads, "batch": target.batch, "deploy": target.deploy}
        if target.deploy == "int8":
            output = recipe.output
            found["int8"] = {
                "method": output.int8_method,
                "keep": list(output.int8_keep),
                "reduce_range": output.int8_reduce_range,
            }
    if seen is not None:
        found["data"] = seen.described()
    return found


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


def _prepared(tracer: Tracer, program: Program, recipe: Recipe, seen: Calibration | None, run: Clock) -> _Ground:
    with run("couple"):
        coupling = tracer.couple(program, keep=recipe.selection.keep)
    with run("score"):
        orders, costs = (
            arrange(program, coupling, recipe.criterion, seed=recipe.selection.seed),
            tracer.cost_functions(program, coupling),
        )
        order = reorderings(coupling, orders)

    @cache
    def scored() -> Scores:
        with run("score"):
            found = score(
                program,
                coupling,
                recipe.criterion,
                seed=recipe.selection.seed,
                prepare=lambda weights: reordered(weights, order),
                images=seen.batches if seen is not None else None,
                macs=costs["macs"]({}),
                progress=lambda fraction: run.progress("score", fraction),
            )
            if recipe.criterion in PRICED and recipe.goal.kind in costs:
                return priced(found, coupling, costs[recipe.goal.kind])
            return found

    return _Ground(program, coupling, scored, orders, costs)


def _chosen(tracer: Tracer, program: Program, recipe: Recipe, seen: Calibration | None, run: Clock) -> Choice:
    blocks = _droppable(program, recipe)
    dead, notes = _dead(program, blocks)
    ground = _prepared(tracer, drop(program, dead, blocks), recipe, seen, run)
    settings = {**plan_settings(recipe, seen), **parts.plain_arguments(program)}
    if recipe.goal.is_latency:
        return _Clockwork(tracer, program, recipe, seen, run, ground, blocks, dead, settings).choice(notes)
    whole = ground if not dead else _prepared(tracer, program, recipe, seen, run)
    cost = ground.costs.get(recipe.goal.kind)
    with run("allocate"):
        plan = allocate(
            ground.coupling,
            ground.scores,
            recipe.goal,
            cost=cost,
            dense=whole.costs[recipe.goal.kind]({}) if cost and dead else None,
            fingerprint=program.fingerprint,
            inputs=program.inputs,
            scope=recipe.selection.scope,
            round_to=recipe.selection.round_to,
            inexact=recipe.selection.inexact,
            settings=settings,
        )
    plan = settled(plan, ground.orders)
    plan = replace(plan, dropped=dead, notes=(*plan.notes, *notes))
    return Choice(ground.program, ground.coupling, plan, _kept(whole, ground, plan))


def _droppable(program: Program, recipe: Recipe) -> tuple[Block, ...]:
    """The blocks that may go: none of whose tensors is to be kept."""
    if not recipe.selection.drop_layers or not program.has_graph:
        return ()
    kept = kept_names(program, recipe.selection.keep)
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
        tracer: Tracer,
        program: Program,
        recipe: Recipe,
        seen: Calibration | None,
        run: Clock,
        ground: _Ground,
        blocks: Sequence[Block],
        dead: Mapping[str, tuple[float, ...]],
        settings: Mapping[str, Any],
    ) -> None:
        self._tracer, self._program, self._recipe, self._run = tracer, program, recipe, run
        self._seen, self._blocks, self._dead, self._settings = seen, blocks, dict(dead), settings
        self._grounds = {frozenset(dead): ground}
        self._warnings: list[str] = []
        self._worth: Mapping[str, float] | None = None
        self._source = race.source_of(
            recipe.target.latency_table,
            race.conditions_of(program, recipe),
            seed=recipe.selection.seed,
            progress=run.progress,
            warn=self._warn,
        )

    def _warn(self, sentence: str) -> None:
        self._warnings.append(sentence)

    def choice(self, notes: Sequence[str]) -> Choice:
        """Return the plan for the recipe, with what it takes to make others."""
        recipe = self._recipe
        whole = self._ground(frozenset())
        with self._run("measure kernels"):
            predicted = self._planner(whole, ()).dense_ms()
        if predicted <= 0:
            raise InvalidInput(
                "the latency table tells no time at all for this model; make it anew with surgery profile"
            )
        measured = predicted
        if recipe.goal.latency_ms is not None and recipe.target.correct and self._source.live:
            measured = _timed_dense(self._program, recipe, self._seen, self._run)
        accepted = acceptance_of(recipe)
        if accepted is not None:
            accepted.refuse_others(self._source.device, self._program.fingerprint, recipe.target.batch)
            measured = accepted.dense_ms
        target = race.target_of(recipe.goal, measured)

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

        if accepted is None and recipe.selection.max_drop is None:
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
        lowered = lower(ground.program, ground.coupling, batch=self._recipe.target.batch)
        labelled = ground.coupling.labelled
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
            self._grounds[dropped] = _prepared(self._tracer, program, self._recipe, self._seen, self._run)
        return self._grounds[dropped]

    def _planner(self, ground: _Ground, blocks: tuple[Block, ...]) -> Planner:
        return Planner(
            coupling=ground.coupling,
            scores=ground.scores,
            lowered=lower(ground.program, ground.coupling, batch=self._recipe.target.batch),
            source=self._source,
            inexact=self._recipe.selection.inexact,
            fingerprint=self._program.fingerprint,
            inputs=self._program.inputs,
            settings=self._settings,
            budget=self._recipe.goal,
            blocks=blocks,
            signal=self._signal(ground, blocks),
        )

    def _signal(self, ground: _Ground, blocks: tuple[Block, ...]) -> Signal:
        """Who reads the units; how much a unit counts among its like is the criterion's to tell."""
        order = reorderings(ground.coupling, ground.orders)
        parameters = reordered(weights_of(ground.program, ground.coupling), order)
        signal = signal_of(ground.program, ground.coupling, parameters, blocks)
        if self._seen is not None and blocks:
            signal = replace(signal, blocks=self._practised(ground.program, blocks))
        if self._recipe.criterion in PRICED:
            return replace(signal, losses=ground.scores)
        return signal if self._recipe.criterion == "signal" else signal.ranked(ground.scores)

    def _practised(self, program: Program, blocks: tuple[Block, ...]) -> Mapping[str, float]:
        """What is lost with blocks as seen on images, once for all plans."""
        assert self._seen is not None
        if self._worth is None:
            with self._run("calibrate"):
                macs = self._grounds[frozenset(self._dead)].costs["macs"]({})
                self._worth = practised_worth(
                    program, blocks, self._seen.batches, macs=macs, compensated=self._recipe.criterion in PRICED
                )
        return self._worth


def _timed_dense(program: Program, recipe: Recipe, seen: Calibration | None, run: Clock) -> float:
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        return race.track_of(program, Path(folder), recipe, seen, run.progress).dense_ms()


def _in_the_way(tracer: Tracer, choice: Choice, recipe: Recipe, run: Clock) -> str:
    """Return the submodule that has to stay whole for the model's own class to fit, or "" where the class fits."""
    program = choice.program
    with run("fit"):
        compact = tracer.cut(choice.cut)
    if compact.kind == "module":
        return ""
    module = compact.stuck
    while module and module in recipe.selection.keep:
        module = module.rpartition(".")[0]
    if not module:
        raise UnsupportedModel(
            f"{type(program.model).__name__} cannot hold a cut model: {compact.why}; "
            "do without --own-class, and the rewritten program comes back in its place"
        )
    return module


def _kept(whole: _Ground, ground: _Ground, plan: Plan) -> dict[str, tuple[int, int]]:
    return kept_costs(whole.coupling, whole.costs, ground.coupling, ground.costs, plan)
