"""What the `algorithm` section says about the policy's loss, as the algorithms take it."""

from __future__ import annotations

from searchr1.algorithms.correction import CorrectionSettings
from searchr1.algorithms.loss import LossConfig
from searchr1.algorithms.policy_losses import ClipSettings
from searchr1.config.schema import AlgorithmConfig, MismatchCorrectionConfig


def loss_config(algorithm: AlgorithmConfig) -> LossConfig:
    """Return the loss that the `algorithm` section asks for."""
    return LossConfig(
        clip=clip_settings(algorithm),
        loss_type=algorithm.loss_type,
        aggregation=algorithm.loss_agg_func,
        kl_beta=algorithm.kl_beta if algorithm.kl_in == "loss" else 0.0,
        kl_penalty_type=algorithm.kl_penalty_type,
        entropy_bonus=algorithm.entropy_bonus,
        llds_coef=algorithm.llds_coef,
        llds_gate=algorithm.llds_gate,
        correction=correction_settings(algorithm.mismatch_correction),
        ratio_is_correction=not algorithm.recompute_logprobs,
    )


def correction_settings(config: MismatchCorrectionConfig) -> CorrectionSettings | None:
    """Return what `algorithm.mismatch_correction` asks for; None if it is off."""
    if config.level is None:
        return None
    return CorrectionSettings(config.level, config.bound, config.lower, config.upper, config.veto)


def clip_settings(algorithm: AlgorithmConfig) -> ClipSettings:
    """Return the limits of the ratio.

    Raises:
        UserError: one that makes no sense.
    """
    low = algorithm.ratio_clip_eps if algorithm.clip_ratio_low is None else algorithm.clip_ratio_low
    high = algorithm.ratio_clip_eps if algorithm.clip_ratio_high is None else algorithm.clip_ratio_high
    return ClipSettings(low, high, algorithm.clip_ratio_c, algorithm.sapo_tau_positive, algorithm.sapo_tau_negative)
