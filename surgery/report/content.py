"""What a run found, as plain data: the dictionary that report.json holds, and its two readable forms.

`describe` says what was decided and verified, `measured` adds the files and the clock; `render_terminal` and
`render_markdown` show the same figures to a reader. The schema is documented in docs/reference/report.md. Nothing here
computes a cost or measures a time: those are passed in, so a report can be rendered from its JSON, without torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from rich.console import Console
from rich.table import Table

from surgery import __version__
from surgery.core import CheckResult, CompactModel, Coupling, Plan, Program, figure, plain_table, ratio, si, size
from surgery.report import tables as report_steps

SCHEMA = 1
VERDICT = "accuracy unknown: not fit to deploy"

COLUMNS = (
    "model",
    "params",
    "MACs",
    "ONNX",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "items /s",
    "speedup",
    "95% interval",
    "memory",
)
"""Headers of the table of models, in the order of `cells`."""

_SHOWN_GROUPS = 24
_SHOWN_REASONS = 8


def describe(
    program: Program,
    coupling: Coupling,
    plan: Plan,
    *,
    compact: CompactModel | None = None,
    verdict: CheckResult | None = None,
    costs: Mapping[str, tuple[int, int]],
    loop: Any = None,
) -> dict[str, Any]:
    """Return the report on a decision: what is cut, what stays and why, and what the check found.

    Args:
        program: the traced dense model.
        coupling: its groups.
        plan: which units die.
        compact: the smaller model, or None where nothing was cut yet (`surgery show`).
        verdict: what the check found, or None where nothing was checked.
        costs: ``params``, ``macs`` and ``channels`` → (dense, kept), in parameters, MACs per batch element, units.
        loop: for a budget of time, how the plan was found (`surgery.planning.refinement.Loop`).

    Returns:
        JSON-ready data of schema `SCHEMA`, without files and times.
    """
    dense, kept = ({key: pair[side] for key, pair in costs.items()} for side in (0, 1))
    rows = [("dense", dense), ("masked", dense), ("compact", kept)]
    return {
        "schema": SCHEMA,
        "tool": {"name": "model-surgery", "version": __version__},
        "accuracy": {"status": "unknown", "verdict": VERDICT, "next_command": None},
        "model": {
            "name": type(program.dense.model).__name__,
            "weights": None,
            "fingerprint": program.fingerprint,
            "tracer": program.tracer,
            "inputs": [plain(spec) for spec in program.inputs],
        },
        "budget": _budget(plan, costs),
        "latency": _plain_loop(loop),
        "settings": json.loads(json.dumps(dict(plan.settings))),
        "plan": {"digest": plan.digest, "notes": list(plan.notes), "reasons": dict(plan.reasons)},
        "compact": _compact(compact),
        "models": [
            {"name": name, "parameters": cost["params"], "macs": cost["macs"], "onnx_bytes": None}
            for name, cost in rows
        ],
        "groups": _groups(coupling, plan),
        "dropped": [
            {"name": name, "constant": bool(left), "reason": plan.reasons.get(name)}
            for name, left in plan.dropped.items()
        ],
        "frozen": [plain(frozen) for frozen in coupling.frozen],
        "check": plain(verdict) if verdict else None,
        "timing": None,
        "command": None,
        "files": {},
        "stages_s": {},
        "notes": list(program.notes),
    }


def measured(
    data: Mapping[str, Any],
    *,
    onnx_bytes: Mapping[str, int],
    timing: Mapping[str, Any] | None,
    files_sha256: Mapping[str, str],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the report with the files that were written and the times that were measured.

    Args:
        data: what `describe` returned; left unchanged.
        onnx_bytes: row name → size of its ONNX file, weights included.
        timing: the timer's own dictionary, or None where nothing was timed.
        files_sha256: file name → SHA-256, hexadecimal.
        notes: what exporting and timing want the user to know.
    """
    models = [{**row, "onnx_bytes": onnx_bytes.get(row["name"])} for row in data["models"]]
    return {
        **data,
        "models": models,
        "timing": timing,
        "files": dict(files_sha256),
        "notes": [*data["notes"], *notes],
    }


