"""Every option, declared once: its default, accepted values, help, and place.

The fields of a `Recipe` define the options of the command line, the keys of a TOML recipe, the arguments of `recipe`,
the checks of values and the table in the documentation. Imports neither torch nor other large packages.
"""

from __future__ import annotations

import ast
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from math import inf, isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

import tomli_w

from surgery.errors import InvalidInput
from surgery.registry import CRITERIA, RECOVERY_METHODS, Registry

# Kinds of values. ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """The values that an option accepts."""

    metavar: str
    accepts: str  # description of the accepted values, after "give"
    parse: Callable[[Any], Any] = lambda value: value  # may raise ValueError or TypeError
    accepted: Callable[[Any], object] = lambda value: True
    multiple: bool = False  # whether it may be repeated on the command line
    built_in: tuple[str, ...] = ()  # names, if the user's own code may register others
    objects: bool = False  # whether Python objects are accepted, which a file cannot hold

    def check(self, value: Any) -> Any:
        """Return the normalized value; raises ValueError or TypeError if it is not accepted."""
        found = self.parse(value)
        if not self.accepted(found):
            raise ValueError(self.accepts)
        return found

    def is_new(self, value: Any) -> bool:
        """Return whether a value names anything that is not built in, and may be registered by the user's own code."""
        return bool(self.built_in) and not {*_listed(value)} <= {*self.built_in}


_NUMBERS: Mapping[type, Any] = {int: Integral, float: Real}


def _number(value: Any, cast: type[int] | type[float]) -> Any:
    found, kind = cast(value) if isinstance(value, str) else value, _NUMBERS[cast]
    if not isinstance(found, kind) or isinstance(found, bool) or not isfinite(found):
        raise ValueError(value)
    return found if isinstance(found, (int, float)) else cast(found)  # those of numpy too


def _listed(value: Any) -> tuple[Any, ...]:
    """Split text at commas; a value that is no list makes a list of one."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else (value,)
    return tuple(part.strip() if isinstance(part, str) else part for part in parts)


def number(metavar: str, *, above: float = -inf, least: float = -inf, below: float = inf, most: float = inf) -> Kind:
    """Accept finite numbers within these ends."""
    ends = ((above, "above"), (least, "of at least"), (below, "below"), (most, "of at most"))
    accepts = "a number " + " and ".join(f"{word} {end:g}" for end, word in ends if isfinite(end))
    as_float = partial(_number, cast=float)
    return Kind(metavar, accepts, as_float, lambda x: above < x < below and least <= x <= most)


def whole(least: int) -> Kind:
    """Accept whole numbers from `least` on."""
    return Kind("N", f"a whole number of at least {least}", partial(_number, cast=int), lambda n: least <= n < 2**63)


def choice(*words: str) -> Kind:
    """Accept one of the words."""
    return Kind("|".join(words), f"one of {', '.join(words)}", accepted=lambda word: word in words)


def registered(registry: Registry, metavar: str, accepted: Callable[[Any], bool] = lambda value: False) -> Kind:
    """Accept the names of a registry, those that were added since included, or another `accepted` value."""
    words = tuple(registry.names())
    accepts = f"one of {', '.join(words)}"
    return Kind(metavar, accepts, accepted=lambda x: accepted(x) or x in registry.names(), built_in=words)


def several(*words: str, built_in: tuple[str, ...] = ()) -> Kind:
    """Accept some of the words; with `built_in`, any others too, checked where they are used."""
    accepts, parse = f"some of {', '.join(words)}", lambda value: tuple(dict.fromkeys(_listed(value)))
    return Kind(",".join(words), accepts, parse, lambda x: x and (built_in or set(x) <= {*words}), built_in=built_in)


def names(metavar: str, accepts: str) -> Kind:
    """Accept a list of texts, or one text."""
    as_list = lambda value: (value,) if isinstance(value, str) else tuple(value)  # noqa: E731
    return Kind(metavar, accepts, as_list, lambda x: all(isinstance(part, str) for part in x), multiple=True)


def numbers(metavar: str, accepts: str, cast: type[int] | type[float], lengths: Sequence[int] = ()) -> Kind:
    """Accept a list of numbers: positive whole ones for `int`, finite ones for `float`."""
    least = 1 if cast is int else -inf
    return Kind(
        metavar,
        accepts,
        lambda value: tuple(_number(part, cast) for part in _listed(value)),
        lambda found: min(found) >= least and (not lengths or len(found) in lengths),
    )


def text(metavar: str, accepts: str) -> Kind:
    """Accept text, and paths as text."""
    return Kind(metavar, accepts, os.fspath, lambda value: isinstance(value, str))


def _assignment(value: Any) -> dict[str, Any]:
    """Parse ``NAME=VALUE``, with Python's literals as values where they are such."""
    if not isinstance(value, str):
        return dict(value)
    key, equals, content = value.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(value)
    try:
        return {key: ast.literal_eval(content)}
    except (ValueError, SyntaxError):
        return {key: content}


