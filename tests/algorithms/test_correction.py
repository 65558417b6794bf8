"""Mismatch corrections against NumPy in float64, a sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchr1.algorithms.aggregation import Denominators
from searchr1.algorithms.correction import CorrectionSettings, correction_weights
from searchr1.algorithms.loss import LossConfig, LossInputs, loss_metrics, policy_gradient_loss
from searchr1.algorithms.policy_losses import ClipSettings

LEVELS = ("token", "sequence", "geometric")
BOUNDS = ("truncate", "clip", "mask", "reject")


def oracle(sequences: list[np.ndarray], settings: CorrectionSettings) -> np.ndarray:
    found = []
    for d in sequences:
        exponent = {"token": d, "sequence": np.full_like(d, d.sum()), "geometric": np.full_like(d, d.mean())}[settings.level]
        w = np.exp(np.clip(exponent, -20, 20))
        inside = (w >= settings.lower) & (w <= settings.upper)
        w = {
            "truncate": np.minimum(w, settings.upper),
            "clip": np.clip(w, settings.lower, settings.upper),
            "mask": np.where(inside, w, 0),
            "reject": inside.astype(float),
        }[settings.bound]
        if settings.veto and (np.exp(d) < settings.veto).any():
            w = np.zeros_like(w)
        found.append(w)
    return np.concatenate(found)


def ragged(seed: int, sizes: list[int], spread: float = 0.5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [spread * rng.normal(size=size) for size in sizes]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bound", BOUNDS)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([0.0, 0.3, 0.9]))
def test_weights_equal_the_formulas(level, bound, seed, sizes, veto):
    settings = CorrectionSettings(level, bound, lower=0.7, upper=1.6, veto=veto)
    sequences = ragged(seed, sizes)
    d_P = torch.from_numpy(np.concatenate(sequences)).requires_grad_()
    found = correction_weights(d_P, torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)), settings)
    assert np.abs(found.weights_P.numpy() - oracle(sequences, settings)).max() < 1e-12
    assert not found.weights_P.requires_grad


def test_extreme_differences_stay_finite():
    for level in LEVELS:
        d_P = torch.tensor([1e4, -1e4, 0.0], dtype=torch.float64)
        found = correction_weights(d_P, torch.zeros(3, dtype=torch.long), CorrectionSettings(level, "truncate", upper=1e9))
        assert bool(found.weights_P.isfinite().all())
    assert len(correction_weights(d_P[:0], torch.zeros(0, dtype=torch.long), CorrectionSettings("sequence")).weights_P) == 0


def loss_of(order, cut, settings, off_policy=False, scale=1.0, seed=3):
    """Loss, gradient by sequence, and metrics of five sequences in an order, cut into micro-batches."""
    rng = np.random.default_rng(seed)
    sizes = [4, 7, 2, 5, 3]
    data = []
    for size in sizes:
        rollout = -rng.exponential(1.0, size)
        data.append((rollout + 0.4 * rng.normal(size=size), rollout + 0.4 * rng.normal(size=size), rollout, rng.normal()))
    config = LossConfig(ClipSettings(0.2, 0.28), kl_beta=0.0, correction=settings, ratio_is_correction=off_policy)
    denominators = Denominators(tokens=sum(sizes), sequences=len(sizes), longest=10)
    total, gradients, sums = 0.0, {}, None
    for part in [order[:cut], order[cut:]]:
        if not part:
            continue
        logprobs = [torch.tensor(data[i][0], requires_grad=True) for i in part]
        old = torch.cat([torch.tensor(data[i][2 if off_policy else 1]) for i in part])
        output = policy_gradient_loss(
            LossInputs(
                logprobs_T=torch.cat(logprobs),
                old_logprobs_T=old,
                advantages_T=torch.cat([torch.full((sizes[i],), data[i][3], dtype=torch.float64) for i in part]),
                loss_mask_T=torch.ones(len(old), dtype=torch.bool),
                segment_ids_T=torch.repeat_interleave(torch.arange(len(part)), torch.tensor([sizes[i] for i in part])),
                denominators=denominators,
                rollout_logprobs_T=torch.cat([torch.tensor(data[i][2]) for i in part]),
                weight_scale=scale,
            ),
            config,
        )
        output.loss.backward()
        total += output.loss.item()
        gradients |= {i: tensor.grad for i, tensor in zip(part, logprobs, strict=True)}
        sums = output.sums if sums is None else sums + output.sums
    return total, gradients, loss_metrics(sums), data


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_order_and_micro_batches_change_nothing_and_the_loss_is_weighted(level, bound):
    settings = CorrectionSettings(level, bound, 0.5, 1.5, veto=0.2)
    expected, gradients, metrics, data = loss_of([0, 1, 2, 3, 4], 5, settings)
    for order, cut in (([4, 2, 0, 1, 3], 2), ([3, 1, 4, 0, 2], 4)):
        found, others, again, _ = loss_of(order, cut, settings)
        assert found == pytest.approx(expected, abs=1e-12)
        assert all(torch.allclose(others[i], gradients[i], atol=1e-12) for i in gradients)
        assert again["correction_weight"] == pytest.approx(metrics["correction_weight"], abs=1e-12)
    by_hand = 0.0
    for logp, old, rollout, advantage in data:
        w = oracle([old - rollout], settings)
        ratio = np.exp(logp - old)
        loss = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
        by_hand += (w * loss).sum() / 21
    assert expected == pytest.approx(by_hand, abs=1e-12)
    twice, _, scaled, _ = loss_of([0, 1, 2, 3, 4], 5, settings, scale=2.0)
    assert twice == pytest.approx(2 * expected, abs=1e-12)
    assert scaled["correction_weight"] == pytest.approx(2 * metrics["correction_weight"])


def test_with_the_engine_as_the_old_policy_only_what_is_dropped_applies():
    """The ratio is the importance weight already; multiplying once more would square it."""
    plain, *_ = loss_of([0, 1, 2, 3, 4], 5, None, off_policy=True)
    truncated, *_ = loss_of([0, 1, 2, 3, 4], 5, CorrectionSettings("token", "truncate", upper=1.01), off_policy=True)
    assert truncated == pytest.approx(plain, abs=1e-12)
    _, gradients, metrics, data = loss_of(
        [0, 1, 2, 3, 4], 5, CorrectionSettings("geometric", "mask", 0.9, 1.1), off_policy=True
    )
    assert 0 < metrics["correction_bounded"] < 1
    for number, (logp, _, rollout, _) in enumerate(data):
        inside = 0.9 <= np.exp((logp - rollout).mean()) <= 1.1
        assert bool((gradients[number] == 0).all()) != inside


def test_a_correction_without_the_engines_log_probabilities_is_an_error():
    with pytest.raises(ValueError, match="needs the engine's"):
        policy_gradient_loss(
            LossInputs(*[torch.zeros(1)] * 3, torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long),
                       Denominators(1, 1, 1)),
            LossConfig(ClipSettings(0.2, 0.2), correction=CorrectionSettings("token")),
        )  # fmt: skip
