"""Our formulas against verl's, in float64; run with verl 0.9.1, of which only the files are needed.

verl's 1e-8 beside a count (`masked_mean`) and beside a variance (`masked_whiten`, where we have 1e-6 beside the deviation)
is taken out where it would hide what is compared.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.lifted import lift
from support.padded import LENGTH, LONGEST, ROWS, SEEDS, exactly, make_batch, ours
from torch import Tensor

from searchr1.algorithms.advantages import AdvantageInputs, AdvantageSettings, compute_advantages
from searchr1.algorithms.advantages.gae import gae
from searchr1.algorithms.aggregation import check_aggregation
from searchr1.algorithms.correction import CorrectionSettings, correction_weights
from searchr1.algorithms.kl import kl_function
from searchr1.algorithms.loss import LossConfig
from searchr1.algorithms.mismatch import mismatch_metrics, mismatch_sums
from searchr1.algorithms.policy_losses import ClipSettings
from searchr1.algorithms.value_loss import clipped_value_loss

if importlib.util.find_spec("verl") is None:  # nothing of it is imported: its wheel without its dependencies is enough
    pytest.skip("verl is not installed", allow_module_level=True)

CORE, CORRECTION = "trainer/ppo/core_algos.py", "trainer/ppo/rollout_corr_helper.py"


def masked_sum(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    return torch.where(mask.bool(), values, 0.0).sum(axis)


def masked_mean(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    return masked_sum(values, mask, axis) / mask.sum(axis)


def masked_whiten(values: Tensor, mask: Tensor) -> Tensor:
    chosen = values[mask.bool()]
    return (values - chosen.mean()) / (chosen.std() + 1e-6)


MEANS = SimpleNamespace(
    masked_sum=masked_sum,
    masked_mean=masked_mean,
    masked_whiten=masked_whiten,
    clip_by_value=lambda x, low, high: torch.max(torch.min(x, high), low),
)


def verl(path: str, *names: str, **known: Any) -> Any:
    return lift("verl", path, *names, verl_F=MEANS, ActorConfig=SimpleNamespace, AlgoConfig=dict, **known)


LOSSES = {
    "vanilla": ("actor", ClipSettings(0.2, 0.28, 2.0)),
    "gspo": ("gspo", ClipSettings(0.03, 0.04)),
    "sapo": ("sapo", ClipSettings(0.2, 0.2, None, 0.8, 1.3)),
    "cispo": ("cispo", ClipSettings(0.6, 0.4)),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("corrected", [False, True])
def test_losses(name: str, aggregation: str, corrected: bool, seed: int) -> None:
    loss_type, clip = LOSSES[name]
    if name == "sapo":  # the only aggregation that verl has for it
        aggregation = "seq-mean-token-mean"
    theirs = verl(CORE, "agg_loss", f"compute_policy_loss_{name}")
    batch = make_batch(seed)
    scale = {"loss_scale_factor": LONGEST} if aggregation.endswith("norm") else {}
    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=clip.low, clip_ratio_high=clip.high, tau_pos=clip.tau_positive,
        tau_neg=clip.tau_negative, global_batch_info=scale, get=lambda key, default: clip.dual,
    )  # fmt: skip
    weights = (batch["old"] - batch["rollout"]).exp().clamp(max=1.4) if corrected else None
    logprobs = batch["logprobs"].clone().requires_grad_()
    expected, metrics = getattr(theirs, f"compute_policy_loss_{name}")(
        batch["old"], logprobs, batch["advantages"][:, None].expand(ROWS, LENGTH), batch["mask"].double(),
        aggregation, config, weights,
    )  # fmt: skip
    (slope,) = torch.autograd.grad(expected, logprobs)
    correction = CorrectionSettings("token", "truncate", upper=1.4) if corrected else None
    loss, gradient, found = ours(batch, LossConfig(clip, loss_type, check_aggregation(aggregation), correction=correction))
    # verl adds 1e-8 to a sequence's number of tokens; RLinf and TRL, which do not, are met to 1e-10.
    near = 1e-7 if aggregation == "seq-mean-token-mean" else 1e-10
    torch.testing.assert_close(loss, expected.detach(), atol=near, rtol=near)
    torch.testing.assert_close(gradient, slope, atol=near, rtol=near)
    assert found["approx_kl"] == pytest.approx(metrics["actor/ppo_kl"], abs=1e-10)
    if name != "vanilla":  # ours tells what the dual clip decided apart from what the clip did
        assert found["clip_fraction"] == pytest.approx(metrics["actor/pg_clipfrac"], abs=1e-7)


@pytest.mark.parametrize("name", ["k1", "abs", "k2", "k3"])
def test_kl(name: str) -> None:
    theirs = verl(CORE, "kl_penalty_forward", "kl_penalty")
    batch = make_batch(0)
    mine, other = (batch["logprobs"].clone().requires_grad_() for _ in range(2))
    found, expected = kl_function(name)(mine, 6 * batch["ref"]), theirs.kl_penalty(other, 6 * batch["ref"], name)
    exactly(found.detach(), expected.detach())
    exactly(torch.autograd.grad(found.sum(), mine)[0], torch.autograd.grad(expected.sum(), other)[0])


ADVANTAGES = {
    "grpo": ("compute_grpo_outcome_advantage", {}),
    "dr_grpo": ("compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("compute_rloo_outcome_advantage", {}),
    "reinforce++": ("compute_reinforce_plus_plus_outcome_advantage", {"config": SimpleNamespace(gamma=1.0)}),
    "reinforce++_baseline": ("compute_reinforce_plus_plus_baseline_outcome_advantage", {}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name: str, seed: int) -> None:
    function, options = ADVANTAGES[name]
    theirs = verl(CORE, function)
    torch.manual_seed(seed)
    groups = torch.tensor([3, 3, 5, 5, 5, 9, 9, 9, 9, 3])
    rewards_N, lengths_N = torch.rand(10, dtype=torch.float64), torch.randint(1, 8, (10,))
    mask = (torch.arange(8) < lengths_N[:, None]).double()
    rewards = torch.zeros(10, 8, dtype=torch.float64)
    rewards[torch.arange(10), lengths_N - 1] = rewards_N
    if name != "reinforce++":
        options = options | {"index": groups.numpy()}
    expected, _ = getattr(theirs, function)(token_level_rewards=rewards, response_mask=mask, **options)
    found = compute_advantages(AdvantageInputs(rewards_N, groups, lengths_N), AdvantageSettings(name))
    exactly(found[:, None] * mask, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_gae(seed: int) -> None:
    theirs = verl(CORE, "compute_gae_advantage_return")
    batch = make_batch(seed)
    mask, values = batch["mask"], batch["logprobs"]
    rewards = batch["ref"] * mask
    expected, targets = theirs.compute_gae_advantage_return(rewards, values, mask.double(), 0.97, 0.9)
    found, returns = gae(
        [row[m].numpy() for row, m in zip(rewards, mask, strict=True)],
        [row[m].numpy() for row, m in zip(values, mask, strict=True)],
        0.97,
        0.9,
    )
    joined = torch.cat([torch.from_numpy(one) for one in found])
    exactly((joined - joined.mean()) / (joined.std() + 1e-6), expected[mask])
    exactly(torch.cat([torch.from_numpy(one) for one in returns]), targets[mask])


def test_value_loss() -> None:
    theirs = verl(CORE, "agg_loss", "compute_value_loss")
    batch = make_batch(4)
    mine, other = (batch["logprobs"].clone().requires_grad_() for _ in range(2))
    expected, clipped = theirs.compute_value_loss(other, batch["ref"], batch["old"], batch["mask"].double(), 0.2)
    loss, bounded = clipped_value_loss(mine, batch["old"], batch["ref"], 0.2)
    found = loss[batch["mask"]].mean()
    exactly(found.detach(), expected.detach())
    exactly(torch.autograd.grad(found, mine)[0], torch.autograd.grad(expected, other)[0])
    assert float(bounded[batch["mask"]].double().mean()) == pytest.approx(float(clipped), abs=1e-6)


def segments(batch: dict[str, Tensor]) -> Tensor:
    return torch.arange(ROWS).repeat_interleave(LENGTH)[batch["mask"].flatten()]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("bound", "threshold"), [("truncate", 1.5), ("mask", "0.7_1.5")])
def test_importance_weights(level: str, bound: str, threshold: Any) -> None:
    theirs = verl(
        CORRECTION, "_parse_rollout_is_threshold", "compute_rollout_correction_weights",
        SAFETY_BOUND=20.0, compute_is_metrics=lambda **_: {},
    )  # fmt: skip
    for seed in SEEDS:
        batch = make_batch(seed)
        d, mask = batch["old"] - batch["rollout"], batch["mask"]
        expected, _ = theirs.compute_rollout_correction_weights(d, mask.double(), level, threshold)
        settings = CorrectionSettings(level, bound, 0.7, 1.5)  # type: ignore[arg-type]
        exactly(correction_weights(d[mask], segments(batch), settings).weights_P, expected[mask])


@pytest.mark.parametrize(
    ("level", "option", "low", "high"),
    [("token", "token_k1", 0.8, 1.2), ("sequence", "seq_sum_k1", 0.3, 3.0), ("geometric", "seq_mean_k1", 0.95, 1.05)],
)
def test_rejection(level: str, option: str, low: float, high: float) -> None:
    theirs = verl(
        CORRECTION, "_parse_rollout_rs_thresholds", "compute_rollout_rejection_mask",
        SAFETY_BOUND=20.0, compute_rs_metrics=lambda **_: {}, SUPPORTED_ROLLOUT_RS_OPTIONS={option},
        TOKEN_LEVEL_ROLLOUT_RS_OPTIONS={"token_k1"},
    )  # fmt: skip
    shares = []
    for seed in SEEDS:
        batch = make_batch(seed)
        d, mask = batch["old"] - batch["rollout"], batch["mask"]
        # Theirs is of the inverse ratio.
        kept, _ = theirs.compute_rollout_rejection_mask(d, mask.double(), option, f"{1 / high}_{1 / low}")
        settings = CorrectionSettings(level, "reject", low, high)  # type: ignore[arg-type]
        weights_P = correction_weights(d[mask], segments(batch), settings).weights_P
        exactly(weights_P, kept[mask])
        shares.append(float(weights_P.mean()))
    assert max(shares) > 0
    assert min(shares) < 1


def test_mismatch_measures() -> None:
    theirs = verl(CORRECTION, "compute_offpolicy_metrics", SAFETY_BOUND=20.0)
    batch = make_batch(6)
    expected = theirs.compute_offpolicy_metrics(batch["old"], batch["rollout"], batch["mask"].double())
    found = mismatch_metrics(
        mismatch_sums(batch["old"].flatten(), batch["rollout"].flatten(), batch["mask"].flatten().nonzero().squeeze(-1))
    )
    assert found["kl"] == pytest.approx(expected["kl"], abs=1e-10)
    assert found["kl_k3"] == pytest.approx(expected["k3_kl"], abs=1e-10)
    weights = (batch["old"] - batch["rollout"])[batch["mask"]].exp()
    assert found["effective_sample_size"] == pytest.approx(
        float(weights.mean() ** 2) / (expected["chi2_token"] + 1), abs=1e-10
    )