FLAG = Kind("", "true or false", accepted=lambda value: isinstance(value, bool))
ASSIGNMENTS = Kind("NAME=VALUE", "NAME=VALUE, as in num_classes=10", _assignment, multiple=True)
FRACTION = number("R", above=0, below=1)
FOLDER = text("DIR", "a folder's path")
ACCEPTED_IMAGES = (
    "a folder of images, an .npz file with 'images' (N,H,W,C), uint8, and optionally 'labels', or FILE.py:CALLABLE "
    "that returns a DataLoader"
)
IMAGES = Kind("IMAGES", ACCEPTED_IMAGES, objects=True)
PER_CHANNEL = numbers("R,G,B", "a number for each channel, as in 0.5,0.5,0.5", float)


@dataclass(frozen=True, slots=True)
class Option:
    """Declaration of a field."""

    default: Any
    kind: Kind  # None is also accepted if it is the default
    help: str
    heading: str = ""  # in the help; by default that of the group
    common: bool = False  # whether it is on the first page of the help
    unset: str = ""  # meaning of None
    name: str = ""
    group: str = ""

    @property
    def flag(self) -> str:
        """The option as on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def shown_default(self) -> str:
        """Description of the default; empty for none."""
        if self.unset or self.default in (None, (), dict):
            return self.unset
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        return ",".join(self.default) if isinstance(self.default, tuple) else str(self.default)

    def default_in(self, case: Recipe | None) -> str:
        """Description of the default where these other options are given."""
        value = None if case is None else getattr(getattr(case, self.group), self.name)
        return str(value) if self.default is None and isinstance(value, (str, int, float)) else self.shown_default

    def checked(self, value: Any, prefix: str) -> Any:
        """Return the normalized value; raises InvalidInput, its message prefixed, if it is not accepted."""
        if value is None and self.default is None:
            return None
        try:
            return self.kind.check(value)
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"{prefix}: give {self.kind.accepts}") from error


def option(default: Any, kind: Kind, help: str, **more: Any) -> Any:
    """Declare a field of a group; `more` are attributes of `Option`."""
    made = {"default_factory": dict} if default is dict else {"default": default}
    return field(**made, metadata={"option": Option(default, kind, help, **more)})


class Group:
    """Base class of the groups; fields are checked and normalized on construction."""

    __slots__ = ()
    HEADING: ClassVar[str]

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            object.__setattr__(self, name, OPTIONS[name].checked(value, f"{name}={value!r:.80}"))


# The groups. ---------------------------------------------------------------------------------------------------------

TRACERS = {"export": True, "torch-pruning": False}  # tracer → whether it provides a graph of operators
DEPLOYED = ("fp32", "int8")  # precisions that a latency budget may refer to

# fmt: off


@dataclass(frozen=True, slots=True)
class Model(Group):
    """The model to shrink."""

    HEADING = "Model"
    model: Any = option(
        None, Kind("MODEL", "a model's name", objects=True),
        "A torchvision name (resnet18), timm:NAME, FILE.py:CALLABLE or package.module:CALLABLE that returns a module, "
        "or a .pt2 exported program.")
    weights: str = option(
        "auto", text("auto|random|PATH", "auto, random, or the path of a checkpoint"), common=True,
        help="Pretrained if available, random, or a file. The file is a safetensors or weights-only checkpoint.")
    input_shape: tuple[int, ...] | None = option(
        None, numbers("N,C,H,W", "a shape: positive whole numbers, as in 1,3,224,224", int),
        "Shape of the example input.", common=True, unset="the model's own")
    ignore_extra: bool = option(
        False, FLAG, "Ignore tensors of the checkpoint that the model does not have, as of losses and teachers.")
    model_arg: Mapping[str, Any] = option(
        dict, ASSIGNMENTS, "Passed to the model's constructor, as in num_classes=10; may be repeated.")
    trust: bool = option(
        False, FLAG, "Load a .pt2 file with pickled objects or unknown operators, which can execute arbitrary code.")


@dataclass(frozen=True, slots=True)
class Budget(Group):
    """The target: a fraction of the dense model (0 < R < 1), or milliseconds in ONNX Runtime. At most one is set."""

    HEADING = "Budget"
    latency: float | None = option(
        None, FRACTION, "Fraction of the dense latency to keep.", common=True, unset="0.5, without another budget")
    latency_ms: float | None = option(
        None, number("X", above=0), "Latency to reach, in milliseconds.", common=True)
    macs: float | None = option(None, FRACTION, "Fraction of the MACs to keep.", common=True)
    params: float | None = option(None, FRACTION, "Fraction of the parameters to keep.", common=True)
    channels: float | None = option(None, FRACTION, "Fraction of all removable units to keep.")

    def __post_init__(self) -> None:
        Group.__post_init__(self)
        if len(self._set) > 1:
            flags = " and ".join(OPTIONS[name].flag for name in self._set)
            raise InvalidInput(f"{flags} are given, but a run has one budget; choose one of them")
        for name in self._set:
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def _set(self) -> list[str]:
        return [name for name, value in asdict(self).items() if value is not None]

    @property
    def is_set(self) -> bool:
        """Whether a budget is set."""
        return bool(self._set)

    @property
    def kind(self) -> str:
        """`macs`, `params`, `channels`, `latency` or `latency_ms`."""
        if not self.is_set:
            raise InvalidInput(f"the budget is not set: give one of {', '.join(f.name for f in fields(self))}")
        return self._set[0]

    @property
    def amount(self) -> float:
        """The fraction of the dense model to keep, or milliseconds."""
        return float(getattr(self, self.kind))

    @property
    def is_latency(self) -> bool:
        """Whether it is a latency budget."""
        return self.latency is not None or self.latency_ms is not None


@dataclass(frozen=True, slots=True)
class Selection(Group):
    """Selection of what to remove."""

    HEADING = "Advanced"
    max_drop: float | None = option(
        None, number("P", above=0, below=100), heading="Budget", common=True,
        help="Instead of a budget: find the fastest model that loses at most P points. Points are the upper end of the "
        "95 % interval of the accuracy lost on labelled --val, else the loss in the first value of --metric, else in "
        "agreement with the dense model on --data.")
    steps: int = option(1, whole(1), "Prune in N steps, each followed by recovery; not for latency budgets.")
    criterion: Any = option(
        None, registered(CRITERIA, "NAME", callable), f"Importance of a unit: {', '.join(CRITERIA.names())}.",
        unset="second-order with --data, else signal for a latency budget, else l1")
    scope: str = option(
        "global", choice("global", "uniform"), "Rank all units together, or keep the same share of every group.")
    round_to: int = option(1, whole(1), "Keep multiples of N units per group.")
    inexact: str = option(
        "if-needed", choice("never", "if-needed", "always"),
        "Cut units whose removal is not the same as setting them to zero (norms, means).")
    keep: tuple[str, ...] = option(
        (), names("PATTERN", "patterns of names, such as 'fc' or 'layer4.*'"),
        "Do not prune modules or parameters of this name (wildcards: * and ?); may be repeated.")
    own_class: bool = option(
        False, FLAG, "Do not prune what your model's own code cannot run at other sizes, so that its class is kept.")
    submodule: str | None = option(
        None, text("NAME", "the submodule's dotted name, such as 'backbone'"),
        "Shrink this submodule only; its interface is unchanged.")
    drop_layers: bool = option(
        True, FLAG, "Remove whole residual blocks and depthwise layers: dead ones, and those with the most latency "
        "relative to their importance.")
    tracer: str = option(
        "export", choice(*TRACERS),
        "How the model is captured; torch-pruning for models that torch.export cannot capture.")
    fixed_size: bool = option(
        False, FLAG, "Fix height and width at the example's, without trying to keep them dynamic.")
    seed: int = option(0, whole(0), "Seed of all random numbers.")

    @property
    def has_graph(self) -> bool:
        """Whether the tracer provides a graph of operators."""
        return TRACERS[self.tracer]


@dataclass(frozen=True, slots=True)
class Target(Group):
    """Deployment target of the compact model."""

    HEADING = "Deployment"
    deploy: str = option(
        "fp32", choice(*DEPLOYED), common=True,
        help="Precision that the latency budget refers to. With int8, the compact int8 file is compared with the dense "
        "int8 file.")
    threads: int = option(1, whole(1), "Intra-op threads of ONNX Runtime.", common=True)
    batch: int = option(1, whole(1), "Items per timed run.")
    latency_table: Any = option(
        None, Kind("FILE", "the path of a table that `surgery profile` wrote", objects=True), common=True,
        help="Plan with this latency table. It can be that of another device; planning measures nothing then.",
        unset="this machine's")
    acceptance: str | None = option(
        None, text("FILE", "the path of an acceptance"),
        "Correct the plan by a measurement of an earlier one on the table's device.")
    correct: bool = option(True, FLAG, "Time the compact model and correct the plan until the latency is met.")
    best_effort: bool = option(
        False, FLAG, "Accept a latency budget that is not met. Otherwise such files go to OUT.unmet, with exit code 5.")


@dataclass(frozen=True, slots=True)
class Data(Group):
    """Images for calibration, recovery and evaluation."""

    HEADING = "Data"
    data: Any = option(
        None, IMAGES, common=True,
        help=f"Images for selection and recovery, labels not needed. Accepted are {ACCEPTED_IMAGES}.")
    val: Any = option(None, IMAGES, "Images for evaluation; with labels, the accuracy lost is measured.", common=True)
    classes: str | None = option(
        None, text("FILE", "the path of a text file with a class's name a line"),
        "Names of the model's classes, one a line in the order of its outputs, which folders of --val and --data are "
        "called by.", unset="those of ImageNet or the published weights, else folders in alphabetical order")
    allow_chance: bool = option(
        False, FLAG, "Continue even if the dense model is no better than chance on the labels of --val.")
    metric: Any = option(
        None, Kind("FILE.py:CALLABLE", "a function of a model that returns {metric: value}", objects=True),
        "A function from a model to {metric: value}; called with the torch models and the exported files.")
    max_images: int = option(512, whole(1), "Maximum number of images of --data used for selection and reconstruction.")
    mean: tuple[float, ...] | None = option(
        None, PER_CHANNEL, "Mean of each channel, for pixel values from 0 to 1.", unset="the model's own")
    std: tuple[float, ...] | None = option(
        None, PER_CHANNEL, "Standard deviation of each channel.", unset="the model's own")
    size: tuple[int, ...] | None = option(
        None, numbers("N|H,W", "one number, or height and width as in 192,256", int, (1, 2)),
        "Height and width of the images.", unset="the example input's")
    crop: float | None = option(
        None, number("F", above=0, most=1), "Fraction of an image's shorter side kept by the center crop.",
        unset="the model's own")


@dataclass(frozen=True, slots=True)
class Recovery(Group):
    """Recovery of the compact model's accuracy."""

    HEADING = "Recovery"
    recover: str | None = option(
        None, registered(RECOVERY_METHODS, "METHOD"), common=True,
        help=f"How to recover accuracy: {', '.join(RECOVERY_METHODS.names())}.",
        unset="reconstruct with --data, else fold for trained weights, else none")
    epochs: int = option(10, whole(1), "Training epochs, for distill and finetune.", common=True)
    lr: float = option(3e-4, number("X", above=0, below=10), "Peak learning rate of AdamW.")
    train_batch: int = option(128, whole(1), "Images per step, in total over all processes.")
    weight_decay: float = option(1e-4, number("X", least=0), "Weight decay of AdamW, for weights with 2 or more axes.")
    temperature: float = option(2.0, number("T", above=0), "Softmax temperature in distillation.")
    ema: float = option(
        0.99, number("X", least=0, below=1), "Decay of the moving average of the weights; 0 disables averaging.")
    mixed_precision: str = option("no", choice("no", "fp16", "bf16"), "Precision of training.")
    held_out: float = option(
        0.05, number("R", least=0, below=1), "Fraction of the images held out to measure progress; 0 for none.")
    patience: int = option(5, whole(1), "Epochs without improvement after which training stops.")
    shift: float = option(0.125, number("R", least=0, below=1), "Shift images by up to this fraction of their size.")
    flip: bool | None = option(None, FLAG, "Flip half of the images horizontally.", unset="for distill only")
    mix: bool = option(True, FLAG, "Mix half of the images in pairs; for distill only.")
    checkpoint_steps: int = option(200, whole(1), "Steps between checkpoints of training.")
    checkpoint: str | None = option(None, FOLDER, "Folder for checkpoints of training.", unset="beside --out")


