"""GAE and the critic's loss against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from searchr1.algorithms.advantages.gae import gae, whiten_tokens
from searchr1.algorithms.value_loss import clipped_value_loss


def test_with_lambda_one_returns_are_the_rewards_to_come_whatever_the_critic_says():
    rng = np.random.default_rng(0)
    rewards = [np.array([0.0, 0.5, 0.0, 1.0])]
    for _ in range(3):
        _, returns = gae(rewards, [rng.normal(size=4)], 1.0, 1.0)
        assert np.allclose(returns[0], [1.5, 1.5, 1.0, 1.0])


def test_whitening_is_over_all_tokens():
    white = whiten_tokens([np.array([1.0, 2.0]), np.array([6.0]), np.zeros(0)])
    joined = np.concatenate(white)
    assert joined.mean() == pytest.approx(0)
    assert joined.std(ddof=1) == pytest.approx(1, abs=1e-5)
    assert np.allclose(whiten_tokens([np.ones(3)])[0], 0)
    assert whiten_tokens([np.zeros(0)])[0].shape == (0,)


def test_a_value_that_moved_too_far_gets_no_gradient_for_moving_on():
    values = torch.tensor([1.0, 0.2, -0.9, 2.0], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(4, dtype=torch.float64)
    returns = torch.tensor([3.0, 1.0, -3.0, 0.0], dtype=torch.float64)
    loss, clipped = clipped_value_loss(values, old, returns, 0.5)
    assert torch.allclose(loss, torch.tensor([0.5 * 2.5**2, 0.5 * 0.8**2, 0.5 * 2.5**2, 0.5 * 4.0], dtype=torch.float64))
    assert clipped.tolist() == [True, False, True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert torch.allclose(gradient, torch.tensor([0.0, -0.8, 0.0, 2.0], dtype=torch.float64))
