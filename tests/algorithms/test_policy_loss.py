"""Policy losses and KL estimators against scalar formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from searchr1.algorithms.kl import KL_FUNCTIONS, kl_function
from searchr1.algorithms.policy_losses import POLICY_LOSSES, ClipSettings, PolicyInputs, policy_loss
from searchr1.algorithms.policy_losses.ppo_clip import ppo_clip
from searchr1.config.check import CHOICES
from searchr1.errors import UserError

CLIP = ClipSettings(low=0.2, high=0.28, dual=3.0)


def one_each(logp_P: torch.Tensor, old_P: torch.Tensor, advantage_P: torch.Tensor) -> PolicyInputs:
    """Every token is a sequence of its own."""
    return PolicyInputs(logp_P, old_P, advantage_P, torch.arange(len(logp_P)))


def oracle(logp: float, old: float, advantage: float, clip: ClipSettings) -> tuple[float, float]:
    """(loss, d loss / d logp), case by case."""
    ratio = math.exp(max(-20.0, min(20.0, logp - old)))
    if advantage >= 0:
        if ratio > 1 + clip.high:
            return -advantage * (1 + clip.high), 0.0
        return -advantage * ratio, -advantage * ratio
    if ratio < 1 - clip.low:
        return -advantage * (1 - clip.low), 0.0
    if clip.dual is not None and ratio > clip.dual:
        return -advantage * clip.dual, 0.0
    return -advantage * ratio, -advantage * ratio


@given(
    st.lists(st.tuples(st.floats(-6, 0), st.floats(-6, 0), st.floats(-3, 3)), min_size=1, max_size=20),
    st.sampled_from([None, 3.0]),
)
def test_ppo_clip_and_its_gradient(tokens: list[tuple[float, float, float]], dual: float | None) -> None:
    clip = ClipSettings(low=0.2, high=0.28, dual=dual)
    logp_P, old_P, advantage_P = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    logp_P = logp_P.clone().requires_grad_()
    token = ppo_clip(one_each(logp_P, old_P, advantage_P), clip)
    token.loss_P.sum().backward()
    expected = torch.tensor([oracle(*values, clip) for values in tokens], dtype=torch.float64)
    torch.testing.assert_close(token.loss_P.detach(), expected[:, 0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(logp_P.grad, expected[:, 1], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(token.ratio_P, (logp_P - old_P).exp().detach())


def test_which_limit_decided_is_told() -> None:
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
    assert CHOICES["algorithm.loss_type"] == tuple(POLICY_LOSSES)


ragged = st.lists(
    st.lists(st.tuples(st.floats(-6, 0), st.floats(-1, 1)), min_size=1, max_size=6), min_size=1, max_size=4
).flatmap(lambda rows: st.tuples(st.just(rows), st.lists(st.floats(-3, 3), min_size=len(rows), max_size=len(rows))))


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


@given(ragged)
def test_gspo_is_the_clipped_objective_of_the_sequence_ratio(batch: tuple[list, list]) -> None:
    clip = ClipSettings(low=0.2, high=0.28)
    inputs = sequences(*batch)
    token = policy_loss("gspo")(inputs, clip)
    per_sequence = torch.zeros(len(batch[0]), dtype=torch.float64)
    lengths = torch.tensor([len(row) for row in batch[0]], dtype=torch.float64)
    per_sequence = per_sequence.index_add(0, inputs.segment_ids_P, token.loss_P) / lengths
    found = gradient(inputs, per_sequence.sum())

    again = sequences(*batch)
    start, expected = 0, []
    for row, advantage in zip(*batch, strict=True):
        part = slice(start, start + len(row))
        ratio = (again.logprobs_P[part] - again.old_logprobs_P[part]).mean().exp()
        limited = ratio.clamp(1 - clip.low, 1 + clip.high)
        expected.append(-torch.minimum(ratio * advantage, limited * advantage))
        start += len(row)
    torch.testing.assert_close(per_sequence.detach(), torch.stack(expected).detach(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found, gradient(again, torch.stack(expected).sum()), atol=1e-10, rtol=1e-10)


@given(ragged)
def test_cispo_clips_the_weight_and_keeps_every_gradient(batch: tuple[list, list]) -> None:
    inputs = sequences(*batch)
    token = policy_loss("cispo")(inputs, ClipSettings(low=0.3, high=0.5))
    gaps = [gap for row in batch[0] for _, gap in row]
    advantages = inputs.advantages_P.tolist()
    weights = [min(max(math.exp(gap), 0.7), 1.5) for gap in gaps]
    expected = torch.tensor([-w * a for w, a in zip(weights, advantages, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(token.loss_P.detach(), expected * inputs.logprobs_P.detach(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(gradient(inputs, token.loss_P.sum()), expected, atol=1e-10, rtol=1e-10)
    assert token.clipped_P.tolist() == [not 0.7 <= ratio <= 1.5 for ratio in token.ratio_P.tolist()]


@given(ragged)
def test_sapo_gates_softly(batch: tuple[list, list]) -> None:
    inputs = sequences(*batch)
    token = policy_loss("sapo")(inputs, ClipSettings(0.2, 0.2, tau_positive=0.8, tau_negative=1.3))
    expected, slopes = [], []
    for advantage, ratio in zip(inputs.advantages_P.tolist(), token.ratio_P.tolist(), strict=True):
        tau = 0.8 if advantage > 0 else 1.3
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        expected.append(-advantage * 4 / tau * gate)
        slopes.append(-advantage * 4 * gate * (1 - gate) * ratio)
    torch.testing.assert_close(token.loss_P.detach(), torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=1e-10)
    found = gradient(inputs, token.loss_P.sum())
    torch.testing.assert_close(found, torch.tensor(slopes, dtype=torch.float64), atol=1e-10, rtol=1e-10)


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
