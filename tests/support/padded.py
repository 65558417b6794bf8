"""Random batches as other projects have them, padded rows and masks, and our loss on them."""

from __future__ import annotations

import torch
from torch import Tensor

from searchr1.algorithms.aggregation import Denominators
from searchr1.algorithms.loss import LossConfig, LossInputs, loss_metrics, policy_gradient_loss

ROWS, LENGTH, LONGEST = 5, 17, 40
SEEDS = [0, 1, 2]


def exactly(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def make_batch(seed: int) -> dict[str, Tensor]:
    """Padded rows of ragged lengths, with holes where the environment wrote."""
    torch.manual_seed(seed)
    logprobs = -3 * torch.rand(ROWS, LENGTH, dtype=torch.float64)
    mask = torch.rand(ROWS, LENGTH) < 0.7
    mask &= torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (ROWS, 1))
    mask[:, 0] = True

    def near(spread: float) -> Tensor:
        return logprobs + spread * torch.randn(ROWS, LENGTH, dtype=torch.float64)

    return {
        "logprobs": logprobs,
        "old": near(0.5),
        "ref": near(0.5),
        "rollout": near(0.3),
        "advantages": torch.randn(ROWS, dtype=torch.float64),
        "entropy": torch.rand(ROWS, LENGTH, dtype=torch.float64),
        "mask": mask,
    }


def ours(batch: dict[str, Tensor], config: LossConfig) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Loss, gradient [ROWS, LENGTH] and metrics, the padding left in."""
    logprobs = batch["logprobs"].flatten().clone().requires_grad_()
    output = policy_gradient_loss(
        LossInputs(
            logprobs_T=logprobs,
            old_logprobs_T=batch["old"].flatten(),
            advantages_T=batch["advantages"].repeat_interleave(LENGTH),
            loss_mask_T=batch["mask"].flatten(),
            segment_ids_T=torch.arange(ROWS).repeat_interleave(LENGTH),
            denominators=Denominators(int(batch["mask"].sum()), ROWS, LONGEST),
            rollout_logprobs_T=batch["rollout"].flatten(),
            ref_logprobs_T=batch["ref"].flatten(),
            entropy_T=batch["entropy"].flatten(),
        ),
        config,
    )
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    return output.loss.detach(), gradient.view(ROWS, LENGTH), loss_metrics(output.sums)
