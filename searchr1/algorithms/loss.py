"""The training loss of one packed micro-batch: policy gradient, KL to the reference, entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from searchr1.algorithms.aggregation import Denominators, token_weights
from searchr1.algorithms.correction import Correction, CorrectionSettings, correction_weights
from searchr1.algorithms.kl import EXPONENT_LIMIT, kl_function
from searchr1.algorithms.llds import action_ids, llds
from searchr1.algorithms.names import LldsGate, LossAggregation
from searchr1.algorithms.policy_losses import ClipSettings, PolicyInputs, policy_loss
from searchr1.algorithms.sums import Sums, on_host, peak, total


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The `algorithm` keys that shape the loss."""

    clip: ClipSettings
    loss_type: str = "actor"
    aggregation: LossAggregation = "token-mean"
    kl_beta: float = 0.0
    kl_penalty_type: str = "low_var_kl"
    entropy_bonus: float = 0.0
    llds_coef: float = 0.0
    llds_gate: LldsGate = "action"
    correction: CorrectionSettings | None = None
    """Weights against the mismatch of engine and trainer (correction.py)."""
    ratio_is_correction: bool = False
    """The old log-probabilities are the engine's: the ratio is the importance weight already, and of the correction only
    what it drops (mask, veto) applies."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """T packed tokens. Values where `loss_mask_T` is False are never read."""

    logprobs_T: Tensor
    """Of the policy being trained, with its graph."""
    old_logprobs_T: Tensor
    """Of the policy that the ratio is taken against; no gradient flows into it."""
    advantages_T: Tensor
    loss_mask_T: Tensor
    """bool, True where the policy sampled the token."""
    segment_ids_T: Tensor
    """int, which sequence a token belongs to; a sequence must lie whole within one micro-batch."""
    denominators: Denominators
    """Counts over the whole mini-batch: all ranks, all micro-batches."""
    rollout_logprobs_T: Tensor | None = None
    """Of the engine that sampled. Needed with a `correction`."""
    weight_scale: float = 1.0
    """Multiplies the correction's weights: 1 / their mean over the mini-batch, if they are to be normalised."""
    policy_positions_P: Tensor | None = None
    """Where `loss_mask_T` is True, if the caller knows: looking for them makes the host wait for a GPU."""
    sequences: int | None = None
    """How many sequences there are, likewise."""
    ref_logprobs_T: Tensor | None = None
    """Needed when `kl_beta` is not 0; measured whenever given."""
    entropy_T: Tensor | None = None
    """Needed (with its graph) when `entropy_bonus` is not 0; measured whenever given."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What one micro-batch adds to the mini-batch."""

    loss: Tensor
    """Scalar with graph. Sum it (never average it) over micro-batches and ranks."""
    sums: Sums
    """Add over micro-batches and ranks, then `loss_metrics`."""