@dataclass(frozen=True, slots=True)
class Output(Group):
    """Output files and their timing."""

    HEADING = "Deployment"
    out: str | None = option(
        None, FOLDER, "Output folder, replaced as a whole.", heading="Output", common=True, unset="shrunk/MODEL")
    precision: tuple[str, ...] = option(
        ("fp32",), several("fp32", "fp16", "int8"), common=True,
        help="Precisions in which files are written; int8 is calibrated on --data.")
    int8_method: str = option(
        "minmax", choice("minmax", "entropy", "percentile"), "Calibration method for the ranges of activations.")
    int8_keep: tuple[str, ...] = option(
        (), names("first|last|PATTERN", "first, last, or patterns of names"),
        "Keep layers in float32: the first, the last, nodes or operators of this name (wildcards: * and ?); may be "
        "repeated.")
    int8_reduce_range: bool = option(False, FLAG, "7-bit weights, for x86 processors without VNNI.")
    opset: int | None = option(None, whole(18), "ONNX opset.", unset="20, or less for an older --min-ort")
    format: tuple[str, ...] = option(
        ("onnx",), several("onnx", "ort", built_in=("onnx", "ort")),
        "Formats of the compact files; ort is the one that ONNX Runtime's mobile builds load. ONNX files are always "
        "written.")
    min_ort: str | None = option(
        None, text("VERSION", "a version of ONNX Runtime, as in 1.16"),
        "Oldest ONNX Runtime that must be able to load the files.")
    runs: int = option(2000, whole(3), "Maximum timed runs per file; fewer if intervals are narrow. A p99 needs 1000.")


