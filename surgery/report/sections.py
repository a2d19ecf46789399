"""The sections of a report, in order.

A section is a function of report.json's data that yields its parts: paragraphs, figures, tables, lists, code, charts.
`section` registers one under its title; empty parts and sections are omitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.core import visible
from surgery.report import charts
from surgery.report.charts import Chart
from surgery.report.data import deployed_precision

MOST_LAYERS = 120  # maximum number of layers in the chart of widths; report.json has all of them


@dataclass(frozen=True, slots=True)
class Figure:
    """A key figure: value, description and detail."""

    value: str
    what: str
    detail: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under column names; empty columns are omitted unless `all_columns`."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    all_columns: bool = False

    def filled(self) -> Table:
        """Return the table without empty columns."""
        every = range(len(self.columns))
        used = [k for k in every if k == 0 or self.all_columns or any(row[k] not in ("", "-") for row in self.rows)]
        return Table([self.columns[k] for k in used], [[row[k] for k in used] for row in self.rows])


@dataclass(frozen=True, slots=True)
class Items:
    """A list; a terminal shows at most `most` of its lines."""

    lines: Sequence[str]
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Code:
    """A command to copy."""

    text: str


Part = str | Figure | Table | Items | Code | Chart
"""A part of a section; a string is a paragraph."""
Data = Mapping[str, Any]
"""Contents of report.json."""
Yields = Callable[[Data], Iterator[Part]]


@dataclass(frozen=True, slots=True)
class Section:
    """A title and its parts; shown on a terminal only if `on_terminal`."""

    title: str
    parts: tuple[Part, ...]
    on_terminal: bool = True


_REGISTRY: dict[str, tuple[Yields, bool]] = {}


def section(title: str, *, on_terminal: bool = True) -> Callable[[Yields], Yields]:
    """Register a function of report.json's data as a section; raises ValueError if there is one of this title."""

    def register(function: Yields) -> Yields:
        if title in _REGISTRY:
            raise ValueError(f"a report has a section '{title}' already")
        _REGISTRY[title] = function, on_terminal
        return function

    return register


def sections_of(data: Data) -> list[Section]:
    """Return the non-empty sections of a report, with control characters in text escaped."""
    clean, found = _visible(data), []
    for title, (function, on_terminal) in _REGISTRY.items():
        parts = tuple(x for x in function(clean) if not (isinstance(x, Items) and not x.lines))
        found += [Section(title, parts, on_terminal)] if parts else []
    return found


def headline(data: Data) -> tuple[str, str]:
    """Return the verdict on accuracy, shown first in every rendering, and the command to run next."""
    accuracy = _visible(data["accuracy"])
    return accuracy["verdict"], accuracy["next_command"] or "evaluate the compact model on your own data"


def _visible(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible(key): _visible(item) for key, item in value.items()}
    return [_visible(item) for item in value] if isinstance(value, (list, tuple)) else value


def _timed(data: Data) -> dict[str, Data]:
    """Return the measured times of each file by name."""
    return {row["name"]: row for row in data["timing"]["rows"]} if data["timing"] else {}


def _steps(data: Data) -> Sequence[Data]:
    recovery = data.get("recovery")
    return recovery["steps"] if recovery else ()


# Formatting. ---------------------------------------------------------------------------------------------------------


def si(value: float | None, digits: int = 4) -> str:
    """Return a count in thousands, millions and so on: 11689512 is ``11.69 M``; ``-`` for None."""
    if value is None:
        return "-"
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.{digits}g} {letter}"
    return f"{value:.{digits}g}"


def size(value: int | None) -> str:
    """Return a size in bytes: 46755000 is ``46.8 MB`` (decimal megabytes)."""
    return "-" if value is None else f"{si(value, 3)}B"


def figure(value: float | None) -> str:
    """Return three significant digits, without an exponent for large values."""
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ratio(value: Mapping[str, float] | None, *, digits: int = 2, unit: str = "x") -> tuple[str, str]:
    """Return a ratio, such as a speedup, and its 95 % interval."""
    if value is None:
        return "-", "-"
    return f"{value['value']:.{digits}f}{unit}", f"{value['low']:.{digits}f}-{value['high']:.{digits}f}"


