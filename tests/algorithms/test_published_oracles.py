"""Our formulas against the published implementations that the project already depends on (RLinf, TRL)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from searchr1.algorithms.advantages import AdvantageInputs, AdvantageSettings, compute_advantages
from searchr1.algorithms.aggregation import Denominators, check_aggregation
from searchr1.algorithms.entropy import logprobs_from_logits
from searchr1.algorithms.kl import kl_function
from searchr1.algorithms.loss import LossConfig, LossInputs, loss_metrics, policy_gradient_loss
from searchr1.algorithms.policy_losses import ClipSettings

SHAPE = (4, 25)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    logprobs = -3 * torch.rand(SHAPE, generator=generator)
    mask = torch.rand(SHAPE, generator=generator) < 0.6
    mask[:, 0] = True
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.5 * torch.randn(SHAPE, generator=generator),
        "ref": logprobs + 0.5 * torch.randn(SHAPE, generator=generator),
        "advantages": torch.randn(4, 1, generator=generator).expand(SHAPE).contiguous(),
        "mask": mask,
    }


@pytest.mark.parametrize(
    ("aggregation", "rlinf_name"),
    [
        ("token-mean", "masked_mean"),
        ("seq-mean-token-sum", "seq_mean_token_sum"),
        ("seq-mean-token-mean", "seq_mean_token_mean"),
    ],
)
@pytest.mark.parametrize("dual", [None, 1.5])
def test_rlinf_ppo_loss(batch: dict[str, torch.Tensor], aggregation: str, rlinf_name: str, dual: float | None) -> None:
    losses: Any = pytest.importorskip("rlinf.algorithms.losses")
    utils: Any = pytest.importorskip("rlinf.utils.utils")
    theirs = batch["logprobs"].clone().requires_grad_()
    expected, metrics = losses.compute_ppo_actor_loss(
        logprobs=theirs,
        old_logprobs=batch["old"],
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=dual,
        advantages=batch["advantages"],
        loss_mask=batch["mask"],
        loss_agg_func=getattr(utils, rlinf_name),
    )
    expected.backward()
    ours = batch["logprobs"].flatten().clone().requires_grad_()
    output = policy_gradient_loss(
        LossInputs(
            logprobs_T=ours,
            old_logprobs_T=batch["old"].flatten(),
            advantages_T=batch["advantages"].flatten(),
            loss_mask_T=batch["mask"].flatten(),
            segment_ids_T=torch.arange(4).repeat_interleave(25),
            denominators=Denominators(int(batch["mask"].sum()), 4),
        ),
        LossConfig(ClipSettings(0.2, 0.28, dual), aggregation=check_aggregation(aggregation)),
    )
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad.view(SHAPE), theirs.grad)
    found = loss_metrics(output.sums)
    assert found["ratio"] == pytest.approx(metrics["actor/ratio"].item(), rel=1e-5)
    assert found["approx_kl"] == pytest.approx(metrics["actor/approx_kl"].item(), abs=1e-6)


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_rlinf_kl(batch: dict[str, torch.Tensor], name: str) -> None:
    utils: Any = pytest.importorskip("rlinf.algorithms.utils")
    expected = utils.kl_penalty(batch["logprobs"], batch["ref"], name)
    torch.testing.assert_close(kl_function(name)(batch["logprobs"], batch["ref"]), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("adv_type", ["grpo", "grpo_dynamic"])
def test_rlinf_advantages(adv_type: str) -> None:
    theirs: Any = pytest.importorskip("rlinf.algorithms.advantages")
    rewards_N = torch.tensor([1, 0, 0, 0.5, 1, 1, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
    if adv_type == "grpo":
        mask = torch.ones(3, 12, dtype=torch.float64)
        expected, _ = theirs.compute_grpo_advantages(rewards=rewards_N, loss_mask=mask, group_size=4)
    else:
        expected, _ = theirs.compute_grpo_dynamic_advantages(
            rewards=rewards_N[:, None],
            loss_mask=torch.ones(3, 12, dtype=torch.float64),
            group_size=4,
            idx_to_traj=list(range(12)),
            advantage_mode="trajectory",
        )
    inputs = AdvantageInputs(rewards_N, torch.arange(12) // 4, torch.ones(12, dtype=torch.int64))
    torch.testing.assert_close(compute_advantages(inputs, AdvantageSettings(adv_type)), expected[0])


def test_trl_logprobs_and_entropy() -> None:
    trl: Any = pytest.importorskip("trl.trainer.utils")
    logits_MV = 4 * torch.randn(33, 120, generator=torch.Generator().manual_seed(2))
    targets_M = torch.arange(33) * 3
    found = logprobs_from_logits(logits_MV, targets_M, 0.7, with_entropy=True)
    assert found.entropy_M is not None
    expected = trl.selective_log_softmax(logits_MV / 0.7, targets_M)
    torch.testing.assert_close(found.logprobs_M, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy_M, trl.entropy_from_logits(logits_MV / 0.7), atol=1e-5, rtol=1e-5)
