"""What a policy loss is given and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    tau_positive: float = 1.0
    """SAPO: how fast a token's weight falls off the policy, for positive advantages."""
    tau_negative: float = 1.05
    """The same for negative advantages."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= 1.0:
            raise UserError("algorithm.clip_ratio_low", f"{self.low} is not between 0 and 1")
        if self.high < 0.0:
            raise UserError("algorithm.clip_ratio_high", f"{self.high} is negative")
        if self.dual is not None and self.dual <= 1.0:
            raise UserError("algorithm.clip_ratio_c", f"{self.dual} is not larger than 1; use null to turn it off")
        if self.tau_positive <= 0.0 or self.tau_negative <= 0.0:
            raise UserError("algorithm.sapo_tau_positive, sapo_tau_negative", "must be above 0")


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """P policy tokens of whole sequences."""

    logprobs_P: Tensor
    """Of the policy being trained; the only input with a gradient."""
    old_logprobs_P: Tensor
    """Of the policy that took the tokens."""
    advantages_P: Tensor
    segment_ids_P: Tensor
    """int, the sequence of each token; numbers start at 0."""
    sequences: int | None = None
    """How many sequences there are, if the caller knows: counting them makes the host wait for a GPU."""

    def log_ratio_P(self) -> Tensor:
        """logp - old logp, held within ±20, so that no ratio overflows."""
        return (self.logprobs_P - self.old_logprobs_P).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """What a policy loss says about P policy tokens."""

    loss_P: Tensor
    """Differentiable."""
    ratio_P: Tensor
    """Detached importance ratio that the loss went by: e^(logp - old logp) of the token, or of its sequence."""
    clipped_P: Tensor
    """bool: the ratio's clip decided the loss."""
    dual_clipped_P: Tensor
    """bool: the dual clip decided the loss."""


PolicyLoss = Callable[[PolicyInputs, ClipSettings], TokenLosses]
