"""The documents: links, code, tables and generated pages are up to date, and the site builds without warnings."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import run_python

import surgery
from benchmarks.studies import allocation, blocks, cifar, record
from benchmarks.studies.latency import table as latency
from benchmarks.studies.recovery.table import tables
from surgery.config import options_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
RUNNABLE = [f"docs/how-to/{name}.md" for name in ("add-an-operator", "export-files", "use-recipes")]
ROOMS = {path.parent.name for path in (ROOT / "surgery").glob("*/__init__.py")}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_readme_is_short_and_opens_with_the_two_commands() -> None:
    assert len(README.splitlines()) <= 170
    first, second = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)[0].strip().splitlines()
    assert "venv" in first
    assert first.endswith("scripts/shrink.py resnet18")
    assert "[test]" in second
    assert second.endswith("-m pytest -n 2")


def test_code_map_lists_the_rooms() -> None:
    section = README.split("## Code map")[1].split("\n## ")[0]
    mapped = re.findall(r"^\| `([\w/]+)` \|", section, flags=re.MULTILINE)
    assert set(mapped) == {f"surgery/{room}" for room in ROOMS} | {"exporters", "benchmarks", "scripts"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
        assert target.startswith("http") or (document.parent / target).exists(), target


@pytest.mark.parametrize("document", ["README.md", *RUNNABLE])
def test_python_in_the_documents_runs(document: str, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code
    done = run_python(tmp_path, "-c", "\n".join(code))
    assert done.returncode == 0, done.stderr


def test_tables_in_the_documents_match_the_results_files() -> None:
    results = record.read("cifar")
    assert cifar.markdown(results) in page("results/cifar.md")
    assert results["command"] in page("results/cifar.md")
    assert record.sentence(results["machine"]) in page("results/cifar.md")
    drop = record.read("recovery")["rows"]["without labels resnet56 0.476 second-order"]["rows"][-1]["judged"][0]
    assert f"{drop['drop']:.2f} points [{drop['low']:.2f}, {drop['high']:.2f}]" in page("results/cifar.md")
    assert tables(record.read("recovery")).rstrip() in page("results/recovery.md")
    assert latency.render(record.read("latency")["rows"]).rstrip() in page("results/latency.md")
    assert blocks.markdown(record.read("blocks")["rows"]) in page("explanation/latency-budgets.md")
    assert allocation.markdown(record.read("allocation")["rows"]) in page("explanation/latency-budgets.md")


def test_options_reference_is_up_to_date() -> None:
    assert page("reference/options.md").endswith(options_table()), "surgery options"


def test_every_public_name_is_in_the_api_reference() -> None:
    documented = re.findall(r"^::: surgery\.(\w+)$", page("reference/api.md"), flags=re.MULTILINE)
    assert sorted(documented) == sorted(surgery.__all__)


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-f", ROOT / "docs/site/mkdocs.yml"]
    done = subprocess.run([*command, "-d", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
