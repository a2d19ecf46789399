"""Charts of a report as SVG: page-coloured text, no background, byte-identical for the same data."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

INK = "#010203"
"""Placeholder for the text colour until the SVG is written."""
DENSE, COMPACT, OTHER, LIGHT = "#8a97a6", "#2f7fd0", "#d9822b", "#b9c2cc"
_STYLE = {
    "svg.hashsalt": "surgery",
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of layers may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
}
_MOST_OPERATORS = 8
_PIXELS_PER_POINT = 1.6


@dataclass(frozen=True, slots=True, eq=False)
class Chart:
    """A chart, drawn when it is rendered."""

    description: str  # alternative text
    size: tuple[float, float]  # width and height in inches
    draw: Callable[..., None]  # draws on `columns` matplotlib axes, side by side
    columns: int = 1
    file: str | None = None  # name of its own SVG file in the output folder

    def to_svg(self) -> str:
        """Return an SVG document."""
        import matplotlib as mpl  # saves start-up seconds
        from matplotlib.figure import Figure  # saves start-up seconds

        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(*figure.subplots(1, self.columns, squeeze=False)[0])
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        return stream.getvalue().replace(INK, "currentColor")

    def to_inline_svg(self) -> str:
        """Return an SVG element for a page, with flexible width and the description."""
        svg = self.to_svg()
        head, body = svg[svg.index("<svg") + len("<svg") :].split(">", 1)
        kept, width = re.sub(r' (width|height)="[^"]*"', "", head), _PIXELS_PER_POINT * 72 * self.size[0]
        return f'<svg role="img" aria-label="{escape(self.description)}" style="max-width:{width:.0f}px"{kept}>{body}'


def run_times(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Each file's run times: 5th to 95th percentile, thick interquartile range, median as a dot."""

    def draw(axes: Any) -> None:
        for k, row in enumerate(rows):
            at = row["quantiles_ms"]
            colour = COMPACT if row["name"].startswith("compact") else DENSE
            axes.plot([at[1], at[19]], [k, k], color=colour, linewidth=1.5)
            axes.plot([at[5], at[15]], [k, k], color=colour, linewidth=7, solid_capstyle="butt")
            axes.plot(at[10], k, "o", color=INK, markersize=4)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set(xlim=(0, None), ylim=axes.get_ylim()[::-1], xlabel="milliseconds per run")

    return Chart("distribution of run times by file", (4.8, 0.7 + 0.32 * len(rows)), draw)


def operator_times(before: Mapping[str, float], after: Mapping[str, float], name: str) -> Chart:
    """Milliseconds by operator of a compact file and the dense one in the same precision."""
    names = sorted({*before, *after}, key=lambda op: -max(before.get(op, 0.0), after.get(op, 0.0)))[:_MOST_OPERATORS]
    dense = name.replace("compact", "dense")

    def draw(axes: Any) -> None:
        for shift, colour, found, label in ((-0.2, DENSE, before, dense), (0.2, COMPACT, after, name)):
            places = [k + shift for k in range(len(names))]
            axes.barh(places, [found.get(op, 0.0) for op in names], height=0.38, color=colour, label=label)
        axes.set_yticks(range(len(names)), names)
        axes.set(ylim=axes.get_ylim()[::-1], xlabel="milliseconds, by ONNX Runtime's profiler")
        axes.legend()

    return Chart(f"time by operator, {dense} and {name}", (4.8, 0.9 + 0.36 * len(names)), draw)


def layer_widths(layers: Sequence[Mapping[str, Any]]) -> Chart:
    """Output channels of layers before and after."""

    def draw(axes: Any) -> None:
        for k, layer in enumerate(layers):
            before, after = layer["dense"][0], layer["compact"][0] if layer["compact"] else 0
            axes.barh(k, before, height=0.72, color=LIGHT)
            axes.barh(k, after, height=0.72, color=COMPACT)
            axes.text(before, k, f" {before} → {after or 'removed'}", va="center", fontsize=7.5)
        axes.set_yticks(range(len(layers)), [layer["name"].removesuffix(".weight") for layer in layers], fontsize=7.5)
        axes.margins(x=0.12)
        axes.set(ylim=(len(layers) - 0.4, -0.6), xlabel="output channels")

    return Chart("output channels of layers before and after", (4.8, 0.6 + 0.18 * len(layers)), draw)


def staircase(stair: Mapping[str, Any]) -> Chart:
    """One kernel's time over its width, with the dense and the chosen width marked."""

    def draw(axes: Any) -> None:
        axes.step(stair["widths"], stair["ms"], where="mid", color=DENSE, linewidth=1.4)
        at = dict(zip(stair["widths"], stair["ms"], strict=True))
        for width, colour, label in ((stair["dense"], DENSE, "dense"), (stair["kept"], COMPACT, "chosen")):
            axes.plot(width, at[width], "o", color=colour, label=f"{label}, {width}")
        axes.set(xlim=(0, 1.05 * stair["dense"]), ylim=(0, 1.12 * max(stair["ms"])), xlabel="channels", ylabel="ms")
        axes.set_title(stair["title"], fontsize=8)
        axes.legend(fontsize=7.5)

    return Chart(f"time over channels of {stair['title']}", (3.1, 2.3), draw)


def recovery_steps(steps: Sequence[Mapping[str, Any]]) -> Chart:
    """Accuracy, or agreement with the dense model, after each step, and the loss of the last training run."""
    trained = [step for step in steps if step.get("history")]

    def draw(*axes: Any) -> None:
        _draw_steps(axes[0], steps)
        if trained:
            _draw_loss(axes[1], trained[-1])

    columns = 1 + bool(trained)
    size = max(4.2, 0.8 * len(steps)) * columns, 2.8
    return Chart("accuracy or agreement after each recovery step", size, draw, columns, "recovery.svg")


def _draw_steps(axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    known = [("accuracy", "accuracy, %"), ("top1_match", "top-1 match with the dense model, %")]
    key, label = next(((k, t) for k, t in known if steps[0]["agreement"].get(k) is not None), ("cosine", "cosine, %"))
    names = [step["name"].replace(" ", "\n", 1) + ("" if step["kept"] else "\nundone") for step in steps]
    values = [100 * step["agreement"][key] for step in steps]
    colours = {"dense": DENSE, "cut": OTHER}
    bars = axes.bar(names, values, color=[colours.get(name.partition("\n")[0], COMPACT) for name in names])
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2)
    axes.set(ylim=(0, 112), ylabel=label)


def _draw_loss(axes: Any, step: Mapping[str, Any]) -> None:
    marks = step["history"]["marks"]
    for key, label, colour in (("loss", "training", COMPACT), ("held_out", "held out", OTHER)):
        points = [(mark["epoch"], mark[key]) for mark in marks if mark[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label, color=colour)
    best = step["history"]["best"]
    if 0 <= best < len(marks):
        axes.axvline(marks[best]["epoch"], color=DENSE, linestyle=":", label="kept")
    axes.set(yscale="log", xlabel="epochs", ylabel=f"loss of {step['name']}")
    axes.legend()
