"""The user's own model without some of its blocks: placeholder modules replace the blocks' modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from surgery.capture import evaluating, module_of
from surgery.core import Block, Program, buffers_kept, copied, first_line, flat_outputs, fresh
from surgery.coupling.compact_graph import CompactGraph


class Placeholder(nn.Module):
    """Replaces a residual block without its branch: optional projection, (N, C, ..) plus a constant, optional ReLU.

    Attributes:
        constant: (1, C, 1, ..), or None for nothing.
        rectified: whether the block ends in a ReLU.
        shortcut: name of the submodule that projects the input, or None.
    """

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


def shared_path(paths: Iterable[str]) -> str:
    """Return the path of the innermost module that contains, or is, all these modules."""
    together = takewhile(lambda names: len(set(names)) == 1, zip(*(path.split(".") for path in paths), strict=False))
    return ".".join(names[0] for names in together)


class CannotReplace(Exception):
    """Blocks of the user's model cannot be replaced by placeholder modules; the message says why."""


def model_without(
    program: Program,
    gone: Sequence[Block],
    shortcuts: Mapping[str, str],
    held: CompactGraph,
    added: Mapping[str, nn.Parameter],
    shifted: Mapping[int, Tensor],
) -> nn.Module:
    """Return the user's model with a placeholder for each module of a dropped block.

    A module may compute more than the sum, or have several arguments, so the result is run and compared.

    Args:
        program: the program of the model, which is unchanged.
        gone: the dropped blocks.
        shortcuts: name of each block → path of the module that projects the remaining operand, or empty.
        held: the program without the blocks.
        added: constants that are added instead of blocks, by name.
        shifted: id of a tensor of the model → its new value.

    Raises:
        CannotReplace: the model with placeholders would not compute the same.
    """
    model: nn.Module = program.model
    children = {block.module: _child(shortcuts[block.name], block.module) for block in gone}
    _validate_modules(model, gone, children, added)
    nodes = {node.name: node for node in program.graph.graph.nodes}
    endings = {block.name: _rectifier(nodes[block.sum], block) for block in gone}
    _validate_nothing_else(program, gone, shortcuts, [node for node in endings.values() if node is not None])
    through = {block.sum: nodes[block.stays] for block in gone if block.is_layer}
    rectified = {
        block.module
        for block in gone
        if endings[block.name] is not None
        and (
            f"{block.module}.constant" in added
            or children[block.module]
            or not _nonnegative(nodes[block.stays], through)
        )
    }
    memo: dict[int, object] = {**{id(t): t for t in (*model.parameters(), *model.buffers())}, **shifted}
    for path in sorted(children, reverse=True):  # a block may be part of another's shortcut
        child = children[path]
        shortcut = {child: copied(model.get_submodule(f"{path}.{child}"), memo)} if child else {}
        memo[id(model.get_submodule(path))] = _placeholder(added.get(f"{path}.constant"), path in rectified, shortcut)
    made = copied(model, memo)
    _validate_same(made, held, program)
    return made


def _validate_modules(
    model: nn.Module, gone: Sequence[Block], children: Mapping[str, str], added: Mapping[str, nn.Parameter]
) -> None:
    modules = dict(model.named_modules())
    for block in gone:
        if not block.module or block.module not in modules:
            raise CannotReplace(f"block '{block.name}' is not computed in a submodule of its own")
        if not block.plain and not children[block.module]:
            raise CannotReplace(f"the shortcut of block '{block.name}' is not a submodule of it")
    for name in added:
        if name.removesuffix(".constant") not in children:
            raise CannotReplace(f"the constant '{name}' is added outside of the submodules that are gone")


def _validate_nothing_else(
    program: Program, gone: Sequence[Block], shortcuts: Mapping[str, str], endings: Sequence[torch.fx.Node]
) -> None:
    """Raise if the modules of the blocks compute anything else, which would be lost."""
    kept = [path for path in shortcuts.values() if path]
    known = {name for block in gone for name in (*block.nodes, block.sum)} | {node.name for node in endings}
    for node in program.graph.graph.nodes:
        if node.op != "call_function" or node.name in known or not isinstance(node.meta.get("val"), Tensor):
            continue  # size computations may be recorded in any module
        path = module_of(node)
        if any(_within(path, block.module) for block in gone) and not any(_within(path, own) for own in kept):
            raise CannotReplace(f"module '{path}' computes more than the block that is gone ({node.target})")


def _validate_same(made: nn.Module, held: CompactGraph, program: Program) -> None:
    """Raise unless outputs, modified inputs and memory sharing of outputs are as without placeholders."""
    try:
        found, after = _outputs(made, program)
    except Exception as error:  # any exception the user's forward raises with a replaced submodule
        raise CannotReplace(f"its forward does not run without the blocks: {first_line(error)}") from error
    wanted, _ = _outputs(held, program)
    _, written = _outputs(program.model, program)
    if not (_same(found, wanted) and _same(after, written) and _shared(found) == _shared(wanted)):
        raise CannotReplace("its forward computes something else without the blocks")


def _same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(a.shape == b.shape and torch.allclose(a, b) for a, b in pairs)


def _shared(tensors: Sequence[Tensor]) -> list[int]:
    """Return, for each tensor, the first one with the same memory (an identity returns its input)."""
    at = [x.untyped_storage().data_ptr() for x in tensors]
    return [at.index(address) for address in at]


def _within(path: str, module: str) -> bool:
    return f"{path}.".startswith(f"{module}.")


def _child(path: str, module: str) -> str:
    """Return the name of a module's child that contains, or is, the given submodule."""
    return path.removeprefix(f"{module}.").split(".")[0] if path.startswith(f"{module}.") else ""


def _placeholder(constant: nn.Parameter | None, rectified: bool, shortcut: Mapping[str, nn.Module]) -> nn.Module:
    if constant is None and not rectified and not shortcut:
        return nn.Identity()
    return Placeholder(constant, rectified=rectified, shortcut=shortcut)


def _rectifier(total: torch.fx.Node, block: Block) -> torch.fx.Node | None:
    """Return the ReLU that is the only user of a block's sum and ends the block's module, if any."""
    reader, *more = total.users or [None]
    if reader is None or more or str(reader.target) != _RELU or not _within(module_of(reader), block.module):
        return None
    return reader


_RELU = "aten.relu.default"
_NOT_BELOW = (
    *("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default"),
    *("aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default", "aten.dropout.default"),
    *("aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default"),
)
"""Operators that preserve non-negative values."""


def _nonnegative(node: torch.fx.Node, through: Mapping[str, torch.fx.Node]) -> bool:
    """Return whether a value is non-negative; `through`: last node of each dropped layer → its input."""
    while node.name in through or (node.op == "call_function" and str(node.target) in _NOT_BELOW):
        node = through[node.name] if node.name in through else node.all_input_nodes[0]
    return node.op == "call_function" and str(node.target) in (_RELU, "aten.sigmoid.default")


def _outputs(model: nn.Module, program: Program) -> tuple[list[Tensor], list[Tensor]]:
    """Return a model's outputs on the example, and the inputs after the call."""
    args, kwargs = fresh((program.example_args, dict(program.example_kwargs)))
    with torch.no_grad(), evaluating(model), buffers_kept(model):
        found = flat_outputs(model(*args, **kwargs))
    return found, flat_outputs((args, kwargs))
