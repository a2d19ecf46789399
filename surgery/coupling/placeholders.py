"""The user's own model without some of its blocks: placeholder modules replace the modules of those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from surgery.capture import evaluating, module_of
from surgery.core import Block, Program, buffers_kept, copied, first_line, flat_outputs, fresh
from surgery.coupling.compact_graph import CompactGraph


class Placeholder(nn.Module):
    """Replaces a residual block whose branch is gone: (N, C, ..) plus a constant, perhaps projected, rectified.

    Attributes:
        constant: (1, C, 1, ..), or None for nothing.
        rectified: whether the block ended in a ReLU.
        shortcut: name of the submodule that projects what comes in; None for none.
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
        """Return the value in its own shape, or that of its projection."""
        stays: Tensor = x if self.shortcut is None else getattr(self, self.shortcut)(x)
        y = stays if self.constant is None else stays + self.constant
        return torch.relu(y) if self.rectified else y


def shared_path(paths: Iterable[str]) -> str:
    """Return the path of the innermost module that all these modules are in, or are."""
    together = takewhile(lambda names: len(set(names)) == 1, zip(*(path.split(".") for path in paths), strict=False))
    return ".".join(names[0] for names in together)


class CannotReplace(Exception):
    """Why no placeholder modules can replace blocks of the user's model."""


def model_without(
    program: Program,
    gone: Sequence[Block],
    shortcuts: Mapping[str, str],
    held: CompactGraph,
    added: Mapping[str, nn.Parameter],
    shifted: Mapping[int, Tensor],
) -> nn.Module:
    """Return the user's model with a placeholder for each module whose blocks are gone.

    A module may do more than add up, or be called with more than the one value: the result is run and compared.

    Args:
        program: whose model it is; the model is left unchanged.
        gone: the blocks.
        shortcuts: name of each block → path of the module that projects what stays, or empty.
        held: the program without the blocks.
        added: constants that are added instead of blocks, by name.
        shifted: id of a tensor of the model → what it becomes.

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
    for path in sorted(children, reverse=True):  # a block may be in the shortcut of another
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
    """Nothing else may be computed in the modules of the blocks: it would be gone with them."""
    kept = [path for path in shortcuts.values() if path]
    known = {name for block in gone for name in (*block.nodes, block.sum)} | {node.name for node in endings}
    for node in program.graph.graph.nodes:
        if node.op != "call_function" or node.name in known or not isinstance(node.meta.get("val"), Tensor):
            continue  # sizes are worked out wherever they are first asked for
        path = module_of(node)
        if any(_within(path, block.module) for block in gone) and not any(_within(path, own) for own in kept):
            raise CannotReplace(f"module '{path}' computes more than the block that is gone ({node.target})")


def _validate_same(made: nn.Module, held: CompactGraph, program: Program) -> None:
    """Outputs, what the inputs are afterwards, and which outputs share memory: as without placeholders."""
    try:
        found, after = _outputs(made, program)
    except Exception as error:  # whatever the user's forward raises where a submodule is not what it was
        raise CannotReplace(f"its forward does not run without the blocks: {first_line(error)}") from error
    wanted, _ = _outputs(held, program)
    _, written = _outputs(program.model, program)
    if not (_same(found, wanted) and _same(after, written) and _shared(found) == _shared(wanted)):
        raise CannotReplace("its forward computes something else without the blocks")


def _same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(a.shape == b.shape and torch.allclose(a, b) for a, b in pairs)


def _shared(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor the first that has the same memory: an identity hands on what another caller may write to."""
    at = [x.untyped_storage().data_ptr() for x in tensors]
    return [at.index(address) for address in at]


def _within(path: str, module: str) -> bool:
    return f"{path}.".startswith(f"{module}.")


def _child(path: str, module: str) -> str:
    """The name of a module's child that another of its submodules is in, or is."""
    return path.removeprefix(f"{module}.").split(".")[0] if path.startswith(f"{module}.") else ""


def _placeholder(constant: nn.Parameter | None, rectified: bool, shortcut: Mapping[str, nn.Module]) -> nn.Module:
    if constant is None and not rectified and not shortcut:
        return nn.Identity()
    return Placeholder(constant, rectified=rectified, shortcut=shortcut)


def _rectifier(total: torch.fx.Node, block: Block) -> torch.fx.Node | None:
    """The ReLU that is all that reads a block's sum, if the block's module ends in it."""
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
"""Operators that give nothing below zero where they are given nothing below zero."""


def _nonnegative(node: torch.fx.Node, through: Mapping[str, torch.fx.Node]) -> bool:
    """Whether a value is known to be rectified already; `through`: end of each layer that is gone → what it reads."""
    while node.name in through or (node.op == "call_function" and str(node.target) in _NOT_BELOW):
        node = through[node.name] if node.name in through else node.all_input_nodes[0]
    return node.op == "call_function" and str(node.target) in (_RELU, "aten.sigmoid.default")


def _outputs(model: nn.Module, program: Program) -> tuple[list[Tensor], list[Tensor]]:
    """What a model gives on the example, and what the example is afterwards."""
    args, kwargs = fresh((program.example_args, dict(program.example_kwargs)))
    with torch.no_grad(), evaluating(model), buffers_kept(model):
        found = flat_outputs(model(*args, **kwargs))
    return found, flat_outputs((args, kwargs))
