"""Charts of a report as SVG: text in the colour of what surrounds it, no background, the same bytes each time."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INK = "#010203"
"""Stands for the colour of text until the SVG is written."""
DENSE, COMPACT, OTHER, LIGHT = "#8a97a6", "#2f7fd0", "#d9822b", "#b9c2cc"
_STYLE = {
    "svg.hashsalt": "surgery",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
}
_MOST_OPERATORS = 8
_PIXELS = 1.6
"""Of a screen, for each point of a figure, at most."""


def drawn(size: tuple[float, float], draw: Callable[..., None], *, columns: int = 1) -> str:
    """Return an SVG of a figure of this size in inches, whose axes `draw` gets."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        draw(*figure.subplots(1, columns, squeeze=False)[0])
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue().replace(INK, "currentColor")


def inline(svg: str, told: str) -> str:
    """Return an SVG for the middle of a page: as wide as there is room, and with words for who cannot see it."""
    start = svg.index("<svg")
    head, body = svg[start:].split(">", 1)
    kept = " ".join(part for part in _attributes(head) if not part.startswith(("width=", "height=")))
    label = told.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    width = float(re.findall(r'width="([\d.]+)pt"', head)[0])
    return f'<svg role="img" aria-label="{label}" style="max-width:{_PIXELS * width:.0f}px" {kept}>{body}'


def _attributes(head: str) -> list[str]:
    return re.findall(r'[\w:]+="[^"]*"', head)


def times(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each file's run times: from a twentieth to nineteen, half of them as the thick part, the median as a dot."""

    def draw(axes: Any) -> None:
        for k, row in enumerate(rows):
            at = row["quantiles_ms"]
            colour = COMPACT if row["name"].startswith("compact") else DENSE
            axes.plot([at[1], at[19]], [k, k], color=colour, linewidth=1.5)
            axes.plot([at[5], at[15]], [k, k], color=colour, linewidth=7, solid_capstyle="butt")
            axes.plot(at[10], k, "o", color=INK, markersize=4)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("milliseconds a run")

    return inline(drawn((4.8, 0.7 + 0.32 * len(rows)), draw), "distribution of run times by file")


def operators(before: Mapping[str, float], after: Mapping[str, float], name: str) -> str:
    """Milliseconds by operator of a compact file of this name and of the dense one in the same precision."""
    names = sorted({*before, *after}, key=lambda op: -max(before.get(op, 0.0), after.get(op, 0.0)))[:_MOST_OPERATORS]

    def draw(axes: Any) -> None:
        dense = name.replace("compact", "dense")
        for shift, colour, found, label in ((-0.2, DENSE, before, dense), (0.2, COMPACT, after, name)):
            places = [k + shift for k in range(len(names))]
            axes.barh(places, [found.get(op, 0.0) for op in names], height=0.38, color=colour, label=label)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds, by ONNX Runtime's profiler")
        axes.legend()

    return inline(
        drawn((4.8, 0.9 + 0.36 * len(names)), draw), f"time by operator, {name.replace('compact', 'dense')} and {name}"
    )


def widths(layers: Sequence[Mapping[str, Any]]) -> str:
    """Output widths of layers before and after."""

    def draw(axes: Any) -> None:
        for k, layer in enumerate(layers):
            after = layer["compact"][0] if layer["compact"] else 0
            axes.barh(k, layer["dense"][0], height=0.72, color=LIGHT)
            axes.barh(k, after, height=0.72, color=COMPACT)
            axes.text(layer["dense"][0], k, f" {layer['dense'][0]} → {after or 'gone'}", va="center", fontsize=7.5)
        axes.set_yticks(range(len(layers)), [layer["name"].removesuffix(".weight") for layer in layers], fontsize=7.5)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.margins(x=0.12)
        axes.set_xlabel("units that come out")

    return inline(drawn((4.8, 0.6 + 0.18 * len(layers)), draw), "widths of layers before and after")


def staircase(stair: Mapping[str, Any]) -> str:
    """One kernel's time over its width, with the dense and the chosen width marked."""

    def draw(axes: Any) -> None:
        axes.step(stair["widths"], stair["ms"], where="mid", color=DENSE, linewidth=1.4)
        at = dict(zip(stair["widths"], stair["ms"], strict=True))
        axes.plot(stair["dense"], at[stair["dense"]], "o", color=DENSE, label=f"dense, {stair['dense']}")
        axes.plot(stair["kept"], at[stair["kept"]], "o", color=COMPACT, label=f"chosen, {stair['kept']}")
        axes.set_ylim(0, 1.12 * max(stair["ms"]))
        axes.set_xlim(0, 1.05 * stair["dense"])
        axes.set_title(stair["title"], fontsize=8)
        axes.set_xlabel("width")
        axes.set_ylabel("ms")
        axes.legend(fontsize=7.5)

    return inline(drawn((3.1, 2.3), draw), f"time over width of {stair['title']}")


def recovery(data: Mapping[str, Any]) -> str | None:
    """Accuracy, or agreement, by step, and the loss where something was trained; None where there are no steps."""
    found = data.get("recovery") or {"steps": ()}
    steps = [step for step in found["steps"] if step["agreement"]]
    taught = [step for step in found["steps"] if step.get("history")]
    if len(steps) < 2:
        return None

    def draw(*axes: Any) -> None:
        _by_step(axes[0], steps)
        if taught:
            _loss(axes[1], taught[-1])

    columns = 1 + bool(taught)
    return drawn((max(4.2, 0.8 * len(steps)) * columns, 2.8), draw, columns=columns)


def _by_step(axes: Any, steps: list[Any]) -> None:
    known = [("accuracy", "accuracy, %"), ("top1_match", "top-1 match with the dense model, %")]
    key, label = next(((k, t) for k, t in known if steps[0]["agreement"].get(k) is not None), ("cosine", "cosine, %"))
    names = [step["name"].replace(" ", "\n", 1) + ("" if step["kept"] else "\nundone") for step in steps]
    values = [100 * step["agreement"][key] for step in steps]
    colours = {"dense": DENSE, "cut": OTHER}
    bars = axes.bar(names, values, color=[colours.get(name.partition("\n")[0], COMPACT) for name in names])
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2)
    axes.set_ylim(0, 112)
    axes.set_ylabel(label)


def _loss(axes: Any, step: Mapping[str, Any]) -> None:
    marks = step["history"]["marks"]
    for key, label, colour in (("loss", "learnt from", COMPACT), ("held_out", "held out", OTHER)):
        points = [(mark["epoch"], mark[key]) for mark in marks if mark[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, color=colour)
    best = step["history"]["best"]
    if 0 <= best < len(marks):
        axes.axvline(marks[best]["epoch"], color=DENSE, linestyle=":", label="kept")
    axes.set_yscale("log")
    axes.set_xlabel("epochs")
    axes.set_ylabel(f"loss of {step['name']}")
    axes.legend()
