"""Options are declared once: the command line, recipes, Python and the documentation follow from the declaration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery import config
from surgery.errors import InvalidInput

ROOT = Path(__file__).resolve().parents[2]


def surgery_run(folder: Path, *args: str, code: str = "", at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *(("-c", code) if code else ("-m", "surgery.cli", *args))]
    environment = {**os.environ, "PYTHONPATH": str(at), "COLUMNS": "80"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


# One declaration. ----------------------------------------------------------------------------------------------------


def test_a_new_field_is_an_option_a_key_a_check_and_a_row_without_another_edit(tmp_path: Path) -> None:
    for package in ("surgery", "exporters"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "surgery" / "config.py"
    text = path.read_text(encoding="utf-8")
    place = text.index("    channels: float | None")
    added = '    joules: float | None = option(None, FRACTION, "Fraction of the energy.", common=True)\n'
    path.write_text(text[:place] + added + text[place:], encoding="utf-8")
    (tmp_path / "edge.toml").write_text('model = "none.py:net"\njoules = 2\n')

    assert "--joules R" in surgery_run(tmp_path, "shrink", "--help", at=tmp_path).stdout
    assert "| `--joules` | a number above 0 and below 1 |" in surgery_run(tmp_path, "options", at=tmp_path).stdout
    for args in (("run", "edge.toml"), ("shrink", "none.py:net", "--recipe", "edge.toml")):
        said = surgery_run(tmp_path, *args, at=tmp_path).stderr
        assert "edge.toml, line 2: joules = 2: give a number above 0 and below 1" in said
    code = (
        "import surgery; print(surgery.recipe(joules=0.5).budget.joules)\n"
        "try: surgery.recipe(joule=0.5)\nexcept surgery.SurgeryError as error: print(error)"
    )
    assert surgery_run(tmp_path, code=code, at=tmp_path).stdout == (
        "0.5\nthere is no option 'joule'; the nearest is 'joules'\n"
    )


def test_names_are_unique_and_each_option_says_what_it_is() -> None:
    assert len(config.OPTIONS) == sum(len(fields(group)) for group in config.GROUPS.values())
    assert not set(config.OLD_NAMES) & set(config.OPTIONS)
    assert {new for new, _ in config.OLD_NAMES.values()} <= set(config.OPTIONS)
    for option in config.OPTIONS.values():
        assert option.help.endswith(".") and option.heading in config.HEADINGS


# Values. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latencyy": 0.5}, "there is no option 'latencyy'; the nearest is 'latency'"),
        ({"macs": 1.0}, "macs=1.0: give a number above 0 and below 1"),
        ({"macs": True}, "macs=True"),
        ({"macs": 0.5, "params": 0.5}, "--macs and --params are given"),
        ({"round_to": 1.5}, "a whole number of at least 1"),
        ({"scope": "all"}, "one of global, uniform"),
        ({"precision": "fp32,fp8"}, "some of fp32, fp16, int8"),
        ({"input_shape": (1, 0)}, "a shape"),
        ({"size": (1, 2, 3)}, "one number, or height and width"),
        ({"keep": 3}, "patterns of names"),
        ({"inexact": None}, "one of never, if-needed, always"),
    ],
)
def test_what_is_not_accepted_says_what_is(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        surgery.recipe(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"macs": 0.5, "deploy": "int8"}, "--deploy int8 is for budgets of time"),
        ({"latency": 0.5, "round_to": 8}, "round_to does not go with a latency budget"),
        ({"tracer": "torch-pruning", "latency": 0.5}, "torch.export"),
        ({"max_drop": 1.0}, "needs something to evaluate on"),
        ({"max_drop": 1.0, "macs": 0.5, "val": "photos"}, "give no budget with it"),
        ({"macs": 0.5, "steps": 2}, "--steps recovers after each step"),
        ({"mean": (0.5,)}, "--mean is for images"),
        ({"recover": "bn"}, "--recover bn uses images"),
        ({"epochs": 3}, "--epochs is for training"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        config.validate(surgery.recipe(**options))


def test_values_come_in_one_form() -> None:
    made = surgery.recipe(keep="fc", precision="int8, fp16", latency_table=Path("a.json"), size=7)
    assert made.selection.keep == ("fc",)
    assert made.output.precision == ("int8", "fp16")
    assert made.data.size == (7,)
    assert surgery.recipe(budget=surgery.Budget(macs=0.5)) == surgery.recipe(macs=0.5)


def test_defaults_depend_on_what_else_is_asked_for() -> None:
    def chosen(trained: bool = False, **options: Any) -> tuple[str, str, str | None]:
        made = config.resolved(surgery.recipe(**options), trained=trained)
        return made.budget.kind, made.selection.criterion, made.recovery.recover

    assert chosen() == ("latency", "signal", "none")
    assert chosen(trained=True) == ("latency", "signal", "fold")
    assert chosen(macs=0.5) == ("macs", "l1", "none")
    assert chosen(macs=0.5, data="photos", trained=True) == ("macs", "second-order", "reconstruct")
    assert chosen(tracer="torch-pruning") == ("macs", "l1", "none")


# Recipes. ------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    made = surgery.recipe(
        model="resnet18", model_arg={"num_classes": 10}, macs=0.5, keep=("fc", "layer4.*"), data="photos",
        mean=(0.5, 0.5, 0.5), flip=False, precision=("fp32", "int8"), opset=18,
    )  # fmt: skip
    (tmp_path / "recipe.toml").write_text(config.to_toml(made))
    options, said = config.read_recipe(tmp_path / "recipe.toml")
    assert surgery.recipe(**options) == made
    assert not said


def test_objects_of_python_stand_in_a_recipe_as_comments(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(config.to_toml(surgery.recipe(data=torch.zeros(1), macs=0.5)))
    assert "# data: an object of Python" in (tmp_path / "recipe.toml").read_text()
    assert surgery.recipe(**config.read_recipe(tmp_path / "recipe.toml")[0]) == surgery.recipe(macs=0.5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("# ours\n\nlatencyy = 0.5\n", "line 3: there is no key 'latencyy'; the nearest is 'latency'"),
        ('macs = 0.5\nscope = "all"\n', "line 2: scope = 'all': give one of global, uniform"),
        ("[budget]\nmacs = 0.5\n", "line 1: recipes have no tables; write the keys of .budget. without that line"),
        ("macs = \n", "not TOML: .*line 1"),
        ('data = ["photos"]\n', r"line 1: data = \['photos'\]: give a folder of images"),
        ("metric = 5\n", "line 1: metric = 5: give a function of a model"),
        (f"keep = {'[' * 100_000}", "recursion"),
        (f"threads = {'9' * 5000}", "digits"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_told_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "edge.toml").write_text(content)
    with pytest.raises(InvalidInput, match=rf"edge\.toml.*{said}"):
        surgery.recipe(**config.read_recipe(tmp_path / "edge.toml")[0])


def test_a_recipe_by_an_older_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text('part = "backbone"\nexact = true\n')
    options, said = config.read_recipe(tmp_path / "old.toml")
    assert options == {"submodule": "backbone", "inexact": "never"}
    assert len(said) == 2 and "'part' is now 'submodule'" in said[0]


def test_the_command_line_comes_before_the_recipe_and_that_before_defaults(tmp_path: Path) -> None:
    from surgery.cli import _recipe

    (tmp_path / "edge.toml").write_text('model = "resnet18"\nlatency = 0.5\nscope = "uniform"\nseed = 3\n')
    made = _recipe({"recipe_file": tmp_path / "edge.toml", "macs": 0.4, "seed": 4, "scope": None, "keep": ()})
    assert made.budget == surgery.Budget(macs=0.4)  # a budget of the command line replaces the recipe's
    assert (made.selection.seed, made.selection.scope, made.selection.round_to) == (4, "uniform", 1)
    assert made.model.model == "resnet18"


# Earlier versions. ---------------------------------------------------------------------------------------------------


def test_keyword_arguments_of_earlier_versions_warn_and_do_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(1, 3, 8, 8)
    with pytest.warns(DeprecationWarning, match=r"surgery\.recipe\(macs, submodule\)|surgery\.recipe\("):
        old = surgery.shrink(model, x, budget=surgery.Budget(macs=0.5), inexact="always", part=None)
    assert old.plan.to_json() == surgery.shrink(model, x, surgery.recipe(macs=0.5, inexact="always")).plan.to_json()
    with pytest.warns(DeprecationWarning):
        recovered = surgery.recover(old, torch.randn(64, 3, 8, 8), level="bn")
    assert [step.name for step in recovered.steps] == ["dense", "cut", "bn"]
    with pytest.warns(DeprecationWarning):
        training = surgery.Training(batch=8, epochs=1, held_out=0.0)
        taught = surgery.recover(old, torch.randn(64, 3, 8, 8), level="distill", training=training)
    assert taught.steps[-1].history is not None and taught.steps[-1].history.steps == 8


def test_what_a_users_file_registers_is_an_accepted_value(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import surgery, torch\nfrom torch import nn\n\n"
        "@surgery.criterion('own')\ndef own(group, weights): return list(range(group.size))\n\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), torch.ones(1, 3, 8, 8)\n"
    )
    for criterion, said in (("own", ""), ("other", "criterion='other': give one of ")):
        shown = surgery_run(tmp_path, "show", "net.py:net", "--macs", "0.6", "--criterion", criterion)
        assert (shown.returncode == 0) is (not said) and said in shown.stderr, shown.stderr
    (tmp_path / "edge.toml").write_text('macs = 0.6\ncriterion = "other"\n')
    for model in ("net.py:net", "resnet18"):
        said = surgery_run(tmp_path, "show", model, "--recipe", "edge.toml").stderr
        assert "edge.toml, line 2: criterion = 'other': give one of " in said


# Help. ---------------------------------------------------------------------------------------------------------------


def test_the_first_page_of_help_fits_a_screen_and_does_not_load_torch(tmp_path: Path) -> None:
    page = surgery_run(tmp_path, "shrink", "--help").stdout
    assert len(page.splitlines()) <= 60 and all(len(line) <= 80 for line in page.splitlines())
    assert [heading for heading in config.HEADINGS if f"\n{heading}:\n" in page] == list(config.HEADINGS[:-1])
    examples = page.partition("Examples:\n")[2].strip().splitlines()
    assert len(examples) == 3 and all(line.strip().startswith("surgery shrink ") for line in examples)
    every = surgery_run(tmp_path, "shrink", "--help-all").stdout
    assert all(x.flag in every for x in config.OPTIONS.values() if x.name not in ("model", "checkpoint"))


def test_help_states_the_defaults_for_the_case_at_hand(tmp_path: Path) -> None:
    def default(option: str, *args: str) -> str:
        page = " ".join(surgery_run(tmp_path, "shrink", *args, "--help-all").stdout.split())
        return page.partition(f" {option} ")[2].partition("[default: ")[2].partition("]")[0]

    assert default("--criterion", "resnet18") == "signal"
    assert default("--criterion", "resnet18", "--macs", "0.5") == "l1"
    assert default("--recover", "resnet18", "--data", "photos") == "reconstruct"
    assert default("--recover", "resnet18", "--weights", "random") == "none"
    assert "fold for trained weights" in default("--recover")


def test_surgery_alone_shows_the_help_with_whole_sentences(tmp_path: Path) -> None:
    done = surgery_run(tmp_path)
    assert done.returncode == 0 and "..." not in done.stdout.partition("Commands:")[2]
    assert surgery_run(tmp_path, "shrink", "--help").returncode == 0


def test_numbers_of_numpy_are_numbers() -> None:
    found = surgery.recipe(latency=np.float32(0.5), steps=np.int64(2))
    assert found.goal.latency == 0.5 and type(found.goal.latency) is float
    assert type(found.selection.steps) is int
    with pytest.raises(InvalidInput, match="steps"):
        surgery.recipe(steps=np.float64(2))
