"""Models of torchvision and timm: imports, constructors, example inputs and pretrained weights.

torchvision's operators are built for one exact build of torch; with another one (a CPU torch with a CUDA torchvision)
`import torchvision` fails at the missing schema of `nms`, which only detectors need: it is declared here. Downloads use
the libraries' loaders, after one short request that tests the connection, because the loaders retry for minutes.
"""

from __future__ import annotations

import functools
import http.client
import importlib
import importlib.util
import inspect
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from surgery.core import explained, first_line
from surgery.errors import InvalidInput, UnsupportedModel

PROBE_SECONDS = 4.0
STALLED_SECONDS = 20.0
_IMAGE = 224
_FRAMES = 16
_ERRORS = (TypeError, AssertionError, LookupError, AttributeError, ValueError, RuntimeError)
"""What builders raise on arguments that they do not take."""


class Unavailable(Exception):
    """Pretrained weights are not available, for the reason in the message. Caught here; random weights are used."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Preprocessing of images that published weights expect; the defaults are ImageNet's, used by most."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, for pixels from 0 to 1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # of each channel
    crop: float = 1.0  # side of the centre square relative to the shorter side, before resizing
    interpolation: str = "bilinear"  # or `bicubic`, `nearest`
    size: tuple[int, int] | None = None  # height and width; None for those of the example input


@dataclass(frozen=True, slots=True)
class Built:
    """A module, and its example inputs if its source provides any."""

    module: nn.Module
    args: tuple[Any, ...] | None = None
    kwargs: Arguments | None = None


Arguments = Mapping[str, Any]
"""Keyword arguments of a builder."""


@dataclass(frozen=True, slots=True)
class Source:
    """One way to get a model."""

    name: str  # safe for folders
    label: str  # in messages
    build: Callable[[Arguments], Built]  # → the model with its initial weights; downloads nothing
    initial: str = "random"  # description of the initial weights; `{seed}` is substituted
    accepts: Callable[[str], bool] = lambda name: False  # whether the builder has a keyword argument of this name
    pretrained: Callable[[Arguments], tuple[Built, str]] | None = None  # → model, name of its weights; or Unavailable
    shape: Callable[[nn.Module, Arguments], tuple[int, ...]] = lambda module, args: (1, 3, _IMAGE, _IMAGE)
    wrap: Callable[[Tensor], tuple[Any, ...]] = lambda image: (image,)  # example tensor → positional arguments
    variants: tuple[Arguments, ...] = ()  # to try for a checkpoint that does not fit the default
    runs: bool = True  # whether the whole model runs on its example inputs (detectors may not)
    notes: tuple[str, ...] = ()
    initial_notes: tuple[str, ...] = ()  # notes if no weights were given
    shape_notes: tuple[str, ...] = ()  # notes if no input shape was given, and the source has no inputs of its own
    preprocessing: Callable[[nn.Module], Preprocessing] = lambda module: Preprocessing()
    classes: Callable[[nn.Module], Sequence[str]] = lambda module: ()  # names of the published weights' classes


def import_torchvision() -> ModuleType:
    """Return torchvision, without operators that do not load; raises InvalidInput if its import fails otherwise."""
    try:
        return _imported("torchvision", "torchvision")
    except InvalidInput as error:
        if "torchvision::" not in str(error):
            raise
    _declare_operators()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # modules left by the failed import
    return _imported("torchvision", "torchvision")


def import_timm() -> ModuleType:
    """Return timm, which requires torchvision; errors as in `import_torchvision`."""
    import_torchvision()
    return _imported("timm", "'model-surgery[timm]'")


def _imported(package: str, requirement: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        raise InvalidInput(f"{package} is not installed; install it with `pip install {requirement}`")
    with explained(f"{package} does not import: install one that matches torch {torch.__version__}"):
        return importlib.import_module(package)


@functools.cache
def _declare_operators() -> torch.library.Library:
    """Declare the missing schemas; the cache keeps the library, and so the declarations, alive."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library


_FAMILIES: Mapping[str, Arguments] = {
    "detection": {
        "wrap": lambda images: (list(images.unbind(0)),),
        "runs": False,
        "notes": ("a detector's post-processing depends on its data: shrink a part of it, --submodule backbone",),
    },
    "optical_flow": {"wrap": lambda image: (image, image.roll(1, dims=-1))},
    "segmentation": {"shape_notes": ("example images are 256 x 256 unless --input-shape says otherwise",)},
}
_SIZES = {"segmentation": 256, "detection": 256, "optical_flow": 128}
_INCEPTIONS = ("googlenet", "inception_v3")
_AUXILIARY: tuple[Arguments, ...] = ({"aux_loss": True}, {"aux_logits": True}, {"aux_logits": False})


def torchvision_names() -> list[str]:
    """Return the names of torchvision's float models, all families."""
    return [name for name in import_torchvision().models.list_models() if not name.startswith("quantized_")]


