"""Per-token estimators of KL(policy || reference) from the log-probabilities of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from searchr1.errors import UserError

EXPONENT_LIMIT = 20.0
"""Log-ratios are held within ±20 before they are exponentiated (e^20 = 4.9e8)."""
LOW_VAR_LIMIT = 10.0
"""low_var_kl of a token is held within ±10, so a single token cannot dominate a batch."""

KlFunction = Callable[[Tensor, Tensor], Tensor]
"""(logprobs, ref_logprobs), same shape -> KL estimates of that shape; differentiable in the first argument."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = logp - logp_ref: unbiased, high variance, may be negative. Its gradient is zero in expectation."""
    return logprobs - ref_logprobs


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|d|: no estimator of the KL, a plain pull towards the reference."""
    return (logprobs - ref_logprobs).abs()


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased, low variance; its gradient is that of the KL in expectation."""
    return 0.5 * (logprobs - ref_logprobs).square()


def low_var_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = e^-d - 1 + d: unbiased, low variance, never negative.

    Clamped as is usual in the field: d to ±20 before the exponential and the result to ±10. A clamped token has no
    gradient. k3 reaches 10 at d = -2.6 and at d = 11.
    """
    difference = (ref_logprobs - logprobs).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    # expm1 keeps the small values that matter when the policy is near the reference.
    return (difference.expm1() - difference).clamp(-LOW_VAR_LIMIT, LOW_VAR_LIMIT)


KL_FUNCTIONS: dict[str, KlFunction] = {
    "k1": k1,
    "kl": k1,
    "abs": absolute,
    "k2": k2,
    "mse": k2,
    "low_var_kl": low_var_kl,
    "k3": low_var_kl,
}


def kl_function(name: str) -> KlFunction:
    """Return the estimator that `algorithm.kl_penalty_type` names.

    Raises:
        UserError: unknown name.
    """
    if name not in KL_FUNCTIONS:
        raise UserError("algorithm.kl_penalty_type", f"unknown '{name}'; use one of {', '.join(sorted(KL_FUNCTIONS))}")
    return KL_FUNCTIONS[name]
