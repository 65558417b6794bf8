"""How far the training model's log-probabilities are from those that the rollout engine sampled with."""

from __future__ import annotations

import math

from torch import Tensor

from searchr1.algorithms.kl import EXPONENT_LIMIT
from searchr1.algorithms.sums import Sums, on_host, peak, total

USUAL_WEIGHTS = (0.5, 2.0)
"""Importance weights that most corrections leave as they are; what lies outside counts as `clipped`."""


def mismatch_sums(train_logprobs_T: Tensor, rollout_logprobs_T: Tensor, policy_P: Tensor) -> Sums:
    """Return sums over the policy tokens of one micro-batch; d = train - rollout.

    Args:
        train_logprobs_T: [T] of the trained model with the weights that the rollout used.
        rollout_logprobs_T: [T] of the engine that sampled.
        policy_P: [P] their positions; other tokens are never read.
    """
    train_P = train_logprobs_T.detach()[policy_P].double()
    rollout_P = rollout_logprobs_T.detach()[policy_P].double()
    d_P = train_P - rollout_P
    bounded_P = d_P.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    weight_P = bounded_P.exp()
    clipped_P = (weight_P < USUAL_WEIGHTS[0]) | (weight_P > USUAL_WEIGHTS[1])
    probability_gap_P = (train_P.exp() - rollout_P.exp()).abs()
    totals = {
        "tokens": total(d_P.new_ones(d_P.shape)),
        "d": total(d_P),
        "abs_d": total(d_P.abs()),
        "k3": total(bounded_P.expm1() - bounded_P),
        "weight": total(weight_P),
        "weight_squared": total(weight_P.square()),
        "clipped": total(clipped_P),
        "probability_gap": total(probability_gap_P),
        "train": total(train_P),
        "rollout": total(rollout_P),
        "train_squared": total(train_P.square()),
        "rollout_squared": total(rollout_P.square()),
        "product": total(train_P * rollout_P),
    }
    return Sums(totals, {"abs_d": peak(d_P.abs()), "probability_gap": peak(probability_gap_P)})


def mismatch_metrics(sums: Sums) -> dict[str, float]:
    """Return metrics of a step from the sums of all micro-batches and ranks.

    `kl` and `kl_k3` estimate KL(rollout || train) per token; `logprob_gap`, `logprob_gap_max`,
    `probability_gap` and `probability_gap_max` are means and largest values of absolute differences;
    `perplexity_gap` is the training model's perplexity minus the engine's on the sampled tokens;
    `effective_sample_size` is (sum e^d)^2 / (n sum e^2d), 1 if both agree; `clipped` is the share of tokens whose weight e^d
    is outside `USUAL_WEIGHTS`; `correlation` is Pearson's, of the log-probabilities (1 if they have no spread).
    Without tokens: no mismatch.
    """
    totals, peaks = on_host(sums.totals), on_host(sums.peaks)
    tokens = totals["tokens"]
    if tokens == 0:
        totals |= {"weight": 1.0, "weight_squared": 1.0}
        tokens = 1.0
    train, rollout = totals["train"] / tokens, totals["rollout"] / tokens
    return {
        "kl": -totals["d"] / tokens,
        "kl_k3": totals["k3"] / tokens,
        "logprob_gap": totals["abs_d"] / tokens,
        "logprob_gap_max": peaks["abs_d"],
        "probability_gap": totals["probability_gap"] / tokens,
        "probability_gap_max": peaks["probability_gap"],
        "perplexity_gap": _perplexity(train) - _perplexity(rollout),
        "effective_sample_size": totals["weight"] ** 2 / (tokens * totals["weight_squared"]),
        "clipped": totals["clipped"] / tokens,
        "correlation": _correlation(totals, tokens),
    }


def _perplexity(mean_logprob: float) -> float:
    return math.exp(min(-mean_logprob, 700.0))


def _correlation(totals: dict[str, float], tokens: float) -> float:
    train, rollout = totals["train"] / tokens, totals["rollout"] / tokens
    train_variance = totals["train_squared"] / tokens - train**2
    rollout_variance = totals["rollout_squared"] / tokens - rollout**2
    if min(train_variance, rollout_variance) <= 1e-12:
        return 1.0
    covariance = totals["product"] / tokens - train * rollout
    return covariance / math.sqrt(train_variance * rollout_variance)


def ratio_too_large(mean_ratio: float, limit: float | None) -> bool:
    """Return whether `algorithm.early_stop_imp_ratio` says to drop a mini-batch's update.

    The mean importance ratio of the *whole* mini-batch is judged, so that the answer does not depend on how it was
    cut into micro-batches. A ratio that is not finite is always too large; a limit of None never stops.
    """
    return limit is not None and not mean_ratio <= limit
