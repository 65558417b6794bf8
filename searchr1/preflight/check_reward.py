"""Check the sections `reward`, `evaluation` and `runner.health` across their keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

from searchr1.config.choices import choice_problems, choices_of
from searchr1.config.load import Problem
from searchr1.config.schema import Config
from searchr1.config.schema_reward import HealthConfig, RewardConfig
from searchr1.errors import UserError


def check_evaluation(config: Config) -> Iterator[Problem]:
    """Yield every problem."""
    methods = config.evaluation.methods
    key = "evaluation.methods"
    if not methods:
        yield Problem(key, f"is empty; name any of {', '.join(map(str, choices_of(key)))}")
    yield from (Problem(*problem) for problem in choice_problems(config.evaluation, "evaluation."))
    for name in dict.fromkeys(methods):
        if methods.count(name) > 1:
            yield Problem(key, f"{name} stands there twice")
    if "rag" in methods and config.tools.search.dummy_mode:
        yield Problem("tools.search.dummy_mode", "must be False: evaluation.methods has rag, which needs a retrieval server")
    if config.agentloop.generate_fn and set(methods) - {"search"}:
        yield Problem("agentloop.generate_fn", "is a loop of your own, which evaluation.methods: [search] alone can use")
    if config.evaluation.judge and not config.reward.judge.base_url:
        yield Problem("reward.judge.base_url", "is empty, and evaluation.judge is True; give the judge's address")
    if config.runner.resume_dir not in (None, "auto"):
        yield Problem("runner.resume_dir", "an evaluation goes on by itself in its own folder; leave it out, or give auto")


def check_health(health: HealthConfig) -> Iterator[Problem]:
    """Yield limits that no run could keep, or none could break."""
    for name in ("window", "min_history", "patience"):
        if getattr(health, name) < 1:
            yield Problem(f"runner.health.{name}", f"must be 1 or more, found {getattr(health, name)}")
    if health.window < health.min_history:
        yield Problem("runner.health.window", f"{health.window} is less than min_history = {health.min_history}")
    for name in ("truncated", "invalid", "skipped", "uniform_groups"):
        limit = getattr(health, f"{name}_max")
        if limit is not None and not 0 <= limit < 1:
            yield Problem(f"runner.health.{name}_max", f"must be 0 or more and less than 1, found {limit:g}; null is off")
    for name in ("length_ratio_max", "grad_norm_ratio_max"):
        limit = getattr(health, name)
        if limit is not None and limit <= 1:
            yield Problem(f"runner.health.{name}", f"must be more than 1, which is what is usual; found {limit:g}")
    for name in ("length_ratio_min", "reward_ratio_min", "effective_sample_size_min"):
        limit = getattr(health, name)
        if limit is not None and not 0 < limit < 1:
            yield Problem(f"runner.health.{name}", f"must be between 0 and 1, found {limit:g}; null is off")
    low, high = health.entropy_min, health.entropy_max
    if low is not None and high is not None and not 0 <= low < high:
        yield Problem("runner.health.entropy_max", f"must be more than entropy_min = {low:g}, and that 0 or more")
    if health.mismatch_kl_max is not None and health.mismatch_kl_max <= 0:
        yield Problem("runner.health.mismatch_kl_max", f"must be more than 0, found {health.mismatch_kl_max:g}")


def check_reward(reward: RewardConfig, response_limit: int) -> Iterator[Problem]:
    """Yield every problem. `response_limit` is how many tokens a response may have at most."""
    yield from (Problem(*problem) for problem in choice_problems(reward, "reward."))
    if reward.concurrency < 1:
        yield Problem("reward.concurrency", f"must be 1 or more, found {reward.concurrency}")
    if not math.isfinite(reward.reward_scale):
        yield Problem("reward.reward_scale", f"must be a finite number, found {reward.reward_scale}")
    yield from _names(reward)
    yield from _judge(reward)
    yield from _penalties(reward, response_limit)


def _names(reward: RewardConfig) -> Iterator[Problem]:
    from searchr1.rewards.registry import require_known

    names = dict.fromkeys(reward.weights, "reward.weights") or {reward.reward_type: "reward.reward_type"}
    for name, key in names.items():
        try:
            require_known(name, key)
        except UserError as error:
            yield Problem.of(error, key)
    for name, weight in reward.weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            yield Problem("reward.weights", f"{name}: expects a finite number, found {weight!r}")


def _judge(reward: RewardConfig) -> Iterator[Problem]:
    judge = reward.judge
    for name in ("timeout_s", "concurrency"):
        if not getattr(judge, name) > 0:
            yield Problem(f"reward.judge.{name}", f"must be more than 0, found {getattr(judge, name)}")
    for name in {"model", "messages", "stream", "n"} & judge.request.keys():
        yield Problem("reward.judge.request", f"{name} is not for you to set here")
    used = "judge" in reward.weights if reward.weights else reward.reward_type == "judge"
    if used or judge.base_url:  # rows of the data may ask for the judge by themselves
        from searchr1.rewards.judge import judge_problems

        for key, message in judge_problems(judge):
            yield Problem(key, message)


def _penalties(reward: RewardConfig, response_limit: int) -> Iterator[Problem]:
    length, search = reward.length_penalty, reward.search_penalty
    if length is not None:
        if not 0 < length.max_length <= response_limit:
            yield Problem(
                "reward.length_penalty.max_length",
                f"must be between 1 and the response's limit, which is {response_limit}; found {length.max_length}",
            )
        if not 0 < length.overlong_buffer <= length.max_length:
            yield Problem("reward.length_penalty.overlong_buffer", "must be between 1 and max_length")
        if length.penalty_factor < 0:
            yield Problem("reward.length_penalty.penalty_factor", "must be 0 or more; it is taken off")
    if search is not None:
        if search.free_searches < 0:
            yield Problem("reward.search_penalty.free_searches", "must be 0 or more")
        if search.per_search < 0:
            yield Problem("reward.search_penalty.per_search", "must be 0 or more; it is taken off")
