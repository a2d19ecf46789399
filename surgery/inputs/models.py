"""Load a model as named by the user, in eval mode and with example inputs.

A model is a library model (`resnet18`, `timm:NAME`), the result of the user's own code (`FILE.py:CALLABLE`,
`package.module:CALLABLE`) or a `.pt2` program; its weights are pretrained, random from a seed, or from a checkpoint.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.core import first_line, require_finite, user_line
from surgery.errors import InvalidInput, SurgeryError
from surgery.inputs import checkpoints
from surgery.inputs.batches import seed_all, states_kept
from surgery.inputs.libraries import (
    Built,
    Preprocessing,
    Source,
    Unavailable,
    import_timm,
    import_torchvision,
    timm_source,
    torchvision_names,
    torchvision_source,
)
from surgery.inputs.pt2 import load_program, plain_module
from surgery.inputs.usercode import folder_name, near, user_source

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model ready to be traced."""

    module: nn.Module  # in eval mode
    example_inputs: Any  # positional arguments of forward: one tensor (1, C, H, W), or a tuple
    example_kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""  # short, and safe for folders
    weights: str = ""  # in the report: `IMAGENET1K_V1 (torchvision)`, `random`, `checkpoint resnet.pt`
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # for the user, such as random weights because pretrained ones are unavailable
    preprocessing: Preprocessing = field(default_factory=Preprocessing)  # that the model expects
    classes: Sequence[str] = ()  # names of the outputs of the published weights, if known

    def __post_init__(self) -> None:
        eager = getattr(self.module, "_orig_mod", self.module)  # of a model that torch.compile returned
        object.__setattr__(self, "module", eager)

    @property
    def call(self) -> tuple[nn.Module, Any, Mapping[str, Any]]:
        """The module and its example inputs: arguments of `surgery.trace`."""
        return self.module, self.example_inputs, self.example_kwargs

    @property
    def is_trained(self) -> bool:
        """Whether the weights are known to be trained."""
        return not self.weights.startswith("random")


def load_model(
    spec: str,
    *,
    weights: str = "auto",
    ignore_extra: bool = False,
    input_shape: tuple[int, ...] | None = None,
    model_args: Mapping[str, Any] = _NOTHING,
    seed: int = 0,
    trust: bool = False,
) -> LoadedModel:
    """Load a model by name, from the user's code, or from an exported program, and run it once.

    Args:
        spec: a torchvision name, `timm:NAME`, `FILE.py:CALLABLE`, `package.module:CALLABLE`, or the path of a `.pt2`.
        weights: `auto` (pretrained, else seeded random with a warning), `random` (nothing is downloaded), or the path
            of a checkpoint.
        ignore_extra: ignore tensors of the checkpoint that the model does not have; they are named in the notes.
        input_shape: shape of the example input, such as (1, 3, 224, 224); None for the model's default.
        model_args: keyword arguments of the builder, such as num_classes.
        seed: seed of random weights and example inputs; the global random states are restored afterwards.
        trust: load `.pt2` files that could run code.

    Raises:
        InvalidInput: the name is unknown, files or weights do not fit, or the model does not run on the shape.
        UnsupportedModel: the model is of a kind that cannot be shrunk.
    """
    if input_shape is not None and not (input_shape and all(isinstance(n, int) and n > 0 for n in input_shape)):
        raise InvalidInput(f"input shape {input_shape}: every size must be a positive integer, such as 1,3,224,224")
    if weights == "random" and spec.endswith(".pt2"):
        raise InvalidInput(f"--weights random: {spec} comes with its weights; omit the option or give a checkpoint")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with states_kept(), torch.random.fork_rng(devices=devices):
        source = _find_source(spec, trust)
        built, label, notes, warnings = _with_weights(source, weights, ignore_extra, model_args, seed)
        module = getattr(built.module, "_orig_mod", built.module).eval()  # not compiled: it would be, on its first run
        require_finite(module.state_dict(keep_vars=True), source.label)
        args, kwargs = _example_inputs(source, built, input_shape, model_args, seed)
        if source.runs:
            check_runs(module, args, kwargs)
    notes = notes if input_shape or built.args is not None else (*source.shape_notes, *notes)
    how, classes = source.preprocessing(module), source.classes(module)
    return LoadedModel(module, args, kwargs, source.name, label, notes, warnings, how, classes)


def check_runs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
    """Run the model once, without gradients; raises InvalidInput, with the user's source line, if forward raises."""
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except SurgeryError:
        raise
    except Exception as error:  # forward is user code and may raise any exception
        tensors = (x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor))
        shapes = ", ".join("x".join(map(str, x.shape)) or "()" for x in tensors) or "no tensor"
        raise InvalidInput(
            f"{type(module).__name__} does not run on input {shapes}{user_line(error)}: {first_line(error)}; "
            "give a shape that it takes with --input-shape"
        ) from error


