"""ONNX Runtime releases: the newest operator set and IR version that each loads."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx

from surgery.errors import InvalidInput, UnsupportedModel

READ = {
    (1, 14): (18, 8),
    (1, 15): (19, 9),
    (1, 16): (19, 9),
    (1, 17): (20, 9),
    (1, 18): (21, 10),
    (1, 19): (21, 10),
    (1, 20): (21, 10),
    (1, 21): (22, 10),
    (1, 22): (22, 10),
    (1, 23): (23, 11),
    (1, 24): (25, 13),
}
"""Release of ONNX Runtime → operator set and IR version, as its release notes have it; tried from 1.15 on."""
FORMAT_OF = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
"""Operator set → the IR version released with it: a runtime that reads one reads the other."""


@dataclass(frozen=True, slots=True)
class Reader:
    """The oldest ONNX Runtime that must read a file.

    Attributes:
        version: version as given, such as `1.16`.
        opset: the newest operator set that it loads.
        ir_version: the newest IR version that it loads.
    """

    version: str
    opset: int
    ir_version: int

    @classmethod
    def of(cls, version: str) -> Reader:
        """Return what a release reads; one that is newer than all known ones reads what they read.

        Raises:
            InvalidInput: not a version, or older than the oldest whose operators can be written.
        """
        found = re.fullmatch(r"(\d+)\.(\d+)(?:\.\d+)*", str(version))
        if found is None:
            raise InvalidInput(f"ONNX Runtime '{version}' is no version; write one such as 1.16")
        release = int(found[1]), int(found[2])
        oldest = min(READ)
        if release < oldest:
            known = ".".join(map(str, oldest))
            raise InvalidInput(f"ONNX Runtime {version} is older than {known}, the oldest that files are written for")
        opset, ir_version = READ[max(known for known in READ if known <= release)]
        return cls(str(version), opset, ir_version)


def format_of(opset: int) -> int:
    """Return the oldest IR version that goes with an operator set."""
    return FORMAT_OF.get(opset, int(onnx.IR_VERSION))


def require_readable(model: onnx.ModelProto, reader: Reader, name: str) -> None:
    """Raise UnsupportedModel, with the operator's name, where a release does not load a model's operators or format.

    Args:
        model: its weights are not looked at.
        reader: the release.
        name: name of the file, for the message.
    """
    opset = next((x.version for x in model.opset_import if x.domain in _OWN_DOMAINS), 0)
    nodes = [node for node in model.graph.node if node.domain in _OWN_DOMAINS]
    since = {n.op_type: onnx.defs.get_schema(n.op_type, opset, n.domain).since_version for n in nodes}
    newer = [(n, since[n.op_type]) for n in nodes if since[n.op_type] > reader.opset]
    if reader.opset < SPATIAL_SAMPLES and (sample := _sampled_in_space(model)) is not None:
        newer.append((sample, SPATIAL_SAMPLES))
    if newer:
        node, needed = newer[0]
        axes = " of five axes" if node.op_type == "GridSample" else ""
        raise UnsupportedModel(
            f"{name}: operator {node.op_type} ('{node.name}'){axes} is of operator set {needed}, and ONNX Runtime "
            f"{reader.version} reads sets up to {reader.opset}; ask for a newer one, or replace what makes it"
        )
    if opset > reader.opset or model.ir_version > reader.ir_version:
        raise UnsupportedModel(
            f"{name}: operator set {opset} in IR version {model.ir_version}, and ONNX Runtime {reader.version} reads "
            f"sets up to {reader.opset} in IR versions up to {reader.ir_version}"
        )


_OWN_DOMAINS = ("", "ai.onnx")
SPATIAL_SAMPLES = 20
"""The operator set from which GridSample takes volumes; newer libraries read them in files of older sets as well."""


def _sampled_in_space(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """A GridSample of volumes (N, C, D, H, W), as far as shapes can be inferred."""
    if not any(node.op_type == "GridSample" for node in model.graph.node):
        return None
    graph = onnx.shape_inference.infer_shapes(model).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.value_info, *graph.output)}
    ranks |= {x.name: len(x.dims) for x in graph.initializer}
    return next(
        (n for n in model.graph.node if n.op_type == "GridSample" and 5 in (ranks.get(x) for x in n.input)), None
    )
