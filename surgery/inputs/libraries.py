"""Models of torchvision and timm: constructors, example inputs and pretrained weights.

Downloads use the libraries' own loaders and caches, after one short request that tests the connection, because the
loaders retry for minutes. Building random models never accesses the network.
"""

from __future__ import annotations

import http.client
import inspect
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from surgery.core import first_line
from surgery.errors import InvalidInput, UnsupportedModel
from surgery.inputs.compat import import_timm, import_torchvision
from surgery.inputs.preprocessing import Preprocessing

PROBE_SECONDS = 4.0
STALLED_SECONDS = 20.0
_IMAGE = 224
_SIZES = {"segmentation": 256, "detection": 256, "optical_flow": 128}
_FRAMES = 16
_AUXILIARY: tuple[Mapping[str, Any], ...] = ({"aux_loss": True}, {"aux_logits": True}, {"aux_logits": False})


class Unavailable(Exception):
    """Pretrained weights are not available, for the reason in the message. Caught here; random weights are used."""


@dataclass(frozen=True, slots=True)
class Built:
    """A module, and its example inputs if its source provides any."""

    module: nn.Module
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """One way to get a model.

    Attributes:
        name: name that is safe for folders.
        label: name of the model in messages.
        build: keyword arguments of the builder → the model with its initial weights; downloads nothing.
        initial: description of the initial weights; `{seed}` is substituted.
        accepts: whether the builder has a keyword argument of this name.
        pretrained: keyword arguments → (model, name of its weights), or raises Unavailable. None: no pretrained
            weights.
        shape: (model, builder arguments) → shape of an example input; None if unknown.
        wrap: example tensor → positional arguments.
        variants: builder arguments to try for a checkpoint that does not fit the default.
        runs: whether the whole model runs on its example inputs (detectors may not).
        notes: notes for the user.
        shape_notes: notes for the user if no input shape was given.
        preprocessing: model → the preprocessing that its weights expect.
    """

    name: str
    label: str
    build: Callable[[Mapping[str, Any]], Built]
    initial: str = "random"
    accepts: Callable[[str], bool] = lambda name: False
    pretrained: Callable[[Mapping[str, Any]], tuple[Built, str]] | None = None
    shape: Callable[[nn.Module, Mapping[str, Any]], tuple[int, ...]] | None = None
    wrap: Callable[[Tensor], tuple[Any, ...]] = lambda image: (image,)
    variants: tuple[Mapping[str, Any], ...] = ()
    runs: bool = True
    notes: tuple[str, ...] = ()
    shape_notes: tuple[str, ...] = ()
    preprocessing: Callable[[nn.Module], Preprocessing] = lambda module: Preprocessing()


def torchvision_names() -> list[str]:
    """Return the names of torchvision's float models, all families."""
    models = import_torchvision().models
    return [name for name in models.list_models() if not name.startswith("quantized_")]


def timm_names() -> list[str]:
    """Return the names of timm's models, without the prefix `timm:`."""
    return list(import_timm().list_models())


def torchvision_source(name: str) -> Source:
    """Describe a model of torchvision: classification, segmentation, detection, video or optical flow."""
    models = import_torchvision().models
    if name.startswith("quantized_"):
        raise UnsupportedModel(f"{name} is already quantised; shrink the float model {name.removeprefix('quantized_')}")
    builder = models.get_model_builder(name)
    family = builder.__module__.split(".")[2]
    default = getattr(models.get_model_weights(name), "DEFAULT", None)
    parameters = _parameters(builder)

    def build(args: Mapping[str, Any]) -> Built:
        return Built(_call(name, models.get_model, {"name": name, **_random(name, parameters), **args}, random=True))

    def shape(module: nn.Module, args: Mapping[str, Any]) -> tuple[int, ...]:
        return _torchvision_shape(family, module, default)

    return Source(
        name=name,
        label=name,
        build=build,
        accepts=lambda key: key in parameters or key == "num_classes",
        pretrained=lambda args: _torchvision_pretrained(name, default, args),
        shape=shape,
        wrap=_WRAPPERS.get(family, lambda image: (image,)),
        variants=tuple(v for v in _AUXILIARY if v.keys() <= parameters or (name in _INCEPTIONS and "aux_logits" in v)),
        runs=family != "detection",
        notes=_NOTES.get(family, ()),
        shape_notes=_SHAPE_NOTES.get(family, ()),
        preprocessing=lambda module: _torchvision_preprocessing(default),
    )


def timm_source(name: str) -> Source:
    """Describe a model of timm; raises InvalidInput if timm is not installed."""
    timm = import_timm()

    def build(args: Mapping[str, Any]) -> Built:
        return Built(
            _call(f"timm:{name}", timm.create_model, {"model_name": name, "pretrained": False, **args}, random=True)
        )

    return Source(
        name=f"timm_{name}",
        label=f"timm:{name}",
        build=build,
        accepts=lambda key: key == "num_classes",
        pretrained=lambda args: _timm_pretrained(name, args),
        shape=_timm_shape,
        preprocessing=_timm_preprocessing,
    )


def _torchvision_preprocessing(weights: Any) -> Preprocessing:
    """Return the preprocessing of the published weights' transforms; those for classification specify a crop."""
    transforms: Any = weights.transforms() if weights is not None else None
    crop, resize = (getattr(transforms, name, None) for name in ("crop_size", "resize_size"))
    if not crop or not resize:
        return Preprocessing()
    share = min(1.0, crop[0] / resize[0])
    return Preprocessing(tuple(transforms.mean), tuple(transforms.std), share, transforms.interpolation.value)


