"""A configuration is named by a path, or by the name of a recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from searchr1.config.load import load_config
from searchr1.config.recipes import RECIPES, find_config, recipe_names
from searchr1.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_every_recipe_of_the_clone_has_a_name():
    assert recipe_names() == sorted(path.stem for path in (ROOT / "examples/searchr1/config").iterdir())


@pytest.mark.parametrize("name", ["qwen2.5-3b-tool-1node", "qwen2.5-3b-tool-1node.yaml", Path("tiny-cpu"), "tiny-gpu-eval"])
def test_a_recipe_is_loaded_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = RECIPES / f"{str(name).removesuffix('.yaml')}.yaml"
    assert find_config(name) == path
    assert load_config(name) == load_config(path)


def test_a_file_goes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny-cpu.yaml").write_text("runner: {seed: 7}\n")
    assert load_config("tiny-cpu.yaml").runner.seed == 7
    assert load_config("tiny-cpu").runner.seed == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-cpus", "tiny-cpus: no such file, and no recipe of that name; did you mean tiny-cpu?"),
        ("tiny-gpuu.yaml", "tiny-gpuu.yaml: no such file, and no recipe of that name; did you mean tiny-gpu.yaml?"),
        ("xyzzy", "give the path of a YAML or one of llama3.2-3b-agent-lightning, "),
        ("elsewhere/tiny-cpu.yaml", "elsewhere/tiny-cpu.yaml: no such file; give the path of a YAML"),
        (".", ".: no such file"),
        ("", "give the path of a YAML or the name of a recipe"),
    ],
)
def test_what_is_neither_is_an_error_with_the_way_out(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        find_config(name)
    assert message in str(caught.value)


def test_a_file_of_another_kind_is_rejected(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.json: a configuration's name ends in \.yaml"):
        find_config(tmp_path / "run.json")


@pytest.mark.parametrize("command", ["train", "eval", "check-config", "plan-memory"])
def test_help_lists_the_recipes(command):
    words = [sys.executable, "-m", "searchr1.cli", command, "--help"]
    text = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    assert set(recipe_names()) <= set(text.replace(",", " ").split())
