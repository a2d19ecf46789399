"""Programs without some of their blocks, and the user's own model without them.

A dropped branch may leave a constant per channel. It is added to a bias that is added to the same value, if no value in
between has other users; otherwise one sum remains. The user's tensors are not changed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from surgery.capture import evaluating, module_of
from surgery.core import (
    Block,
    Program,
    all_tensors,
    arguments_of,
    buffers_kept,
    copied,
    first_line,
    flat_outputs,
    fresh,
    hint,
)
from surgery.coupling.blocks import channel_axes, exclusive, find_blocks, shared_path, spread
from surgery.coupling.compact_graph import CompactGraph, hold
from surgery.errors import PlanMismatch


def drop(program: Program, constants: Mapping[str, Sequence[float]], blocks: Sequence[Block] | None = None) -> Program:
    """Return the program, which is unchanged, without some of its blocks.

    `constants`: name of each dropped block → the constant per channel that replaces it, empty if none. Raises
    PlanMismatch if the program has no such block. `blocks`: result of `find_blocks`, if available.
    """
    if not constants:
        return program
    graph, left, gone = _without(program, constants, blocks)
    read, reads = ({str(n.target) for n in g.nodes if n.op == "get_attr"} for g in (program.graph.graph, graph))
    tensors = {name: t for name, t in all_tensors(program).items() if name in reads or name not in read}
    shifted: dict[str, Tensor] = {}
    for name, by in left.shifts.items():
        old = tensors[name]
        new = (old.detach().double() + by.to(old.device)).to(old.dtype)
        shifted[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    kinds = {str(n.target): n.meta["val"].dtype for n in graph.nodes if n.op == "get_attr" and n.target in left.added}
    device = next((p.device for p in program.model.parameters()), None)
    added = {name: nn.Parameter(value.to(device, kinds[name])) for name, value in left.added.items()}
    root = hold(nn.Module(), {**tensors, **shifted, **added}, program.model)
    name, why = type(program.model).__name__, ""
    held = CompactGraph(root, graph, name)
    try:
        model = _model_without(program, gone, held, added, {id(tensors[name]): t for name, t in shifted.items()})
    except _CannotReplace as error:
        training = program.model.training
        model, why = CompactGraph(root, copy.deepcopy(graph), name).train() if training else held, str(error)
    held.eval()  # programs are in eval mode; the model keeps its own mode
    computed = {name: sources for name, sources in program.materialised.items() if name in tensors}
    return replace(program, graph=held, model=model, why_graph=why, materialised=computed, whole=program)


def _dropped(
    program: Program, constants: Mapping[str, Sequence[float]], blocks: Sequence[Block] | None = None
) -> list[Block]:
    """Return the blocks of these names; raise PlanMismatch if there is none, or the constants do not fit it."""
    known = {block.name: block for block in (find_blocks(program) if blocks is None else blocks)}
    nodes = {node.name: node for node in program.graph.graph.nodes}
    for name, values in constants.items():
        if name not in known:
            raise PlanMismatch(f"no block '{name}' in this model: the plan is for another architecture")
        shape = nodes[known[name].sum].meta["val"].shape
        numbers = all(isinstance(x, (int, float)) and isfinite(x) for x in values)
        fits = len(values) in {hint(shape[a]) for a in channel_axes(shape)}
        if values and (known[name].is_layer or not numbers or not fits):
            raise PlanMismatch(
                f"block '{name}' leaves {len(values)} constants, not one number per channel: the plan was "
                "edited, or made for another architecture; make a new plan"
            )
    return [known[name] for name in constants]


def _without(
    program: Program, constants: Mapping[str, Sequence[float]], blocks: Sequence[Block] | None = None
) -> tuple[torch.fx.Graph, BranchConstants, list[Block]]:
    """Copy the graph; each sum becomes the remaining operand, plus the branch's constant unless a bias absorbs it."""
    gone = _dropped(program, constants, blocks)
    skipped = {name for block in gone for name in block.nodes}
    sums = {block.sum: block for block in gone}
    graph = torch.fx.Graph()
    graph.set_codegen(copy.deepcopy(program.graph.graph._codegen))
    new: dict[torch.fx.Node, torch.fx.Node] = {}
    tensors, added = all_tensors(program), dict[str, Tensor]()
    for node in program.graph.graph.nodes:
        if node.op == "output":
            _return(graph, node, new)
        elif node.name in skipped:
            continue
        elif (block := sums.get(node.name)) is not None:
            new[node] = stays = next(copy for old, copy in new.items() if old.name == block.stays)
            if constants[block.name]:
                name = f"{block.module}.constant"  # as in `Placeholder`, if that replaces the block's module
                if not block.plain or block.name != block.module or name in tensors:
                    name = f"{block.name.replace('.', '_').replace('#', '_')}_left"
                added[name] = spread(constants[block.name], node.meta["val"].shape)
                attribute = graph.create_node("get_attr", name, name=name.replace(".", "_"))
                attribute.meta["val"] = added[name].to(node.meta["val"].dtype)
                new[node] = graph.create_node("call_function", node.target, (stays, attribute), name=node.name)
                new[node].meta = dict(node.meta)
        else:
            new[node] = graph.node_copy(node, lambda n: new[n])
            new[node].meta = dict(node.meta)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    own = {name: tensor for name, tensor in tensors.items() if name not in program.materialised}
    return graph, _fold(graph, added, own), gone


