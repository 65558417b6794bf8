"""What is wrong with the `reward` section across its keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

from searchr1.config.load import Problem
from searchr1.config.schema_reward import RewardConfig
from searchr1.errors import UserError


def check_reward(reward: RewardConfig, response_limit: int) -> Iterator[Problem]:
    """Every problem. `response_limit` is how many tokens a response may have at most."""
    if reward.use_reward_model:
        yield Problem("reward.use_reward_model", "reward models are not supported; use reward.reward_type")
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
            yield Problem(key, str(error).removeprefix(f"{key}: "))
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
        if length.tokens not in ("response", "policy"):
            yield Problem("reward.length_penalty.tokens", f"{length.tokens!r} is not one of response, policy")
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