def percent(value: float | None, digits: int = 2) -> str:
    """Return a fraction in percent: 0.9153 is ``91.53 %``."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


# Speed, size and accuracy. -------------------------------------------------------------------------------------------


@section("Summary")
def _summary(data: Data) -> Iterator[Part]:
    yield from _figures(data)
    if budget := data["budget"]:
        yield (
            f"target {100 * budget['fraction']:g} % of the {budget['kind'].replace('macs', 'MACs')}: reached "
            f"{percent(budget['kept_fraction'])} ({si(budget['kept'])} of {si(budget['dense'])})"
        )
    if latency := data["latency"]:
        yield _latency_sentence(latency, deployed_precision(data))
    if compact := data["compact"]:
        kind = "an instance of the model's own class" if compact["kind"] == "module" else "a graph module"
        yield f"compact model: {kind} ({compact['why']})"
    if check := data["check"]:
        labels = f"unit labels of {check['replayed']} tensors replayed" if check["replayed"] else "no label replay"
        real = "not measurable" if check["error_real"] is None else f"{check['error_real']:.1e}"
        yield (
            f"verified: equal to the {check['reference']}; {labels}, relative error {check['error_float64']:.1e} in "
            f"float64, {real} with the real weights"
        )
    recovery = data.get("recovery")
    if recovery and recovery["judged_by"]:
        what = "accuracy" if recovery["labelled"] else "agreement with the dense model"
        yield f"recovery ({recovery['level']}): {what} on {recovery['judged_by']}"
    if timing := data["timing"]:
        where, settings = timing["environment"], timing["settings"]
        verdict = "reliable" if timing["reliable"] else "UNRELIABLE, so no row is marked as dominated"
        yield (
            f"timing: {verdict}: {timing['why']}; ONNX Runtime {where['onnxruntime']} on {where['cpu']}, "
            f"threads {settings['threads']}, batch {settings['batch']}, {timing['rounds']} rounds"
        )


def _latency_sentence(latency: Data, precision: str) -> str:
    target = f"target {100 * latency['target']:.3g} % of the {f'dense {precision}'.removesuffix(' fp32')} latency"
    table = f"latency table: {latency['predicted_ms']:.4g} of {latency['predicted_dense_ms']:.4g} ms"
    if latency["taken"] < 0:
        return f"{target}: {latency['verdict']}; {table}"
    measured = percent(latency.get("final", latency["rounds"][latency["taken"]]["measured"]), 1)
    found = f"reached {measured}" if latency["met"] else f"NOT MET: {measured} ({latency['verdict']})"
    return f"{target}: {found}; {table}"


def _figures(data: Data) -> Iterator[Figure]:
    times, rows = _timed(data), {row["name"]: row for row in data["models"]}
    fastest = sorted((n for n in times if n.startswith("compact")), key=lambda n: times[n]["ratio"]["value"])[:1]
    main = f"compact {deployed_precision(data)}".removesuffix(" fp32")
    for name in dict.fromkeys(n for n in (main, "compact", *fastest) if n in times):
        doubt = "" if data["timing"]["reliable"] else ", UNRELIABLE: see below"
        speedup, p50, dense = times[name]["speedup"], times[name]["p50_ms"], name.replace("compact", "dense")
        interval = f"{name} [{speedup['low']:.2f}, {speedup['high']:.2f}]"
        yield _speed(speedup["value"], interval, f"{p50:.3g} ms{doubt}")
        if dense != "dense" and dense in times:
            before = times[dense]["p50_ms"]
            yield _speed(before / p50, f"{name} against {dense}", f"{before:.3g} ms before")
        if found := rows[name].get("agreement"):
            yield _loss(name, found)
    before, after = rows["dense"], rows.get(main, rows["compact"])
    for key, what, shown in (("macs", "MACs", si), ("onnx_bytes", f"bytes, {after['name']}", size)):
        if before[key] and after[key]:
            yield Figure(percent(after[key] / before[key], 0), f"of the dense {what}", shown(after[key]))


def _speed(factor: float, what: str, detail: str) -> Figure:
    return Figure(f"{factor:.2f}×", f"{'faster' if factor >= 1 else 'the speed: slower'}, {what}", detail)


def _loss(name: str, found: Data) -> Figure:
    if found["drop"] is not None:
        gained, high, low = (0.0 - x for x in found["drop"])  # never -0.00
        what = f"points of accuracy, {name} [{low:+.2f}, {high:+.2f}]"
        return Figure(f"{gained:+.2f}", what, percent(found["accuracy"]))
    value, what = f"{found['cosine']:.4f}", f"cosine with the dense model's output, {name}"
    if found["top1_match"] is not None:
        value, what = percent(found["top1_match"], 1), f"same class as the dense model, {name}"
    return Figure(value, what, "accuracy unknown")


@section("Models")
def _models(data: Data) -> Iterator[Part]:
    timing, times, rows = data["timing"], _timed(data), []
    for model in data["models"]:
        time = times.get(model["name"], {})
        sizes = si(model["parameters"]), si(model["macs"]), size(model["onnx_bytes"])
        figures = (figure(time.get(key)) for key in ("p50_ms", "p90_ms", "p99_ms", "throughput_per_s"))
        memory = size(time.get("peak_memory_bytes"))
        rows.append((model["name"], *sizes, *figures, *ratio(time.get("speedup")), memory))
    if timing and timing["aa"]:
        rows.append(("A/A", *([""] * 7), *ratio(timing["aa"]), ""))  # the dense model against its own copy
    columns = ("model", "params", "MACs", "ONNX", "p50 ms", "p90 ms", "p99 ms", "items /s", "speedup", "95% interval")
    yield Table((*columns, "memory"), rows, all_columns=bool(timing))
    if timing:
        yield charts.run_times(timing["rows"])


@section("Accuracy and latency")
def _accuracy_and_latency(data: Data) -> Iterator[Part]:
    rows, times = [], _timed(data)
    for model in data["models"]:
        if model.get("agreement") and (time := times.get(model["name"])):
            relative, agreement = ratio(time["ratio"], digits=3, unit=""), _agreement_cells(model["agreement"])
            last = size(model["onnx_bytes"]), model["dominated_by"] or ""
            rows.append((model["name"], figure(time["p50_ms"]), *relative, *agreement, *last))
    if rows:
        columns = ("model", "p50 ms", "relative time", "95% interval", *_AGREEMENT, "bytes", "dominated by")
        yield Table(columns, rows)


_AGREEMENT = ("accuracy", "points lost", "95% interval", "top-1 match", "cosine", "KL")


def _agreement_cells(found: Data) -> tuple[str, ...]:
    lost, low, high = (f"{x:.2f}" for x in found["drop"]) if found.get("drop") else ("-", "", "")
    numbers = ("-" if found.get(key) is None else f"{found[key]:.4f}" for key in ("cosine", "divergence"))
    return (
        percent(found.get("accuracy")),
        lost,
        f"{low} to {high}" if low else "-",
        percent(found.get("top1_match")),
        *numbers,
    )


@section("Recovery steps")
def _recovery_steps(data: Data) -> Iterator[Part]:
    rows = []
    for step in _steps(data):
        name = step["name"] + ("" if step["kept"] else " (undone)")
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in (step["metrics"] or {}).items())
        spent = f"{step['seconds']:.1f}", f"{step['peak_memory_bytes'] / 1e9:.2f} GB"
        rows.append((name, *_agreement_cells(step["agreement"] or {}), metrics or "-", *spent))
    if rows:
        yield Table(("step", *_AGREEMENT, "eval", "seconds", "memory"), rows)
    evaluated = [step for step in _steps(data) if step["agreement"]]
    if len(evaluated) > 1:
        yield charts.recovery_steps(evaluated)


@section("Time by operator")
def _time_by_operator(data: Data) -> Iterator[Part]:
    found = data.get("operators") or {}
    for name, after in found.items():
        before = found.get(name.replace("compact", "dense"))
        if name.startswith("compact") and before and after:
            yield charts.operator_times(before, after, name)


# Pruned and untouched parts. -----------------------------------------------------------------------------------------


@section("Pruned units")
def _pruned(data: Data) -> Iterator[Part]:
    cut = [group for group in data["groups"] if group["to"] < group["from"]]
    width = max((len(group["name"]) for group in cut), default=0)
    lines = [f"{g['name']:<{width}} {g['from']:>5} → {g['to']}{' (inexact)' if g['inexact'] else ''}" for g in cut]
    yield Items(lines, most=24)
    changed = [x for x in data.get("layers") or () if x["compact"] is None or x["compact"][0] != x["dense"][0]]
    if changed:
        yield charts.layer_widths(changed[:MOST_LAYERS])


@section("Removed blocks and layers")
def _removed(data: Data) -> Iterator[Part]:
    dead = "dead", "dead, replaced by a constant"
    yield Items([f"{x['name']}: {x['reason'] or dead[x['constant']]}" for x in data["dropped"]], most=24)


@section("Inexact cuts: not the same as setting units to zero")
def _inexact(data: Data) -> Iterator[Part]:
    pruned = (group for group in data["groups"] if group["to"] < group["from"])
    yield Items([f"{group['name']}: {group['inexact']}" for group in pruned if group["inexact"]], most=24)


@section("Left untouched, and why")
def _untouched(data: Data) -> Iterator[Part]:
    count = Counter(frozen["reason"] for frozen in data["frozen"])
    example = {f["reason"]: f"{f['tensor']}:{f['axis']}" for f in reversed(data["frozen"])}
    more = {reason: f" and {n - 1} more" if n > 1 else "" for reason, n in count.items()}
    yield Items([f"{reason}: {example[reason]}{more[reason]}" for reason, _ in count.most_common()], most=8)


@section("Costliest kernels", on_terminal=False)
def _kernels(data: Data) -> Iterator[Part]:
    yield from map(charts.staircase, data.get("stairs") or ())


# Everything else. ----------------------------------------------------------------------------------------------------


@section("Notes")
def _notes(data: Data) -> Iterator[Part]:
    lines = [*data["notes"], *data["plan"]["notes"], *(note for step in _steps(data) for note in step["notes"])]
    for name, figures in (data.get("evaluation") or {}).items():
        values = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        lines.append(f"--metric of {name.replace(' ', '.')}.onnx: {values}")
    if found := data.get("within"):
        attempts = []
        for attempt in found["tried"]:
            measured = "" if attempt["measured"] is None else f" (measured {percent(attempt['measured'], 1)})"
            attempts.append(f"{percent(attempt['aim'], 0)}{measured} loses up to {attempt['upper']:.2f}")
        lines.append(
            f"fastest model that loses at most {found['max_drop']:g} points of {found['of']}: "
            f"{percent(found['measured'], 1)} of {found.get('dense', 'the dense')} model's latency; attempts: "
            + ", ".join(attempts)
        )
    lines += [f"in training the compact model has no {x}" for x in (data["compact"] or {}).get("lost_in_training", [])]
    yield Items(list(dict.fromkeys([*lines, *(data["check"] or {}).get("notes", [])])))


@section("Machine, settings, and how to repeat the run", on_terminal=False)
def _origin(data: Data) -> Iterator[Part]:
    rows = {"tool": f"{data['tool']['name']} {data['tool']['version']}"}
    if data["timing"]:
        where, how = data["timing"]["environment"], data["timing"]["settings"]
        rows["processor"] = f"{where['cpu']}, {where['cores']} cores, {', '.join(where['instruction_sets'])}"
        rows["system"] = f"{where['system']}, Python {where['python']}"
        rows["ONNX Runtime"] = f"{where['onnxruntime']}, {where['provider']}"
        rows["threads, batch"] = f"{how['threads']}, {how['batch']}"
    rows["plan"] = data["plan"]["digest"][:16]
    settings = [(name, str(value)) for name, value in sorted(data["settings"].items())]
    yield Table(("name", "value"), [*rows.items(), *settings])
    if data["command"]:
        yield Code(data["command"])
    if data["accuracy"]["next_command"]:
        yield "To evaluate or train the compact model at a Python prompt:"
        yield Code(data["accuracy"]["next_command"])
    if data["files"]:
        yield Table(("file", "SHA-256"), sorted(data["files"].items()))
