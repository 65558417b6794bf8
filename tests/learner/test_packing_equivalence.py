"""With a real (tiny, random) model: packed == padded == any micro-batches == any split over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.algorithms.aggregation import Denominators, check_aggregation
from searchr1.algorithms.correction import CorrectionSettings
from searchr1.algorithms.entropy import logprobs_from_logits
from searchr1.algorithms.loss import LossConfig, LossInputs, loss_metrics, policy_gradient_loss
from searchr1.algorithms.policy_losses import POLICY_LOSSES, ClipSettings
from searchr1.algorithms.sums import Sums
from searchr1.learner.attention import packed_model_inputs
from searchr1.learner.packing import PackedBatch, pack, sequence_length, split_balanced
from searchr1.learner.stats import count_denominators

AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
TEMPERATURE = 0.9


def make_model(dtype: torch.dtype, attention: str = "searchr1_packed") -> Qwen2ForCausalLM:
    """All in `dtype`: transformers' own norms fall back to fp32, which would hide what float64 can show."""
    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        # Large enough that attention is far from uniform. At 0.3 fp32 rounding alone, of the padded oracle as well as
        # of packing, is 2e-6 of the float64 gradient; at 0.1 it is 5e-7.
        initializer_range=0.1,
        attn_implementation=attention,
    )
    model = Qwen2ForCausalLM(config)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if "RMSNorm" in type(child).__name__:
                setattr(parent, name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    return model.to(dtype)


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    return make_model(torch.float64)


@pytest.fixture(scope="module")
def trajectories() -> list[Trajectory]:
    generator = np.random.default_rng(3)
    made = []
    for index in range(9):
        prompt, response = int(generator.integers(2, 9)), int(generator.integers(1, 25))
        mask = generator.random(response) < 0.6
        if index == 4:
            mask[:] = False
        made.append(
            Trajectory(
                sample=Sample(f"toy/{index}", index, generator.integers(1, 96, prompt).tolist(), "?", ["!"]),
                rollout_id=0,
                response_ids=generator.integers(1, 96, response).astype(np.int32),
                loss_mask=mask,
                rollout_logprobs=(-4 * generator.random(response)).astype(np.float32),
                ref_logprobs=(-4 * generator.random(response)).astype(np.float32),
                turns=[],
                stop="answer",
            )
        )
    return made


def advantage_of(trajectory: Trajectory) -> float:
    return float(np.sin(trajectory.sample.index + 1))


def loss_config(aggregation: str, loss_type: str = "actor") -> LossConfig:
    config = LossConfig(
        ClipSettings(0.2, 0.28, 3.0), loss_type, check_aggregation(aggregation), kl_beta=0.1, entropy_bonus=0.01
    )
    if loss_type == "actor":
        return config
    # Everything else that looks at whole sequences or turns.
    correction = CorrectionSettings("sequence", "clip", 0.5, 2.0, veto=1e-4)
    return replace(config, correction=correction, ratio_is_correction=True, llds_coef=0.1)


def packed_logprobs(model: Qwen2ForCausalLM, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Only the positions that predict a policy token reach the output layer."""
    positions_P = batch.policy_positions_P
    logits_PV = model(**packed_model_inputs(batch), logits_to_keep=positions_P - 1).logits[0]
    found = logprobs_from_logits(logits_PV, batch.input_ids_T[positions_P], TEMPERATURE, with_entropy=True)
    assert found.entropy_M is not None
    return batch.scatter_policy(found.logprobs_M), batch.scatter_policy(found.entropy_M)


def accumulate(
    model: Qwen2ForCausalLM,
    ranks: Sequence[Sequence[Trajectory]],
    max_tokens: int,
    aggregation: str,
    at_least: int = 1,
    loss_type: str = "actor",
) -> tuple[dict[str, float], list[Tensor]]:
    """Backward over every rank's every micro-batch. Gradients add up as an all-reduce with a sum would."""
    model.zero_grad()
    local = [count_denominators(rank) for rank in ranks]
    denominators = Denominators(sum(d.tokens for d in local), sum(d.sequences for d in local))
    sums = Sums()
    for rank in ranks:
        advantages = [advantage_of(trajectory) for trajectory in rank]
        old = [trajectory.rollout_logprobs for trajectory in rank]
        for batch in pack(rank, max_tokens, advantages=advantages, old_logprobs=old, at_least=at_least):
            logprobs_T, entropy_T = packed_logprobs(model, batch)
            assert batch.old_logprobs_T is not None
            inputs = LossInputs(
                logprobs_T=logprobs_T,
                old_logprobs_T=batch.old_logprobs_T,
                advantages_T=batch.advantages_T,
                loss_mask_T=batch.loss_mask_T,
                segment_ids_T=batch.segment_ids_T,
                denominators=denominators,
                rollout_logprobs_T=batch.rollout_logprobs_T,
                # An empty rank has nothing to pack references from.
                ref_logprobs_T=batch.rollout_logprobs_T if batch.ref_logprobs_T is None else batch.ref_logprobs_T,
                entropy_T=entropy_T,
            )
            output = policy_gradient_loss(inputs, loss_config(aggregation, loss_type))
            output.loss.backward()
            sums = sums + output.sums
    return loss_metrics(sums), gradients(model)


def gradients(model: Qwen2ForCausalLM) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def padded(
    model: Qwen2ForCausalLM, trajectories: Sequence[Trajectory], aggregation: str
) -> tuple[float, list[Tensor], list[Tensor]]:
    """The oracle: right-padded rows, transformers' own attention and mask, losses written out per token."""
    longest = max(sequence_length(trajectory) for trajectory in trajectories)
    ids_BT = torch.zeros(len(trajectories), longest, dtype=torch.long)
    attention_BT = torch.zeros_like(ids_BT)
    for row, trajectory in enumerate(trajectories):
        ids = trajectory.sample.prompt_ids + trajectory.response_ids.tolist()
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        attention_BT[row, : len(ids)] = 1
    oracle = make_model(next(model.parameters()).dtype, "sdpa")
    oracle.load_state_dict(model.state_dict())
    log_p_BTV = (oracle(input_ids=ids_BT, attention_mask=attention_BT).logits / TEMPERATURE).log_softmax(-1)
    per_sequence, logprobs = [], []
    for row, trajectory in enumerate(trajectories):
        start = len(trajectory.sample.prompt_ids)
        at = torch.arange(start, sequence_length(trajectory))
        logp_N = log_p_BTV[row, at - 1, ids_BT[row, at]]
        log_p_NV = log_p_BTV[row, at - 1]
        logprobs.append(logp_N.detach())
        mask_N = torch.from_numpy(trajectory.loss_mask)
        if not mask_N.any():
            continue
        advantage = torch.tensor(advantage_of(trajectory), dtype=torch.float32).to(logp_N.dtype)
        ratio_N = (logp_N - torch.from_numpy(trajectory.rollout_logprobs)).exp()
        loss_N = torch.max(-advantage * ratio_N, -advantage * ratio_N.clamp(0.8, 1.28))
        if advantage < 0:
            loss_N = torch.min(loss_N, -advantage * 3.0)
        assert trajectory.ref_logprobs is not None
        d_N = logp_N - torch.from_numpy(trajectory.ref_logprobs)
        kl_N = ((-d_N).exp() - 1 + d_N).clamp(max=10)
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
        per_sequence.append((loss_N + 0.1 * kl_N - 0.01 * entropy_N)[mask_N])
    if aggregation == "token-mean":
        loss = torch.cat(per_sequence).mean()
    elif aggregation == "seq-mean-token-sum":
        loss = torch.stack([values.sum() for values in per_sequence]).mean()
    else:
        loss = torch.stack([values.mean() for values in per_sequence]).mean()
    loss.backward()
    return loss.item(), gradients(oracle), logprobs


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_packed_equals_padded(
    trajectories: list[Trajectory], aggregation: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = make_model(dtype)
    loss, expected, logprobs = padded(model, trajectories, aggregation)
    metrics, found = accumulate(model, [trajectories], 4096, aggregation)
    assert metrics["loss"] == pytest.approx(loss, abs=tolerance * max(1.0, abs(loss)))
    mine, theirs = (torch.cat([gradient.flatten() for gradient in each]) for each in (found, expected))
    assert (mine - theirs).norm() <= tolerance * theirs.norm()
    batch = pack(trajectories, 4096)[0]
    logprobs_T, _ = packed_logprobs(model, batch)
    for sequence in batch.sequences:
        mask_N = torch.from_numpy(trajectories[sequence.index].loss_mask)
        mine_N, theirs_N = logprobs_T.detach()[sequence.response][mask_N], logprobs[sequence.index][mask_N]
        torch.testing.assert_close(mine_N, theirs_N, atol=10 * tolerance, rtol=0)


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    max_tokens=st.integers(40, 300),
    n_ranks=st.integers(1, 11),
    at_least=st.integers(1, 4),
    aggregation=st.sampled_from(AGGREGATIONS),
    loss_type=st.sampled_from(sorted(POLICY_LOSSES)),
)
def test_micro_batches_and_ranks_change_nothing(
    model: Qwen2ForCausalLM,
    trajectories: list[Trajectory],
    max_tokens: int,
    n_ranks: int,
    at_least: int,
    aggregation: str,
    loss_type: str,
) -> None:
    together, expected = accumulate(model, [trajectories], 4096, aggregation, loss_type=loss_type)
    split = split_balanced([sequence_length(trajectory) for trajectory in trajectories], n_ranks)
    ranks = [[trajectories[index] for index in members] for members in split]
    apart, found = accumulate(model, ranks, max_tokens, aggregation, at_least, loss_type)
    assert apart.keys() == together.keys()
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, abs=1e-10), name
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