def named(
    data: Mapping[str, Any],
    *,
    name: str,
    weights: str,
    next_command: str,
    command: str | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the report with what only the caller knows: where the model came from, and what to do next.

    Args:
        data: what `describe` returned; left unchanged.
        name: of the model, as the user would say it.
        weights: where they came from.
        next_command: a command line that can be typed as it stands.
        command: the one that was typed.
        notes: what loading wants the user to know; they come first.
    """
    return {
        **data,
        "accuracy": {**data["accuracy"], "next_command": next_command},
        "model": {**data["model"], "name": name, "weights": weights},
        "command": command,
        "notes": [*notes, *data["notes"]],
    }


def plain(value: Any) -> Any:
    """Return a dataclass as what JSON makes of it: tuples are lists, as they are when the report is read back."""
    return json.loads(json.dumps(asdict(value)))


def layers(dense: Any, compact: Any) -> list[dict[str, Any]]:
    """Return the shape of each weight of two axes or more, before and after; after is None where it is gone.

    Args:
        dense: the dense module.
        compact: the compact one, whose parameters bear the same names.
    """
    kept = {name: list(x.shape) for name, x in compact.named_parameters()}
    shapes = {name: list(x.shape) for name, x in dense.named_parameters() if x.dim() > 1}
    return [{"name": name, "dense": shape, "compact": kept.get(name)} for name, shape in shapes.items()]


def _plain_loop(loop: Any) -> dict[str, Any] | None:
    return json.loads(json.dumps(loop.to_dict())) if loop is not None else None


def _budget(plan: Plan, costs: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
    if plan.budget is None or plan.budget.is_latency:
        return None
    dense, kept = costs[plan.budget.kind]
    return {
        "kind": plan.budget.kind,
        "fraction": plan.budget.amount,
        "dense": dense,
        "kept": kept,
        "kept_fraction": kept / dense if dense else 1.0,
    }


def _compact(compact: CompactModel | None) -> dict[str, Any] | None:
    if compact is None:
        return None
    return {"kind": compact.kind, "why": compact.why, "lost_in_training": list(compact.lost_in_training)}


def _groups(coupling: Coupling, plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": group.name,
            "from": group.size,
            "to": group.size - len(plan.dead.get(group.name, ())),
            "inexact": group.inexact,
            "sites": [f"{site.tensor}:{site.axis}" for site in group.sites],
        }
        for group in coupling.groups
    ]


# The readable forms. -------------------------------------------------------------------------------------------------


def headline(data: Mapping[str, Any]) -> str:
    """Return the first line a reader sees: no figure is shown before it."""
    accuracy = data["accuracy"]
    if accuracy["next_command"]:
        return f"{accuracy['verdict']}; next: {accuracy['next_command']}"
    return f"{accuracy['verdict']}; next: evaluate the compact model on your own data"


def cells(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of models as text, one tuple per row in the order of `COLUMNS`; ``-`` where not measured.

    Where times were measured, the last row is the dense model against its own copy: the timer's test of itself.
    """
    timing = data["timing"] or {"rows": (), "aa": None}
    times = {row["name"]: row for row in timing["rows"]}
    rows = [_row(model, times.get(model["name"], {})) for model in data["models"]]
    if timing["aa"]:
        rows.append(("A/A", *([""] * 7), *ratio(timing["aa"]), ""))
    return rows


def _row(model: Mapping[str, Any], times: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        model["name"],
        si(model["parameters"]),
        si(model["macs"]),
        size(model["onnx_bytes"]),
        *(figure(times.get(key)) for key in ("p50_ms", "p90_ms", "p99_ms")),
        figure(times.get("throughput_per_s")),
        *ratio(times.get("speedup")),
        size(times.get("peak_memory_bytes")),
    )


def cut_lines(data: Mapping[str, Any]) -> list[str]:
    """Return one line per cut group: its name, from how many units to how many, and whether that is inexact."""
    cut = [group for group in data["groups"] if group["to"] < group["from"]]
    width = max((len(group["name"]) for group in cut), default=0)
    return [
        f"{group['name']:<{width}} {group['from']:>5} → {group['to']}" + (" (inexact)" if group["inexact"] else "")
        for group in cut
    ]


def dropped_lines(data: Mapping[str, Any]) -> list[str]:
    """Return one line per block that is gone, with why it went."""
    return [f"{b['name']}: {b['reason'] or 'dead' + ', a constant stays' * b['constant']}" for b in data["dropped"]]


def inexact_lines(data: Mapping[str, Any]) -> list[str]:
    """Return one line per cut group whose removal changes what a norm or mean averages over."""
    return [f"{g['name']}: {g['inexact']}" for g in data["groups"] if g["inexact"] and g["to"] < g["from"]]


def frozen_lines(data: Mapping[str, Any]) -> list[str]:
    """Return one line per reason for leaving axes whole, the most frequent first, with how many and an example."""
    count = Counter(frozen["reason"] for frozen in data["frozen"])
    example = {f["reason"]: f"{f['tensor']}:{f['axis']}" for f in reversed(data["frozen"])}
    return [
        f"{reason}: {example[reason]}" + (f" and {n - 1} more" if n > 1 else "") for reason, n in count.most_common()
    ]


def budget_line(data: Mapping[str, Any]) -> str:
    """Return what was asked for and what is kept, or the empty string for a plan made without a budget."""
    budget = data["budget"]
    if budget is None:
        return ""
    return (
        f"budget: keep at most {budget['fraction']:g} of the {budget['kind']}; "
        f"kept {budget['kept_fraction']:.4f} ({si(budget['kept'])} of {si(budget['dense'])})"
    )


def deployed(data: Mapping[str, Any]) -> str:
    """Return the precision that a budget of time is of; `fp32` for other budgets."""
    return str(((data["latency"] or {}).get("device") or {}).get("precision", "fp32"))


def latency_line(data: Mapping[str, Any]) -> str:
    """Return what a budget of time came to; the empty string for other budgets."""
    latency = data["latency"]
    if latency is None:
        return ""
    table = f"by the latency table {latency['predicted_ms']:.4g} of {latency['predicted_dense_ms']:.4g} ms"
    return f"latency budget: keep at most {latency['target']:.4g} of it; {latency['verdict']}; {table}"


def compact_line(data: Mapping[str, Any]) -> str:
    """Return which kind of module came back, and why; the empty string where nothing was cut."""
    compact = data["compact"]
    if compact is None:
        return ""
    kind = "the model's own class" if compact["kind"] == "module" else "a graph module"
    return f"compact model: {kind} ({compact['why']})"


def check_line(data: Mapping[str, Any]) -> str:
    """Return what the check found, in one sentence; the empty string where nothing was checked."""
    check = data["check"]
    if check is None:
        return ""
    replayed = f"labels of {check['replayed']} values replayed" if check["replayed"] else "no label replay"
    real = "cannot be told" if check["error_real"] is None else f"{check['error_real']:.1e}"
    return (
        f"check: equal to {check['reference']}; {replayed}, "
        f"relative error {check['error_float64']:.1e} in float64, {real} on the real weights"
    )


def timing_line(data: Mapping[str, Any]) -> str:
    """Return what the times were measured on and whether they can be believed; empty where nothing was timed."""
    timing = data["timing"]
    if timing is None:
        return ""
    where, settings = timing["environment"], timing["settings"]
    verdict = "reliable" if timing["reliable"] else "UNRELIABLE, so that no row is called dominated"
    return (
        f"times: {verdict}: {timing['why']}; ONNX Runtime {where['onnxruntime']} on {where['cpu']}, "
        f"threads {settings['threads']}, batch {settings['batch']}, {timing['rounds']} rounds"
    )


def sentences(data: Mapping[str, Any]) -> list[str]:
    """Return what was asked for and what came of it, a sentence for each stage that has something to say."""
    lines = (
        *(budget_line(data), latency_line(data), compact_line(data), check_line(data)),
        *(report_steps.judged_line(data), timing_line(data)),
    )
    return [line for line in lines if line]


def note_lines(data: Mapping[str, Any]) -> list[str]:
    """Return everything else the user should know: fallbacks, losses in training, doubts of check and timer."""
    lost = (data["compact"] or {}).get("lost_in_training", [])
    lines = [
        *data["notes"],
        *data["plan"]["notes"],
        *report_steps.step_notes(data),
        *(f"in training the compact model has no {item}" for item in lost),
        *(data["check"] or {}).get("notes", []),
    ]
    return list(dict.fromkeys(lines))


def render_terminal(data: Mapping[str, Any], console: Console) -> None:
    """Print the report: verdict, table of models, what was cut and what was not; long lists are summarised."""
    console.print(headline(data), soft_wrap=True, markup=False, highlight=False, style="bold yellow")
    console.print("", _table(data), "", sep="\n")
    if judged := report_steps.judged_cells(data):
        console.print(plain_table(report_steps.JUDGED, judged), "", sep="\n")
    if steps := report_steps.step_cells(data):
        console.print(plain_table(report_steps.STEP_COLUMNS, steps), "", sep="\n")
    for line in sentences(data):
        console.print(line, markup=False, highlight=False)
    _section(console, "cut (group: units from → to)", cut_lines(data), limit=_SHOWN_GROUPS)
    _section(console, "dropped: whole branches and layers", dropped_lines(data), limit=_SHOWN_GROUPS)
    _section(console, "inexact: not what zeros would give", inexact_lines(data), limit=_SHOWN_GROUPS)
    _section(console, "frozen, and why", frozen_lines(data), limit=_SHOWN_REASONS)
    _section(console, "notes", note_lines(data), limit=None)


def _table(data: Mapping[str, Any]) -> Table:
    return plain_table(COLUMNS, cells(data), whole=data["timing"] is not None)


def _section(console: Console, title: str, lines: Sequence[str], *, limit: int | None) -> None:
    if not lines:
        return
    console.print(f"\n[bold]{title}[/bold]")
    shown = lines if limit is None else lines[:limit]
    for line in shown:
        console.print(f"  {line}", markup=False, highlight=False)
    if len(shown) < len(lines):
        console.print(f"  … and {len(lines) - len(shown)} more, all in the report (--json, report.json)", markup=False)


def render_markdown(data: Mapping[str, Any]) -> str:
    """Return report.md: the same as on the terminal, with every list complete."""
    import jinja2  # Here, so that `surgery --help` does not pay for it.

    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("surgery.report").joinpath("templates/report.md.j2").read_text("utf-8"))
    return template.render(
        data=data,
        columns=COLUMNS,
        judged_columns=report_steps.JUDGED,
        judged_rows=report_steps.judged_cells(data),
        step_columns=report_steps.STEP_COLUMNS,
        step_rows=report_steps.step_cells(data),
        rows=cells(data),
        headline=headline(data),
        sentences=sentences(data),
        sections={
            "Cut: group, units from → to": cut_lines(data),
            "Dropped: whole branches and layers": dropped_lines(data),
            "Inexact: not what zeros would give": inexact_lines(data),
            "Frozen, and why": frozen_lines(data),
            "Notes": note_lines(data),
        },
    )
