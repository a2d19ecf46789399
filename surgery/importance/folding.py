"""Run traced graphs with batch norms folded into the preceding convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.core import Executor, arguments_of
from surgery.importance.contractions import CONVOLUTIONS, find_contractions


class Folded(Executor):
    """An executor that folds batch norms into the preceding convolutions, as runtimes do.

    The value of such a convolution is that of its norm, which becomes an identity; all other values change only by
    rounding. On CPUs, norms take a third of the time of networks such as MobileNetV2.
    """

    def __init__(
        self, graph: torch.fx.GraphModule, state: Mapping[str, Tensor], device: torch.device | None = None
    ) -> None:
        super().__init__(graph, state, device=device or torch.device("cpu"))
        found = find_contractions(graph, self.place.keys())
        self._folds = {c.node: c for c in found if c.norm and self.nodes[self.place[c.node]].target in CONVOLUTIONS}
        self._passed = {c.norm: c for c in self._folds.values()}
        self._given = {
            name: arguments_of(self.nodes[self.place[name]]) for name in self._folds.keys() | self._passed.keys()
        }

    def call(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any], **changed: Any) -> Any:
        """Run one node."""
        layer = self._folds.get(node.name) or self._passed.get(node.name)
        # Of an image without a batch a norm's channels are another axis.
        if layer is None or (x := self._input(node, values)).dim() != self.state[layer.weight].dim():
            return super().call(node, values, **changed)
        if node.name in self._passed:
            return x
        gamma, beta, mean, var = (self.state[name].double() for name in layer.norm_names)  # not in half
        scale = gamma / (var + float(self._given[layer.norm]["eps"])).sqrt()
        given = dict(torch.fx.map_arg(self._given[node.name], lambda n: self.value(n, values)))
        weight, bias = given["weight"], given["bias"]
        shift = beta - scale * (mean if bias is None else mean - bias)
        wide = torch.promote_types(weight.dtype, torch.float32)
        given["weight"] = (weight.to(wide) * scale.to(wide).reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        given["bias"] = shift.to(weight.dtype)
        return node.target(**{**given, **changed})  # type: ignore[operator]

    def _input(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any]) -> Tensor:
        found: Tensor = self.value(self._given[node.name]["input"], values)
        return found
