"""`searchr1 check-config` on the algorithm's keys: what makes no sense, and what has no effect."""

from __future__ import annotations

import pytest

from searchr1.config.choices import value_of
from searchr1.config.schema import AlgorithmConfig, Config
from searchr1.preflight.check_algorithm import algorithm_warnings, check_algorithm


def algorithm(**values: object) -> AlgorithmConfig:
    """With dotted keys below `algorithm` as `a__b`."""
    config = Config()
    for name, value in values.items():
        *path, last = name.split("__")
        setattr(value_of(config, ".".join(["algorithm", *path])), last, value)
    return config.algorithm


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"clip_ratio_c": 0.5}, "clip_ratio_c"),
        ({"clip_ratio_low": 1.5}, "clip_ratio_low"),
        ({"clip_ratio_high": -0.1}, "clip_ratio_high"),
        ({"ratio_clip_eps": -0.1}, "ratio_clip_eps"),
        ({"ratio_clip_eps": 1.5, "clip_ratio_high": 0.2}, "ratio_clip_eps"),
        ({"kl_beta": -1.0}, "kl_beta"),
        ({"llds_coef": -1.0}, "llds_coef"),
        ({"turn_reward_weight": -1.0}, "turn_reward_weight"),
        ({"max_refills": -1}, "max_refills"),
        ({"max_refills": 2, "group_size": 1}, "max_refills"),
        ({"sapo_tau_positive": 0.0}, "sapo_tau_positive, sapo_tau_negative"),
        ({"early_stop_imp_ratio": 1.0}, "early_stop_imp_ratio"),
        ({"gamma": 0.0}, "gamma"),
        ({"gae_lambda": 1.1}, "gae_lambda"),
        ({"adv_type": "grpo_dynamic", "loss_scales": ["turn_level"]}, "loss_scales"),
        ({"mismatch_correction__lower": 3.0}, "mismatch_correction.upper"),
        ({"mismatch_correction__veto": 1.0}, "mismatch_correction.veto"),
    ],
)
def test_what_makes_no_sense_is_reported_before_anything_starts(values, key):
    assert [problem.key for problem in check_algorithm(algorithm(**values), False)] == [f"algorithm.{key}"]


def test_the_critic_and_gae_belong_together():
    assert list(check_algorithm(algorithm(), False)) == list(check_algorithm(algorithm(adv_type="gae"), True)) == []
    for adv_type, critic in (("gae", False), ("grpo", True)):
        found = list(check_algorithm(algorithm(adv_type=adv_type), critic))
        assert [problem.key for problem in found] == ["critic.use_critic_model"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, []),
        ({"group_size": 1}, ["algorithm.group_size: 1"]),
        ({"group_size": 1, "adv_type": "reinforce++"}, []),
        ({"kl_penalty_type": "k1"}, ["algorithm.kl_penalty_type: k1"]),
        ({"kl_penalty_type": "k1", "kl_in": "reward", "adv_type": "rloo"}, []),
        ({"kl_in": "reward"}, ["algorithm.kl_in: reward with adv_type: grpo"]),
        ({"llds_coef": 0.1}, ["algorithm.llds_coef"]),
        ({"llds_coef": 0.1, "n_minibatches": 2}, []),
        ({"loss_type": "gspo"}, ["algorithm.clip_ratio_high: gspo"]),
        ({"loss_type": "gspo", "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, []),
        ({"recompute_logprobs": False, "mismatch_correction__level": "token"}, ["algorithm.mismatch_correction: without"]),
        (
            {
                "recompute_logprobs": False, "mismatch_correction__level": "token", "mismatch_correction__bound": "mask",
                "mismatch_correction__normalize": True,
            },
            ["algorithm.mismatch_correction.normalize"],
        ),
        ({"mismatch_correction__level": "token", "mismatch_correction__normalize": True}, []),
        (
            {"sampling_params__top_p": 0.95, "sampling_params__top_k": 50},
            ["algorithm.sampling_params: top_p: 0.95, top_k: 50 changes"],
        ),
        ({"sampling_params__top_k": 1_000_000}, []),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_reported(values, words):
    found = list(algorithm_warnings(algorithm(**values)))
    assert [line[: len(word)] for line, word in zip(found, words, strict=True)] == words
