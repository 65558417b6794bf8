"""The estimates against brute force and against scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.evaluation.summary import bootstrap_means, interval, pass_at_k


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_drawn_subsets_with_a_right_rollout(case):
    rollouts, right, k = case
    subsets = list(itertools.combinations([True] * right + [False] * (rollouts - right), k))
    assert pass_at_k(rollouts, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("case", [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_rejects_what_cannot_be(case):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*case)


@pytest.mark.parametrize("kind", ["zeros and ones", "all different"])
def test_intervals_agree_with_scipys_percentile_bootstrap(kind):
    from scipy.stats import bootstrap

    rng = np.random.default_rng(3)
    values_Q = (rng.random(150) < 0.3).astype(float) if kind == "zeros and ones" else rng.random(150) ** 2
    low, high = interval(bootstrap_means(values_Q[:, None], "nq", 0, 20_000)[:, 0])
    theirs = bootstrap((values_Q,), np.mean, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_metrics_of_one_sample_share_its_questions():
    values_Q = (np.arange(60) % 3 == 0).astype(float)
    means_BM = bootstrap_means(np.stack([values_Q, 1 - values_Q], axis=1), "nq", 0, 500)
    assert means_BM.shape == (500, 2)
    np.testing.assert_allclose(means_BM.sum(axis=1), 1.0)


def test_resampling_depends_on_seed_and_name_only():
    values_QM = (np.arange(50) % 2.0)[:, None]
    first = bootstrap_means(values_QM, "nq", 0)
    np.testing.assert_array_equal(first, bootstrap_means(values_QM, "nq", 0))
    assert not np.array_equal(first, bootstrap_means(values_QM, "popqa", 0))
    assert not np.array_equal(first, bootstrap_means(values_QM, "nq", 1))
    assert bootstrap_means(values_QM, "nq", -5).shape == first.shape


def test_drawing_in_parts_gives_as_many(monkeypatch):
    monkeypatch.setattr("searchr1.evaluation.summary._CELLS", 100)
    means_BM = bootstrap_means(np.random.default_rng(0).random((40, 1)), "nq", 0, 1001)
    assert means_BM.shape == (1001, 1)
    assert means_BM.mean() == pytest.approx(np.random.default_rng(0).random((40, 1)).mean(), abs=0.02)


def test_one_question_has_no_width():
    assert interval(bootstrap_means(np.array([[0.25]]), "nq", 0)[:, 0]) == (0.25, 0.25)
