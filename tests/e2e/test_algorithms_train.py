"""Every algorithm trains: the rows and the budget of benchmarks/algorithms.py, one seed each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from algorithms import ALGORITHMS, run_of
from demo_runs import Surroundings, prepare, summary

from searchr1.config.choices import choices_of, value_of
from searchr1.config.load import load_config
from searchr1.demo.demo import CPU_RECIPES
from searchr1.demo.processes import retrieval_server


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    folder = tmp_path_factory.mktemp("algorithms")
    prepare(folder)
    with retrieval_server(folder / "world", folder / "retrieval.log") as server:
        yield Surroundings(folder, server.address)


def test_the_table_leaves_no_advantage_and_no_loss_out():
    runs = [run_of(name, seed=0) for name in ALGORITHMS]
    configs = [load_config(CPU_RECIPES.train, [*run.budget, *run.overrides]) for run in runs]
    for key in ("algorithm.adv_type", "algorithm.loss_type", "algorithm.advantage_mode", "algorithm.kl_in"):
        assert {value_of(config, key) for config in configs} == set(choices_of(key))


def level(name: str) -> pytest.MarkDecorator:
    """CI trains with groups and with a critic."""
    return pytest.mark.slow if name in ("grpo", "ppo") else pytest.mark.soak


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [pytest.param(name, marks=level(name)) for name in ALGORITHMS])
def test_an_algorithm_answers_more_held_out_questions_than_its_cold_start(surroundings, name):
    found = summary(surroundings.train(run_of(name, seed=0), timeout_s=850))
    assert found["after"] > found["before"]
    # What the other algorithms reach is in docs/algorithms/results.md.
    assert found["after"] >= (ALGORITHMS[name].reaches or 0), found
