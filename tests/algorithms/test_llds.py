"""LLDS against the formula, an action at a time."""

from __future__ import annotations

import pytest
import torch

from searchr1.algorithms.aggregation import Denominators
from searchr1.algorithms.llds import action_ids
from searchr1.algorithms.loss import LossConfig, LossInputs, loss_metrics, policy_gradient_loss
from searchr1.algorithms.policy_losses import ClipSettings


def test_actions_are_unbroken_runs_of_policy_tokens():
    segments = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2])
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    assert action_ids("action", segments, mask, mask.nonzero().squeeze(-1)).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert action_ids("response", segments, mask, mask.nonzero().squeeze(-1)).tolist() == [0, 0, 0, 0, 1, 1, 2]


def inputs(tensors, tokens):
    logprobs, old, advantages, mask, segments = tensors
    return LossInputs(logprobs, old, advantages, mask, segments, Denominators(tokens, 3, 9))


@pytest.mark.parametrize("gate", ["action", "response"])
def test_in_the_loss_it_is_aggregated_like_the_rest_and_micro_batches_change_nothing(gate):
    torch.manual_seed(0)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 5, 6]))
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1], dtype=torch.bool)
    old = torch.randn(18, dtype=torch.float64)
    logprobs = old + 0.5 * torch.randn(18, dtype=torch.float64)
    advantages = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)[segments]
    tensors = (logprobs, old, advantages, mask, segments)
    tokens = int(mask.sum())
    plain = LossConfig(ClipSettings(0.2, 0.2))
    with_llds = LossConfig(ClipSettings(0.2, 0.2), llds_coef=0.1, llds_gate=gate)
    whole = policy_gradient_loss(inputs(tensors, tokens), with_llds)
    added = float(whole.loss - policy_gradient_loss(inputs(tensors, tokens), plain).loss)
    metrics = loss_metrics(whole.sums)
    assert added == pytest.approx(0.1 * metrics["llds"], abs=1e-12)
    assert added > 0
    parts = 0.0
    for chosen in (segments == 0, segments > 0):
        part = [tensor[chosen] for tensor in tensors]
        part[4] = part[4] - part[4].min()
        parts += float(policy_gradient_loss(inputs(part, tokens), with_llds).loss)
    assert parts == pytest.approx(float(whole.loss), abs=1e-12)
    same = policy_gradient_loss(inputs((old, old, advantages, mask, segments), tokens), with_llds)
    assert float(same.sums.totals["llds"]) == 0
