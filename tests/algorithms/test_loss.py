"""The whole loss against loops over tokens in float64, and its invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from searchr1.algorithms.aggregation import Denominators, check_aggregation, token_weights
from searchr1.algorithms.loss import LossConfig, LossInputs, LossOutput, loss_metrics, policy_gradient_loss
from searchr1.algorithms.policy_losses import ClipSettings
from searchr1.algorithms.sums import Sums
from searchr1.errors import UserError

AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
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


def by_hand(inputs: LossInputs, aggregation: str, kl_beta: float, bonus: float) -> float:
    """One token at a time."""
    assert inputs.ref_logprobs_T is not None
    assert inputs.entropy_T is not None
    logprobs_T, entropy_T = inputs.logprobs_T.detach(), inputs.entropy_T.detach()
    per_sequence: dict[int, list[float]] = {}
    for t in range(len(inputs.logprobs_T)):
        if not inputs.loss_mask_T[t]:
            continue
        logp, advantage = float(logprobs_T[t]), float(inputs.advantages_T[t])
        ratio = math.exp(logp - float(inputs.old_logprobs_T[t]))
        value = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.28))
        if advantage < 0:
            value = min(value, -advantage * 3.0)
        d = logp - float(inputs.ref_logprobs_T[t])
        value += kl_beta * (math.exp(-d) - 1 + d) - bonus * float(entropy_T[t])
        per_sequence.setdefault(int(inputs.segment_ids_T[t]), []).append(value)
    rows = list(per_sequence.values())
    if aggregation == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if aggregation == "seq-mean-token-sum":
        return sum(map(sum, rows)) / len(rows)
    if aggregation == "seq-mean-token-sum-norm":
        return sum(map(sum, rows)) / len(rows) / 8
    return sum(sum(row) / len(row) for row in rows) / len(rows)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_loss_equals_the_loop_over_tokens(aggregation: str, seed: int, lengths: list[int]) -> None:
    inputs = make_inputs(seed, lengths)
    output = policy_gradient_loss(inputs, config(aggregation))
    assert output.loss.dtype == torch.float64
    assert output.loss.item() == pytest.approx(by_hand(inputs, aggregation, 0.05, 0.01), abs=1e-10)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_equal_finite_differences(aggregation: str) -> None:
    inputs = make_inputs(3, [4, 1, 6])
    output = policy_gradient_loss(inputs, config(aggregation))
    grad_T, entropy_grad_T = gradients(output, inputs)
    for t in range(len(grad_T)):
        for name, found in (("logprobs_T", grad_T), ("entropy_T", entropy_grad_T)):
            step = torch.zeros_like(grad_T)
            step[t] = 1e-6
            up, down = (
                by_hand(replace(inputs, **{name: getattr(inputs, name).detach() + sign * step}), aggregation, 0.05, 0.01)
                for sign in (1, -1)
            )
            assert found[t].item() == pytest.approx((up - down) / 2e-6, abs=1e-7)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.lists(st.integers(1, 7), min_size=2, max_size=6), st.data())
def test_any_split_into_micro_batches_and_ranks_is_the_same(
    aggregation: str, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    inputs = make_inputs(seed, lengths)
    whole = policy_gradient_loss(inputs, config(aggregation))
    assignment = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    loss, grad_T, sums = 0.0, torch.zeros_like(inputs.logprobs_T), Sums()
    for part in range(4):  # some parts are empty
        chosen_T = torch.tensor([assignment[segment] == part for segment in inputs.segment_ids_T.tolist()])
        names = [name for name in LossInputs.__slots__ if name.endswith("_T")]
        micro = replace(inputs, **{name: getattr(inputs, name)[chosen_T] for name in names})
        output = policy_gradient_loss(micro, config(aggregation))
        loss += output.loss.item()
        grad_T += gradients(output, inputs)[0]
        sums = sums + output.sums
    assert loss == pytest.approx(whole.loss.item(), abs=1e-12)
    torch.testing.assert_close(grad_T, gradients(whole, inputs)[0], atol=1e-12, rtol=1e-12)
    split, together = loss_metrics(sums), loss_metrics(whole.sums)
    assert split.keys() == together.keys()
    for name, value in together.items():
        assert split[name] == pytest.approx(value, abs=1e-10), name


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(AGGREGATIONS))
def test_masked_tokens_are_never_read(seed: int, aggregation: str) -> None:
    inputs = make_inputs(seed, [5, 3, 6])
    output = policy_gradient_loss(inputs, config(aggregation))
    grad_T, _ = gradients(output, inputs)
    assert (grad_T[~inputs.loss_mask_T] == 0).all()
    names = ["logprobs_T", "old_logprobs_T", "rollout_logprobs_T", "ref_logprobs_T", "advantages_T", "entropy_T"]
    ruined = replace(
        inputs, **{name: getattr(inputs, name).detach().masked_fill(~inputs.loss_mask_T, torch.nan) for name in names}
    )
    assert policy_gradient_loss(ruined, config(aggregation)).loss.item() == output.loss.item()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from(AGGREGATIONS), st.permutations(range(4)))
def test_the_order_of_sequences_does_not_matter(seed: int, aggregation: str, order: list[int]) -> None:
    inputs = make_inputs(seed, [3, 5, 2, 4])
    pieces = [(inputs.segment_ids_T == segment).nonzero().squeeze(-1) for segment in order]
    index_T = torch.cat(pieces)
    names = [name for name in LossInputs.__slots__ if name.endswith("_T") and name != "segment_ids_T"]
    segment_ids_T = torch.repeat_interleave(torch.arange(4), torch.tensor([len(piece) for piece in pieces]))
    moved = replace(inputs, segment_ids_T=segment_ids_T, **{name: getattr(inputs, name)[index_T] for name in names})
    first, second = (policy_gradient_loss(each, config(aggregation)).loss.item() for each in (inputs, moved))
    assert first == pytest.approx(second, abs=1e-12)


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


def test_missing_parts_are_refused() -> None:
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