def _with_weights(
    source: Source, weights: str, ignore_extra: bool, model_args: Mapping[str, Any], seed: int
) -> tuple[Built, str, tuple[str, ...], tuple[str, ...]]:
    """Build the model and load its weights; return it with the weights' name, notes and warnings."""
    warnings: tuple[str, ...] = ()
    _seed(seed)
    if weights == "auto" and source.pretrained is not None:
        try:
            return *source.pretrained(model_args), source.notes, ()
        except Unavailable as reason:
            warnings = (f"random weights: no pretrained weights for {source.label} ({reason}); the model is untrained",)
    _seed(seed)
    if weights in ("auto", "random"):
        notes = (*source.notes, *(source.initial_notes if weights == "auto" else ()))
        return source.build(model_args), source.initial.format(seed=seed), notes, warnings
    checkpoint = checkpoints.read_checkpoint(Path(weights).expanduser())
    if ignore_extra:
        checkpoint = checkpoint.without_extra(source.build(model_args).module.state_dict())
    built = _build_for(source, checkpoint, model_args)
    checkpoints.fit(built.module, checkpoint, label=source.label)
    return built, f"checkpoint {checkpoint.path.name}", (*source.notes, *checkpoint.notes), ()


def _build_for(source: Source, checkpoint: checkpoints.Checkpoint, model_args: Mapping[str, Any]) -> Built:
    """Build the variant of the model that fits a checkpoint: class count, with or without auxiliary heads."""
    first = source.build(model_args)
    tensors = checkpoints.without_prefixes(checkpoint.tensors, first.module.state_dict().keys())
    for extra in ({}, *(variant for variant in source.variants if not variant.keys() & model_args.keys())):
        built = source.build({**model_args, **extra}) if extra else first
        mismatch = checkpoints.compare(built.module, tensors)
        if not mismatch:
            return built
        if mismatch.missing or mismatch.unexpected or "num_classes" in model_args or not source.accepts("num_classes"):
            continue
        for count in checkpoints.class_counts(mismatch):
            built = source.build({**model_args, **extra, "num_classes": count})
            if not checkpoints.compare(built.module, tensors):
                return built
    return first


def _seed(seed: int) -> None:
    torch.manual_seed(seed)  # all devices
    seed_all(seed)


def _example_inputs(
    source: Source, built: Built, shape: tuple[int, ...] | None, model_args: Mapping[str, Any], seed: int
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    args, kwargs = built.args, dict(built.kwargs or {})
    if args is not None and shape is None:
        return args, kwargs
    if args is not None and (len(args) != 1 or kwargs or not isinstance(args[0], Tensor)):
        raise InvalidInput(
            f"{source.label} takes {len(args) + len(kwargs)} inputs of its own: --input-shape can only stand for a "
            "single tensor; omit it"
        )
    image = torch.randn(shape or source.shape(built.module, model_args), generator=torch.Generator().manual_seed(seed))
    floating = (t.dtype for t in built.module.parameters() if t.is_floating_point())
    return source.wrap(image.to(args[0].dtype if args else next(floating, image.dtype))), kwargs


def _find_source(spec: str, trust: bool) -> Source:
    owner, colon, name = spec.rpartition(":")
    if owner == "timm":
        if import_timm().is_model(name):
            return timm_source(name)
        hint = near(spec, [f"timm:{known}" for known in import_timm().list_models()])
        raise InvalidInput(f"no model '{name}' in timm; {hint}")
    if spec.endswith(".pt2"):
        return _program(Path(spec).expanduser(), trust)
    if colon and owner:
        return user_source(owner, name)
    if spec.endswith(".py"):
        raise InvalidInput(f"{spec} is a file: name what returns the model, {spec}:CALLABLE")
    if spec.endswith(_WEIGHT_FILES):
        raise InvalidInput(f"{spec} holds weights, not a model: give the model's name, and --weights {spec}")
    if spec.lower() in import_torchvision().models.list_models():
        return torchvision_source(spec.lower())
    hint = near(spec, torchvision_names())
    if importlib.util.find_spec("timm") is not None and import_timm().is_model(spec):
        hint = f"did you mean timm:{spec}?"
    raise InvalidInput(f"no model '{spec}' in torchvision; {hint} (or timm:NAME, FILE.py:CALLABLE, a .pt2 file)")


def _program(path: Path, trust: bool) -> Source:
    program = load_program(path, trust=trust)
    args, kwargs = program.example_inputs or (None, None)

    def build(model_args: Mapping[str, Any]) -> Built:
        if model_args:
            raise InvalidInput(f"--model-arg {next(iter(model_args))}: {path} is already built and takes no arguments")
        return Built(plain_module(program), args, kwargs)

    return Source(name=folder_name(path.stem), label=str(path), build=build, initial=f"of {path.name}")
