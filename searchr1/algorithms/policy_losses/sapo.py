"""SAPO: a smooth gate in place of the clip. https://arxiv.org/abs/2511.20347"""

from __future__ import annotations

import torch

from searchr1.algorithms.policy_losses.inputs import ClipSettings, PolicyInputs, TokenLosses


def sapo(inputs: PolicyInputs, clip: ClipSettings) -> TokenLosses:
    """loss = -A (4 / tau) sigmoid(tau (r - 1)); tau is `sapo_tau_positive` where A > 0, else `sapo_tau_negative`.

    At r = 1 the gradient is that of the plain policy gradient; it fades to both sides. Nothing is clipped.
    """
    ratio_P = inputs.log_ratio_P().exp()
    tau_P = torch.full_like(ratio_P, clip.tau_negative).masked_fill(inputs.advantages_P > 0, clip.tau_positive)
    gate_P = torch.sigmoid(tau_P * (ratio_P - 1.0)) * 4.0 / tau_P
    none_P = torch.zeros_like(ratio_P, dtype=torch.bool)
    return TokenLosses(-inputs.advantages_P * gate_P, ratio_P.detach(), none_P, none_P)
