"""A custom policy loss: TOPR, which tapers off-policy sequences. https://arxiv.org/abs/2503.14286"""

from __future__ import annotations

import torch

from searchr1.algorithms.policy_losses import ClipSettings, PolicyInputs, TokenLosses


def topr(inputs: PolicyInputs, clip: ClipSettings) -> TokenLosses:
    """Return losses -stop_grad(w) A logp; w = 1 where A > 0, else min(1, e^(sum over the sequence of logp - old logp)).

    A good rollout is learned from however unlikely it has become; a bad one is pushed down only while it is still likely.
    Nothing is clipped, so `clip` is unused.
    """
    log_ratio_P = inputs.log_ratio_P().detach()
    segments_P = inputs.segment_ids_P.long()
    sums_S = torch.bincount(segments_P, weights=log_ratio_P).to(log_ratio_P.dtype)
    tapered_P = sums_S[segments_P].clamp(max=0.0).exp()
    weight_P = torch.where(inputs.advantages_P > 0, torch.ones_like(tapered_P), tapered_P)
    loss_P = -weight_P * inputs.advantages_P * inputs.logprobs_P
    none_P = torch.zeros_like(weight_P, dtype=torch.bool)
    return TokenLosses(loss_P, log_ratio_P.exp(), none_P, none_P)
