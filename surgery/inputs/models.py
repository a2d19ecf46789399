"""Load a model as named by the user, in eval mode and with example inputs.

A model is a library model (`resnet18`, `timm:NAME`), the result of the user's own code (`FILE.py:CALLABLE`,
`package.module:CALLABLE`) or a `.pt2` program; its weights are pretrained, random from a seed, or from a checkpoint.
Errors are reported here, in one sentence each, before long computations.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core import first_line, user_line
from surgery.errors import InvalidInput, SurgeryError
from surgery.inputs import checkpoints, random_state
from surgery.inputs.compat import import_timm, import_torchvision
from surgery.inputs.libraries import (
    Built,
    Source,
    Unavailable,
    timm_names,
    timm_source,
    torchvision_names,
    torchvision_source,
)
from surgery.inputs.preprocessing import Preprocessing
from surgery.inputs.pt2 import load_program, plain_module
from surgery.inputs.usercode import folder_name, near, top_level_names, user_source

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_GUESSED_SHAPE = (1, 3, 224, 224)
_WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model ready to be traced.

    Attributes:
        module: the module in eval mode.
        example_inputs: positional arguments of forward, usually one tensor of shape (1, C, H, W).
        example_kwargs: keyword arguments of forward.
        name: short name that is safe for folders.
        weights: name of the weights in the report: `IMAGENET1K_V1 (torchvision)`, `random`, `checkpoint resnet.pt`.
        notes: notes for the user.
        warnings: warnings for the user, such as random weights because pretrained ones are unavailable.
        preprocessing: preprocessing that the model expects.
    """

    module: nn.Module
    example_inputs: tuple[Any, ...]
    example_kwargs: Mapping[str, Any]
    name: str
    weights: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    @property
    def is_trained(self) -> bool:
        """Whether the weights are known to be trained."""
        return not self.weights.startswith("random")


def load_model(
    spec: str,
    *,
    weights: str = "auto",
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
    with random_state.states_kept(), torch.random.fork_rng(devices=devices):
        source = _find_source(spec, trust)
        loaded, built = _with_weights(source, weights, model_args, seed)
        built.module.eval()
        checkpoints.check_finite(built.module, origin=source.label)
        args, kwargs = _example_inputs(source, built, input_shape, model_args, seed)
        if source.runs:
            check_runs(built.module, args, kwargs)
    notes = loaded.notes if input_shape else (*source.shape_notes, *loaded.notes)
    how = source.preprocessing(built.module)
    return replace(loaded, example_inputs=args, example_kwargs=kwargs, notes=notes, preprocessing=how)


def list_names(library: str = "torchvision") -> list[str]:
    """Return the model names of `torchvision` or `timm`; raises InvalidInput if the library is not installed."""
    return timm_names() if library == "timm" else torchvision_names()


def check_runs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NOTHING) -> None:
    """Run the model once, without gradients; raises InvalidInput, with the user's source line, if forward raises."""
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except SurgeryError:
        raise
    except Exception as error:  # forward is user code and may raise any exception
        shapes = ", ".join(_shape(value) for value in (*args, *kwargs.values())) or "no input"
        raise InvalidInput(
            f"{type(module).__name__} does not run on input {shapes}{user_line(error)}: {first_line(error)}; "
            "give a shape that it takes with --input-shape"
        ) from error


# Weights -------------------------------------------------------------------------------------------------------------


def _with_weights(source: Source, weights: str, model_args: Mapping[str, Any], seed: int) -> tuple[LoadedModel, Built]:
    """Build the model and load its weights; the example inputs are added later."""
    initial, notes = source.initial.format(seed=seed), source.notes
    warnings: tuple[str, ...] = ()
    _seed(seed)
    if weights == "auto" and source.pretrained is not None:
        try:
            built, label = source.pretrained(model_args)
            return _loaded(source, built, label, notes), built
        except Unavailable as reason:
            warnings = (f"random weights: no pretrained weights for {source.label} ({reason}); the model is untrained",)
    _seed(seed)
    if weights in ("auto", "random"):
        built = source.build(model_args)
        return replace(_loaded(source, built, initial, notes), warnings=warnings), built
    checkpoint = checkpoints.read_checkpoint(Path(weights).expanduser())
    built = _build_for(source, checkpoint, model_args)
    checkpoints.fit(built.module, checkpoint, label=source.label)
    return _loaded(source, built, f"checkpoint {checkpoint.path.name}", notes + checkpoint.notes), built


