"""Policy-gradient losses per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from searchr1.algorithms.kl import EXPONENT_LIMIT
from searchr1.errors import UserError


@dataclass(frozen=True, slots=True)
class ClipSettings:
    """Limits of the importance ratio.

    Raises:
        UserError: a limit that makes no sense.
    """

    low: float
    """The ratio's lower limit is 1 - low."""
    high: float
    """The ratio's upper limit is 1 + high."""
    dual: float | None = None
    """Dual clip c > 1: a token with a negative advantage loses at most c times it. None turns it off."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= 1.0:
            raise UserError(f"algorithm.clip_ratio_low: {self.low} is not between 0 and 1")
        if self.high < 0.0:
            raise UserError(f"algorithm.clip_ratio_high: {self.high} is negative")
        if self.dual is not None and self.dual <= 1.0:
            raise UserError(f"algorithm.clip_ratio_c: {self.dual} is not larger than 1; use null to turn it off")

    @classmethod
    def from_config(cls, eps: float, low: float | None, high: float | None, dual: float | None) -> ClipSettings:
        """From `algorithm.ratio_clip_eps`, `clip_ratio_low`, `clip_ratio_high` (null takes eps), `clip_ratio_c`."""
        return cls(low=eps if low is None else low, high=eps if high is None else high, dual=dual)


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """What a policy loss says about P policy tokens."""

    loss_P: Tensor
    """Differentiable."""
    ratio_P: Tensor
    """Detached importance ratio e^(logp - old logp)."""
    clipped_P: Tensor
    """bool: the ratio's clip decided the loss."""
    dual_clipped_P: Tensor
    """bool: the dual clip decided the loss."""


PolicyLoss = Callable[[Tensor, Tensor, Tensor, ClipSettings], TokenLosses]
"""(logprobs_P, old_logprobs_P, advantages_P, clip) -> losses."""


def ppo_clip(logprobs_P: Tensor, old_logprobs_P: Tensor, advantages_P: Tensor, clip: ClipSettings) -> TokenLosses:
    """PPO's clipped surrogate, with separate lower and upper limits and the dual clip.

    loss = max(-A r, -A clamp(r, 1 - low, 1 + high)), and for A < 0 at most -A c.
    The log-ratio is held within ±20, so that no ratio overflows.

    Args:
        logprobs_P: [P] of the policy being trained; the only input with a gradient.
        old_logprobs_P: [P] of the policy that took the tokens.
        advantages_P: [P].
        clip: limits.
    """
    ratio_P = (logprobs_P - old_logprobs_P).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
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


POLICY_LOSSES: dict[str, PolicyLoss] = {"actor": ppo_clip}


def policy_loss(name: str) -> PolicyLoss:
    """The loss that `algorithm.loss_type` names.

    Raises:
        UserError: unknown name.
    """
    if name not in POLICY_LOSSES:
        raise UserError(f"algorithm.loss_type: unknown '{name}'; use one of {', '.join(sorted(POLICY_LOSSES))}")
    return POLICY_LOSSES[name]