# fmt: on


# The recipe. ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """All options of a run, in groups. `recipe` makes one from flat names."""

    model: Model = field(default_factory=Model)
    budget: Budget = field(default_factory=Budget)
    selection: Selection = field(default_factory=Selection)
    target: Target = field(default_factory=Target)
    data: Data = field(default_factory=Data)
    recovery: Recovery = field(default_factory=Recovery)
    output: Output = field(default_factory=Output)

    @property
    def goal(self) -> Budget:
        """The budget, or the default one: half of the latency; the mildest cut where `max_drop` decides."""
        if self.budget.is_set:
            return self.budget
        if self.selection.max_drop is not None:
            return MILDEST
        return DEFAULT_BUDGET if self.selection.has_graph else WITHOUT_PROGRAM

    @property
    def criterion(self) -> Any:
        """The criterion, or the default one: by images if there are any."""
        if self.selection.criterion is not None:
            return self.selection.criterion
        if self.data.data is not None and self.selection.has_graph:
            return "second-order"
        return "signal" if self.goal.is_latency else "l1"

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions in which files are written, with the one that a latency refers to."""
        return tuple(dict.fromkeys((*self.output.precision, self.target.deploy)))

    def but(self, **options: Any) -> Recipe:
        """Return the recipe with other values of these options; names and errors are those of `recipe`."""
        changes: dict[str, dict[str, Any]] = {}
        for name, value in options.items():
            if name in GROUPS and isinstance(value, GROUPS[name]):
                changes.setdefault(name, {}).update({f.name: getattr(value, f.name) for f in fields(value)})
            elif name in OPTIONS:
                changes.setdefault(OPTIONS[name].group, {})[name] = value
            else:
                raise InvalidInput(f"there is no option '{name}'{_nearest(name)}")
        return replace(self, **{group: replace(getattr(self, group), **values) for group, values in changes.items()})


GROUPS: Mapping[str, type[Any]] = {f.name: f.default_factory for f in fields(Recipe)}  # type: ignore[misc]
OPTIONS: Mapping[str, Option] = {
    f.name: replace(found, name=f.name, group=group, heading=found.heading or kind.HEADING)
    for group, kind in GROUPS.items()
    for f in fields(kind)
    for found in [f.metadata["option"]]
}
"""Every option by name."""
HEADINGS = ("Model", "Budget", "Data", "Recovery", "Deployment", "Output", "Advanced")
ONE_OF = (*(f.name for f in fields(Budget)), "max_drop")  # mutually exclusive options
OLD_NAMES: Mapping[str, tuple[str, str | None]] = {
    **{"exact": ("inexact", "never"), "allow_inexact": ("inexact", "always"), "part": ("submodule", None)},
    **{"eval": ("metric", None), "evaluate": ("metric", None), "images": ("max_images", None)},
}
"""Former name of an option → its name, and the value that the former one stands for (None: the given value)."""

DEFAULT_BUDGET = Budget(latency=0.5)
MILDEST = Budget(latency=0.95)  # mildest cut that the max-drop search tries, as a fraction of the dense latency
WITHOUT_PROGRAM = Budget(macs=0.5)
"""The default for models that `torch.export` cannot capture, whose operators at run time are not known."""


def _nearest(name: str) -> str:
    found = difflib.get_close_matches(name, OPTIONS, 1, 0.5)
    return f"; the nearest is '{found[0]}'" if found else ""


def recipe(**options: Any) -> Recipe:
    """Return a recipe: options by the names of the command line, as in ``recipe(latency=0.5, data="photos")``.

    Raises:
        InvalidInput: there is no such option (the message names the nearest), or a value is not accepted.
    """
    return Recipe().but(**options)


def current(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return options with former names replaced, and a deprecation message for each."""
    found, messages = dict[str, Any](), list[str]()
    for name, value in options.items():
        new, implied = OLD_NAMES.get(name, (name, None))
        found[new] = value if implied is None else implied
        if new != name:
            now = new if implied is None else f"{new} {implied}"
            messages.append(f"option '{name}' is now '{now}'; the old name will be removed in the next version")
    return found, messages


