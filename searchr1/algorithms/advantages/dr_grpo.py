"""Dr. GRPO: no division by the standard deviation, which favours questions that are too easy or too hard. https://arxiv.org/abs/2503.20783

Its other half, no division by a response's own length, is `algorithm.loss_agg_func: seq-mean-token-sum-norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from searchr1.algorithms.advantages.inputs import AdvantageInputs, AdvantageSettings, groups_of


def dr_grpo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """Reward - group mean."""
    groups = groups_of(inputs)
    return torch.where(groups.equal_N, 0.0, inputs.rewards_N - groups.mean_N)
