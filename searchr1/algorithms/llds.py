"""LLDS: keeps the likelihood of good actions from sliding away. https://arxiv.org/abs/2512.04220

GRPO with tools tends to lower the likelihood of right and wrong rollouts alike until the run collapses. This term is zero
while an action's likelihood has not fallen; once it has, it pulls up exactly the tokens that fell. With the advantage A and
d_t = log p_old(t) - log p(t) of an action's tokens:

    sum over t of max(0, d_t),   if A >= 0 and the sum of all its d_t is above 0;   else 0

An action is one turn of the policy (`action`) or the whole response (`response`); the paper found turns better. The sum is
aggregated over tokens as the policy loss is. As long as old and present log-probabilities are the same (a step's first
mini-batch with `recompute_logprobs`) it is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from searchr1.algorithms.names import LldsGate


def llds(logprobs_P: Tensor, old_logprobs_P: Tensor, advantages_P: Tensor, action_ids_P: Tensor, actions: int) -> Tensor:
    """Return [P] each policy token's part.

    Args:
        logprobs_P: of the policy being trained, with its graph.
        old_logprobs_P: of the policy that took the tokens.
        advantages_P: of the tokens.
        action_ids_P: int from 0, which action a token belongs to (`action_ids`).
        actions: larger than every id.
    """
    fallen_P = old_logprobs_P.detach() - logprobs_P
    if len(fallen_P) == 0:
        return fallen_P
    sum_A = fallen_P.new_zeros(actions).index_add_(0, action_ids_P, fallen_P.detach())
    is_on_P = (sum_A > 0)[action_ids_P] & (advantages_P >= 0)
    return fallen_P.clamp(min=0) * is_on_P


def action_ids(gate: LldsGate, segment_ids_T: Tensor, loss_mask_T: Tensor, policy_P: Tensor) -> Tensor:
    """Return [P] for each policy token of a packed row: its sequence, or its unbroken run of policy tokens."""
    if gate == "response":
        return segment_ids_T[policy_P]
    before_T = torch.zeros_like(loss_mask_T)
    before_T[1:] = loss_mask_T[:-1] & (segment_ids_T[1:] == segment_ids_T[:-1])
    starts_T = loss_mask_T & ~before_T
    return (starts_T.cumsum(0) - 1)[policy_P]
