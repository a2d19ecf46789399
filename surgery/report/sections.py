"""The sections of a report, in order.

A section is a function of report.json's data that yields its parts: paragraphs, figures, tables, lists, code, charts.
`section` registers one under its title; empty sections are omitted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.report import charts
from surgery.report.charts import Chart
from surgery.report.data import deployed_precision
from surgery.report.formatting import figure, percent, ratio, si, size, visible

MOST_LAYERS = 120
"""Maximum number of layers in the chart of widths; report.json has all of them."""


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
        used = [
            k
            for k in range(len(self.columns))
            if k == 0 or self.all_columns or any(row[k] not in ("", "-") for row in self.rows)
        ]
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


@dataclass(frozen=True, slots=True)
class Section:
    """A title and its parts; shown on a terminal only if `on_terminal`."""

    title: str
    parts: tuple[Part, ...]
    on_terminal: bool = True


_REGISTRY: dict[str, tuple[Callable[[Data], Iterator[Part]], bool]] = {}


def section(
    title: str, *, on_terminal: bool = True
) -> Callable[[Callable[[Data], Iterator[Part]]], Callable[[Data], Iterator[Part]]]:
    """Register a function of report.json's data as a section of every report.

    Args:
        title: heading.
        on_terminal: whether it is also shown on a terminal.

    Raises:
        ValueError: a section of this title is already registered.
    """

    def register(function: Callable[[Data], Iterator[Part]]) -> Callable[[Data], Iterator[Part]]:
        if title in _REGISTRY:
            raise ValueError(f"a report has a section '{title}' already")
        _REGISTRY[title] = function, on_terminal
        return function

    return register


def sections_of(data: Data) -> list[Section]:
    """Return the non-empty sections of a report, with control characters in text escaped."""
    clean = _visible(data)
    made = (Section(title, tuple(function(clean)), shown) for title, (function, shown) in _REGISTRY.items())
    return [section for section in made if section.parts]


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


# Speed, size and accuracy. -------------------------------------------------------------------------------------------


@section("Summary")
def summary(data: Data) -> Iterator[Part]:
    """Key figures, and one sentence per stage."""
    yield from _figures(data)
    if budget := data["budget"]:
        yield (
            f"target {100 * budget['fraction']:g} % of the {budget['kind']}: reached "
            f"{percent(budget['kept_fraction'])} ({si(budget['kept'])} of {si(budget['dense'])})"
        )
    if latency := data["latency"]:
        yield _latency_sentence(latency, deployed_precision(data))
    if compact := data["compact"]:
        kind = "an instance of the model's own class" if compact["kind"] == "module" else "a graph module"
        yield f"compact model: {kind} ({compact['why']})"
    if check := data["check"]:
        labels = f"labels of {check['replayed']} values replayed" if check["replayed"] else "no label replay"
        real = "not measurable" if check["error_real"] is None else f"{check['error_real']:.1e}"
        yield (
            f"verified: equal to {check['reference']}; {labels}, relative error {check['error_float64']:.1e} in "
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
    dense = "dense" if precision == "fp32" else f"dense {precision}"
    target = f"target {100 * latency['target']:.3g} % of the {dense} latency"
    table = f"latency table: {latency['predicted_ms']:.4g} of {latency['predicted_dense_ms']:.4g} ms"
    if latency["taken"] < 0:
        return f"{target}: {latency['verdict']}; {table}"
    if not latency["met"]:
        return f"{latency['verdict']}; {table}"
    return f"{target}: reached {percent(latency['rounds'][latency['taken']]['measured'], 1)}; {table}"


def _figures(data: Data) -> Iterator[Figure]:
    times = {row["name"]: row for row in (data["timing"] or {"rows": ()})["rows"]}
    rows = {row["name"]: row for row in data["models"]}
    fastest = sorted((n for n in times if n.startswith("compact")), key=lambda n: times[n]["ratio"]["value"])[:1]
    deployed = deployed_precision(data)
    main = "compact" if deployed == "fp32" else f"compact {deployed}"
    for name in dict.fromkeys(n for n in (main, "compact", *fastest) if n in times):
        yield from _speed(name, times, reliable=data["timing"]["reliable"])
        if found := rows[name].get("agreement"):
            yield _loss(name, found)
    before, after = rows["dense"], rows.get(main, rows["compact"])
    if before["macs"] and after["macs"]:
        yield Figure(percent(after["macs"] / before["macs"], 0), "of the dense MACs", si(after["macs"]))
    if before["onnx_bytes"] and after["onnx_bytes"]:
        share = percent(after["onnx_bytes"] / before["onnx_bytes"], 0)
        yield Figure(share, f"of the dense bytes, {after['name']}", size(after["onnx_bytes"]))


def _speed(name: str, times: Mapping[str, Data], *, reliable: bool) -> Iterator[Figure]:
    speedup, p50 = times[name]["speedup"], times[name]["p50_ms"]
    interval = f"{name} [{speedup['low']:.2f}, {speedup['high']:.2f}]"
    doubt = "" if reliable else ", UNRELIABLE: see below"
    yield Figure(f"{speedup['value']:.2f}×", f"{_faster(speedup['value'])}, {interval}", f"{p50:.3g} ms{doubt}")
    dense = name.replace("compact", "dense")
    if dense != "dense" and dense in times:
        factor = times[dense]["p50_ms"] / p50
        what = f"{_faster(factor)}, {name} against {dense}"
        yield Figure(f"{factor:.2f}×", what, f"{times[dense]['p50_ms']:.3g} ms before")


def _faster(speedup: float) -> str:
    return "faster" if speedup >= 1 else "the speed: slower"


def _loss(name: str, found: Data) -> Figure:
    if found["drop"] is not None:
        gained, high, low = (0.0 - x for x in found["drop"])  # never -0.00
        what = f"points of accuracy, {name} [{low:+.2f}, {high:+.2f}]"
        return Figure(f"{gained:+.2f}", what, percent(found["accuracy"]))
    if found["top1_match"] is not None:
        return Figure(percent(found["top1_match"], 1), f"same class as the dense model, {name}", "accuracy unknown")
    return Figure(f"{found['cosine']:.4f}", f"cosine with the dense model's output, {name}", "accuracy unknown")


@section("Models")
def models(data: Data) -> Iterator[Part]:
    """Size and speed of each file; the last row is the dense model timed against its own copy."""
    timing = data["timing"]
    times = {row["name"]: row for row in timing["rows"]} if timing else {}
    rows = []
    for model in data["models"]:
        time = times.get(model["name"], {})
        sizes = si(model["parameters"]), si(model["macs"]), size(model["onnx_bytes"])
        figures = (figure(time.get(key)) for key in ("p50_ms", "p90_ms", "p99_ms", "throughput_per_s"))
        memory = size(time.get("peak_memory_bytes"))
        rows.append((model["name"], *sizes, *figures, *ratio(time.get("speedup")), memory))
    if timing and timing["aa"]:
        rows.append(("A/A", *([""] * 7), *ratio(timing["aa"]), ""))
    columns = ("model", "params", "MACs", "ONNX", "p50 ms", "p90 ms", "p99 ms", "items /s", "speedup", "95% interval")
    yield Table((*columns, "memory"), rows, all_columns=bool(timing))
    if timing:
        yield charts.run_times(timing["rows"])


@section("Accuracy and latency")
def accuracy_and_latency(data: Data) -> Iterator[Part]:
    """Latency and accuracy of each file."""
    times = {row["name"]: row for row in (data["timing"] or {"rows": ()})["rows"]}
    rows = [
        (
            model["name"],
            figure(times[model["name"]]["p50_ms"]),
            *ratio(times[model["name"]]["ratio"], digits=3, unit=""),
            *_agreement_cells(model["agreement"]),
            size(model["onnx_bytes"]),
            model["dominated_by"] or "",
        )
        for model in data["models"]
        if model.get("agreement") and model["name"] in times
    ]
    columns = ("model", "p50 ms", "relative time", "95% interval", *_AGREEMENT, "bytes", "dominated by")
    if rows:
        yield Table(columns, rows)


_AGREEMENT = ("accuracy", "points lost", "95% interval", "top-1 match", "cosine", "KL")


def _agreement_cells(found: Data) -> tuple[str, ...]:
    drop, cosine, divergence = (found.get(key) for key in ("drop", "cosine", "divergence"))
    return (
        percent(found.get("accuracy")),
        f"{drop[0]:.2f}" if drop else "-",
        f"{drop[1]:.2f} to {drop[2]:.2f}" if drop else "-",
        percent(found.get("top1_match")),
        "-" if cosine is None else f"{cosine:.4f}",
        "-" if divergence is None else f"{divergence:.4f}",
    )


@section("Recovery steps")
def recovery_steps(data: Data) -> Iterator[Part]:
    """The model after each step of recovery."""
    steps = (data.get("recovery") or {"steps": ()})["steps"]
    rows = [
        (
            step["name"] + ("" if step["kept"] else " (undone)"),
            *_agreement_cells(step["agreement"] or {}),
            ", ".join(f"{name} {value:.4g}" for name, value in (step["metrics"] or {}).items()) or "-",
            f"{step['seconds']:.1f}",
            f"{step['peak_memory_bytes'] / 1e9:.2f} GB",
        )
        for step in steps
    ]
    if rows:
        yield Table(("step", *_AGREEMENT, "eval", "seconds", "memory"), rows)
    judged = [step for step in steps if step["agreement"]]
    if len(judged) > 1:
        yield charts.recovery_steps(judged)


@section("Time by operator")
def time_by_operator(data: Data) -> Iterator[Part]:
    """Time by operator of each compact file."""
    found = data.get("operators") or {}
    for name, after in found.items():
        before = found.get(name.replace("compact", "dense"))
        if name.startswith("compact") and before and after:
            yield charts.operator_times(before, after, name)


# Pruned and untouched parts. -----------------------------------------------------------------------------------------


@section("Pruned units")
def pruned(data: Data) -> Iterator[Part]:
    """Each pruned group with its units before and after."""
    cut = [group for group in data["groups"] if group["to"] < group["from"]]
    if cut:
        width = max(len(group["name"]) for group in cut)
        inexact = (" (inexact)" if group["inexact"] else "" for group in cut)
        yield Items(
            [f"{g['name']:<{width}} {g['from']:>5} → {g['to']}{x}" for g, x in zip(cut, inexact, strict=True)], most=24
        )
    changed = [x for x in data.get("layers") or () if x["compact"] is None or x["compact"][0] != x["dense"][0]]
    if changed:
        yield charts.layer_widths(changed[:MOST_LAYERS])


@section("Removed blocks and layers")
def removed(data: Data) -> Iterator[Part]:
    """Each removed block, with the reason."""
    lines = [
        f"{block['name']}: {block['reason'] or 'dead' + ', replaced by a constant' * block['constant']}"
        for block in data["dropped"]
    ]
    if lines:
        yield Items(lines, most=24)


@section("Inexact cuts: not the same as setting units to zero")
def inexact(data: Data) -> Iterator[Part]:
    """Pruned groups whose removal changes what a norm or mean averages over."""
    lines = [f"{g['name']}: {g['inexact']}" for g in data["groups"] if g["inexact"] and g["to"] < g["from"]]
    if lines:
        yield Items(lines, most=24)


@section("Left untouched, and why")
def untouched(data: Data) -> Iterator[Part]:
    """Reasons for untouched axes, the most frequent first, each with an example."""
    count = Counter(frozen["reason"] for frozen in data["frozen"])
    example = {f["reason"]: f"{f['tensor']}:{f['axis']}" for f in reversed(data["frozen"])}
    if count:
        yield Items(
            [
                f"{reason}: {example[reason]}" + (f" and {n - 1} more" if n > 1 else "")
                for reason, n in count.most_common()
            ],
            most=8,
        )


@section("Costliest kernels", on_terminal=False)
def kernels(data: Data) -> Iterator[Part]:
    """Time over width of the slowest kernels."""
    yield from map(charts.staircase, data.get("stairs") or ())


# Everything else. ----------------------------------------------------------------------------------------------------


@section("Notes")
def notes(data: Data) -> Iterator[Part]:
    """Fallbacks, features lost in training, and caveats of verification and timing."""
    steps = (data.get("recovery") or {"steps": ()})["steps"]
    lost = (data["compact"] or {}).get("lost_in_training", [])
    lines = [
        *data["notes"],
        *data["plan"]["notes"],
        *(note for step in steps for note in step["notes"]),
        *_evaluation_lines(data),
        *_search_lines(data),
        *(f"in training the compact model has no {item}" for item in lost),
        *(data["check"] or {}).get("notes", []),
    ]
    if lines:
        yield Items(list(dict.fromkeys(lines)))


def _evaluation_lines(data: Data) -> Iterator[str]:
    for name, figures in (data.get("evaluation") or {}).items():
        values = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        yield f"--metric of {name.replace(' ', '.')}.onnx: {values}"


def _search_lines(data: Data) -> Iterator[str]:
    found = data.get("within")
    if not found:
        return
    attempts = []
    for attempt in found["tried"]:
        measured = "" if attempt["measured"] is None else f" (measured {percent(attempt['measured'], 1)})"
        attempts.append(f"{percent(attempt['aim'], 0)}{measured} loses up to {attempt['upper']:.2f}")
    yield (
        f"fastest model that loses at most {found['max_drop']:g} points of {found['of']}: "
        f"{percent(found['measured'], 1)} of {found.get('dense', 'the dense')} model's latency; attempts: "
        + ", ".join(attempts)
    )


@section("Machine, settings, and how to repeat the run", on_terminal=False)
def origin(data: Data) -> Iterator[Part]:
    """Machine, settings and commands behind the figures."""
    rows = [("tool", f"{data['tool']['name']} {data['tool']['version']}")]
    if data["timing"]:
        where, how = data["timing"]["environment"], data["timing"]["settings"]
        rows += [
            ("processor", f"{where['cpu']}, {where['cores']} cores, {', '.join(where['instruction_sets'])}"),
            ("system", f"{where['system']}, Python {where['python']}"),
            ("ONNX Runtime", f"{where['onnxruntime']}, {where['provider']}"),
            ("threads, batch", f"{how['threads']}, {how['batch']}"),
        ]
    rows.append(("plan", data["plan"]["digest"][:16]))
    rows += [(name, str(value)) for name, value in sorted(data["settings"].items())]
    yield Table(("name", "value"), rows)
    if data["command"]:
        yield Code(data["command"])
    if data["accuracy"]["next_command"]:
        yield "To evaluate or train the compact model at a Python prompt:"
        yield Code(data["accuracy"]["next_command"])
    if data["files"]:
        yield Table(("file", "SHA-256"), sorted(data["files"].items()))
