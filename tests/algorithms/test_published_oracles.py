"""Our formulas against the published implementations that the project already depends on (RLinf, TRL), in float64.

TRL's loss is `GRPOTrainer._compute_loss`, called on a stub that has what it reads: the real method, but no trainer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.lifted import lift
from support.padded import LENGTH, LONGEST, ROWS, SEEDS, exactly, make_batch, ours
from torch import Tensor

from searchr1.algorithms.advantages import AdvantageInputs, AdvantageSettings, compute_advantages
from searchr1.algorithms.aggregation import check_aggregation
from searchr1.algorithms.correction import CorrectionSettings
from searchr1.algorithms.entropy import logprobs_from_logits
from searchr1.algorithms.kl import kl_function
from searchr1.algorithms.loss import LossConfig
from searchr1.algorithms.policy_losses import ClipSettings
from searchr1.algorithms.value_loss import clipped_value_loss

CLIP = ClipSettings(0.2, 0.28)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("aggregation", "rlinf_name"),
    [
        ("token-mean", "masked_mean"),
        ("seq-mean-token-sum", "seq_mean_token_sum"),
        ("seq-mean-token-mean", "seq_mean_token_mean"),
    ],
)
@pytest.mark.parametrize("dual", [None, 1.5])
def test_rlinf_ppo_loss(seed: int, aggregation: str, rlinf_name: str, dual: float | None) -> None:
    means = lift("rlinf", "utils/utils.py", "masked_mean", "seq_mean_token_sum", "seq_mean_token_mean")
    actor = lift("rlinf", "algorithms/losses.py", "compute_ppo_actor_loss", masked_mean=means.masked_mean)
    batch = make_batch(seed)
    theirs = batch["logprobs"].clone().requires_grad_()
    expected, metrics = actor.compute_ppo_actor_loss(
        logprobs=theirs,
        old_logprobs=batch["old"],
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=dual,
        advantages=batch["advantages"][:, None].expand(ROWS, LENGTH),
        loss_mask=batch["mask"],
        loss_agg_func=getattr(means, rlinf_name),
    )
    (slope,) = torch.autograd.grad(expected, theirs)
    loss, gradient, found = ours(batch, LossConfig(replace(CLIP, dual=dual), aggregation=check_aggregation(aggregation)))
    exactly(loss, expected.detach())
    exactly(gradient, slope)
    assert found["ratio"] == pytest.approx(metrics["actor/ratio"].item(), abs=1e-10)
    assert found["approx_kl"] == pytest.approx(metrics["actor/approx_kl"].item(), abs=1e-10)


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_rlinf_kl(name: str) -> None:
    utils = lift("rlinf", "algorithms/utils.py", "kl_penalty")
    batch = make_batch(0)
    mine, theirs = (batch["logprobs"].clone().requires_grad_() for _ in range(2))
    found, expected = kl_function(name)(mine, 6 * batch["ref"]), utils.kl_penalty(theirs, 6 * batch["ref"], name)
    exactly(found.detach(), expected.detach())
    exactly(*(torch.autograd.grad(value.sum(), leaf)[0] for value, leaf in ((found, mine), (expected, theirs))))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("adv_type", ["grpo", "grpo_dynamic"])
def test_rlinf_advantages(adv_type: str, seed: int) -> None:
    names = ("compute_grpo_advantages", "compute_grpo_dynamic_advantages")
    theirs = lift("rlinf", "algorithms/advantages.py", *names)
    torch.manual_seed(seed)
    rewards_N = torch.rand(12, dtype=torch.float64)
    mask_LN = torch.ones(3, 12, dtype=torch.float64)
    if adv_type == "grpo":
        expected, _ = theirs.compute_grpo_advantages(rewards=rewards_N, loss_mask=mask_LN, group_size=4)
    else:
        expected, _ = theirs.compute_grpo_dynamic_advantages(
            rewards=rewards_N[:, None],
            loss_mask=mask_LN,
            group_size=4,
            idx_to_traj=list(range(12)),
            advantage_mode="trajectory",
        )
    inputs = AdvantageInputs(rewards_N, torch.arange(12) // 4, torch.ones(12, dtype=torch.int64))
    exactly(compute_advantages(inputs, AdvantageSettings(adv_type)), expected[0])


def test_rlinf_loss_scales_are_one_for_trajectories_that_are_one_sequence() -> None:
    """Which is why `grpo_dynamic` with any of them is plain GRPO here."""
    theirs = lift("rlinf", "algorithms/loss_scales.py", "group_scale", "agent_scale", "turn_scale")
    batch = make_batch(0)
    rows: dict[str, Any] = {
        "idx_to_traj": list(range(ROWS)),
        "extra:idx_to_sub_traj": torch.zeros(ROWS, dtype=torch.long),
        "response_mask": batch["mask"],
        "advantages": batch["advantages"].clone(),
        "loss_scales": torch.ones(ROWS, LENGTH, dtype=torch.float64),
    }
    context = {"folding_scale": [], "actor_global_batch_size": ROWS}
    for scale in (theirs.group_scale, theirs.agent_scale, theirs.turn_scale):
        rows = scale(context, rows)
    assert bool((rows["loss_scales"] == 1).all())
    assert torch.equal(rows["advantages"], batch["advantages"])


@pytest.mark.parametrize("seed", SEEDS)
def test_rlinf_reinforce_plus_plus(seed: int) -> None:
    """Theirs works in fp32 and divides by the deviation with n where ours has n - 1."""
    means = lift("rlinf", "utils/utils.py", "masked_mean")
    theirs = lift("rlinf", "algorithms/advantages.py", "compute_reinpp_advantages", masked_mean=means.masked_mean)
    torch.manual_seed(seed)
    rewards_N, lengths_N = torch.rand(12), torch.randint(1, 8, (12,))
    mask_LN = torch.arange(8)[:, None] < lengths_N
    expected, _ = theirs.compute_reinpp_advantages(rewards=rewards_N[None], loss_mask=mask_LN, group_size=1)
    inputs = AdvantageInputs(rewards_N.double(), torch.arange(12), lengths_N)
    found = compute_advantages(inputs, AdvantageSettings("reinforce++"))
    tokens = float(lengths_N.sum())
    torch.testing.assert_close(found.float() * (tokens / (tokens - 1)) ** 0.5, expected[0], atol=1e-5, rtol=1e-5)


def test_rlinf_value_loss() -> None:
    means = lift("rlinf", "utils/utils.py", "masked_mean")
    huber = lift("rlinf", "algorithms/utils.py", "huber_loss")
    losses = lift(
        "rlinf", "algorithms/losses.py", "compute_ppo_critic_loss",
        masked_mean=means.masked_mean, huber_loss=huber.huber_loss,
    )  # fmt: skip
    batch = make_batch(4)
    mine, theirs = (batch["logprobs"].clone().requires_grad_() for _ in range(2))
    # A Huber loss with so large a delta is half the square.
    expected, _ = losses.compute_ppo_critic_loss(theirs, batch["ref"], batch["old"], 0.2, 1e9, loss_mask=batch["mask"])
    found = clipped_value_loss(mine, batch["old"], batch["ref"], 0.2)[0][batch["mask"]].mean()
    exactly(found.detach(), expected.detach())
    exactly(torch.autograd.grad(found, mine)[0], torch.autograd.grad(expected, theirs)[0])


def trl_loss(batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """What TRL's trainer makes of it; with its options as keyword arguments."""
    trainer = lift("trl", "trainer/grpo_trainer.py", "_compute_loss", nanmin=torch.min, nanmax=torch.max)
    logprobs = batch["logprobs"].clone().requires_grad_()
    weights = options.pop("weights", None)
    args = {"delta": None, "use_bias_correction_kl": False, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    args |= {name: options.pop(name) for name in list(options) if name in args}
    defaults = {
        "loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.28,
        "entropy_coef": 0.0, "max_completion_length": LONGEST, "vllm_importance_sampling_correction": weights is not None,
    }  # fmt: skip
    stub = SimpleNamespace(
        **defaults | options,
        args=SimpleNamespace(**args, steps_per_generation=1),
        aux_loss_enabled=False,
        use_vllm=weights is not None,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        current_gradient_accumulation_steps=1,
        use_adaptive_entropy=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x,
        ),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, batch["entropy"], None),
    )  # fmt: skip
    stub._entropy_bonus_enabled = stub.entropy_coef != 0
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    loss = trainer._compute_loss(
        stub,
        None,
        {
            "prompt_ids": ids[:, :2],
            "prompt_mask": ids[:, :2] + 1,
            "completion_ids": ids,
            "completion_mask": torch.ones_like(ids),
            "tool_mask": batch["mask"].long(),
            "advantages": batch["advantages"],
            "old_per_token_logps": batch["old"],
            "ref_per_token_logps": batch["ref"],
            "num_items_in_batch": batch["mask"].sum(),
            "importance_sampling_ratio": weights,
        },
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


TOKENS, SEQUENCES = check_aggregation("token-mean"), check_aggregation("seq-mean-token-mean")
TRL = {
    "grpo": (LossConfig(CLIP, aggregation=SEQUENCES), {"loss_type": "grpo"}),
    "dapo": (LossConfig(CLIP), {"loss_type": "dapo"}),
    "bnpo": (LossConfig(ClipSettings(0.2, 0.2)), {"loss_type": "bnpo", "epsilon_high": 0.2}),
    "dr_grpo": (LossConfig(CLIP, aggregation=check_aggregation("seq-mean-token-sum-norm")), {"loss_type": "dr_grpo"}),
    "luspo": (LossConfig(CLIP, aggregation=check_aggregation("seq-mean-token-sum")), {"loss_type": "luspo"}),
    "gspo": (
        LossConfig(ClipSettings(0.03, 0.04), "gspo", SEQUENCES),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    ),
    # TRL's bound is of the weight, ours of its distance from 1.
    "cispo": (LossConfig(ClipSettings(1.0, 0.5), "cispo"), {"loss_type": "cispo", "epsilon_high": 1.5}),
    # TRL makes fp32 of its temperatures; these are exact in it.
    "sapo": (
        LossConfig(ClipSettings(0.2, 0.2, None, 0.75, 1.25), "sapo", SEQUENCES),
        {"loss_type": "sapo", "sapo_temperature_pos": 0.75, "sapo_temperature_neg": 1.25},
    ),
    "dual clip": (LossConfig(ClipSettings(0.2, 0.28, 1.5)), {"delta": 1.5}),
    "kl": (LossConfig(CLIP, kl_beta=0.2, kl_penalty_type="k3"), {"beta": 0.2}),
    "entropy": (LossConfig(CLIP, entropy_bonus=0.1), {"entropy_coef": 0.1}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TRL)
def test_trl_losses(name: str, seed: int) -> None:
    config, options = TRL[name]
    batch = make_batch(seed)
    loss, gradient, _ = ours(batch, config)
    expected, slope = trl_loss(batch, **options)
    exactly(loss, expected)
    exactly(gradient, slope)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("bound", ["truncate", "mask"])
def test_trl_takes_importance_weights_as_we_do(level: str, bound: str) -> None:
    """The weights themselves stand in the middle of a long method of TRL's; their use can be called."""
    batch = make_batch(5)
    difference = torch.where(batch["mask"], batch["old"] - batch["rollout"], 0.0)
    raw = (difference if level == "token" else difference.sum(-1, keepdim=True)).exp()
    weights = raw.clamp(max=1.4) if bound == "truncate" else raw.masked_fill((raw < 0.6) | (raw > 1.4), 0.0)
    correction = CorrectionSettings(level, bound, 0.6, 1.4)  # type: ignore[arg-type]
    loss, gradient, _ = ours(batch, LossConfig(CLIP, kl_beta=0.1, correction=correction))
    expected, slope = trl_loss(batch, beta=0.1, weights=weights)
    exactly(loss, expected)
    exactly(gradient, slope)


def test_trl_logprobs_and_entropy() -> None:
    trl = lift(
        "trl", "trainer/utils.py", "selective_log_softmax", "entropy_from_logits", is_triton_available=lambda: False
    )  # fmt: skip
    torch.manual_seed(2)
    logits_MV = 4 * torch.randn(33, 120, dtype=torch.float64)
    targets_M = torch.arange(33) * 3
    found = logprobs_from_logits(logits_MV, targets_M, 0.7, with_entropy=True)
    assert found.entropy_M is not None
    exactly(found.logprobs_M, trl.selective_log_softmax(logits_MV / 0.7, targets_M))
    exactly(found.entropy_M, trl.entropy_from_logits(logits_MV / 0.7))
