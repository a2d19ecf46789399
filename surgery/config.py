"""Every option, declared once: its default, accepted values, help, and place.

A `Recipe` is made of frozen groups of fields. From the fields follow the options of the command line, the keys of a
TOML recipe, the arguments of `recipe`, the checks of values and the table in the documentation. `validate` holds the
rules across fields. Imports neither torch nor anything else heavy.
"""

from __future__ import annotations

import ast
import difflib
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

import tomli_w

from surgery.errors import InvalidInput
from surgery.registry import CRITERIA, RECOVERY_METHODS, Registry

# Kinds of values. ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """The values that an option accepts.

    Attributes:
        metavar: placeholder of a value in the help.
        accepts: description of the accepted values, after "give".
        check: value → normalized value; raises ValueError if it is not accepted.
        parse: text of the command line → value.
        choices: all accepted words, if few.
        multiple: whether the option may be repeated on the command line.
    """

    metavar: str
    accepts: str
    check: Callable[[Any], Any]
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    multiple: bool = False


def _require(accepted: bool, value: Any) -> Any:
    if not accepted:
        raise ValueError
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(metavar: str, *, above: float = -inf, least: float = -inf, below: float = inf, most: float = inf) -> Kind:
    """Accept finite numbers within these ends."""
    ends = ((above, "above"), (least, "of at least"), (below, "below"), (most, "of at most"))
    accepts = " and ".join(f"{word} {end:g}" for end, word in ends if isfinite(end))

    def check(value: Any) -> float:
        known = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
        return _require(known and above < value < below and least <= value <= most, value)  # type: ignore[no-any-return]

    return Kind(metavar, f"a number {accepts}", check, float)


def whole(least: int, metavar: str = "N") -> Kind:
    """Accept whole numbers from `least` on."""

    def check(value: Any) -> int:
        return _require(_is_whole(value) and least <= value < 2**63, value)  # type: ignore[no-any-return]

    return Kind(metavar, f"a whole number of at least {least}", check, int)


def choice(*words: str, metavar: str = "", known: Callable[[Any], bool] = lambda value: False) -> Kind:
    """Accept one of the words, or another value that is `known`."""

    def check(value: Any) -> Any:
        return _require((isinstance(value, str) and value in words) or known(value), value)

    return Kind(metavar or "|".join(words), f"one of {', '.join(words)}", check, choices=words)


def registered(registry: Registry[Any], metavar: str, known: Callable[[Any], bool] = lambda value: False) -> Kind:
    """Accept the names of a registry, those that were added since included, or another value that is `known`."""

    def check(value: Any) -> Any:
        return _require((isinstance(value, str) and value in registry.names()) or known(value), value)

    words = tuple(registry.names())
    return Kind(metavar, f"one of {', '.join(words)}", check, choices=words)


def several(*words: str, others: bool = False) -> Kind:
    """Accept some of the words: a list, or text with commas; with `others`, any words, checked where they are used."""

    def check(value: Any) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        found = tuple(dict.fromkeys(part.strip() if isinstance(part, str) else part for part in parts))
        return _require(bool(found) and all(others or part in words for part in found), found)  # type: ignore[no-any-return]

    return Kind(",".join(words), f"some of {', '.join(words)}", check, choices=words)


def names(metavar: str, accepts: str) -> Kind:
    """Accept a list of texts, or one text."""

    def check(value: Any) -> tuple[str, ...]:
        found = (value,) if isinstance(value, str) else value
        _require(isinstance(found, Sequence) and all(isinstance(part, str) for part in found), found)
        return tuple(found)

    return Kind(metavar, accepts, check, multiple=True)


def numbers(metavar: str, accepts: str, cast: type[int] | type[float], lengths: Sequence[int] = ()) -> Kind:
    """Accept a list of numbers: positive whole ones for `int`, finite ones for `float`."""

    def check(value: Any) -> tuple[float, ...]:
        found = (value,) if isinstance(value, (int, float)) else tuple(value)
        good = [_is_whole(x) and x > 0 if cast is int else isinstance(x, (int, float)) for x in found]
        return _require(bool(found) and all(good) and (not lengths or len(found) in lengths), found)  # type: ignore[no-any-return]

    return Kind(metavar, accepts, check, lambda text: tuple(cast(part) for part in text.split(",")))


def text(metavar: str, accepts: str) -> Kind:
    """Accept text, and paths as text."""
    return Kind(metavar, accepts, lambda value: str(_require(isinstance(value, (str, Path)), value)))


def anything(metavar: str, accepts: str) -> Kind:
    """Accept text, or an object that is checked where it is used."""
    return Kind(metavar, accepts, lambda value: value)


def _assignment(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    _require(bool(equals) and key.isidentifier(), text)
    try:
        return {key: ast.literal_eval(value)}
    except (ValueError, SyntaxError):
        return {key: value}


FLAG = Kind("", "true or false", lambda value: _require(isinstance(value, bool), value))
ASSIGNMENTS = Kind(
    "NAME=VALUE",
    "NAME=VALUE, as in num_classes=10",
    lambda value: dict(_require(isinstance(value, Mapping), value)),
    _assignment,
    multiple=True,
)
FRACTION = number("R", above=0, below=1)


@dataclass(frozen=True, slots=True)
class Option:
    """Declaration of a field.

    Attributes:
        kind: accepted values; None is also accepted if it is the default.
        help: one or two sentences.
        group: heading in the help.
        common: whether it is on the first page of the help.
        unset: description of the meaning of None.
        was: names in earlier versions → the implied value, or None for the given value.
    """

    kind: Kind
    help: str
    group: str
    common: bool = False
    unset: str = ""
    was: Mapping[str, Any] = field(default_factory=dict)


def option(default: Any, kind: Kind, help: str, group: str, **more: Any) -> Any:
    """Declare a field of a group; `more` are attributes of `Option`."""
    return field(default=default, metadata={"option": Option(kind, help, group, **more)})


def option_of(declared: Any) -> Option:
    """Return what a dataclass field declares."""
    found = declared.metadata["option"]
    assert isinstance(found, Option)
    return found


class Group:
    """Base class of the groups; fields are checked and normalized on construction."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for declared in fields(self):  # type: ignore[arg-type]
            value = getattr(self, declared.name)
            object.__setattr__(self, declared.name, checked(declared, value, f"{declared.name}={value!r:.80}"))


