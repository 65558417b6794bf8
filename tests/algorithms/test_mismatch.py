"""Mismatch metrics against NumPy over the concatenation, however the tokens are cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.algorithms.mismatch import mismatch_metrics, mismatch_sums, ratio_too_large
from searchr1.algorithms.sums import Sums


def oracle(train: np.ndarray, rollout: np.ndarray) -> dict[str, float]:
    d = train - rollout
    weight = np.exp(d)
    gap = np.abs(np.exp(train) - np.exp(rollout))
    return {
        "kl": -d.mean(),
        "kl_k3": (np.exp(d) - 1 - d).mean(),
        "logprob_gap": np.abs(d).mean(),
        "logprob_gap_max": np.abs(d).max(),
        "probability_gap": gap.mean(),
        "probability_gap_max": gap.max(),
        "perplexity_gap": np.exp(-train.mean()) - np.exp(-rollout.mean()),
        "effective_sample_size": weight.sum() ** 2 / len(d) / (weight**2).sum(),
        "clipped": ((weight < 0.5) | (weight > 2)).mean(),
        "correlation": np.corrcoef(train, rollout)[0, 1],
    }


@settings(max_examples=40)
@given(st.integers(0, 1000), st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_metrics_equal_the_formulas_for_any_split(seed: int, sizes: list[int]) -> None:
    generator = np.random.default_rng(seed)
    sizes = [*sizes, 4]
    tokens = sum(sizes)
    rollout = -generator.exponential(2.0, tokens)
    train = rollout + 0.4 * generator.standard_normal(tokens)
    mask = generator.random(tokens) < 0.7
    mask[-3:] = True
    sums = Sums()
    train_T = torch.from_numpy(np.where(mask, train, np.nan))
    parts = [tensor.split(sizes) for tensor in (train_T, torch.from_numpy(rollout), torch.from_numpy(mask))]
    for train_part, rollout_part, mask_part in zip(*parts, strict=True):
        sums = sums + mismatch_sums(train_part, rollout_part, mask_part.nonzero().squeeze(-1))
    found, expected = mismatch_metrics(sums), oracle(train[mask], rollout[mask])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-10, abs=1e-10), name


def test_agreement() -> None:
    logprobs_T = torch.tensor([-0.5, -2.0, -1.0])
    found = mismatch_metrics(mismatch_sums(logprobs_T, logprobs_T.clone(), torch.arange(3)))
    assert found.pop("effective_sample_size") == pytest.approx(1.0)
    assert found.pop("correlation") == pytest.approx(1.0)
    assert set(found.values()) == {0.0}


def test_without_tokens_there_is_no_mismatch_and_no_nan() -> None:
    found = mismatch_metrics(mismatch_sums(torch.zeros(2), torch.ones(2), torch.zeros(0, dtype=torch.long)))
    assert found["kl"] == 0.0
    assert found["effective_sample_size"] == 1.0
    assert all(np.isfinite(list(found.values())))


def test_early_stop() -> None:
    assert not ratio_too_large(1.2, 5.0)
    assert ratio_too_large(5.1, 5.0)
    assert ratio_too_large(float("nan"), 5.0)
    assert ratio_too_large(float("inf"), 5.0)
    assert not ratio_too_large(1e9, None)
