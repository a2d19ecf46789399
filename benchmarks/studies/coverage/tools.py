"""What each tool does with one model, in this process: rows of the table. The parent sets the limits."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.studies.coverage.conditioned import condition
from benchmarks.studies.coverage.isolated import tell
from benchmarks.studies.coverage.models import Model
from benchmarks.studies.coverage.oracle import DOES_NOT_RUN, judge, said
from surgery.capture import reach
from surgery.core import count_macs, count_params
from surgery.errors import SurgeryError
from surgery.inputs import load_model

MACS = 0.5
"""Fraction of the dense MACs to keep at most."""
LEAST = 0.45
"""And at least: more than that was not asked for."""
_NEAR = 0.52
"""Share of the dense MACs below which a peer's are counted exactly, after every step."""
PARITY = 1e-4
"""Largest relative difference of the ONNX file, in float32."""

Row = dict[str, Any]
"""`seconds` are processor time, which for one thread is wall time on an idle machine."""


class Subject:
    """The dense model of a row: conditioned, in float64, with the inputs of the part that is cut."""

    def __init__(self, model: Model) -> None:
        loaded, module, inputs = _loaded(model)
        self.whole, self.whole_inputs, self.part = loaded.module, loaded.example_inputs, model.part
        self.inputs = _as(inputs, torch.float64)
        self.dense = condition(module, self.drawn(4, seed=3))
        self.whole, self.whole_inputs = self.whole.double(), _as(self.whole_inputs, torch.float64)

    def of(self, cut: nn.Module) -> nn.Module:
        """The part of a cut model."""
        return cut.get_submodule(self.part) if self.part else cut

    @property
    def batches(self) -> list[tuple[Any, ...]]:
        """Two calls' arguments: batches of two, that are different."""
        return [self.drawn(2, seed=7), self.drawn(2, seed=8)]

    def drawn(self, count: int, *, seed: int) -> tuple[Any, ...]:
        """Arguments of a call with a random batch of this size."""
        generator = torch.Generator().manual_seed(seed)

        def of(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return torch.randn((count, *x.shape[1:]), generator=generator, dtype=x.dtype)

        called: tuple[Any, ...] = _pytree.tree_map(of, self.inputs)
        return called


def _loaded(model: Model) -> tuple[Any, nn.Module, tuple[Any, ...]]:
    """The model with random weights, the part to prune, and its inputs."""
    loaded = load_model(model.spec, weights="random", input_shape=model.shape, model_args=model.arguments)
    if not model.part:
        return loaded, loaded.module, loaded.example_inputs
    reached = reach(loaded.module, model.part, loaded.example_inputs, loaded.example_kwargs)
    return loaded, reached.part.module, reached.part.example[0]


def _as(tree: Any, dtype: torch.dtype) -> Any:
    return _pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def _count(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[int, int]:
    return count_macs(module, inputs), count_params(module)


# This compiler. ------------------------------------------------------------------------------------------------------


def surgery_row(model: Model) -> Row:
    """Trace, cut, check, judge, cast, export, compare."""
    import surgery
    from exporters import onnx

    subject = Subject(model)
    row: Row = {"stage": "cut"}
    started = time.process_time()
    with _explained(row):
        result = surgery.shrink(
            subject.whole, subject.whole_inputs, surgery.recipe(macs=MACS, submodule=subject.part), progress=tell
        )
        row["seconds"] = round(time.process_time() - started, 1)
        macs, params = result.report["models"][0], result.report["models"][2]
        row |= {
            "macs": macs["macs"],
            "macs_kept": params["macs"] / macs["macs"],
            "parameters": macs["parameters"],
            "parameters_kept": params["parameters"] / macs["parameters"],
            "kind": result.kind,
            "stages_s": dict(result.report["stages_s"]),
            "check": result.check.error_float64,
        }
        row |= _groups(result)
        tell("oracle")
        verdict = judge(subject.dense, compact := subject.of(result.model), subject.batches)
        row |= asdict(verdict)
        row["stage"] = "onnx"
        tell("ONNX")
        with tempfile.TemporaryDirectory() as folder:
            single = _as(subject.inputs, torch.float32)
            written = onnx.export(compact.float(), single, Path(folder, "compact.onnx"))
        row |= {"onnx_error": written.error, "onnx_notes": [plain(note) for note in written.notes], "stage": "done"}
    return row


def _groups(result: Any) -> Row:
    coupling, plan = result.coupling, result.plan
    parameters = dict(result.program.model.named_parameters())
    movable = {site.tensor for group in coupling.groups for site in group.sites}
    movable |= {name for made in movable for name in result.program.materialised.get(made, ())}
    cut = [group for group in coupling.groups if plan.dead.get(group.name)]
    whole = {
        f.tensor: f.reason for f in reversed(coupling.frozen) if f.tensor in parameters and f.tensor not in movable
    }
    reasons: dict[str, int] = {}
    for name, reason in whole.items():
        reasons[plain(reason)] = reasons.get(plain(reason), 0) + parameters[name].numel()
    read = {str(n.target) for n in result.program.graph.graph.nodes if n.op == "get_attr"}
    read |= {name for made in read for name in result.program.materialised.get(made, ())}
    unread = sum(p.numel() for name, p in parameters.items() if name not in read)
    reasons |= {"not used by forward in eval mode": unread} if unread else {}
    total = sum(p.numel() for p in parameters.values())
    return {
        "groups": len(coupling.groups),
        "groups_cut": len(cut),
        "groups_inexact": sum(group.inexact is not None for group in cut),
        "frozen_share": sum(p.numel() for name, p in parameters.items() if name not in movable) / total,
        "frozen": dict(sorted(reasons.items(), key=lambda kv: -kv[1])[:6]),
    }


# torch-pruning, at its best settings. --------------------------------------------------------------------------------


def torch_pruning_row(model: Model) -> Row:
    """L1, heads given, output transform given, classifier spared; steps until half is gone.

    One global ranking; where that fails, or leaves a model that does not run, every layer by the same ratio.
    """
    rows: list[Row] = []
    subject = Subject(model)
    for scope in ("global", "local"):
        rows.append(row := _pruned(subject, scope))
        if "failed" not in row and row["macs_kept"] is not None:
            return row
    return rows[0]


def _pruned(subject: Subject, scope: str) -> Row:
    import copy

    import torch_pruning as tp

    row: Row = {"stage": "cut", "scope": scope}
    started = time.process_time()
    with _explained(row):
        dense_macs, dense_params = _count(subject.dense, subject.inputs)
        dense_products, _ = products(subject.dense, subject.inputs)
        module = copy.deepcopy(subject.dense)
        pruner = tp.pruner.BasePruner(
            module,
            example_inputs=subject.inputs,
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            global_pruning=scope == "global",
            pruning_ratio=0.95,
            max_pruning_ratio=0.95,
            iterative_steps=40,
            ignored_layers=list(output_layers(module, subject.inputs)),
            num_heads=_heads(module),
            prune_num_heads=True,
            prune_head_dims=True,
            head_pruning_ratio=0.5,
            output_transform=lambda out: sum(x.sum() for x in _pytree.tree_leaves(out) if isinstance(x, Tensor)),
        )
        total = sum(p.numel() for p in module.parameters())
        kept, movable = (dense_macs, dense_params), _movable(pruner)
        for _ in range(40):
            pruner.step()
            left, why = products(module, subject.inputs)
            if why:
                return row | {"sound": False, "why": why, "macs_kept": None}
            if left <= _NEAR * dense_products:
                kept = _count(module, subject.inputs)
                if kept[0] <= MACS * dense_macs:
                    break
        else:
            kept = _count(module, subject.inputs)
        row["seconds"] = round(time.process_time() - started, 1)
        row |= {
            "macs": dense_macs,
            "macs_kept": kept[0] / dense_macs,
            "parameters": dense_params,
            "parameters_kept": kept[1] / dense_params,
        }
        row["frozen_share"] = 1 - sum(movable.values()) / total
        row |= asdict(judge(subject.dense, module, subject.batches)) | {"stage": "done"}
    return row


def products(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[int, str]:
    """Multiply-adds of one forward pass by torch's own counter, which is quick; or why the model does not run."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes, without = _pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (tensors, inputs))
    for state, given in ((shapes, without), ({}, inputs)):
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                functional_call(module, state, given)
            return int(counter.get_total_flops()) // 2, ""
        except Exception as error:  # without values some models do not run; with them, cut ones run into anything
            why = f"{DOES_NOT_RUN}: {said(error)}"
    return 0, why


def _movable(pruner: Any) -> dict[int, int]:
    """Sizes of the parameters that any group of the pruner would make smaller, by identity."""
    found: dict[int, Tensor] = {}
    for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers):
        for dependency, _ in group:
            owner = dependency.target.module
            cut = [owner] if isinstance(owner, Tensor) else list(owner.parameters(recurse=False))
            if "in_channels" in dependency.handler.__name__ and isinstance(owner, _LAYERS):
                cut = [owner.weight]  # a bias has no input axis
            found |= {id(p): p for p in cut if isinstance(p, nn.Parameter)}
    return {key: p.numel() for key, p in found.items()}


_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def _heads(module: nn.Module) -> dict[nn.Module, int]:
    """Linear and convolution layers called qkv, query and so on, of the modules that have a number of heads."""
    heads: dict[nn.Module, int] = {}
    for owner in module.modules():
        count = getattr(owner, "num_heads", None)
        if isinstance(count, int) and count > 1:
            for name, child in owner.named_children():
                if isinstance(child, (nn.Linear, nn.Conv2d)) and name in (
                    "qkv",
                    "q",
                    "k",
                    "v",
                    "kv",
                    "query",
                    "key",
                    "value",
                ):
                    heads[child] = count
            if isinstance(owner, nn.MultiheadAttention):
                heads[owner] = count
    return heads


def output_layers(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[nn.Module]:
    """Layers whose output is, up to its shape, an output of the model."""
    made: list[tuple[nn.Module, int]] = []
    hooks = [
        m.register_forward_hook(lambda m, _, out: made.append((m, out.data_ptr())))
        for m in module.modules()
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    with torch.no_grad():
        out = module(*inputs)
    for hook in hooks:
        hook.remove()
    pointers = {x.data_ptr() for x in _pytree.tree_leaves(out) if isinstance(x, Tensor)}
    sizes = {x.shape[1] for x in _pytree.tree_leaves(out) if isinstance(x, Tensor) and x.dim() > 1}
    last = [m for m, pointer in made if pointer in pointers]
    heads = [m for m, _ in made if getattr(m, "out_features", getattr(m, "out_channels", None)) in sizes]
    yield from dict.fromkeys([*last, *heads[-2:]])


# onnxsim's structured pruning. ---------------------------------------------------------------------------------------


def onnxsim_row(model: Model) -> Row:
    """Measure onnxsim's pruning of ONNX files: does the result run, how many MACs are removed, how long does it take.

    The file is of torch's exporter by TorchScript, of which onnxsim cut as much or more on the five models that both
    were tried on; of the one by `torch.export` where that one fails. Weights are distinct: onnxsim.simplify stores
    equal ones once (the biases of a fresh model), and its pruning then slices one tensor for several layers.
    """
    import onnx
    import onnxsim

    subject = Subject(model)
    module, inputs = subject.dense.float(), _as(subject.inputs, torch.float32)
    row: Row = {"stage": "cut"}
    with _explained(row), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "dense.onnx")
        row["exporter"] = exported(module, inputs, path)
        dense, _ = onnxsim.simplify(onnx.load(path))
        started = time.process_time()
        pruned = onnxsim.apply_structured_pruning(dense, sparsity=MACS, importance_norm="l1", global_sparsity=True)
        row["seconds"] = round(time.process_time() - started, 1)
        _run(pruned, inputs)
        before, after = onnx_macs(dense), onnx_macs(pruned)
        row |= {"macs": before, "macs_kept": after / max(1, before), "sound": None, "why": "not judged"}
    return row


def exported(module: nn.Module, inputs: tuple[Any, ...], path: Path) -> str:
    """Write the ONNX file; returns by which of torch's exporters."""
    from exporters.onnx import ExportSettings, export

    try:
        export(module, inputs, path, ExportSettings(check=False, dynamo=False), dynamic_axes={})
    except SurgeryError:
        export(module, inputs, path, ExportSettings(check=False), dynamic_axes={})
        return "torch.export"
    return "torchscript"


def _run(model: Any, inputs: tuple[Any, ...]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    fed = [x.numpy() for x in _pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    session.run(None, dict(zip((i.name for i in session.get_inputs()), fed, strict=False)))


def onnx_macs(model: Any) -> int:
    """Multiply-adds of the convolutions and matrix products of an ONNX model with fixed shapes."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {t.name: list(t.dims) for t in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        shapes[value.name] = [d.dim_value for d in value.type.tensor_type.shape.dim]
    total = 0
    for node in inferred.node:
        known = all(name in shapes for name in (*node.input[:2], *node.output[:1]))
        if node.op_type in ("Conv", "Gemm", "MatMul") and known:
            out, weight, first = (shapes[name] for name in (node.output[0], node.input[1], node.input[0]))
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            summed = math.prod(weight[1:]) if node.op_type == "Conv" else first[0 if transposed else -1]
            total += math.prod(out) * summed
    return total


# Common. -------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return a message without the folders of the machine that it was written on."""
    return " ".join(word.rpartition("site-packages/")[2] or word for word in text.split())


@contextmanager
def _explained(row: Row) -> Iterator[None]:
    """Put what goes wrong into the row."""
    try:
        yield
    except SurgeryError as error:
        row |= {"failed": type(error).__name__, "message": plain(str(error))}
    except Exception as error:  # peers may fail in any way, and so may we
        text = str(error).strip().splitlines()
        row |= {"failed": type(error).__name__, "message": plain(text[0])[:300] if text else ""}


TOOLS: Mapping[str, Callable[[Model], Row]] = MappingProxyType(
    {"surgery": surgery_row, "torch-pruning": torch_pruning_row, "onnxsim": onnxsim_row}
)


def tool_version(tool: str) -> str:
    """Return the version of a tool's package."""
    from surgery import __version__

    if tool == "surgery":
        return __version__
    try:
        return version(tool)
    except PackageNotFoundError:
        return "not installed"
