"""The rewritten program as a module that can be trained, moved, copied, saved and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.graph_module import reduce_graph_module
from torch.utils import _pytree as pytree

from surgery.core import tensors_of

aten = torch.ops.aten

_NORMS = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}
_FLAGS = {**_NORMS, aten.dropout.default: 2, aten.feature_dropout.default: 2, aten.alpha_dropout.default: 2}
"""Position of the argument that says whether the operator is in training mode."""
_RUNNING_MEAN = 3


class CompactGraph(torch.fx.GraphModule):
    """A GraphModule over ATen operators whose `.train()`, `.eval()` and `.to(..)` reach the operators' own arguments.

    `train` flips the flags of its batch norms and dropouts; `to` rewrites literal dtypes and devices. All tensors of
    `root` are kept, so that the state dict is complete. `fixed_sizes`, taken from `root`: (input position, axis, size)
    of the static axes; calls with another size raise ValueError, since the result would be wrong.
    """

    def __init__(self, root: nn.Module, graph: torch.fx.Graph, class_name: str = "Compact") -> None:
        super().__init__(root, graph, class_name)
        hold(self, tensors_of(root), root)  # torch copies only tensors that are read
        self.fixed_sizes: tuple[tuple[int, int, int], ...] = getattr(root, "fixed_sizes", ())
        self._forward_pre_hooks.clear()
        self.register_forward_pre_hook(_require_fixed_sizes)

    def _deepcopy_init(self) -> Callable[..., None]:
        return CompactGraph.__init__

    def train(self, mode: bool = True) -> CompactGraph:
        """Set training mode for batch norm and dropout operators too."""
        super().train(mode)
        changed = False
        for node in self.graph.nodes:
            position = _FLAGS.get(node.target)
            if node.target in _NORMS and node.args[_RUNNING_MEAN] is None:
                continue  # without running statistics, both modes use batch statistics
            if position is not None and len(node.args) > position and node.args[position] is not mode:
                node.update_arg(position, mode)
                changed = True
        if changed:
            self.recompile()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompactGraph:
        def kind() -> tuple[torch.dtype, torch.device] | None:
            return next(((p.dtype, p.device) for p in self.parameters() if p.is_floating_point()), None)

        before = kind()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = kind()
        if before is not None and after is not None and before != after:
            table: dict[Any, Any] = dict(zip(before, after, strict=True))

            def swapped(x: Any) -> Any:
                return table.get(x, x) if isinstance(x, (torch.dtype, torch.device)) else x

            for node in self.graph.nodes:
                if node.op == "call_function":
                    node.args = tuple(map(swapped, node.args))
                    node.kwargs = {name: swapped(x) for name, x in node.kwargs.items()}
            self.recompile()
        return self

    def __reduce__(self) -> Any:
        _, (state, imports) = super().__reduce__()
        return _restore, (state, imports, self.training)


def _require_fixed_sizes(graph: nn.Module, args: tuple[Any, ...]) -> None:
    leaves = pytree.tree_leaves(args)
    for position, axis, size in graph.fixed_sizes:  # type: ignore[union-attr]
        x = leaves[position] if position < len(leaves) else None
        if isinstance(x, Tensor) and x.dim() > axis and x.shape[axis] != size:
            raise ValueError(
                f"input {position} has shape {tuple(x.shape)}, but this compact model is a program traced at size "
                f"{size} of axis {axis} and holds at no other; trace the dense model at the size it is to run at"
            )


def _restore(state: dict[Any, Any], imports: str, training: bool) -> CompactGraph:
    held = nn.Module()
    held.__dict__.update(state)
    plain: Any = reduce_graph_module(state, imports)
    for name in {str(n.target) for n in plain.graph.nodes if n.op == "get_attr" and "." not in str(n.target)}:
        value = getattr(plain, name, None)  # retracing gives constants new names
        if isinstance(value, Tensor) and not hasattr(held, name):
            held.register_buffer(name, value, persistent=False)
    graph = CompactGraph(held, plain.graph)
    for module in graph.modules():
        module.training = training
    return graph


def hold(root: nn.Module, tensors: Mapping[str, Tensor], like: nn.Module) -> nn.Module:
    """Register `tensors` below `root` under their dotted names, as parameters or buffers like in `like`."""
    sources = dict(like.named_modules(remove_duplicate=False))
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = root
        for part in path.split(".") if path else ():
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            source = sources.get(path)
            persistent = source is not None and leaf in source._buffers.keys() - source._non_persistent_buffers_set
            owner.register_buffer(leaf, tensor, persistent=persistent)
    return root