def _timm_preprocessing(module: nn.Module) -> Preprocessing:
    import_timm()
    from timm.data import resolve_model_data_config

    known = resolve_model_data_config(module)
    return Preprocessing(tuple(known["mean"]), tuple(known["std"]), known["crop_pct"], known["interpolation"])


def unreachable(url: str) -> str | None:
    """Return why the host of `url` cannot be reached within a few seconds; None if it answers."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # any answer counts
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "reason", "")) or first_line(error)
        return f"no connection to {urlsplit(url).hostname}: {reason}"
    return None


# torchvision ---------------------------------------------------------------------------------------------------------

_INCEPTIONS = ("googlenet", "inception_v3")
_WRAPPERS: Mapping[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "detection": lambda images: (list(images.unbind(0)),),
    "optical_flow": lambda image: (image, image.roll(1, dims=-1)),
}
_NOTES: Mapping[str, tuple[str, ...]] = {
    "detection": ("a detector's post-processing depends on its data: shrink a part of it, --submodule backbone",),
}
_SHAPE_NOTES: Mapping[str, tuple[str, ...]] = {
    "segmentation": ("example images are 256 x 256 unless --input-shape says otherwise",),
}


def _random(name: str, parameters: frozenset[str]) -> dict[str, Any]:
    """Return the arguments that build a model without downloading anything."""
    arguments: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:
        arguments["weights_backbone"] = None  # the default downloads a pretrained backbone
    if name in _INCEPTIONS:
        # Skip their own initialisation, which takes five times as long as torch's default.
        arguments["init_weights"] = False
    if name == "googlenet":
        arguments["aux_logits"] = False  # as with its pretrained weights
    return arguments


def _torchvision_shape(family: str, module: nn.Module, default: Any) -> tuple[int, ...]:
    if family in _SIZES:
        return (1, 3, _SIZES[family], _SIZES[family])
    size = getattr(getattr(default, "transforms", None), "keywords", {}).get("crop_size", _IMAGE)
    if family != "video":
        size = getattr(module, "image_size", size)  # transformers: may differ from the weights' crop
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return (1, 3, _FRAMES, height, width) if family == "video" else (1, 3, height, height)


def _torchvision_pretrained(name: str, default: Any, args: Mapping[str, Any]) -> tuple[Built, str]:
    if default is None:
        raise Unavailable(f"torchvision has no pretrained weights for {name}")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(default.url).path).name
    if not cached.exists() and (reason := unreachable(default.url)):
        raise Unavailable(reason)
    models = import_torchvision().models
    with _downloading(name, cached):
        return Built(_call(name, models.get_model, {"name": name, "weights": default, **args})), (
            f"{default.name} (torchvision)"
        )


# timm ----------------------------------------------------------------------------------------------------------------


def _timm_shape(module: nn.Module, args: Mapping[str, Any]) -> tuple[int, ...]:
    config = getattr(module, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, _IMAGE, _IMAGE))
    size = args.get("img_size", (height, width))
    height, width = (size, size) if isinstance(size, int) else size
    return (1, int(args.get("in_chans", channels)), int(height), int(width))


def _timm_pretrained(name: str, args: Mapping[str, Any]) -> tuple[Built, str]:
    timm = import_timm()
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise Unavailable(f"timm has no pretrained weights for {name}")
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co") if config.hf_hub_id else config.url
    reason = unreachable(url) if url else None
    try:
        with _downloading(f"timm:{name}", None), _hub_offline(reason is not None):
            module = _call(f"timm:{name}", timm.create_model, {"model_name": name, "pretrained": True, **args})
    except Unavailable as error:  # not cached either
        raise Unavailable(reason or str(error)) from error
    classes = args.get("num_classes", config.num_classes)
    new_head = "" if classes == config.num_classes else f", with a random classifier of {classes} classes"
    return Built(module), f"{config.tag or 'pretrained'} (timm){new_head}"


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """Make the hub client use its cache immediately instead of retrying without a network."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# both ----------------------------------------------------------------------------------------------------------------


def _parameters(builder: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(builder).parameters)


def _call(label: str, builder: Callable[..., Any], arguments: Mapping[str, Any], *, random: bool = False) -> nn.Module:
    """Call a library's builder; unless weights are being loaded, exceptions are attributed to --model-arg."""
    try:
        module: nn.Module = builder(**arguments)
    except (TypeError, AssertionError, LookupError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, (ValueError, RuntimeError)) and not random:
            raise
        raise InvalidInput(f"cannot build {label}: {first_line(error)}; check --model-arg") from error
    return module


@contextmanager
def _downloading(label: str, cached: Path | None) -> Iterator[None]:
    """Convert errors of the network, the cache and the model to Unavailable or InvalidInput."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_SECONDS)  # the loaders set no timeout, so a stalled download would never end
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"the download failed: {first_line(error)}") from error
    except ValueError as error:  # the weights are for other builder arguments, usually another class count
        raise Unavailable(first_line(error)) from error
    except (RuntimeError, EOFError) as error:
        where = f" ({cached}; delete it to download again)" if cached else ""
        raise InvalidInput(f"cannot load the pretrained weights of {label}{where}: {first_line(error)}") from error
    finally:
        socket.setdefaulttimeout(before)