# Recipes as files, and the table of options in the documentation. ----------------------------------------------------


def read_recipe(path: str | Path, *, registered: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Return the options in a TOML file, and a deprecation message for each former name.

    Unknown names of what may be `registered` are accepted until the user's own code has registered them. Raises
    InvalidInput if the file cannot be read, or a key or value is not accepted: the message names its line.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
        given = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path}: not TOML: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"cannot read recipe {path}: {error}") from error
    found, messages = current(given)
    for name, value in found.items():
        line = re.search(rf"""^\s*\[?["']?{re.escape(name)}["']?\s*[=.\]]""", content, re.MULTILINE)
        where = f"{path}, line {content.count(chr(10), 0, line.end()) + 1 if line else 1}"
        if name in GROUPS and isinstance(value, Mapping):
            raise InvalidInput(f"{where}: recipes have no tables; write the keys of [{name}] without that line")
        if name not in OPTIONS:
            raise InvalidInput(f"{where}: there is no key '{name}'{_nearest(name)}")
        if OPTIONS[name].kind.objects and not isinstance(value, str):
            raise InvalidInput(f"{where}: {name} = {value!r:.80}: give {OPTIONS[name].kind.accepts}")
        if registered or not OPTIONS[name].kind.is_new(value):
            found[name] = OPTIONS[name].checked(value, f"{where}: {name} = {value!r:.80}")
    return found, [f"{path}: {message}" for message in messages]