def _return(graph: torch.fx.Graph, output: torch.fx.Node, new: Mapping[torch.fx.Node, torch.fx.Node]) -> None:
    """Restore the outputs; distinct output tensors must not become aliases of each other or of the input."""
    returned: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in output.all_input_nodes:
        value = returned[node] = new[node]
        shared = value in [returned[other] for other in returned if other is not node]
        if isinstance(node.meta.get("val"), Tensor) and (shared or value.op != node.op):
            returned[node] = graph.call_function(torch.ops.aten.clone.default, (value,))
            returned[node].meta = dict(node.meta)
    graph.output(torch.fx.map_arg(output.args[0], lambda n: returned[n])).meta = dict(output.meta)


# Constants of dropped branches. --------------------------------------------------------------------------------------

_SUM = "aten.add.Tensor"
_BIAS_AXES = {
    **dict.fromkeys((f"aten.conv{n}d.default" for n in (1, 2, 3)), 1),
    **dict.fromkeys(("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"), 1),
    **{"aten.batch_norm.default": 1, "aten.group_norm.default": 1, "aten.linear.default": -1},
    "aten.layer_norm.default": -1,
}
"""Operators that finally add a bias → the axis of its values."""
_SAME = ("aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default")


@dataclass(frozen=True, slots=True, eq=False)
class BranchConstants:
    """Where the constants are added; values are float64."""

    shifts: Mapping[str, Tensor]  # existing parameter or buffer → the constant added to it
    added: Mapping[str, Tensor]  # new parameter, read by a new sum → its value


def branch_constants(program: Program, constants: Mapping[str, Sequence[float]]) -> BranchConstants:
    """Return where `drop` adds the constants of dropped blocks; arguments and errors are the same."""
    return _without(program, constants)[1]