def torchvision_source(name: str) -> Source:
    """Describe a model of torchvision: classification, segmentation, detection, video or optical flow."""
    models = import_torchvision().models
    if name.startswith("quantized_"):
        raise UnsupportedModel(f"{name} is already quantised; shrink the float model {name.removeprefix('quantized_')}")
    builder = models.get_model_builder(name)
    family, parameters = builder.__module__.split(".")[2], inspect.signature(builder).parameters.keys()
    default = getattr(models.get_model_weights(name), "DEFAULT", None)
    initial: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:
        initial["weights_backbone"] = None  # the default downloads a pretrained backbone
    if name in _INCEPTIONS:
        initial["init_weights"] = False  # their own initialisation takes five times as long as torch's default
    if name == "googlenet":
        initial["aux_logits"] = False  # as with its pretrained weights

    def pretrained(args: Arguments) -> tuple[Built, str]:
        if default is None:
            raise Unavailable(f"torchvision has no pretrained weights for {name}")
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(default.url).path).name
        if not cached.exists() and (reason := unreachable(default.url)):
            raise Unavailable(reason)
        with _downloading(name, cached):
            return _built(name, models.get_model, name=name, weights=default, **args), f"{default.name} (torchvision)"

    return Source(
        name=name,
        label=name,
        build=lambda args: _built(name, models.get_model, True, **{"name": name, **initial, **args}),
        accepts=lambda key: key in parameters or key == "num_classes",
        pretrained=pretrained,
        shape=lambda module, args: _torchvision_shape(family, module, default),
        variants=tuple(v for v in _AUXILIARY if v.keys() <= parameters or (name in _INCEPTIONS and "aux_logits" in v)),
        preprocessing=lambda module: _torchvision_preprocessing(default),
        classes=lambda module: getattr(default, "meta", {}).get("categories", ()),
        **_FAMILIES.get(family, {}),
    )


def _torchvision_shape(family: str, module: nn.Module, default: Any) -> tuple[int, ...]:
    if family in _SIZES:
        return (1, 3, _SIZES[family], _SIZES[family])
    size = getattr(getattr(default, "transforms", None), "keywords", {}).get("crop_size", _IMAGE)
    if family != "video":
        size = getattr(module, "image_size", size)  # transformers: may differ from the weights' crop
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return (1, 3, _FRAMES, height, width) if family == "video" else (1, 3, height, height)


def _torchvision_preprocessing(weights: Any) -> Preprocessing:
    """Return the preprocessing of the published weights' transforms; those for classification specify a crop."""
    transforms: Any = weights.transforms() if weights is not None else None
    crop, resize = (getattr(transforms, name, None) for name in ("crop_size", "resize_size"))
    if not crop or not resize:
        return Preprocessing()
    share = min(1.0, crop[0] / resize[0])
    return Preprocessing(tuple(transforms.mean), tuple(transforms.std), share, transforms.interpolation.value)


def timm_source(name: str) -> Source:
    """Describe a model of timm; raises InvalidInput if timm is not installed."""
    create, label = import_timm().create_model, f"timm:{name}"
    return Source(
        name=f"timm_{name}",
        label=label,
        build=lambda args: _built(label, create, True, **{"model_name": name, "pretrained": False, **args}),
        accepts=lambda key: key == "num_classes",
        pretrained=lambda args: _timm_pretrained(name, args),
        shape=_timm_shape,
        preprocessing=_timm_preprocessing,
        classes=lambda module: (getattr(module, "pretrained_cfg", None) or {}).get("label_names") or (),
    )


def _timm_preprocessing(module: nn.Module) -> Preprocessing:
    from timm.data import resolve_model_data_config  # timm is optional

    known = resolve_model_data_config(module)
    return Preprocessing(tuple(known["mean"]), tuple(known["std"]), known["crop_pct"], known["interpolation"])


def _timm_shape(module: nn.Module, args: Arguments) -> tuple[int, ...]:
    config = getattr(module, "pretrained_cfg", None) or {}
    channels, *sizes = config.get("input_size", (3, _IMAGE, _IMAGE))
    size = args.get("img_size", sizes)
    height, width = (size, size) if isinstance(size, int) else size
    return (1, int(args.get("in_chans", channels)), int(height), int(width))


def _timm_pretrained(name: str, args: Arguments) -> tuple[Built, str]:
    timm = import_timm()
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise Unavailable(f"timm has no pretrained weights for {name}")
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co") if config.hf_hub_id else config.url
    reason = unreachable(url) if url else None
    try:
        with _downloading(f"timm:{name}", None), _hub_offline(reason is not None):
            built = _built(f"timm:{name}", timm.create_model, model_name=name, pretrained=True, **args)
    except Unavailable as error:  # not cached either
        raise Unavailable(reason or str(error)) from error
    classes = args.get("num_classes", config.num_classes)
    new_head = "" if classes == config.num_classes else f", with a random classifier of {classes} classes"
    return built, f"{config.tag or 'pretrained'} (timm){new_head}"


@contextmanager
def _hub_offline(offline: bool) -> Iterator[None]:
    """Make the hub client use its cache immediately instead of retrying without a network."""
    from huggingface_hub import constants  # comes with timm

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _built(label: str, builder: Callable[..., nn.Module], random: bool = False, /, **arguments: Any) -> Built:
    """Call a library's builder; unless weights are being loaded, exceptions are attributed to --model-arg."""
    try:
        return Built(builder(**arguments))
    except _ERRORS as error:
        if isinstance(error, (ValueError, RuntimeError)) and not random:
            raise
        raise InvalidInput(f"cannot build {label}: {first_line(error)}; check --model-arg") from error


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
