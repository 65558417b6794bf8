"""CISPO: the importance weight is clipped, no token's gradient is. https://arxiv.org/abs/2506.13585

The paper bounds the weight from above only: `clip_ratio_low: 1`, and `clip_ratio_high` about 4.
"""

from __future__ import annotations

import torch

from searchr1.algorithms.policy_losses.inputs import ClipSettings, PolicyInputs, TokenLosses


def cispo(inputs: PolicyInputs, clip: ClipSettings) -> TokenLosses:
    """loss = -stop_grad(clamp(r, 1 - low, 1 + high)) A logp; r = e^(logp - old logp)."""
    ratio_P = inputs.log_ratio_P().detach().exp()
    weight_P = ratio_P.clamp(1.0 - clip.low, 1.0 + clip.high)
    loss_P = -weight_P * inputs.advantages_P * inputs.logprobs_P
    return TokenLosses(loss_P, ratio_P, weight_P != ratio_P, torch.zeros_like(ratio_P, dtype=torch.bool))
