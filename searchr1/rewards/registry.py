"""Reward functions by name or dotted path, and scoring a trajectory with one."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence

from searchr1.agent.trajectory import Trajectory
from searchr1.errors import UserError
from searchr1.rewards import answers

RewardFn = Callable[[str, Sequence[str], Trajectory], "float | dict[str, float]"]
"""(policy_text, golden_answers, trajectory) -> reward, or parts with a key "reward"."""


def exact_match_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> float:
    """Exact match of the last answer; a quarter of it if the policy spams answers."""
    found = answers.answer_of(policy_text)
    return answers.exact_match(found, golden_answers) * answers.spam_factor(policy_text)


def f1_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> float:
    """Token F1 of the last answer; a quarter of it if the policy spams answers."""
    return answers.f1(answers.answer_of(policy_text), golden_answers) * answers.spam_factor(policy_text)


def substring_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> float:
    """A gold answer stands in the last answer; a quarter of it if the policy spams answers."""
    found = answers.answer_of(policy_text)
    return answers.substring_match(found, golden_answers) * answers.spam_factor(policy_text)


REWARDS: dict[str, RewardFn] = {
    "searchr1": exact_match_reward,
    "exact_match": exact_match_reward,
    "f1_score": f1_reward,
    "substring_match": substring_reward,
}


@functools.cache
def reward_function(name: str) -> RewardFn:
    """The function behind a name of `REWARDS` or a dotted path (`package.module:function`).

    Raises:
        UserError: neither.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.replace(":", ".").rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"reward.reward_type: cannot import {name!r}: {error}") from error
        if callable(found):
            return found
    raise UserError(
        f"reward.reward_type: {name!r} is not known; use one of {', '.join(REWARDS)}, or package.module:function"
    )


def score_trajectory(trajectory: Trajectory, default: str, scale: float) -> tuple[float, dict[str, float]]:
    """The reward and its parts; exact match and F1 are always among them.

    The row's own reward goes before `default`. Only the policy's own text is looked at by the rewards here: neither
    the prompt, whose example answers would score, nor what was retrieved.

    Raises:
        UserError: unknown reward, or one that returns no finite number.
    """
    sample, text = trajectory.sample, trajectory.policy_text
    name = sample.reward_name or default
    result = reward_function(name)(text, sample.golden_answers, trajectory)
    parts = dict(result) if isinstance(result, dict) else {"reward": float(result)}
    if not math.isfinite(parts.get("reward", math.nan)):
        raise UserError(f"reward.reward_type: {name} returned {result!r}; expected a number or a dict with 'reward'")
    answer = answers.answer_of(text)
    parts["exact_match"] = answers.exact_match(answer, sample.golden_answers)
    parts["f1"] = answers.f1(answer, sample.golden_answers)
    return scale * parts["reward"], parts
