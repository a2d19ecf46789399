"""Render the sections of a report on a terminal, as Markdown, and as an HTML page.

Names from the user, such as models or layers, are escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.core import visible
from surgery.report.charts import Chart
from surgery.report.sections import Code, Figure, Items, Part, Section, Table, headline, sections_of

if TYPE_CHECKING:
    import rich.table
    from rich.console import Console

REPORT_FILES = ("report.json", "report.md", "report.html", "recovery.svg")
"""Files that `Report.write` may write."""


@dataclass(frozen=True, slots=True)
class Report:
    """A report; `data` is the contents of report.json, documented in docs/reference/report.md."""

    data: Mapping[str, Any]

    @property
    def sections(self) -> list[Section]:
        """The sections of every rendering, in order."""
        return sections_of(self.data)

    @property
    def _origin(self) -> tuple[str, str]:
        return visible(self.data["model"]["name"]), visible(self.data["model"]["weights"] or "as given")

    def to_json(self) -> str:
        """Return JSON text with sorted keys."""
        return json.dumps(self.data, sort_keys=True, indent=1) + "\n"

    def print(self, console: Console) -> None:
        """Print the report; long lists are cut short."""
        verdict, next_command = headline(self.data)
        line = f"{verdict}; next: {next_command}"
        console.print(line, soft_wrap=True, markup=False, highlight=False, style="bold yellow")
        for section in self.sections:
            parts = [part for part in section.parts if not isinstance(part, Chart)]
            if parts and section.on_terminal:
                console.print(f"\n{section.title}", markup=False, highlight=False, style="bold")
                print_parts(parts, console)

    def to_markdown(self) -> str:
        """Return the report as Markdown, with complete lists."""
        verdict, next_command = headline(self.data)
        fence, (name, weights) = "`" * (_longest_run(next_command) + 1), self._origin
        lines = [f"{_escaped(verdict)}; next: {fence}{next_command}{fence}", ""]
        lines += [f"# {_escaped(name)}", "", f"weights: {_escaped(weights)}", ""]
        for section in self.sections:
            body = [line for part in section.parts for line in _markdown(part, self.data["files"])]
            lines += [f"## {section.title}", "", *body] if body else []
        return "\n".join(lines)

    def to_html(self) -> str:
        """Return the report as one page without network access or scripts, for screens, phones and print."""
        import jinja2  # saves start-up seconds

        template = files("surgery.report").joinpath("templates/report.html.j2").read_text("utf-8")
        how: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, **how)
        (verdict, _), (name, weights) = headline(self.data), self._origin
        # Consecutive parts of one kind share a row.
        grouped = {x.title: [(kind.__name__, list(g)) for kind, g in groupby(x.parts, type)] for x in self.sections}
        page = environment.from_string(template)
        return page.render(name=name, weights=weights, verdict=verdict, sections=list(grouped.items()))

    def write(self, folder: Path) -> Report:
        """Write report.json, report.md, report.html and separate chart files; return the report with their digests."""
        digests = {}
        for chart in (part for section in self.sections for part in section.parts):
            if isinstance(chart, Chart) and chart.file is not None:
                svg = chart.to_svg().encode()
                (folder / chart.file).write_bytes(svg)
                digests[chart.file] = sha256(svg).hexdigest()
        report = Report({**self.data, "files": {**self.data["files"], **digests}})
        for name, text in zip(REPORT_FILES, (report.to_json(), report.to_markdown(), report.to_html()), strict=False):
            (folder / name).write_text(text, encoding="utf-8")
        return report


def print_parts(parts: Iterable[Part], console: Console) -> None:
    """Print parts of a section, except charts."""
    for part in parts:
        if isinstance(part, Table):
            console.print("", rich_table(part), "", sep="\n")
            continue
        lines = [part] if isinstance(part, str) else []
        if isinstance(part, Code):
            lines = part.text.splitlines()
        elif isinstance(part, Figure):
            lines = [f"{part.value:>8}  {part.what}: {part.detail}"]
        elif isinstance(part, Items):
            lines = [f"  {line}" for line in part.lines[: part.most]]
            if hidden := len(part.lines) - len(lines):
                lines.append(f"  … and {hidden} more, all in the report (--json, report.json)")
        for line in lines:
            console.print(visible(line), markup=False, highlight=False, soft_wrap=isinstance(part, Code))


def rich_table(table: Table) -> rich.table.Table:
    """Return a table for a terminal, the first column left-aligned."""
    from rich import box  # saves start-up seconds
    from rich.table import Table as RichTable  # saves start-up seconds
    from rich.text import Text  # saves start-up seconds

    shown, filled = RichTable(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False), table.filled()
    for k, column in enumerate(filled.columns):
        shown.add_column(Text(column.replace(" ", "\n")), justify="right" if k else "left")
    for row in filled.rows:
        shown.add_row(*(Text(visible(cell)) for cell in row))
    return shown


def _markdown(part: Part, written: Mapping[str, str]) -> list[str]:
    if isinstance(part, Chart):
        return [f"![{_escaped(part.description)}]({part.file})", ""] if part.file in written else []
    if isinstance(part, Table):
        table = part.filled()
        head, *rows = (f"| {' | '.join(map(_escaped, cells))} |" for cells in (table.columns, *table.rows))
        return [head, "|---|" + "---:|" * (len(table.columns) - 1), *rows, ""]
    if isinstance(part, Items):
        return [*(f"- {_escaped(' '.join(line.split()))}" for line in part.lines), ""]
    if isinstance(part, Code):
        fence = "`" * (_longest_run(part.text) + 3)
        return [fence, part.text, fence, ""]
    return [_escaped(part if isinstance(part, str) else f"{part.value} {part.what}: {part.detail}"), ""]


def _escaped(text: str) -> str:
    """Return text with Markdown's markup escaped; an underscore is markup only at the edge of a word."""
    return re.sub(r"([\\`*\[\]<|]|\b_|_\b)", r"\\\1", text)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
