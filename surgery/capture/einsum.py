"""Einstein sums as matrix products: permute, merge axes, multiply, permute back. Each of these operators has a rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_ELLIPSIS = "..."


def einsums(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Return Einstein sums of two or more operands that are products; sums over diagonals are not."""
    for node in graph.graph.nodes:
        if node.target is aten.einsum.default and len(node.args[1]) > 1:
            terms, _ = letters(node)
            if all(len(set(term)) == len(term) for term in terms):
                yield node


def expand_einsums(graph: fx.GraphModule) -> None:
    """Replace Einstein sums by matrix products."""
    for node in list(einsums(graph)):
        operands: Any = node.args[1]
        terms, out = letters(node)
        with graph.graph.inserting_before(node):
            builder = _Builder(node)
            value, term = operands[0], terms[0]
            for k in range(1, len(operands)):
                wanted = set(out).union(*terms[k + 1 :])
                value, term = builder.product(value, term, operands[k], terms[k], wanted)
            value = builder.call(aten.permute.default, value, [term.index(x) for x in out])
        node.replace_all_uses_with(value)
        graph.graph.erase_node(node)


def letters(node: fx.Node) -> tuple[list[str], str]:
    """Return the letters of every operand and of the output; an ellipsis is replaced by unused letters."""
    equation: Any = node.args[0]
    ranks = [operand.meta["val"].dim() for operand in node.args[1]]  # type: ignore[union-attr]
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        once = sorted(x for x in set(left) - set(",.") if left.count(x) == 1)
        right = (_ELLIPSIS if _ELLIPSIS in left else "") + "".join(once)
    unused = [x for x in ascii_letters if x not in equation]
    hidden = [rank - len(term.replace(_ELLIPSIS, "")) for term, rank in zip(terms, ranks, strict=True)]
    widest = max((h for h, term in zip(hidden, terms, strict=True) if _ELLIPSIS in term), default=0)
    dots = "".join(unused[:widest])
    spelt = [term.replace(_ELLIPSIS, dots[widest - h :]) for term, h in zip(terms, hidden, strict=True)]
    return spelt, right.replace(_ELLIPSIS, dots)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


@dataclass(frozen=True)
class _Builder:
    """Inserts operators that carry the source line and module of `origin`."""

    origin: fx.Node

    def call(self, op: Any, *args: Any) -> fx.Node:
        """Insert a call with the meta value that the tracer would have recorded."""
        node = self.origin.graph.call_function(op, args)
        node.meta = {k: v for k, v in self.origin.meta.items() if k in ("stack_trace", "nn_module_stack")}
        node.meta["val"] = op(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def product(self, a: fx.Node, a_term: str, b: fx.Node, b_term: str, wanted: set[str]) -> tuple[fx.Node, str]:
        """Multiply two operands and sum over the letters not needed later."""
        a, a_term = self._narrowed(a, a_term, b, b_term)
        b, b_term = self._narrowed(b, b_term, a, a_term)
        a, a_term = self._summed(a, a_term, set(b_term) | wanted)
        b, b_term = self._summed(b, b_term, set(a_term) | wanted)
        shared = [x for x in a_term if x in b_term]
        summed = [x for x in shared if x not in wanted]
        left, right = [x for x in a_term if x not in shared], [x for x in b_term if x not in shared]
        # All but one letter of each side are leading axes, along which the other side is broadcast.
        row, column = left[-1:], right[-1:]
        leading = [x for x in shared if x in wanted] + left[:-1] + right[:-1]
        a = self._laid_out(a, a_term, leading, row, summed)
        b = self._laid_out(b, b_term, leading, summed, column)
        out = self.call(aten.matmul.default, a, b)
        rank = len(leading)
        for missing, axis in ((not column, rank + 1), (not row, rank)):
            out = self.call(aten.squeeze.dim, out, axis) if missing else out
        return out, "".join(leading + row + column)

    def _narrowed(self, x: fx.Node, term: str, other: fx.Node, theirs: str) -> tuple[fx.Node, str]:
        """Remove axes of length one that are broadcast against the other operand."""
        long = {letter for letter, size in zip(theirs, other.meta["val"].shape, strict=True) if not _is_one(size)}
        for axis in reversed(range(len(term))):
            if term[axis] in long and _is_one(x.meta["val"].shape[axis]):
                x, term = self.call(aten.squeeze.dim, x, axis), term[:axis] + term[axis + 1 :]
        return x, term

    def _summed(self, x: fx.Node, term: str, wanted: set[str]) -> tuple[fx.Node, str]:
        axes = [k for k, letter in enumerate(term) if letter not in wanted]
        x = self.call(aten.sum.dim_IntList, x, axes) if axes else x
        return x, "".join(letter for letter in term if letter in wanted)

    def _laid_out(self, x: fx.Node, term: str, leading: list[str], rows: list[str], columns: list[str]) -> fx.Node:
        """Permute and reshape an operand to (*leading, rows, columns), with axes of length one for missing letters."""
        have = [letter for letter in (*leading, *rows, *columns) if letter in term]
        x = self.call(aten.permute.default, x, [term.index(letter) for letter in have])
        for part in (columns, rows):  # from the back, so that earlier axes keep their positions
            start = sum(letter in term for letter in leading) + (len(rows) if part is columns else 0)
            if len(part) > 1:
                x = self.call(aten.flatten.using_ints, x, start, start + len(part) - 1)
            elif not part:
                x = self.call(aten.unsqueeze.default, x, start)
        for axis, letter in enumerate(leading):
            if letter not in term:
                x = self.call(aten.unsqueeze.default, x, axis)
        return x
