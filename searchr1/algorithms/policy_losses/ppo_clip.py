"""PPO's clipped surrogate. https://arxiv.org/abs/1707.06347; dual clip: https://arxiv.org/abs/1912.09729;
separate limits: https://arxiv.org/abs/2503.14476
"""

from __future__ import annotations

import torch

from searchr1.algorithms.policy_losses.inputs import ClipSettings, PolicyInputs, TokenLosses


def ppo_clip(inputs: PolicyInputs, clip: ClipSettings) -> TokenLosses:
    """loss = max(-A r, -A clamp(r, 1 - low, 1 + high)), and for A < 0 at most -A c; r = e^(logp - old logp)."""
    return clipped_surrogate(inputs.log_ratio_P().exp(), inputs.advantages_P, clip)


def clipped_surrogate(ratio_P: torch.Tensor, advantages_P: torch.Tensor, clip: ClipSettings) -> TokenLosses:
    """Return the surrogate for given ratios, token by token."""
    plain_P = -advantages_P * ratio_P
    limited_P = -advantages_P * ratio_P.clamp(1.0 - clip.low, 1.0 + clip.high)
    clipped_P = limited_P > plain_P
    loss_P = torch.maximum(plain_P, limited_P)
    dual_clipped_P = torch.zeros_like(clipped_P)
    if clip.dual is not None:
        ceiling_P = -advantages_P * clip.dual
        dual_clipped_P = (advantages_P < 0) & (ceiling_P < loss_P)
        loss_P = torch.where(dual_clipped_P, ceiling_P, loss_P)
    return TokenLosses(loss_P, ratio_P.detach(), clipped_P & ~dual_clipped_P, dual_clipped_P)
