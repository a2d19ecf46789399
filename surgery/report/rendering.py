"""Render the sections of a report on a terminal, as Markdown, and as an HTML page.

Names from the user, such as models or layers, are escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.report.charts import Chart
from surgery.report.formatting import visible
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
        name, weights = _origin(self.data)
        lines = [f"{_escaped(verdict)}; next: {_inline_code(next_command)}", ""]
        lines += [f"# {_escaped(name)}", "", f"weights: {_escaped(weights)}", ""]
        for section in self.sections:
            body = [line for part in section.parts for line in _markdown(part, self.data["files"])]
            if body:
                lines += [f"## {section.title}", "", *body]
        return "\n".join(lines)

    def to_html(self) -> str:
        """Return the report as one page without network access or scripts, for screens, phones and print."""
        import jinja2  # imported here because it takes 0.1 s, to keep `surgery --help` fast

        template = files("surgery.report").joinpath("templates/report.html.j2").read_text("utf-8")
        environment = jinja2.Environment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=True,
            undefined=jinja2.StrictUndefined,
        )  # fmt: skip
        (verdict, _), (name, weights) = headline(self.data), _origin(self.data)
        # Consecutive parts of one kind share a row.
        sections = [
            (section.title, [(kind.__name__, list(parts)) for kind, parts in groupby(section.parts, type)])
            for section in self.sections
        ]
        page: str = environment.from_string(template).render(
            name=name, weights=weights, verdict=verdict, sections=sections
        )
        return page

    def write(self, folder: Path) -> Report:
        """Write report.json, report.md, report.html and separate chart files to a folder.

        Returns:
            The report with the digests of the charts.
        """
        digests = {}
        for chart in (part for section in self.sections for part in section.parts):
            if isinstance(chart, Chart) and chart.file is not None:
                svg = chart.to_svg().encode()
                (folder / chart.file).write_bytes(svg)
                digests[chart.file] = sha256(svg).hexdigest()
        report = Report({**self.data, "files": {**self.data["files"], **digests}})
        texts = report.to_json(), report.to_markdown(), report.to_html()
        for name, text in zip(REPORT_FILES[:3], texts, strict=True):
            (folder / name).write_text(text, encoding="utf-8")
        return report


def _origin(data: Mapping[str, Any]) -> tuple[str, str]:
    model = data["model"]
    return visible(model["name"]), visible(model["weights"] or "as given")


# On a terminal. ------------------------------------------------------------------------------------------------------


def print_parts(parts: Iterable[Part], console: Console) -> None:
    """Print parts of a section, except charts."""
    for part in parts:
        if isinstance(part, Table):
            console.print("", rich_table(part), "", sep="\n")
        else:
            for line in _text_lines(part):
                console.print(line, markup=False, highlight=False, soft_wrap=isinstance(part, Code))


def rich_table(table: Table) -> rich.table.Table:
    """Return a table for a terminal, the first column left-aligned."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown, filled = RichTable(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False), table.filled()
    for k, column in enumerate(filled.columns):
        shown.add_column(Text(column.replace(" ", "\n")), justify="right" if k else "left")
    for row in filled.rows:
        shown.add_row(*map(Text, row))
    return shown


def _text_lines(part: Part) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, Code):
        yield part.text
    elif isinstance(part, Figure):
        yield f"{part.value:>8}  {part.what}: {part.detail}"
    elif isinstance(part, Items):
        shown = part.lines[: part.most]
        yield from (f"  {line}" for line in shown)
        if len(shown) < len(part.lines):
            yield f"  … and {len(part.lines) - len(shown)} more, all in the report (--json, report.json)"


# Markdown. -----------------------------------------------------------------------------------------------------------


def _markdown(part: Part, written: Mapping[str, str]) -> Iterator[str]:
    if isinstance(part, Table):
        table = part.filled()
        yield _row(table.columns)
        yield "|---|" + "---:|" * (len(table.columns) - 1)
        yield from map(_row, table.rows)
    elif isinstance(part, Items):
        yield from (f"- {_escaped(' '.join(line.split()))}" for line in part.lines)
    elif isinstance(part, Code):
        fence = "`" * (_longest_run(part.text) + 3)
        yield from (fence, part.text, fence)
    elif isinstance(part, Chart):
        if part.file not in written:
            return
        yield f"![{_escaped(part.description)}]({part.file})"
    else:
        yield _escaped(part if isinstance(part, str) else f"{part.value} {part.what}: {part.detail}")
    yield ""


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Return text with Markdown's markup escaped; an underscore is markup only at the edge of a word."""
    return re.sub(r"([\\`*\[\]<|]|\b_|_\b)", r"\\\1", text)


def _inline_code(text: str) -> str:
    fence = "`" * (_longest_run(text) + 1)
    return f"{fence}{text}{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