def _fold(graph: torch.fx.Graph, added: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> BranchConstants:
    """Remove sums with the constants `added`, as second operands, from a graph where a bias can absorb them."""
    reads = Counter(str(n.target) for n in graph.nodes if n.op == "get_attr" for _ in n.users)
    names = Counter(id(t) for t in tensors.values())
    free = {name for name, t in tensors.items() if names[id(t)] == 1 and t.is_floating_point()} | added.keys()
    shifts, left = dict[str, Tensor](), dict(added)
    for node in [n for n in graph.nodes if str(n.target) == _SUM]:
        stays, attribute = node.args[:2]
        name = str(attribute.target) if isinstance(attribute, torch.fx.Node) else ""
        home = _home(stays, node, left[name], free - {name}, reads) if name in left else None
        if home is not None:
            constant = left.pop(name)
            if home in left:
                left[home] = left[home] + constant
            else:
                shifts[home] = shifts.get(home, 0.0) + constant.flatten()
            node.replace_all_uses_with(stays)
            graph.erase_node(node)
            graph.erase_node(attribute)
    return BranchConstants(shifts, left)


def _home(
    value: Any, reader: torch.fx.Node, constant: Tensor, free: Collection[str], reads: Mapping[str, int]
) -> str | None:
    """Search backwards through sums, from a value that only `reader` uses, for a bias of the same channels."""
    if not isinstance(value, torch.fx.Node) or set(value.users) != {reader}:
        return None
    name, shape, own = str(value.target), constant.shape, getattr(value.meta.get("val"), "shape", ())
    if value.op == "get_attr":
        return name if name in free and reads[name] == 1 and own == shape else None
    raw = arguments_of(value) if value.op == "call_function" and len(own) == len(shape) else {}
    if name in _SAME or (name == "aten.dropout.default" and raw.get("p") == 0.0):
        return _home(value.all_input_nodes[0], value, constant, free, reads)
    if name == _SUM and raw.get("alpha") == 1 and raw["self"] is not raw["other"]:
        found = (_home(x, value, constant, free, reads) for x in (raw["self"], raw["other"]))
        return next((home for home in found if home is not None), None)
    bias, axis = raw.get("bias"), _BIAS_AXES.get(name)
    if axis is None or not isinstance(bias, torch.fx.Node) or not own[axis] == shape[axis] == shape.numel():
        return None
    batched = "conv" not in name or raw["weight"].meta["val"].dim() == len(shape)
    return str(bias.target) if batched and bias.target in free and reads[str(bias.target)] == 1 else None


# The user's own model, with placeholder modules for those of the blocks. ---------------------------------------------


class Placeholder(nn.Module):
    """Replaces a block without its branch: optional projection, plus a constant (1, C, 1, ..), optional ReLU."""

    def __init__(self, constant: nn.Parameter | None, *, rectified: bool, shortcut: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.constant: nn.Parameter | None
        self.register_parameter("constant", constant)
        self.rectified = rectified
        self.shortcut = next(iter(shortcut), None)
        for name, module in shortcut.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input or its projection, plus the constant."""
        stays: Tensor = x if self.shortcut is None else getattr(self, self.shortcut)(x)
        y = stays if self.constant is None else stays + self.constant
        return torch.relu(y) if self.rectified else y


class _CannotReplace(Exception):
    """Blocks of the user's model cannot be replaced by placeholder modules; the message says why."""


def _model_without(
    program: Program,
    gone: Sequence[Block],
    held: CompactGraph,
    added: Mapping[str, nn.Parameter],
    shifted: Mapping[int, Tensor],
) -> nn.Module:
    """Return a copy of the user's model with a placeholder for each module of a dropped block, or raise _CannotReplace.

    It is compared with `held`. `shifted`: id of a tensor of the model → its new value.
    """
    model: nn.Module = program.model
    nodes = {node.name: node for node in program.graph.graph.nodes}
    shortcuts: dict[str, str] = {}  # block's module → the submodule that projects its input, empty for an identity
    endings: dict[torch.fx.Node, str] = {}  # ReLU that ends a block → the block's module
    through, unclear = {block.sum: nodes[block.stays] for block in gone if block.is_layer}, set[str]()
    for block in gone:
        path, total = block.module, nodes[block.sum]
        if not path or path not in dict(model.named_modules()):
            raise _CannotReplace(f"block '{block.name}' is not computed in a submodule of its own")
        projects = () if block.plain else exclusive(nodes[block.stays], total)
        projection = shared_path(module_of(node) for node in projects if node.op == "call_function")
        if not block.plain and not projection.startswith(f"{path}."):
            raise _CannotReplace(f"the shortcut of block '{block.name}' is not a submodule of it")
        shortcuts[path] = projection
        for reader in total.users if len(total.users) == 1 else ():
            if str(reader.target) == _RELU and _within(module_of(reader), path):
                endings[reader] = path
                unclear |= set() if _nonnegative(nodes[block.stays], through) else {path}
    for name in added:
        if name.removesuffix(".constant") not in shortcuts:
            raise _CannotReplace(f"the constant '{name}' is added outside of the submodules that are gone")
    _validate_nothing_else(program, gone, shortcuts.values(), endings.keys())
    memo: dict[int, object] = {**{id(t): t for t in (*model.parameters(), *model.buffers())}, **shifted}
    for path in sorted(shortcuts, reverse=True):  # a block may be part of another's shortcut
        child = shortcuts[path].removeprefix(f"{path}.").split(".")[0]
        shortcut = {child: copied(model.get_submodule(f"{path}.{child}"), memo)} if child else {}
        constant = added.get(f"{path}.constant")
        rectified = path in endings.values() and (constant is not None or bool(child) or path in unclear)
        needed = constant is not None or rectified or shortcut
        made = Placeholder(constant, rectified=rectified, shortcut=shortcut) if needed else nn.Identity()
        memo[id(model.get_submodule(path))] = made
    whole = copied(model, memo)
    _validate_same(whole, held, program)
    return whole


def _within(path: str, module: str) -> bool:
    return f"{path}.".startswith(f"{module}.")


def _validate_nothing_else(
    program: Program, gone: Sequence[Block], shortcuts: Collection[str], endings: Collection[torch.fx.Node]
) -> None:
    """Raise if the modules of the blocks compute anything else, which would be lost."""
    known = {name for block in gone for name in (*block.nodes, block.sum)} | {node.name for node in endings}
    for node in program.graph.graph.nodes:
        if node.op != "call_function" or node.name in known or not isinstance(node.meta.get("val"), Tensor):
            continue  # size computations may be recorded in any module
        path = module_of(node)
        kept = any(_within(path, own) for own in shortcuts if own)
        if not kept and any(_within(path, block.module) for block in gone):
            raise _CannotReplace(f"module '{path}' computes more than the block that is gone ({node.target})")


def _validate_same(made: nn.Module, held: CompactGraph, program: Program) -> None:
    """Raise unless outputs, modified inputs and memory sharing of outputs are as without placeholders."""

    def called(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Return a model's outputs on the example, and the inputs after the call."""
        args, kwargs = fresh((program.example_args, dict(program.example_kwargs)))
        with torch.no_grad(), evaluating(model), buffers_kept(model):
            found = flat_outputs(model(*args, **kwargs))
        return found, flat_outputs((args, kwargs))

    def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(a.shape == b.shape and torch.allclose(a, b) for a, b in pairs)

    def shared(tensors: Sequence[Tensor]) -> list[int]:
        """Return, for each tensor, the first one with the same memory (an identity returns its input)."""
        at = [x.untyped_storage().data_ptr() for x in tensors]
        return [at.index(address) for address in at]

    try:
        found, after = called(made)
    except Exception as error:  # any exception the user's forward raises with a replaced submodule
        raise _CannotReplace(f"its forward does not run without the blocks: {first_line(error)}") from error
    (wanted, _), (_, written) = called(held), called(program.model)
    if not (same(found, wanted) and same(after, written) and shared(found) == shared(wanted)):
        raise _CannotReplace("its forward computes something else without the blocks")


_RELU = "aten.relu.default"
_NOT_BELOW = (
    *("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default"),
    *("aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default", "aten.dropout.default", *_SAME),
)
"""Operators that preserve non-negative values."""


def _nonnegative(node: torch.fx.Node, through: Mapping[str, torch.fx.Node]) -> bool:
    """Return whether a value is non-negative; `through`: last node of each dropped layer → its input."""
    while node.name in through or (node.op == "call_function" and str(node.target) in _NOT_BELOW):
        node = through[node.name] if node.name in through else node.all_input_nodes[0]
    return node.op == "call_function" and str(node.target) in (_RELU, "aten.sigmoid.default")
