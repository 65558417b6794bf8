"""The pages of docs/algorithms: their YAML is accepted, their links and files are there, and no algorithm lacks a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from searchr1.algorithms.advantages import ADVANTAGES
from searchr1.algorithms.policy_losses import POLICY_LOSSES
from searchr1.config.choices import choices_of
from searchr1.config.load import load_config
from searchr1.preflight.check import check_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs/algorithms").glob("*.md"))
SNIPPETS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("text", SNIPPETS)
def test_yaml_of_the_pages_is_valid(text, tmp_path):
    path = tmp_path / "page.yaml"
    path.write_text(text)
    config = load_config(path)
    config.cluster.device = "cpu"
    config.data.rollout_batch_size = 16
    found = {problem.key for problem in check_config(config, for_training=True)}
    assert found <= {"rollout.model.model_path", "data.train_data_paths", "data.val_data_paths"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:searchr1|examples|tests)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def test_every_algorithm_has_a_page_with_its_yaml():
    shown = "".join(page.read_text() for page in PAGES if page.stem != "index")
    for key, names in (("adv_type", ADVANTAGES), ("loss_type", POLICY_LOSSES)):
        for name in (*names, *(["gae"] if key == "adv_type" else [])):  # gae needs a critic's values
            if name != "reinforce++_baseline":  # on the page of reinforce++
                assert f"{key}: {name}\n" in re.sub(r" +#.*", "", shown), name
    assert "reinforce++_baseline" in shown
    for name in (*choices_of("algorithm.kl_penalty_type"), *choices_of("algorithm.loss_agg_func")):
        assert f"`{name}`" in shown, name


def test_the_index_links_every_page():
    index = (ROOT / "docs/algorithms/index.md").read_text()
    assert {page.name for page in PAGES} - {"index.md"} <= set(re.findall(r"\]\((\S+\.md)\)", index))
