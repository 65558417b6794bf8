"""Policy losses and KL estimators: what they say besides the loss, and their odd inputs (formulas: test_exact_losses.py)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchr1.algorithms.kl import KL_FUNCTIONS, kl_function
from searchr1.algorithms.policy_losses import POLICY_LOSSES, ClipSettings, PolicyInputs, policy_loss
from searchr1.algorithms.policy_losses.ppo_clip import ppo_clip
from searchr1.config.choices import choices_of
from searchr1.errors import UserError

CLIP = ClipSettings(low=0.2, high=0.28, dual=3.0)


def one_each(logp_P: torch.Tensor, old_P: torch.Tensor, advantage_P: torch.Tensor) -> PolicyInputs:
    """Every token is a sequence of its own."""
    return PolicyInputs(logp_P, old_P, advantage_P, torch.arange(len(logp_P)))


def test_which_limit_decided_is_reported() -> None:
    log_ratio_P = torch.tensor([0.5, 0.5, -0.5, -0.5, 2.0, 0.0], dtype=torch.float64)
    advantage_P = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    token = ppo_clip(one_each(log_ratio_P, torch.zeros_like(log_ratio_P), advantage_P), CLIP)
    assert token.clipped_P.tolist() == [True, False, False, True, False, False]
    assert token.dual_clipped_P.tolist() == [False, False, False, False, True, False]


def test_an_enormous_ratio_stays_finite() -> None:
    logp_P = torch.tensor([0.0], requires_grad=True)
    loss = ppo_clip(one_each(logp_P, torch.tensor([-500.0]), torch.tensor([-1.0])), ClipSettings(0.2, 0.2)).loss_P.sum()
    loss.backward()
    assert loss.isfinite()
    assert logp_P.grad is not None
    assert logp_P.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [((-0.1, 0.2, None), "clip_ratio_low"), ((0.2, -1.0, None), "clip_ratio_high"), ((0.2, 0.2, 1.0), "clip_ratio_c")],
)
def test_senseless_limits_name_their_key(arguments: tuple[float, float, float | None], key: str) -> None:
    with pytest.raises(UserError, match=key):
        ClipSettings(*arguments)


def test_the_yaml_knows_every_loss() -> None:
    assert choices_of("algorithm.loss_type") == tuple(POLICY_LOSSES)


def sequences(rows: list[list[tuple[float, float]]], advantages: list[float]) -> PolicyInputs:
    """Ragged sequences of (logp, logp - old logp), one advantage each."""
    logp_P = torch.tensor([logp for row in rows for logp, _ in row], dtype=torch.float64)
    gap_P = torch.tensor([gap for row in rows for _, gap in row], dtype=torch.float64)
    lengths = torch.tensor([len(row) for row in rows])
    segments_P = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    advantages_P = torch.tensor(advantages, dtype=torch.float64)[segments_P]
    return PolicyInputs(logp_P.clone().requires_grad_(), (logp_P - gap_P).detach(), advantages_P, segments_P)


def gradient(inputs: PolicyInputs, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    assert inputs.logprobs_P.grad is not None
    return inputs.logprobs_P.grad


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_on_policy_every_loss_has_the_plain_policy_gradient(name: str) -> None:
    inputs = sequences([[(-1.0, 0.0), (-2.0, 0.0)], [(-0.5, 0.0)]], [1.5, -0.7])
    token = policy_loss(name)(inputs, ClipSettings(0.2, 0.2))
    torch.testing.assert_close(gradient(inputs, token.loss_P.sum()), -inputs.advantages_P, atol=1e-12, rtol=0)
    assert token.ratio_P.tolist() == [1, 1, 1]
    assert not token.clipped_P.any()


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"algorithm\.loss_type.*actor"):
        policy_loss("reinforce_x")
    with pytest.raises(UserError, match=r"algorithm\.kl_penalty_type.*low_var_kl"):
        kl_function("k4")


@given(st.floats(-2.5, 5))
def test_kl_estimators_and_their_gradients(d: float) -> None:
    expected = {
        "k1": (d, 1.0),
        "abs": (abs(d), math.copysign(1.0, d) if d else 0.0),
        "k2": (d * d / 2, d),
        "low_var_kl": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
    }
    expected |= {"kl": expected["k1"], "mse": expected["k2"], "k3": expected["low_var_kl"]}
    assert expected.keys() == KL_FUNCTIONS.keys()
    for name, (value, slope) in expected.items():
        logp = torch.tensor(d, dtype=torch.float64, requires_grad=True)
        found = kl_function(name)(logp, torch.zeros((), dtype=torch.float64))
        found.backward()
        assert logp.grad is not None
        assert found.item() == pytest.approx(value, abs=1e-12)
        assert logp.grad.item() == pytest.approx(slope, abs=1e-12)


def test_low_var_kl_is_clamped_and_never_negative() -> None:
    d_P = torch.tensor([-400.0, -3.0, -1e-6, 0.0, 1e-6, 15.0, 400.0], dtype=torch.float64, requires_grad=True)
    kl_P = kl_function("low_var_kl")(d_P, torch.zeros(7, dtype=torch.float64))
    kl_P.sum().backward()
    assert kl_P.min() >= 0
    assert kl_P.max() <= 10
    assert d_P.grad is not None
    assert d_P.grad[[0, 1, 5, 6]].tolist() == [0, 0, 0, 0]


def test_estimators_agree_in_expectation() -> None:
    # Over the whole distribution instead of samples: k1 and k3 are exact, k2 is close for close distributions.
    policy_V = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    reference_V = (policy_V + 0.05 * torch.sin(torch.arange(50.0))).log_softmax(0)
    exact = (policy_V.exp() * (policy_V - reference_V)).sum().item()
    for name, tolerance in (("k1", 1e-12), ("low_var_kl", 1e-12), ("k2", 0.05 * exact)):
        found = (policy_V.exp() * kl_function(name)(policy_V, reference_V)).sum().item()
        assert found == pytest.approx(exact, abs=tolerance)
