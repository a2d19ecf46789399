"""Program → kernels: the operators that a runtime will run, with variable widths.

Each operator's rule defines its ONNX operators. Batch norms are folded into the preceding convolution, and element-wise
operators join the kernel whose result has no other user: whether a runtime fuses them is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgery.core import (
    Coupling,
    Kernel,
    LabelledGraph,
    Operand,
    Placed,
    Program,
    Size,
    Step,
    Value,
    arguments_of,
    hint,
    is_symbolic,
)
from surgery.coupling import Sizes
from surgery.latency import Point
from surgery.ops import Rule, rules

_BLOCKED = {"Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization", "Resize"}
"""Operators that runtimes run in blocked channel layouts, which operators in between then inherit."""

_READS_BLOCKS = {"convolution", "pooling and resizing", "element-wise", "norm"}
"""Families of operators that read blocked layouts."""
_IDEMPOTENT = {"Relu"}  # idempotent operators, which exporters deduplicate


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """The kernels of a program, in its order."""

    placed: tuple[Placed, ...]
    sizes: Sizes  # lengths of the axes indexed by the kernels' slots
    untimed: tuple[str, ...]  # names of operations without a kernel that may take time
    labelled: LabelledGraph

    def points(self, dead: Mapping[str, Sequence[int]] | None = None) -> list[Point]:
        """Return each kernel with its widths, without the removed units of each group."""
        lengths = self.sizes.lengths(self.labelled.dead_roots(dead or {}))
        return [(p.kernel, tuple(lengths[s] for s in p.slots)) for p in self.placed]


@dataclass(slots=True)
class _Draft:
    steps: list[Step] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)
    shape: tuple[Size, ...] = ()
    nodes: list[str] = field(default_factory=list)
    last: torch.fx.Node | None = None


def lower(program: Program, coupling: Coupling, *, batch: int = 1) -> Lowered:
    """Return the kernels of a program at a batch size."""
    labelled, run = coupling.labelled, _Lowering(program, coupling.labelled, batch)
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and isinstance(labelled.values.get(node.name), Value):
            run.visit(node)
    placed = tuple(_placed(draft, image=run.read_as_image(draft)) for draft in run.drafts)
    return Lowered(placed, run.sizes, tuple(run.untimed), labelled)


class _Lowering:
    def __init__(self, program: Program, labelled: LabelledGraph, batch: int) -> None:
        self._labelled, self.sizes, self._table = labelled, Sizes(labelled), rules()
        self._batch = _batch_symbol(program), batch
        self.drafts: list[_Draft] = []
        self.untimed: list[str] = []
        self._home: dict[torch.fx.Node, _Draft] = {}
        self._images: set[torch.fx.Node] = set()
        self._source: dict[torch.fx.Node, torch.fx.Node] = {}  # source of a free operator's result

    def visit(self, node: torch.fx.Node) -> None:
        """Put an operator into a kernel."""
        rule, arguments = self._table.get(str(node.target)), arguments_of(node)
        tensors = _tensors(arguments)
        shapes = {name: self._shape(source) for name, source in tensors.items()}
        steps = rule.onnx(arguments, shapes, self._shape(node)) if rule is not None and rule.onnx is not None else None
        if rule is None or steps is None:
            self.untimed.append(node.name)
        elif steps:
            self._place(node, rule, steps, tensors)
        elif tensors and self._shape(source := next(iter(tensors.values()))) == self._shape(node):  # free
            self._source[node] = self._source.get(source, source)
            if source in self._images:
                self._images.add(node)

    def _place(self, node: torch.fx.Node, rule: Rule, steps: Any, tensors: Mapping[str, torch.fx.Node]) -> None:
        sources = {name: self._source.get(source, source) for name, source in tensors.items()}
        joined = next((name for name, s in sources.items() if self._joins(tensors[name], s, node, rule, steps)), None)
        draft = self._home[sources[joined]] if joined is not None else _Draft()
        if joined is None:
            self.drafts.append(draft)
        if joined is not None and steps[0].op == "BatchNormalization":
            last = draft.steps[-1]
            if len(last.inputs) == 2:  # a convolution, which gets a bias
                name = f"w{len(draft.operands)}"
                draft.operands.append(Operand(name, self._shape(node)[1:2], "weight"))
                draft.steps[-1] = replace(last, inputs=(*last.inputs, name))
        elif len(steps) > 1 or steps[0].op not in _IDEMPOTENT or joined is None or draft.steps[-1].op != steps[0].op:
            self._append(draft, steps, sources, joined)
        draft.shape, draft.last, self._home[node] = self._shape(node), node, draft
        draft.nodes.append(node.name)
        image = steps[-1].op in _BLOCKED or not self._images.isdisjoint(sources.values())
        if image and len(draft.shape) == 4:
            self._images.add(node)

    def _joins(self, given: torch.fx.Node, source: torch.fx.Node, node: torch.fx.Node, rule: Rule, steps: Any) -> bool:
        """Return whether the operator joins the kernel that produces this argument."""
        draft = self._home.get(source)
        if draft is None or draft.last is not source or len(given.users) > 1 or len(source.users) > 1:
            return False
        folded = steps[0].op == "BatchNormalization"
        fits = draft.steps[-1].op in ("Conv", "ConvTranspose") if folded else rule.family == "element-wise"
        return fits and self._shape(source) == self._shape(node)

    def _append(self, draft: _Draft, steps: Any, sources: Mapping[str, torch.fx.Node], joined: str | None) -> None:
        offset = len(draft.steps)
        names: dict[str, str] = {joined: f"%{offset - 1}"} if joined is not None else {}

        def named(x: Any) -> Any:
            if not isinstance(x, str):
                return x
            if x.startswith("%"):
                return f"%{int(x[1:]) + offset}"
            name, _, turned = x.partition(":")
            if name not in sources:
                return None
            if name not in names:
                weight, image = sources[name].op == "get_attr", sources[name] in self._images
                names[name] = f"{'w' if weight else 'x'}{len(draft.operands)}"
                kind = "image" if image else "weight" if weight else "value"
                draft.operands.append(Operand(names[name], self._shape(sources[name]), kind))
            return f"{names[name]}:{turned}" if turned else names[name]

        for s in steps:
            inputs = [named(x) for x in s.inputs]
            while inputs and inputs[-1] is None:
                inputs.pop()
            draft.steps.append(replace(s, inputs=tuple(inputs)))

    def read_as_image(self, draft: _Draft) -> bool:
        """Return whether the result may stay in blocks: some user is not a view, transposition or linear layer."""
        users = draft.last.users if draft.last in self._images else ()
        readers = [rule for user in users if (rule := self._table.get(str(user.target))) is not None]
        return any("cat" in rule.op or rule.family in _READS_BLOCKS for rule in readers)

    def _shape(self, node: torch.fx.Node) -> tuple[Size, ...]:
        value, traced = self._labelled.values[node.name], node.meta.get("val")
        if not isinstance(value, Value):
            return ()
        slots = self.sizes.track(value)
        sizes: Any = traced.shape if isinstance(traced, Tensor) else value.shape
        return tuple(self._size(slot, size) for slot, size in zip(slots, sizes, strict=True))

    def _size(self, slot: int, size: Any) -> Size:
        if is_symbolic(size):
            symbol, batch = self._batch
            value = size.node.expr.subs({symbol: batch}) if symbol is not None else size.node.expr
            return int(value) if value.is_number else hint(size)
        return f"#{slot}" if slot >= 0 else int(size)


def _placed(draft: _Draft, *, image: bool) -> Placed:
    """Replace axis numbers by letters, in order of first use."""
    sizes = [s for operand in draft.operands for s in operand.shape] + list(draft.shape)
    numbers = list(dict.fromkeys(s for s in sizes if isinstance(s, str)))
    letters = {number: chr(ord("a") + k) if k < 26 else f"a{k}" for k, number in enumerate(numbers)}

    def lettered(shape: tuple[Size, ...]) -> tuple[Size, ...]:
        return tuple(letters[s] if isinstance(s, str) else s for s in shape)

    operands = tuple(replace(o, shape=lettered(o.shape)) for o in draft.operands)
    kernel = Kernel(tuple(draft.steps), operands, lettered(draft.shape), image)
    return Placed(kernel, tuple(int(number[1:]) for number in numbers), tuple(draft.nodes))


def _batch_symbol(program: Program) -> Any:
    values = (node.meta.get("val") for node in program.graph.graph.find_nodes(op="placeholder"))
    firsts: Any = (x.shape[0] for x in values if isinstance(x, Tensor) and x.dim())
    return next((size.node.expr for size in firsts if is_symbolic(size)), None)


def _tensors(arguments: Mapping[str, Any]) -> dict[str, torch.fx.Node]:
    """Return the arguments that are computed tensors, those in lists as ``name.k``."""
    found: dict[str, torch.fx.Node] = {}
    for name, argument in arguments.items():
        several = isinstance(argument, (list, tuple))
        for k, x in enumerate(argument if several else [argument]):
            if isinstance(x, torch.fx.Node) and isinstance(x.meta.get("val"), Tensor):
                found[f"{name}.{k}" if several else name] = x
    return found
