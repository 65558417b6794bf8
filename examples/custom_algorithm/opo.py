"""A custom advantage: OPO's length-weighted baseline. https://arxiv.org/abs/2505.23585"""

from __future__ import annotations

import torch
from torch import Tensor

from searchr1.algorithms.advantages import AdvantageInputs, AdvantageSettings


def opo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """Return advantages [N]: reward - sum(length reward) / sum(length), over the rollouts of the same group.

    This mean minimises the gradient's variance if its square grows with the length: long rollouts count more.
    Lengths are numbers of policy tokens.
    """
    _, group_N = inputs.group_ids_N.unique(return_inverse=True)
    lengths_N = inputs.policy_tokens_N.to(inputs.rewards_N.dtype)
    zeros_G = torch.zeros(int(group_N.max()) + 1, dtype=inputs.rewards_N.dtype)
    total_G = zeros_G.index_add(0, group_N, lengths_N * inputs.rewards_N)
    baseline_G = total_G / zeros_G.index_add(0, group_N, lengths_N).clamp(min=1)
    return inputs.rewards_N - baseline_G[group_N]
