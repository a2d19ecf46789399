"""The user's own model without some of its blocks: what stands in the place of their modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor, nn

from surgery.copies import buffers_kept, copied, fresh
from surgery.graph import CompactGraph
from surgery.ir import Block, Program
from surgery.numerics import flat_outputs
from surgery.trace import evaluating, module_of


class Shifted(nn.Module):
    """What is left of a residual block without its branch: (N, C, ..) plus a constant, perhaps projected, rectified.

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


def model_without(
    program: Program,
    gone: Sequence[Block],
    shortcuts: Mapping[str, str],
    held: CompactGraph,
    added: Mapping[str, nn.Parameter],
    shifted: Mapping[int, Tensor],
) -> nn.Module | None:
    """Return the user's model with a stand-in for each module whose blocks are gone; None where that is not the same.

    A module may do more than add up, or be called with more than the one value: the two are run.

    Args:
        program: whose model it is; the model is left unchanged.
        gone: the blocks.
        shortcuts: name of each block → path of the module that projects what stays, or empty.
        held: the program without the blocks.
        added: constants that are added in the place of blocks, by name.
        shifted: id of a tensor of the model → what it becomes.
    """
    model: nn.Module = program.model
    modules = dict(model.named_modules())
    left = {block.module: _child(shortcuts[block.name], block.module) for block in gone}
    if not all(path and path in modules for path in left):
        return None
    if any(not block.plain and not left[block.module] for block in gone):
        return None
    if not {name.removesuffix(".constant") for name in added} <= left.keys():
        return None
    rectified = _rectified(program, gone)
    shared = {**{id(t): t for t in (*model.parameters(), *model.buffers())}, **shifted}
    wanted = _outputs(held, program)
    for where in ({path for path in rectified if f"{path}.constant" in added or left[path]}, rectified):
        instead = {
            id(modules[path]): _stand_in(
                added.get(f"{path}.constant"),
                path in where,
                {child: copied(modules[f"{path}.{child}"], shared)} if child else {},
            )
            for path, child in left.items()
        }
        made = copied(model, {**shared, **instead})
        try:
            found = _outputs(made, program)
        except Exception:  # whatever the user's forward raises where a submodule is not what it was
            return None
        if len(found) == len(wanted) and all(
            a.shape == b.shape and torch.allclose(a, b) for a, b in zip(found, wanted, strict=True)
        ):
            return made
    return None


def _child(path: str, module: str) -> str:
    """The name of a module's child that another of its submodules is in, or is."""
    return path.removeprefix(f"{module}.").split(".")[0] if path.startswith(f"{module}.") else ""


def _stand_in(constant: nn.Parameter | None, rectified: bool, shortcut: Mapping[str, nn.Module]) -> nn.Module:
    if constant is None and not rectified and not shortcut:
        return nn.Identity()
    return Shifted(constant, rectified=rectified, shortcut=shortcut)


def _rectified(program: Program, gone: Sequence[Block]) -> set[str]:
    """The modules that end in a ReLU of the sum."""
    nodes = {node.name: node for node in program.graph.graph.nodes}
    found = set()
    for block in gone:
        reader, *more = nodes[block.sum].users or [None]
        if reader is not None and not more and str(reader.target) == "aten.relu.default":
            within = module_of(reader)
            found |= {block.module} if f"{within}.".startswith(f"{block.module}.") else set()
    return found


def _outputs(model: nn.Module, program: Program) -> list[Tensor]:
    with torch.no_grad(), evaluating(model), buffers_kept(model):
        return flat_outputs(model(*fresh(program.example_args), **fresh(dict(program.example_kwargs))))
