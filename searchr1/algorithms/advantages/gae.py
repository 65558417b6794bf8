"""Generalised advantage estimation over the policy's tokens. https://arxiv.org/abs/1506.02438

What the environment wrote is not action: after one policy token the next state is the one before the next policy token,
however much was retrieved in between. With r_t the token's reward and V_t the critic's value of the state before it,

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}        return_t = A_t + V_t

and V and A behind the last token are 0. The trajectory's reward falls on its last policy token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def gae(rewards: Sequence[Array], values: Sequence[Array], gamma: float, lam: float) -> tuple[list[Array], list[Array]]:
    """Return advantages and returns of each trajectory's policy tokens.

    Args:
        rewards: one array [P] per trajectory, one number per policy token.
        values: likewise; what the critic gave.
        gamma: discount per policy token.
        lam: 1 is the whole return (least biased), 0 the one-step difference (least varied).
    """
    lengths = np.array([len(array) for array in rewards], dtype=np.int64)
    longest = int(lengths.max(initial=0))
    # Aligned at their ends: behind the last token there is nothing, for all of them.
    reward_NL, value_NL, advantage_NL = (np.zeros((len(rewards), longest + 1)) for _ in range(3))
    for row, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        reward_NL[row, longest - len(reward) : longest] = reward
        value_NL[row, longest - len(value) : longest] = value
    for t in range(longest - 1, -1, -1):
        delta_N = reward_NL[:, t] + gamma * value_NL[:, t + 1] - value_NL[:, t]
        advantage_NL[:, t] = delta_N + gamma * lam * advantage_NL[:, t + 1]
    advantages = [advantage_NL[row, longest - length : longest] for row, length in enumerate(lengths)]
    returns = [advantage + value for advantage, value in zip(advantages, values, strict=True)]
    return advantages, returns


def whiten_tokens(advantages: Sequence[Array]) -> list[Array]:
    """Shift and scale to mean 0 and variance 1 over all tokens of all trajectories; equal values become 0."""
    joined = np.concatenate([*advantages, np.zeros(0)])
    if len(joined) == 0:
        return list(advantages)
    spread = joined.std(ddof=1) if len(joined) > 1 else 0.0
    return [(array - joined.mean()) / (spread + 1e-6) for array in advantages]