def checked(declared: Any, value: Any, told: str) -> Any:
    """Return the normalized value of a field; raises InvalidInput, prefixed by `told`, if it is not accepted."""
    found = option_of(declared)
    if value is None and declared.default is None:
        return None
    try:
        return found.kind.check(value)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{told}: give {found.kind.accepts}") from error


# The groups. ---------------------------------------------------------------------------------------------------------

TRACERS = {"export": True, "torch-pruning": False}
"""Tracer → whether it provides a graph of operators."""
DEPLOYED = ("fp32", "int8")
"""Precisions that a latency budget may refer to."""

_IMAGES = (
    "a folder of images, an .npz file with 'images' (N,H,W,C) of uint8 and perhaps 'labels', or FILE.py:CALLABLE that "
    "returns a DataLoader"
)


@dataclass(frozen=True, slots=True)
class Model(Group):
    """The model to shrink."""

    model: Any = option(
        None, anything("MODEL", "a model's name"),
        "A torchvision name (resnet18), timm:NAME, FILE.py:CALLABLE or package.module:CALLABLE that returns a module, "
        "or a .pt2 exported program.", "Model",
    )  # fmt: skip
    weights: str = option(
        "auto", text("auto|random|PATH", "auto, random, or the path of a checkpoint"),
        "Pretrained if available, random, or a file. The file is a safetensors or weights-only checkpoint.",
        "Model", common=True,
    )  # fmt: skip
    input_shape: tuple[int, ...] | None = option(
        None, numbers("N,C,H,W", "a shape: positive whole numbers, as in 1,3,224,224", int),
        "Shape of the example input.", "Model", common=True, unset="the model's own",
    )  # fmt: skip
    model_arg: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"option": Option(
            ASSIGNMENTS, "Passed to the model's constructor, as in num_classes=10; may be repeated.", "Model",
        )},
    )  # fmt: skip
    trust: bool = option(
        False, FLAG, "Load a .pt2 file that holds pickled payloads: it can run any code.", "Model"
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget(Group):
    """The target: a fraction of the dense model (0 < R < 1), or milliseconds. At most one is set.

    Attributes:
        latency: fraction of the dense model's latency in ONNX Runtime.
        latency_ms: latency in ONNX Runtime, in milliseconds.
        macs: fraction of the multiply-adds.
        params: fraction of the parameters.
        channels: fraction of all removable units.

    Raises:
        InvalidInput: several are set, or one is out of range.
    """

    latency: float | None = option(
        None, FRACTION, "Fraction of the dense latency to keep.", "Budget", common=True,
        unset="0.5, without another budget",
    )  # fmt: skip
    latency_ms: float | None = option(
        None, number("X", above=0), "Latency to reach, in milliseconds.", "Budget", common=True
    )
    macs: float | None = option(None, FRACTION, "Fraction of the MACs to keep.", "Budget", common=True)
    params: float | None = option(None, FRACTION, "Fraction of the parameters to keep.", "Budget", common=True)
    channels: float | None = option(None, FRACTION, "Fraction of all removable units to keep.", "Budget")

    def __post_init__(self) -> None:
        Group.__post_init__(self)
        given = [f"--{k.replace('_', '-')}" for k, v in asdict(self).items() if v is not None]
        if len(given) > 1:
            raise InvalidInput(f"{' and '.join(given)} are given, but a run has one budget; choose one of them")

    @property
    def is_set(self) -> bool:
        """Whether a budget is set."""
        return any(v is not None for v in asdict(self).values())

    @property
    def kind(self) -> str:
        """`macs`, `params`, `channels`, `latency` or `latency_ms`."""
        found = next((k for k, v in asdict(self).items() if v is not None), None)
        if found is None:
            raise InvalidInput(f"the budget is not set: give one of {', '.join(f.name for f in fields(self))}")
        return found

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

    max_drop: float | None = option(
        None, number("P", above=0, below=100),
        "Instead of a budget: the fastest model that loses at most P points. They are the upper end of the 95 % "
        "interval of the accuracy lost on labelled --val; else points of --metric's first figure, else of agreement "
        "with the dense model on --data.", "Budget", common=True,
    )  # fmt: skip
    steps: int = option(1, whole(1), "Cut in N steps, with a recovery in between; not for latencies.", "Advanced")
    criterion: Any = option(
        None, registered(CRITERIA, "NAME", known=callable),
        f"Importance of a unit: {', '.join(CRITERIA.names())}.", "Advanced",
        unset="second-order with --data, else signal for a latency, else l1",
    )  # fmt: skip
    scope: str = option(
        "global", choice("global", "uniform"),
        "Rank all units together, or keep the same share of every group.", "Advanced",
    )  # fmt: skip
    round_to: int = option(1, whole(1), "Keep multiples of N units per group.", "Advanced")
    inexact: str = option(
        "if-needed", choice("never", "if-needed", "always"),
        "Cut units whose removal is not the same as setting them to zero (norms, means).", "Advanced",
        was={"exact": "never", "allow_inexact": "always"},
    )  # fmt: skip
    keep: tuple[str, ...] = option(
        (), names("PATTERN", "patterns of names, such as 'fc' or 'layer4.*'"),
        "Leave modules or parameters of this name whole (* and ? match); may be repeated.", "Advanced",
    )  # fmt: skip
    own_class: bool = option(
        False, FLAG, "Keep whole what your class's code cannot run at other sizes, so that your class comes back.",
        "Advanced",
    )  # fmt: skip
    submodule: str | None = option(
        None, text("NAME", "the submodule's dotted name, such as 'backbone'"),
        "Shrink this submodule only; its interface stays.", "Advanced", was={"part": None},
    )  # fmt: skip
    drop_layers: bool = option(
        True, FLAG, "Remove whole residual blocks and depthwise layers: dead ones, and those that cost most latency "
        "for their importance.", "Advanced",
    )  # fmt: skip
    tracer: str = option(
        "export", choice(*TRACERS),
        "How the model is captured; torch-pruning for models that torch.export cannot capture.", "Advanced",
    )  # fmt: skip
    seed: int = option(0, whole(0), "Of everything drawn at random.", "Advanced")

    @property
    def has_graph(self) -> bool:
        """Whether the tracer provides a graph of operators."""
        return TRACERS[self.tracer]


@dataclass(frozen=True, slots=True)
class Target(Group):
    """Deployment target of the compact model."""

    deploy: str = option(
        "fp32", choice(*DEPLOYED),
        "Precision that the latency refers to. With int8 it is that of the int8 file against the dense model in int8.",
        "Deployment", common=True,
    )  # fmt: skip
    threads: int = option(1, whole(1), "Intra-op threads of ONNX Runtime.", "Deployment", common=True)
    batch: int = option(1, whole(1), "Items per timed run.", "Deployment")
    latency_table: Any = option(
        None, anything("FILE", "the path of a table that `surgery profile` wrote"),
        "Plan by this latency table. It may be another device's; nothing is timed to plan.", "Deployment", common=True,
        unset="this machine's",
    )  # fmt: skip
    acceptance: str | None = option(
        None, text("FILE", "the path of an acceptance"),
        "Calibrate with a measurement of an earlier plan on the table's device.", "Deployment",
    )  # fmt: skip
    correct: bool = option(
        True, FLAG, "Time the compact model and correct the plan until the latency is met.", "Deployment"
    )


@dataclass(frozen=True, slots=True)
class Data(Group):
    """Images for calibration, recovery and evaluation."""

    data: Any = option(
        None, anything("IMAGES", _IMAGES),
        "Images to choose by and to recover with, without labels. Accepted are " + _IMAGES + ".", "Data", common=True,
    )  # fmt: skip
    val: Any = option(
        None, anything("IMAGES", _IMAGES),
        "Images to judge by; if labelled, the accuracy lost is measured.", "Data", common=True,
    )  # fmt: skip
    metric: Any = option(
        None, anything("FILE.py:CALLABLE", "a function of a model that returns {metric: value}"),
        "A function of a model that returns {metric: value}; it judges torch models and the exported files.", "Data",
        was={"eval": None, "evaluate": None},
    )  # fmt: skip
    max_images: int = option(
        512, whole(1), "Images of --data that are used at most, to choose and to reconstruct.", "Data",
        was={"images": None},
    )  # fmt: skip
    mean: tuple[float, ...] | None = option(
        None, numbers("R,G,B", "a number for each channel, as in 0.5,0.5,0.5", float),
        "Mean of each channel, for pixels of 0 to 1.", "Data", unset="the model's own",
    )  # fmt: skip
    std: tuple[float, ...] | None = option(
        None, numbers("R,G,B", "a number for each channel, as in 0.5,0.5,0.5", float),
        "Standard deviation of each channel.", "Data", unset="the model's own",
    )  # fmt: skip
    size: tuple[int, ...] | None = option(
        None, numbers("N|H,W", "one number, or height and width as in 192,256", int, (1, 2)),
        "Height and width of the images.", "Data", unset="the example input's",
    )  # fmt: skip
    crop: float | None = option(
        None, number("F", above=0, most=1), "Share of an image's shorter side to keep, about its centre.", "Data",
        unset="the model's own",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recovery(Group):
    """Recovery of the compact model's accuracy."""

    recover: str | None = option(
        None, registered(RECOVERY_METHODS, "METHOD"),
        f"How to recover accuracy: {', '.join(RECOVERY_METHODS.names())}.", "Recovery",
        common=True, unset="reconstruct with --data, else fold for trained weights, else none",
    )  # fmt: skip
    epochs: int = option(10, whole(1), "Of training, for distill and finetune.", "Recovery", common=True)
    lr: float = option(3e-4, number("X", above=0, below=10), "Highest learning rate of AdamW.", "Recovery")
    train_batch: int = option(128, whole(1), "Images per step, over all processes together.", "Recovery")
    weight_decay: float = option(1e-4, number("X", least=0), "Of AdamW, on weights of two axes or more.", "Recovery")
    temperature: float = option(2.0, number("T", above=0), "Of the distributions that are compared.", "Recovery")
    ema: float = option(
        0.99, number("X", least=0, below=1), "Decay of the moving average of the weights; 0: the last weights.",
        "Recovery",
    )  # fmt: skip
    mixed_precision: str = option("no", choice("no", "fp16", "bf16"), "Precision of training.", "Recovery")
    held_out: float = option(
        0.05, number("R", least=0, below=1), "Share of the images held out to judge progress; 0: none.", "Recovery"
    )
    patience: int = option(5, whole(1), "Epochs without progress after which training ends.", "Recovery")
    shift: float = option(
        0.125, number("R", least=0, below=1), "Shift images by up to this share of their size.", "Recovery"
    )
    flip: bool | None = option(
        None, FLAG, "Flip half of the images left to right.", "Recovery", unset="for distill alone"
    )
    mix: bool = option(True, FLAG, "Mix pairs of images, half of them; for distill alone.", "Recovery")
    checkpoint_steps: int = option(200, whole(1), "Steps between checkpoints of training.", "Recovery")
    checkpoint: str | None = option(
        None, text("DIR", "a folder's path"), "Folder for checkpoints of training.", "Recovery", unset="beside --out"
    )


@dataclass(frozen=True, slots=True)
class Output(Group):
    """Output files and their timing."""

    out: str | None = option(
        None, text("DIR", "a folder's path"), "Output folder, replaced as a whole.", "Output", common=True,
        unset="shrunk/MODEL",
    )  # fmt: skip
    precision: tuple[str, ...] = option(
        ("fp32",), several("fp32", "fp16", "int8"),
        "Precisions in which files are written; int8 is calibrated on --data.", "Deployment", common=True,
    )  # fmt: skip
    int8_method: str = option(
        "minmax", choice("minmax", "entropy", "percentile"), "How an activation's range follows from the images.",
        "Deployment",
    )  # fmt: skip
    int8_keep: tuple[str, ...] = option(
        (), names("first|last|PATTERN", "first, last, or patterns of names"),
        "Leave layers in float32: the first, the last, nodes or operators of this name (* and ? match); may be "
        "repeated.", "Deployment",
    )  # fmt: skip
    int8_reduce_range: bool = option(False, FLAG, "Weights of 7 bits, for x86 processors without VNNI.", "Deployment")
    opset: int | None = option(None, whole(18), "ONNX opset.", "Deployment", unset="the exporter's")
    format: tuple[str, ...] = option(
        ("onnx",), several("onnx", "ort", others=True),
        "Formats of the compact files: ort is what ONNX Runtime's builds for phones load; ONNX files are always "
        "written.", "Deployment",
    )  # fmt: skip
    min_ort: str | None = option(
        None, text("VERSION", "a version of ONNX Runtime, as in 1.16"),
        "Oldest ONNX Runtime that is to read the files.", "Deployment",
    )  # fmt: skip
    runs: int = option(
        2000, whole(3), "Timed runs per model at most; fewer once the speedup's interval is narrow.", "Output"
    )


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
        return WITHOUT_PROGRAM if not self.selection.has_graph else DEFAULT_BUDGET

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
            else:
                changes.setdefault(OPTIONS[known(name)][0], {})[name] = value
        return replace(self, **{group: replace(getattr(self, group), **values) for group, values in changes.items()})


DEFAULT_BUDGET = Budget(latency=0.5)
MILDEST = Budget(latency=0.95)
"""Mildest cut that the max-drop search tries, as a fraction of the dense latency."""
WITHOUT_PROGRAM = Budget(macs=0.5)
"""The default for models that `torch.export` cannot capture, whose operators at run time are not known."""

ONE_OF = (*(f.name for f in fields(Budget)), "max_drop")
"""Mutually exclusive options."""

GROUPS: Mapping[str, type[Any]] = {f.name: f.default_factory for f in fields(Recipe)}  # type: ignore[misc]
OPTIONS: Mapping[str, tuple[str, Any]] = {f.name: (group, f) for group, kind in GROUPS.items() for f in fields(kind)}
"""Name → group and field of every option."""


def known(name: str) -> str:
    """Return the name of an option; raises InvalidInput, with the nearest name, if there is none."""
    if name not in OPTIONS:
        raise InvalidInput(f"there is no option '{name}'{nearest(name)}")
    return name


def nearest(name: str) -> str:
    """Return a hint with the nearest option."""
    found = difflib.get_close_matches(name, OPTIONS, 1, 0.5)
    return f"; the nearest is '{found[0]}'" if found else ""


def recipe(**options: Any) -> Recipe:
    """Return a recipe: options by the names of the command line, as in ``recipe(latency=0.5, data="photos")``.

    Raises:
        InvalidInput: there is no such option (the message names the nearest), or a value is not accepted.
    """
    return Recipe().but(**options)


def current(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return options with old names replaced by new ones, and a deprecation message for each."""
    found: dict[str, Any] = {}
    said: list[str] = []
    for name, value in options.items():
        new = next((new for new, (_, declared) in OPTIONS.items() if name in option_of(declared).was), None)
        if name in OPTIONS or new is None:
            found[name] = value
            continue
        fixed = option_of(OPTIONS[new][1]).was[name]
        found[new] = value if fixed is None else fixed
        told = new if fixed is None else f"{new} {fixed}"
        said.append(f"option '{name}' is now '{told}'; the old name will be removed in the next version")
    return found, said


# Recipes as files. ---------------------------------------------------------------------------------------------------


def read_recipe(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Return the options in a TOML file, and a deprecation message for each old name.

    Raises:
        InvalidInput: the file cannot be read; or a key or value is not accepted: the message names its line.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
        given = tomllib.loads(content)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read recipe {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path}: not TOML: {error}") from error
    lines = {name: _line_of(name, content) for name in given}
    found, said = current(given)
    for name, value in found.items():
        where = f"{path}, line {lines.get(name, 0) or 1}"
        if name not in OPTIONS:
            raise InvalidInput(f"{where}: there is no key '{name}'{nearest(name)}")
        found[name] = checked(OPTIONS[name][1], value, f"{where}: {name} = {value!r:.80}")
    return found, [f"{path}: {sentence}" for sentence in said]


def _line_of(key: str, content: str) -> int:
    found = re.search(rf"""^\s*\[?["']?{re.escape(key)}["']?\s*[=.\]]""", content, re.MULTILINE)
    return content.count("\n", 0, found.end()) + 1 if found else 0


def to_toml(recipe: Recipe) -> str:
    """Return the recipe as TOML, including defaults; Python objects become comments."""
    parts, tables = list[str](), dict[str, Any]()
    for group in GROUPS:
        values = {f.name: getattr(getattr(recipe, group), f.name) for f in fields(GROUPS[group])}
        given = {name: value for name, value in values.items() if value is not None and value != {}}
        plain = {name: value for name, value in given.items() if _is_plain(value)}
        tables |= {name: plain.pop(name) for name in list(plain) if isinstance(plain[name], Mapping)}
        objects = [f"# {name}: an object of Python\n" for name in given if name not in {**plain, **tables}]
        if given:
            parts.append(f"# {group}\n{tomli_w.dumps(plain)}{''.join(objects)}")
    return "\n".join([*parts, *([tomli_w.dumps(tables)] if tables else [])])


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (str, int, float))


# The table of options in the documentation. --------------------------------------------------------------------------

HEADINGS = ("Model", "Budget", "Data", "Recovery", "Deployment", "Output", "Advanced")


def options_table() -> str:
    """Return all options as Markdown: a table for each heading."""
    parts = []
    for heading in HEADINGS:
        rows = [
            f"| `{flag(f.name)}` | {_cell(found.kind.accepts)} | {_cell(shown_default(f))} | {_cell(found.help)} |"
            for _, f in OPTIONS.values()
            if (found := option_of(f)).group == heading and f.name != "model"
        ]
        head = "| option | value | default | |\n| --- | --- | --- | --- |\n"
        parts.append(f"### {heading}\n\n{head}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def flag(name: str) -> str:
    """Return an option as on the command line."""
    return f"--{name.replace('_', '-')}"


def shown_default(declared: Any) -> str:
    """Return a description of a field's default; empty for none."""
    if option_of(declared).unset:
        return option_of(declared).unset
    default = declared.default
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default == () or not isinstance(default, (str, int, float, tuple)):
        return ""
    return ",".join(default) if isinstance(default, tuple) else str(default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# Defaults that depend on other options, and rules across options. ---------------------------------------------------


def resolved(recipe: Recipe, *, trained: bool = False) -> Recipe:
    """Return the recipe with defaults resolved that depend on other options.

    Args:
        recipe: the recipe.
        trained: whether the weights are known to be trained, so that synthetic images are useful.
    """
    default = "reconstruct" if recipe.data.data is not None else "fold" if trained else "none"
    budget = recipe.budget if recipe.selection.max_drop is not None else recipe.goal
    return recipe.but(budget=budget, criterion=recipe.criterion, recover=recipe.recovery.recover or default)


def validate(recipe: Recipe) -> None:
    """Raise InvalidInput if options are incompatible."""
    rules = (_budget_rules, _latency_rules, _max_drop_rules, _steps_rules, _data_rules)
    for wrong in (sentence for rule in rules for sentence in rule(recipe)):
        raise InvalidInput(wrong)


def _budget_rules(recipe: Recipe) -> Iterator[str]:
    selection = recipe.selection
    if recipe.goal.is_latency:
        give = "give a budget of macs, params or channels with it"
        if not selection.has_graph:
            yield f"a latency budget needs the operators that torch.export captures; {give}: tracer torch-pruning"
        if selection.round_to != 1:
            yield f"round_to does not go with a latency budget: widths go by the device's own steps; {give}"
        if selection.scope != "global":
            yield f"scope={selection.scope!r} does not go with a latency budget: time decides among all groups; {give}"


def _latency_rules(recipe: Recipe) -> Iterator[str]:
    target = recipe.target
    given = {
        "--latency-table": target.latency_table is not None,
        "--acceptance": target.acceptance is not None,
        "--no-correct": not target.correct,
        f"--deploy {target.deploy}": target.deploy != DEPLOYED[0],
    }
    if not recipe.goal.is_latency:
        for name in (name for name, is_given in given.items() if is_given):
            yield f"{name} is for budgets of time, this one is of {recipe.goal.kind}: leave it out, or give --latency"
    if target.acceptance is not None and target.latency_table is None:
        yield (
            f"acceptance {target.acceptance} corrects a latency by the table of its device; give that table too, with "
            "--latency-table"
        )


def _max_drop_rules(recipe: Recipe) -> Iterator[str]:
    data, target, selection = recipe.data, recipe.target, recipe.selection
    if selection.max_drop is None:
        return
    if recipe.budget.is_set:
        yield "--max-drop looks for the lowest latency: give no budget with it"
    if target.deploy != DEPLOYED[0] and data.data is None:
        yield f"--max-drop judges files in {target.deploy}: give images to calibrate them on with --data"
    if data.data is None and data.val is None and data.metric is None:
        yield "--max-drop needs something to judge by: give --val with labels, --metric, or --data"
    if target.latency_table is not None or not selection.has_graph:
        yield "--max-drop times models on this machine: leave --latency-table and --tracer out"


def _steps_rules(recipe: Recipe) -> Iterator[str]:
    selection = recipe.selection
    if selection.steps == 1:
        return
    if recipe.goal.is_latency or selection.max_drop is not None:
        yield "--steps goes with --macs, --params or --channels: a latency is corrected by measuring instead"
    if recipe.data.data is None:
        yield "--steps recovers in between: give images with --data"
    if not selection.has_graph or selection.submodule is not None:
        yield "--steps goes with whole models that torch.export captures: leave --tracer and --submodule out"


def _data_rules(recipe: Recipe) -> Iterator[str]:
    data, recovery, criterion = recipe.data, recipe.recovery, recipe.selection.criterion
    if data.data is None and isinstance(criterion, str) and "images" in CRITERIA[criterion].needs:
        yield f"criterion {criterion} looks at images: give some with --data"
    given = [name for name in ("mean", "std", "size", "crop") if getattr(data, name) is not None]
    if given and data.data is None and data.val is None:
        yield f"--{given[0]} is for images: give those with --data or --val, or leave it out"
    if RECOVERY_METHODS.has_need(recovery.recover, "images") and data.data is None:
        yield f"--recover {recovery.recover} learns from images: give them with --data; fold does without any"
    if not RECOVERY_METHODS.has_need(recovery.recover, "gradients"):
        for name in (f.name for f in fields(recovery) if f.name != "checkpoint" and f.default is not None):
            if getattr(recovery, name) != getattr(Recovery(), name):
                yield f"--{name.replace('_', '-')} is for training: add --recover distill or finetune"
