"""Every algorithm trains: the rows and the budget of benchmarks/algorithms.py, one seed each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from algorithms import ALGORITHMS, run_of
from demo_runs import Surroundings, prepare, summary

from searchr1.runner.demo import retrieval_server


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    folder = tmp_path_factory.mktemp("algorithms")
    prepare(folder)
    with retrieval_server(folder / "world", folder / "retrieval.log") as address:
        yield Surroundings(folder, address)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_answers_more_held_out_questions_than_its_cold_start(surroundings, name):
    found = summary(surroundings.train(run_of(name, seed=0), timeout_s=850))
    assert found["after"] > found["before"]
    # Those that the project promises a number for; the others are in docs/algorithms/results.md.
    assert found["after"] >= (ALGORITHMS[name].reaches or 0), found