def policy_gradient_loss(inputs: LossInputs, config: LossConfig) -> LossOutput:
    """Return the micro-batch's share of the mini-batch's loss.

    loss = aggregate(policy loss) + kl_beta * aggregate(KL) - entropy_bonus * aggregate(entropy), and llds_coef *
    aggregate(LLDS), in fp32 at least. A micro-batch without policy tokens gives 0, connected to the graph so that all
    ranks can run backward together.

    Raises:
        ValueError: `kl_beta` without reference log-probabilities, or `entropy_bonus` without entropy.
    """
    if config.kl_beta != 0.0 and inputs.ref_logprobs_T is None:
        raise ValueError("kl_beta is not 0 but there are no reference log-probabilities")
    if config.entropy_bonus != 0.0 and inputs.entropy_T is None:
        raise ValueError("entropy_bonus is not 0 but there is no entropy")
    # Only policy tokens are ever touched: whatever stands at the others (also NaN) can neither change the loss nor
    # receive a gradient.
    policy_P = inputs.policy_positions_P
    if policy_P is None:
        policy_P = inputs.loss_mask_T.nonzero().squeeze(-1)
    logprobs_P = inputs.logprobs_T[policy_P]
    # Sums of thousands of tokens end at 256 in bf16.
    logprobs_P = logprobs_P.to(torch.promote_types(logprobs_P.dtype, torch.float32))
    old_logprobs_P = inputs.old_logprobs_T[policy_P].detach().to(logprobs_P.dtype)
    advantages_P = inputs.advantages_T[policy_P].to(logprobs_P.dtype)
    segment_ids_P = inputs.segment_ids_T[policy_P]
    weights_P = token_weights(config.aggregation, segment_ids_P, inputs.denominators, inputs.sequences)
    weights_P = weights_P.to(logprobs_P.dtype)

    policy_inputs = PolicyInputs(logprobs_P, old_logprobs_P, advantages_P, segment_ids_P, inputs.sequences)
    token = policy_loss(config.loss_type)(policy_inputs, config.clip)
    correction = _correction(inputs, config, policy_P, policy_inputs)
    token_loss_P = token.loss_P if correction is None else token.loss_P * correction.weights_P
    policy_term = (token_loss_P * weights_P).sum()
    loss = policy_term
    log_ratio_P = (logprobs_P.detach() - old_logprobs_P).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
    totals = {
        "tokens": total(torch.ones_like(log_ratio_P)),
        "policy_loss": total(policy_term),
        "ratio": total(token.ratio_P),
        "clipped": total(token.clipped_P),
        "dual_clipped": total(token.dual_clipped_P),
        "approx_kl": total(-log_ratio_P),
        "approx_kl_k3": total(log_ratio_P.expm1() - log_ratio_P),
    }
    if correction is not None:
        totals |= {
            "correction_weight": total(correction.weights_P),
            "correction_bounded": total(correction.bounded_P),
            "correction_vetoed": total(correction.vetoed_P),
        }
    if config.llds_coef != 0.0:
        actions_P = action_ids(config.llds_gate, inputs.segment_ids_T, inputs.loss_mask_T, policy_P)
        llds_P = llds(logprobs_P, old_logprobs_P, advantages_P, actions_P, len(inputs.loss_mask_T))
        loss = loss + config.llds_coef * (llds_P * weights_P).sum()
        totals["llds"] = total(llds_P)
    if inputs.ref_logprobs_T is not None:
        ref_logprobs_P = inputs.ref_logprobs_T[policy_P].detach().to(logprobs_P.dtype)
        kl_P = kl_function(config.kl_penalty_type)(logprobs_P, ref_logprobs_P)
        kl_term = (kl_P * weights_P).sum()
        if config.kl_beta != 0.0:
            loss = loss + config.kl_beta * kl_term
        totals["kl"] = total(kl_P)
        totals["kl_loss"] = total(kl_term)
    if inputs.entropy_T is not None:
        entropy_P = inputs.entropy_T[policy_P]
        entropy_term = (entropy_P.to(logprobs_P.dtype) * weights_P).sum()
        if config.entropy_bonus != 0.0:
            loss = loss - config.entropy_bonus * entropy_term
        totals["entropy"] = total(entropy_P)
    totals["loss"] = total(loss)
    return LossOutput(loss, Sums(totals, {"ratio": peak(token.ratio_P)}))


def _correction(inputs: LossInputs, config: LossConfig, policy_P: Tensor, policy: PolicyInputs) -> Correction | None:
    if config.correction is None:
        return None
    if inputs.rollout_logprobs_T is None:
        raise ValueError("a mismatch correction needs the engine's log-probabilities")
    rollout_P = inputs.rollout_logprobs_T[policy_P].detach().to(policy.logprobs_P.dtype)
    # With the engine's as old ones, the trained model's own are those that sampled, as near as anybody knows.
    train_P = policy.logprobs_P.detach() if config.ratio_is_correction else policy.old_logprobs_P
    found = correction_weights(train_P - rollout_P, policy.segment_ids_P, config.correction, inputs.sequences)
    if config.ratio_is_correction:
        kept_P = (found.weights_P > 0).to(found.weights_P.dtype)
        return replace(found, weights_P=kept_P)
    return replace(found, weights_P=found.weights_P * inputs.weight_scale)


def loss_metrics(sums: Sums) -> dict[str, float]:
    """Return metrics of a mini-batch from the sums of all its micro-batches and ranks.

    `loss`, `policy_loss` and `kl_loss` are as aggregated; `kl`, `entropy`, `ratio`, `approx_kl`, `approx_kl_k3`,
    `clip_fraction`, `dual_clip_fraction` and `correction_…` are means over policy tokens; `ratio_max` is the largest ratio.
    `approx_kl` is against the old policy and has either sign, its k3 form has not.
    """
    totals = on_host(sums.totals)
    tokens = max(1.0, totals["tokens"])
    metrics: dict[str, float] = {name: totals[name] for name in ("loss", "policy_loss", "kl_loss") if name in totals}
    per_token = {"clipped": "clip_fraction", "dual_clipped": "dual_clip_fraction"}
    per_token |= {name: name for name in ("llds", "correction_weight", "correction_bounded", "correction_vetoed")}
    for name in ("ratio", "approx_kl", "approx_kl_k3", "clipped", "dual_clipped", "kl", "entropy", *per_token):
        if name in totals:
            metrics[per_token.get(name, name)] = totals[name] / tokens
    metrics["ratio_max"] = float(sums.peaks["ratio"])
    metrics["policy_tokens"] = totals["tokens"]
    return metrics
