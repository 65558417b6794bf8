"""What is wrong with the `algorithm` section across its keys, and what in it has no effect."""

from __future__ import annotations

from collections.abc import Iterator

from searchr1.config.load import Problem
from searchr1.config.schema import AlgorithmConfig, MismatchCorrectionConfig
from searchr1.errors import UserError
from searchr1.importing import is_dotted_path

NO_FILTER_TOP_K = 100_000
"""A `top_k` from here on keeps every token that has any probability to speak of."""


def check_algorithm(algorithm: AlgorithmConfig, with_critic: bool) -> Iterator[Problem]:
    """Yield every problem. `with_critic` is `critic.use_critic_model`."""
    for name in ("kl_beta", "llds_coef", "turn_reward_weight", "max_refills"):
        if getattr(algorithm, name) < 0:
            yield Problem(f"algorithm.{name}", f"must be 0 or more, found {getattr(algorithm, name)}")
    if algorithm.early_stop_imp_ratio is not None and algorithm.early_stop_imp_ratio <= 1:
        yield Problem("algorithm.early_stop_imp_ratio", "must be more than 1, which is what the ratio is without any change")
    if algorithm.max_refills > 0 and algorithm.group_size == 1:
        yield Problem("algorithm.max_refills", "needs a group_size of 2 or more: one rollout alone has no reward variance")
    if not 0 < algorithm.gamma <= 1:
        yield Problem("algorithm.gamma", f"must be more than 0 and at most 1, found {algorithm.gamma:g}")
    if not 0 <= algorithm.gae_lambda <= 1:
        yield Problem("algorithm.gae_lambda", f"must be between 0 and 1, found {algorithm.gae_lambda:g}")
    try:
        from searchr1.algorithms.advantages.grpo_dynamic import check_loss_scales
        from searchr1.learner.loss_settings import clip_settings

        clip_settings(algorithm)
        if algorithm.adv_type == "grpo_dynamic":
            check_loss_scales(algorithm.loss_scales)
    except UserError as error:
        # Where both limits are one key, that is the key to name.
        limits = {
            "algorithm.clip_ratio_low": algorithm.clip_ratio_low,
            "algorithm.clip_ratio_high": algorithm.clip_ratio_high,
        }
        shared = error.key in limits and limits[error.key] is None
        yield Problem("algorithm.ratio_clip_eps" if shared else error.key, error.message)
    yield from _correction(algorithm.mismatch_correction)
    if with_critic != (algorithm.adv_type == "gae"):
        yield Problem("critic.use_critic_model", "must be True for algorithm.adv_type: gae, and False for any other")
    if algorithm.adv_type == "gae" and algorithm.advantage_mode == "turn":
        yield Problem("algorithm.advantage_mode", "gae gives every token an advantage of its own; use trajectory")


def _correction(correction: MismatchCorrectionConfig) -> Iterator[Problem]:
    if not 0 <= correction.lower < correction.upper:
        yield Problem("algorithm.mismatch_correction.upper", "must be more than lower, and lower 0 or more")
    if not 0 <= correction.veto < 1:
        yield Problem(
            "algorithm.mismatch_correction.veto", f"must be 0 (off) or more and below 1, found {correction.veto:g}"
        )


def algorithm_warnings(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Yield warnings: what will run, but perhaps not as meant."""
    correction, sampling = algorithm.mismatch_correction, algorithm.sampling_params
    adv_type = algorithm.adv_type
    if algorithm.group_size == 1 and adv_type not in ("reinforce++", "gae") and not is_dotted_path(adv_type):
        yield "algorithm.group_size: 1 gives every advantage 0 (but reinforce++'s); that is right for evaluation only"
    if algorithm.kl_beta > 0 and algorithm.kl_in == "loss" and algorithm.kl_penalty_type in ("kl", "k1"):
        yield (
            f"algorithm.kl_penalty_type: {algorithm.kl_penalty_type} in the loss has a gradient of 0 on average; use "
            "low_var_kl or k2, or algorithm.kl_in: reward"
        )
    if algorithm.kl_beta > 0 and algorithm.kl_in == "reward" and adv_type in ("grpo", "grpo_dynamic"):
        yield (
            f"algorithm.kl_in: reward with adv_type: {adv_type}, which divides by the group's standard deviation: rollouts "
            "that earned the same differ by their KL alone, at full strength; rloo, dr_grpo and reinforce++ do not do that"
        )
    on_policy = algorithm.recompute_logprobs and algorithm.n_minibatches == 1
    if algorithm.llds_coef > 0 and on_policy:
        yield "algorithm.llds_coef: is 0 at a step's first update; it needs n_minibatches of 2 or more"
    if algorithm.loss_type == "gspo" and _narrowest_clip(algorithm) >= 0.1:
        yield "algorithm.clip_ratio_high: gspo's ratio is a mean over a sequence and hardly ever 10% off; the paper has 4e-4"
    if correction.level is not None and not algorithm.recompute_logprobs:
        drops = correction.bound in ("mask", "reject") or correction.veto > 0
        if not drops:
            yield (
                "algorithm.mismatch_correction: without effect, because with recompute_logprobs: False the ratio is the "
                "weight; use bound: mask or reject, or veto"
            )
        if correction.normalize:
            yield "algorithm.mismatch_correction.normalize: without effect with recompute_logprobs: False"
    filtered = [f"top_p: {sampling.top_p:g}"] if sampling.top_p < 1 else []
    filtered += [f"top_k: {sampling.top_k}"] if 0 < sampling.top_k < NO_FILTER_TOP_K else []
    if sampling.repetition_penalty != 1:
        filtered.append(f"repetition_penalty: {sampling.repetition_penalty:g}")
    if filtered and sampling.do_sample:
        yield (
            f"algorithm.sampling_params: {', '.join(filtered)} changes the engine's log-probabilities and not the actor's; "
            "mismatch/… measures by how much"
        )


def _narrowest_clip(algorithm: AlgorithmConfig) -> float:
    from searchr1.learner.loss_settings import clip_settings

    clip = clip_settings(algorithm)
    return min(clip.low, clip.high)
