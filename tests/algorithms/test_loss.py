"""The whole loss: its metrics, its scale, its odd inputs (formulas: test_exact_losses.py)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from searchr1.algorithms.aggregation import Denominators, check_aggregation, token_weights
from searchr1.algorithms.loss import LossConfig, LossInputs, LossOutput, loss_metrics, policy_gradient_loss
from searchr1.algorithms.policy_losses import ClipSettings
from searchr1.errors import UserError

CLIP = ClipSettings(low=0.2, high=0.28, dual=3.0)


def make_inputs(seed: int, lengths: list[int]) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    segment_ids_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask_T = torch.rand(tokens, generator=generator) < 0.6
    mask_T[-1] = True
    logprobs_T = -3 * torch.rand(tokens, dtype=torch.float64, generator=generator)
    noise = 0.4 * torch.randn(3, tokens, dtype=torch.float64, generator=generator)
    return LossInputs(
        logprobs_T=logprobs_T.requires_grad_(),
        old_logprobs_T=(logprobs_T + noise[0]).detach(),
        rollout_logprobs_T=(logprobs_T - noise[0]).detach(),
        ref_logprobs_T=(logprobs_T + noise[1]).detach(),
        entropy_T=(noise[2].abs() + 0.1).detach().requires_grad_(),
        advantages_T=torch.randn(len(lengths), dtype=torch.float64, generator=generator)[segment_ids_T],
        loss_mask_T=mask_T,
        segment_ids_T=segment_ids_T,
        denominators=Denominators(int(mask_T.sum()), len(segment_ids_T[mask_T].unique()), longest=8),
    )


def config(aggregation: str, **changes: object) -> LossConfig:
    base = LossConfig(CLIP, aggregation=check_aggregation(aggregation), kl_beta=0.05, entropy_bonus=0.01)
    return replace(base, **changes)  # type: ignore[arg-type]


def gradients(output: LossOutput, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    assert inputs.entropy_T is not None
    first, second = torch.autograd.grad(
        output.loss, (inputs.logprobs_T, inputs.entropy_T), retain_graph=True, allow_unused=True
    )
    return first, torch.zeros_like(first) if second is None else second


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    # With old = new the ratio is 1 and d loss / d logp = -A / tokens: REINFORCE.
    inputs = make_inputs(1, [4, 4])
    inputs = replace(inputs, old_logprobs_T=inputs.logprobs_T.detach())
    output = policy_gradient_loss(inputs, config("token-mean", kl_beta=0.0, entropy_bonus=0.0))
    expected = -inputs.advantages_T * inputs.loss_mask_T / inputs.denominators.tokens
    torch.testing.assert_close(gradients(output, inputs)[0], expected)
    metrics = loss_metrics(output.sums)
    assert metrics["ratio"] == metrics["ratio_max"] == 1.0
    assert metrics["clip_fraction"] == metrics["approx_kl"] == 0.0


def test_metrics_equal_direct_means() -> None:
    inputs = make_inputs(9, [30, 30])
    metrics = loss_metrics(policy_gradient_loss(inputs, config("token-mean")).sums)
    assert inputs.entropy_T is not None
    assert inputs.ref_logprobs_T is not None
    mask = inputs.loss_mask_T
    log_ratio_P = (inputs.logprobs_T - inputs.old_logprobs_T)[mask].detach()
    advantages_P, ratio_P = inputs.advantages_T[mask], log_ratio_P.exp()
    clipped_P = ((advantages_P > 0) & (ratio_P > 1.28)) | ((advantages_P < 0) & (ratio_P < 0.8))
    d_P = (inputs.logprobs_T - inputs.ref_logprobs_T)[mask].detach()
    expected = {
        "ratio": ratio_P.mean(),
        "ratio_max": ratio_P.max(),
        "approx_kl": -log_ratio_P.mean(),
        "approx_kl_k3": (ratio_P - 1 - log_ratio_P).mean(),
        "clip_fraction": clipped_P.double().mean(),
        "kl": ((-d_P).exp() - 1 + d_P).mean(),
        "entropy": inputs.entropy_T[mask].detach().mean(),
        "policy_tokens": mask.sum(),
    }
    assert metrics["clip_fraction"] > 0
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), abs=1e-12), name
    assert metrics["loss"] == pytest.approx(
        metrics["policy_loss"] + 0.05 * metrics["kl_loss"] - 0.01 * metrics["entropy"], abs=1e-12
    )


def test_an_empty_micro_batch_is_zero_with_a_graph_and_the_same_keys() -> None:
    inputs = make_inputs(0, [4])
    full = policy_gradient_loss(inputs, config("seq-mean-token-mean"))
    empty_inputs = replace(inputs, loss_mask_T=torch.zeros(4, dtype=torch.bool))
    empty = policy_gradient_loss(empty_inputs, config("seq-mean-token-mean"))
    assert empty.loss.item() == 0.0
    assert (gradients(empty, inputs)[0] == 0).all()
    assert empty.sums.totals.keys() == full.sums.totals.keys()
    assert empty.sums.peaks.keys() == full.sums.peaks.keys()
    assert all(math.isfinite(value) for value in loss_metrics(empty.sums).values())


def test_missing_parts_are_rejected() -> None:
    inputs = make_inputs(0, [4])
    with pytest.raises(ValueError, match="reference"):
        policy_gradient_loss(replace(inputs, ref_logprobs_T=None), config("token-mean"))
    with pytest.raises(ValueError, match="entropy"):
        policy_gradient_loss(replace(inputs, entropy_T=None), config("token-mean"))
    with pytest.raises(UserError, match=r"algorithm\.loss_agg_func"):
        check_aggregation("token-sum")


def test_weights_add_up_to_one_per_batch_or_to_the_mean_length() -> None:
    segment_ids_P = torch.tensor([0, 0, 0, 2, 2])
    denominators = Denominators(tokens=5, sequences=2, longest=10)
    expected = {
        "token-mean": [0.2] * 5,
        "seq-mean-token-sum": [0.5] * 5,
        "seq-mean-token-mean": [1 / 6] * 3 + [1 / 4] * 2,
        "seq-mean-token-sum-norm": [0.05] * 5,
    }
    for name, weights in expected.items():
        found_P = token_weights(check_aggregation(name), segment_ids_P, denominators)
        torch.testing.assert_close(found_P, torch.tensor(weights, dtype=torch.float64))