def _loaded(source: Source, built: Built, weights: str, notes: tuple[str, ...]) -> LoadedModel:
    return LoadedModel(built.module, (), {}, source.name, weights, notes)


def _build_for(source: Source, checkpoint: checkpoints.Checkpoint, model_args: Mapping[str, Any]) -> Built:
    """Build the variant of the model that fits a checkpoint: class count, with or without auxiliary heads."""
    first = source.build(model_args)
    wanted = first.module.state_dict().keys()
    tensors = checkpoints.without_prefixes(checkpoint.tensors, wanted)
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


# Example inputs ------------------------------------------------------------------------------------------------------


def _example_inputs(
    source: Source, built: Built, shape: tuple[int, ...] | None, model_args: Mapping[str, Any], seed: int
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    kwargs = dict(built.kwargs or {})
    if built.args is not None and shape is None:
        return built.args, kwargs
    if built.args is not None and (len(built.args) != 1 or kwargs or not isinstance(built.args[0], Tensor)):
        count = len(built.args) + len(kwargs)
        raise InvalidInput(
            f"{source.label} takes {count} inputs of its own: --input-shape can only stand for a single tensor; omit it"
        )
    if shape is None:
        shape = source.shape(built.module, model_args) if source.shape else _GUESSED_SHAPE
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    floating = (t.dtype for t in built.module.parameters() if t.is_floating_point())
    return source.wrap(image.to(built.args[0].dtype if built.args else next(floating, image.dtype))), kwargs


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(str(size) for size in value.shape) or "()"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shape(item) for item in value) + "]"
    return type(value).__name__


# From the name to a source -------------------------------------------------------------------------------------------


def _find_source(spec: str, trust: bool) -> Source:
    if spec.startswith("timm:"):
        return _timm(spec.removeprefix("timm:"))
    if spec.endswith(".pt2"):
        return _program(Path(spec).expanduser(), trust)
    owner, colon, name = spec.rpartition(":")
    if colon and owner:
        return user_source(owner, name)
    if spec.endswith(".py"):
        names = top_level_names(Path(spec).expanduser())
        raise InvalidInput(f"which of {spec}? give FILE.py:CALLABLE; it defines {', '.join(names[:5]) or 'nothing'}")
    if spec.endswith(_WEIGHT_FILES):
        raise InvalidInput(f"{spec} holds weights, not a model: give the model's name, and --weights {spec}")
    return _torchvision(spec)


def _torchvision(name: str) -> Source:
    models = import_torchvision().models
    if name.lower() in models.list_models():
        return torchvision_source(name.lower())
    hint = near(name, torchvision_names())
    if importlib.util.find_spec("timm") is not None and import_timm().is_model(name):
        hint = f"did you mean timm:{name}?"
    raise InvalidInput(f"no model '{name}' in torchvision; {hint} (or timm:NAME, FILE.py:CALLABLE, a .pt2 file)")


def _timm(name: str) -> Source:
    if not import_timm().is_model(name):
        similar = difflib.get_close_matches(name, timm_names(), n=3)
        hint = f"did you mean {', '.join('timm:' + n for n in similar)}?" if similar else "see timm.list_models()"
        raise InvalidInput(f"no model '{name}' in timm; {hint}")
    return timm_source(name)


def _program(path: Path, trust: bool) -> Source:
    program = load_program(path, trust=trust)
    args, kwargs = program.example_inputs or (None, None)

    def build(model_args: Mapping[str, Any]) -> Built:
        if model_args:
            raise InvalidInput(f"--model-arg {next(iter(model_args))}: {path} is already built and takes no arguments")
        return Built(plain_module(program), args, kwargs)

    return Source(name=folder_name(path.stem), label=str(path), build=build, initial=f"of {path.name}")


def _seed(seed: int) -> None:
    torch.manual_seed(seed)  # all devices
    random_state.seed_all(seed)
