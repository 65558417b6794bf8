"""A configuration is named by a path, or by the name of a recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from searchr1.config.load import RECIPES, find_config, load_config, recipe_names
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
        ("tiny-cpus", "tiny-cpus: no such file; give the path of a YAML or a recipe: llama3.2-3b-agent-lightning, "),
        ("tiny-cpus", ", tiny-gpu-eval; did you mean tiny-cpu?"),
        ("tiny-gpuu.yaml", ", tiny-gpu-eval; did you mean tiny-gpu.yaml?"),
        ("xyzzy", ", tiny-gpu, tiny-gpu-eval"),
        ("elsewhere/tiny-cpu.yaml", "elsewhere/tiny-cpu.yaml: no such file; give the path of a YAML, or a recipe's name"),
        ("", ".: no such file; give the path of a YAML"),
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


def test_the_example_in_a_help_text_is_a_recipe():
    for command in ("train", "eval", "check_config", "plan_memory"):
        source = (ROOT / f"searchr1/commands/{command}.py").read_text()
        (example,) = re.findall(r'help=config_help\("(.*?)"\)', source)
        assert example in recipe_names()
