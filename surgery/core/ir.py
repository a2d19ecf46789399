"""Frozen data types passed between the stages. Imports neither torch nor other large packages: devices read plans.

A *unit* is the smallest thing that can be removed: an equivalence class of indices of parameters and activations that
must be removed together. A *group* is a set of units of the same kind (the output channels of one convolution and all
indices tied to them; the heads of one attention). A *site* is one axis of one parameter or buffer in a group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import msgspec

from surgery.config import Budget
from surgery.core.files import replacing
from surgery.errors import InvalidInput, PlanMismatch

if TYPE_CHECKING:  # labels need numpy
    from surgery.core.labels import LabelledGraph

PLAN_SCHEMA = 3

Index = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Length = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
"""A position and a size, within these bounds when read from a file."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One tensor input of the network; `dynamic` lists the axes whose size may vary between calls."""

    name: str
    shape: tuple[Length, ...]
    dtype: str
    dynamic: tuple[Index, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A traced network."""

    graph: Any  # functional `torch.fx.GraphModule` of ATen operators; `get_attr` targets are the dense model's names
    inputs: tuple[InputSpec, ...]  # the tensor inputs in forward's order
    example_args: tuple[Any, ...]  # batch 2 where the batch axis is dynamic
    example_kwargs: Mapping[str, Any]
    fingerprint: str  # SHA-256 over operators, parameter names and shapes; equal for copies of one architecture
    notes: tuple[str, ...]  # messages for the user, such as a static fallback or a specialised axis
    model: Any  # the user's module, never modified
    tracer: str = "export"  # or `torch-pruning`
    # Weight that the model computes from parameters, a constant of the graph → those parameters not read elsewhere.
    materialised: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole: Program | None = None  # the program as traced, if this one is a copy without some blocks
    why_graph: str = ""  # why `model` is a graph and not the user's class after blocks were dropped

    @property
    def has_graph(self) -> bool:
        """Whether there is a graph: labels can be replayed, blocks dropped, layers timed and reconstructed."""
        return self.graph is not None

    @property
    def any_batch(self) -> bool:
        """Whether the batch size of every input may vary."""
        return bool(self.inputs) and all(0 in spec.dynamic for spec in self.inputs)

    @property
    def dense(self) -> Program:
        """The program as it was traced."""
        return self.whole or self


@dataclass(frozen=True, slots=True)
class Block:
    """A removable part that preserves all shapes: the branch of a sum, or a depthwise layer (becomes identity)."""

    name: str  # path of the module that contains the sum, or of the layer; numbered if there are several in it
    module: str
    sum: str  # name of the sum, or of the layer's last operation
    stays: str  # name of the value that replaces it: the other operand, or the layer's input
    branch: str  # name of the operand that is removed; empty for a layer
    nodes: tuple[str, ...]  # names of the operations removed with it, in order
    tensors: tuple[str, ...]  # parameters and buffers that only these operations read
    source: str  # the user's ``file:line``
    plain: bool  # whether the remaining operand is the branch's input itself, and not a projection of it

    @property
    def is_layer(self) -> bool:
        """Whether this is a layer rather than a branch."""
        return not self.branch


@dataclass(frozen=True, slots=True)
class Site:
    """One axis of one parameter or buffer; `index[k]` holds the positions that belong to unit k of the group."""

    tensor: str
    axis: int
    index: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Units of one kind, any proper subset of which may be removed."""

    name: str  # ``tensor:axis`` of the first site; unique and the same for every copy of the architecture
    units: tuple[int, ...]  # ids, private to the `Coupling`
    sites: tuple[Site, ...]  # every parameter axis the group touches
    inexact: str | None = None  # why removing units differs from setting them to zero

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.units)