def to_toml(recipe: Recipe) -> str:
    """Return the recipe as TOML, including defaults; Python objects become comments."""
    parts = {group: f"# {group}\n" for group in GROUPS} | {"tables": ""}
    for name, found in OPTIONS.items():
        value = getattr(getattr(recipe, found.group), name)
        if value is None or value == {}:
            continue
        try:
            written = tomli_w.dumps({name: value})
        except TypeError:
            written = f"# {name}: an object of Python\n"
        parts["tables" if isinstance(value, Mapping) else found.group] += written
    return "\n".join(part for part in parts.values() if part.count("\n") > 1)


def options_table() -> str:
    """Return all options as Markdown: a table for each heading."""
    parts = []
    for heading in HEADINGS:
        cells = [
            (f"`{found.flag}`", found.kind.accepts, found.shown_default, found.help)
            for found in OPTIONS.values()
            if found.heading == heading and found.name != "model"
        ]
        rows = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in cells]
        parts.append(f"### {heading}\n\n| option | value | default | |\n| --- | --- | --- | --- |\n{''.join(rows)}")
    return "\n".join(parts)


# Defaults that depend on other options, and rules across options. ---------------------------------------------------


def resolved(recipe: Recipe, *, trained: bool = False) -> Recipe:
    """Return the recipe with defaults that depend on other options, and on whether the weights are trained."""
    default = "reconstruct" if recipe.data.data is not None else "fold" if trained else "none"
    budget = recipe.budget if recipe.selection.max_drop is not None else recipe.goal
    return recipe.but(budget=budget, criterion=recipe.criterion, recover=recipe.recovery.recover or default)


