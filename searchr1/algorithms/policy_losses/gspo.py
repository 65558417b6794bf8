"""GSPO: one importance ratio per sequence, the geometric mean of its tokens'. https://arxiv.org/abs/2507.18071

Its limits are far narrower than PPO's: the paper takes `clip_ratio_low` 3e-4 and `clip_ratio_high` 4e-4, and
`loss_agg_func: seq-mean-token-mean`.
"""

from __future__ import annotations

from searchr1.algorithms.aggregation import tokens_of_sequences
from searchr1.algorithms.policy_losses.inputs import ClipSettings, PolicyInputs, TokenLosses
from searchr1.algorithms.policy_losses.ppo_clip import clipped_surrogate


def gspo(inputs: PolicyInputs, clip: ClipSettings) -> TokenLosses:
    """PPO's surrogate with s = e^(mean over the sequence of logp - old logp) in every token of the sequence.

    Each token carries s through its own log-probability (the paper's token form), so the sum over a sequence divided by
    its length has the gradient of s; the value is s.
    """
    log_ratio_P = inputs.log_ratio_P()
    tokens_S = tokens_of_sequences(inputs.segment_ids_P, inputs.sequences).clamp(min=1)
    sums_S = log_ratio_P.new_zeros(len(tokens_S)).index_add_(0, inputs.segment_ids_P.long(), log_ratio_P.detach())
    sequence_P = (sums_S / tokens_S)[inputs.segment_ids_P.long()]
    ratio_P = (sequence_P + log_ratio_P - log_ratio_P.detach()).exp()
    return clipped_surrogate(ratio_P, inputs.advantages_P, clip)
