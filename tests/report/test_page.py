"""report.html: what is in it, that it stands alone, and how it looks to a browser."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from stairs import table_of
from torch import nn

import surgery
from surgery.capture.tracing import trace
from surgery.coupling.coupler import couple
from surgery.report import Report

VOID = {"meta", "link", "br", "img", "hr", "input"}


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4)).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with a budget of time, images, labels and int8: everything that a page can show."""
    torch.manual_seed(1)
    images, x = torch.randn(48, 3, 16, 16), torch.randn(1, 3, 16, 16)
    model, folder = net(), tmp_path_factory.mktemp("page") / "out"
    program = trace(model, x)
    table = table_of(program, couple(program))
    labelled = {"val": (images, torch.arange(48) % 4), "allow_chance": True}
    asked = surgery.recipe(latency=0.6, latency_table=table, data=images, **labelled)
    result = surgery.shrink(model, x, asked)
    report = surgery.save(result, folder, surgery.recipe(runs=9, precision=("fp32", "int8")))
    return folder / "report.html", copy.deepcopy(dict(report.data))


class Tags(HTMLParser):
    """Elements that are open, and all that refer to something outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_well_formed(written: tuple[Path, dict[str, Any]]) -> None:
    text = written[0].read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert not tags.outside
    assert "script" not in tags.seen
    assert not re.search(r"@import|url\(https?:", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_the_page_shows_speed_accuracy_and_where_both_come_from(written: tuple[Path, dict[str, Any]]) -> None:
    path, data = written
    text = path.read_text(encoding="utf-8")
    speedup = next(row["speedup"]["value"] for row in data["timing"]["rows"] if row["name"] == "compact")
    drop = next(row["agreement"]["drop"][0] for row in data["models"] if row["name"] == "compact")
    assert f"<b>{speedup:.2f}×</b>" in text
    assert f"<b>{0.0 - drop:+.2f}</b>" in text
    for title in ("Summary", "Models", "Accuracy and latency", "Recovery steps", "Time by operator", "Pruned units",
                  "Left untouched, and why", "Costliest kernels"):  # fmt: skip
        assert f"<h2>{title}</h2>" in text, title
    assert text.count("<svg") == 5 + len(data["stairs"])
    assert data["timing"]["environment"]["cpu"] in text
    assert data["plan"]["digest"][:16] in text
    changed = next(x for x in data["layers"] if x["compact"] and x["compact"][0] != x["dense"][0])
    assert f"{changed['dense'][0]} → {changed['compact'][0]}" in text


def test_staircases_mark_the_width_that_was_chosen(written: tuple[Path, dict[str, Any]]) -> None:
    data = written[1]
    assert data["stairs"]
    assert data["stairs"][0]["kept"] < data["stairs"][0]["dense"]
    for stair in data["stairs"]:
        assert {stair["dense"], stair["kept"]} <= set(stair["widths"])
        assert len(stair["ms"]) == len(stair["widths"])
    widths = {tuple(sorted((x["dense"][0], x["compact"][0]))) for x in data["layers"] if x["compact"]}
    assert {tuple(sorted((s["dense"], s["kept"]))) for s in data["stairs"]} <= widths


def test_the_same_report_gives_the_same_page(written: tuple[Path, dict[str, Any]]) -> None:
    path, data = written
    assert Report(data).to_html() == Report(copy.deepcopy(data)).to_html() == path.read_text(encoding="utf-8")


def test_a_page_without_images_or_a_latency_says_what_it_can(tmp_path: Path) -> None:
    result = surgery.shrink(net(), torch.randn(1, 3, 16, 16), surgery.recipe(macs=0.6))
    surgery.save(result, tmp_path / "out", surgery.recipe(runs=3))
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "accuracy unknown" in text
    assert "Recovery steps" not in text
    assert "Costliest kernels" not in text
    assert "Time by operator" in text


# In a browser. -------------------------------------------------------------------------------------------------------

HARNESS = """<!doctype html><link rel="icon" href="data:,"><iframe id="f" src="{page}"
style="width:{width}px;height:900px;border:0"></iframe>
<script>document.getElementById("f").onload = function () {{
  const d = this.contentDocument; console.log("WIDTH " + d.documentElement.scrollWidth + " DRAWN "
    + [...d.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 20).length);
}};</script>"""


@pytest.mark.parametrize("width", [1200, 380])
def test_a_browser_finds_no_fault_and_the_page_fits(
    written: tuple[Path, dict[str, Any]], tmp_path: Path, width: int
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.format(page=written[0].resolve().as_uri(), width=width))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
         "--virtual-time-budget=3000", "--dump-dom", harness.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1, said
    found = re.search(r"WIDTH (\d+) DRAWN (\d+)", said[0])
    assert found is not None, said
    assert int(found[1]) <= width
    drawn = written[0].read_text(encoding="utf-8").count("<svg")
    assert int(found[2]) == drawn > 4 + len(written[1]["stairs"])