KEPT = "kept by --keep"
"""Prefix of the reason for axes that the user asked to keep."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """A parameter axis that is not cut, and the reason (operator and the user's source line)."""

    tensor: str
    axis: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Coupling:
    """Result of coupling: what may be cut."""

    groups: tuple[Group, ...]  # disjoint, in the order of first use in the program
    frozen: tuple[Frozen, ...]  # parameter axes with at least one index that is never cut
    shapes: Mapping[str, tuple[int, ...]]  # parameter and buffer name → dense shape
    graph_labels: LabelledGraph | None = None  # of every value of the traced graph
    # Group name → sets of units, one of each of which must remain, or an axis of a value would become empty.
    required_units: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    # Equal pieces into which a split divides whole groups, as (group, unit) of each index; they must stay equal.
    equal_pieces: tuple[tuple[tuple[tuple[str, int], ...], ...], ...] = ()
    contracted: frozenset[tuple[str, int]] = frozenset()  # without a graph: parameter axes that layers contract

    @property
    def labelled(self) -> LabelledGraph:
        """The labels of every value of the traced graph."""
        if self.graph_labels is None:
            raise TypeError("this coupling was made without a graph")
        return self.graph_labels

    def group(self, name: str) -> Group:
        """Return the group called `name`; raises PlanMismatch if there is none."""
        if found := [group for group in self.groups if group.name == name]:
            return found[0]
        raise PlanMismatch(f"no group '{name}' in this model: the plan is for another architecture; make a new plan")


Scores = Mapping[str, tuple[float, ...]]
"""Group name → importance of each unit, comparable between groups; the lowest are removed first."""

CostFn = Callable[[Mapping[str, Sequence[int]]], int]
"""Removed units per group name → cost of the pruned network."""


@dataclass(frozen=True, slots=True)
class AxisCut:
    """Positions `dead` (increasing) to remove along `axis` of `tensor`, of dense length `size`."""

    tensor: str
    axis: Index
    size: Length
    dead: tuple[Index, ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """An order of a group's units within each unit of another, for instance of head dimensions in each head.

    In unit h of `outer`, unit k of `group` is member `orders[h][k]`. Reordering does not change what the network
    computes, and lets each head keep different members.
    """

    group: str
    outer: str
    orders: tuple[tuple[Index, ...], ...]


class _Int8(TypedDict):
    method: str
    keep: list[str]
    reduce_range: bool | None


class _Settings(TypedDict, total=False):
    """Types of the settings of a plan that applying it reads."""

    part: str | None
    keep: list[str]
    arguments: dict[str, Any]
    tracer: Literal["export", "torch-pruning"]
    seed: int
    deploy: str
    int8: _Int8
    predicted_latency_ratio: float


class _Schema(msgspec.Struct):
    schema: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Units to remove, and the resulting positions of each tensor. Self-contained and serializable to JSON.

    Attributes:
        dead: group name → indices of the removed units within the group, increasing.
        sizes: group name → dense number of units, for every group of the model.
        cuts: the same decision per parameter axis.
        budget: the requested budget, or None for a plan made by hand.
        fingerprint: fingerprint of the program it was made for.
        inputs: the network's input signature.
        settings: criterion, scope, seed and so on, as given.
        notes: decisions with reasons.
        arranged: order of the members in each head before `cuts` are applied; unchanged where missing.
        dropped: name of each dropped block → the constant per channel that replaces it, empty if none.
        reasons: group or block name → why it has the size it has.
    """

    dead: Mapping[str, tuple[Index, ...]]
    sizes: Mapping[str, Length]
    cuts: tuple[AxisCut, ...]
    fingerprint: str
    inputs: tuple[InputSpec, ...]
    budget: Budget | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    arranged: tuple[Arrangement, ...] = ()
    dropped: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the plan as JSON text: sorted keys, byte-identical for equal plans."""
        data = {"schema": PLAN_SCHEMA, **_fields_of(self)}
        return json.dumps(data, sort_keys=True, indent=1, default=_fields_of) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of `to_json`, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write `to_json` to `path`; raises InvalidInput if it cannot."""
        with replacing(path) as file:
            file.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str, origin: str = "plan") -> Plan:
        """Parse the output of `to_json`; raises PlanMismatch if the text is not a plan of this schema."""
        try:
            data = json.loads(text)  # not msgspec's own, which has no infinity, as a model's argument may be
            schema = msgspec.convert(data, _Schema).schema
            if schema != PLAN_SCHEMA:
                raise PlanMismatch(f"{origin}: plan schema {schema}, this version reads {PLAN_SCHEMA}; make a new plan")
            plan = msgspec.convert(data, cls)
            msgspec.convert(plan.settings, _Settings)
            return plan
        except (ValueError, InvalidInput, RecursionError) as error:
            raise PlanMismatch(
                f"{origin}: not a plan file ({error}); `surgery shrink` writes one as plan.json"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; raises PlanMismatch if the file is missing or not a plan."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanMismatch(f"cannot read plan {path}: {error}") from error
        return cls.from_json(text, origin=str(path))


@dataclass(frozen=True, slots=True, eq=False)
class CompactModel:
    """A smaller copy of the dense model."""

    module: Any  # trainable; the dense model's call signature and parameter names
    kind: str  # `module` for the user's own class with sliced submodules, `graph` for the rewritten program
    why: str  # reason for the kind
    graph: Any  # the rewritten program as a `torch.fx.GraphModule` (for kind `graph`, `module` itself)
    lost_in_training: tuple[str, ...] = ()  # what a graph loses in `.train()`: stochastic depth, attention dropout
    stuck: str = ""  # for kind `graph`, the submodule whose forward does not run at the new sizes, if a single one


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of the verification. Errors are relative to the part of the output that varies with the input."""

    replayed: int  # number of values whose labels were replayed through the cut program and found equal
    error_float64: float  # on distinct, well-conditioned weights
    error_real: float | None  # on the real weights in their own precision; None if the output hardly varies
    varying_real: float  # with the real weights, the share of the output that varies with the input
    reference: str  # description of what the compact model was compared with
    notes: tuple[str, ...] = ()  # checks that were not possible, and why


def _fields_of(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}