def validate(recipe: Recipe) -> None:
    """Raise InvalidInput if options are incompatible."""
    for is_broken, message in _rules(recipe):
        if is_broken:
            raise InvalidInput(message)


# fmt: off
def _rules(recipe: Recipe) -> Sequence[tuple[bool, str]]:
    """Return whether each rule across options is broken, and the message."""
    selection, target, data, recovery = recipe.selection, recipe.target, recipe.data, recipe.recovery
    kind, latency, graph, method = recipe.goal.kind, recipe.goal.is_latency, selection.has_graph, recovery.recover
    search, in_steps, blind = selection.max_drop is not None, selection.steps > 1, data.data is None
    trains = RECOVERY_METHODS.has_need(method, "gradients")
    of_training = [OPTIONS[f.name] for f in fields(recovery) if f.name not in ("recover", "checkpoint", "flip")]
    give = "give a budget of macs, params or channels with it"
    only_for_latency = {
        "--latency-table": target.latency_table is not None, "--acceptance": target.acceptance is not None,
        "--no-correct": not target.correct, f"--deploy {target.deploy}": target.deploy != DEPLOYED[0],
    }
    return (
        (latency and not graph,
         f"a latency budget needs the operators that torch.export captures; {give}: tracer torch-pruning"),
        (latency and selection.round_to != 1,
         f"round_to does not go with a latency budget: widths go by the device's own steps; {give}"),
        (latency and selection.scope != "global",
         f"scope={selection.scope!r} does not go with a latency budget: time decides among all groups; {give}"),
        *((given and not latency,
           f"{name} is for budgets of time, this one is of {kind}: leave it out, or give --latency")
          for name, given in only_for_latency.items()),
        (target.acceptance is not None and target.latency_table is None,
         f"acceptance {target.acceptance} corrects a latency by the table of its device; give it with --latency-table"),
        (search and recipe.budget.is_set, "--max-drop looks for the lowest latency: give no budget with it"),
        (search and blind and target.deploy != DEPLOYED[0],
         f"--max-drop evaluates files in {target.deploy}: give images to calibrate them on with --data"),
        (search and blind and data.val is None and data.metric is None,
         "--max-drop needs something to evaluate on: give --val with labels, --metric, or --data"),
        (search and (target.latency_table is not None or not graph),
         "--max-drop times models on this machine: leave --latency-table and --tracer out"),
        (in_steps and (search or latency),
         "--steps goes with --macs, --params or --channels: a latency is corrected by measuring instead"),
        (in_steps and blind, "--steps recovers after each step: give images with --data"),
        (in_steps and (not graph or selection.submodule is not None),
         "--steps goes with whole models that torch.export captures: leave --tracer and --submodule out"),
        (blind and CRITERIA.has_need(selection.criterion, "images"),
         f"criterion {selection.criterion} uses images: give some with --data"),
        *((blind and data.val is None and getattr(data, name) is not None,
           f"--{name} is for images: give those with --data or --val, or leave it out")
          for name in ("mean", "std", "size", "crop", "classes")),
        (blind and RECOVERY_METHODS.has_need(method, "images"),
         f"--recover {method} uses images: give them with --data, or choose fold, which needs none"),
        *((not trains and getattr(recovery, found.name) != found.default,
           f"{found.flag} is for training: add --recover distill or finetune") for found in of_training),
    )
# fmt: on
