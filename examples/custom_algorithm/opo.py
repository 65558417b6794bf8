"""An advantage of one's own: OPO's length-weighted baseline. https://arxiv.org/abs/2505.23585"""

from __future__ import annotations

import torch
from torch import Tensor

from searchr1.algorithms.advantages import AdvantageInputs, AdvantageSettings


def opo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """[N]: reward - sum(length reward) / sum(length), over the attempts at the same question.

    The mean that makes the gradient's variance least if its square grows with the length: long attempts count more.
    Lengths are the tokens that the policy sampled.
    """
    _, group_N = inputs.group_ids_N.unique(return_inverse=True)
    lengths_N = inputs.policy_tokens_N.to(inputs.rewards_N.dtype)
    zeros_G = torch.zeros(int(group_N.max()) + 1, dtype=inputs.rewards_N.dtype)
    total_G = zeros_G.index_add(0, group_N, lengths_N * inputs.rewards_N)
    baseline_G = total_G / zeros_G.index_add(0, group_N, lengths_N).clamp(min=1)
    return inputs.rewards_N - baseline_G[group_N]
