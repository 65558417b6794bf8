"""Reward functions by name or dotted path, and scoring a trajectory with one."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from searchr1.agent.trajectory import Trajectory
from searchr1.errors import UserError
from searchr1.rewards import answers

RewardFn = Callable[[str, Sequence[str], Trajectory], "float | dict[str, float]"]
"""(policy_text, golden_answers, trajectory) -> reward, or parts with a key "reward"."""

REWARDS: dict[str, RewardFn] = {}
"""By the names that `reward.reward_type` and a row's own reward may use."""


def register(*names: str) -> Callable[[RewardFn], RewardFn]:
    """Make a reward function known by `names`.

    Raises:
        ValueError: a name is taken.
    """

    def add(function: RewardFn) -> RewardFn:
        for name in names:
            if name in REWARDS:
                raise ValueError(f"reward {name!r} is registered already")
            REWARDS[name] = function
        return function

    return add


@register("searchr1", "exact_match")
def exact_match_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> float:
    """Exact match of the last answer; a quarter of it if the policy spams answers."""
    found = answers.answer_of(policy_text)
    return answers.exact_match(found, golden_answers) * answers.spam_factor(policy_text)


@register("f1_score")
def f1_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> float:
    """Token F1 of the last answer; a quarter of it if the policy spams answers."""
    return answers.f1(answers.answer_of(policy_text), golden_answers) * answers.spam_factor(policy_text)


@register("substring_match")
def substring_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> float:
    """A gold answer stands in the last answer; a quarter of it if the policy spams answers."""
    found = answers.answer_of(policy_text)
    return answers.substring_match(found, golden_answers) * answers.spam_factor(policy_text)


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
        except (ImportError, AttributeError, ValueError, TypeError) as error:
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
    parts = _parts(name, reward_function(name)(text, sample.golden_answers, trajectory))
    answer = answers.answer_of(text)
    parts["exact_match"] = answers.exact_match(answer, sample.golden_answers)
    parts["f1"] = answers.f1(answer, sample.golden_answers)
    return scale * parts["reward"], parts


def _parts(name: str, result: Any) -> dict[str, float]:
    """What a reward function returned, as finite numbers with a key "reward"."""
    parts = result if isinstance(result, dict) else {"reward": result}
    try:
        numbers = {str(key): float(value) for key, value in parts.items()}
    except (TypeError, ValueError):
        numbers = {}
    if "reward" not in numbers or not all(map(math.isfinite, numbers.values())):
        raise UserError(
            f"reward.reward_type: {name} returned {result!r}; expected a finite number, or a dict of them with 'reward'"
        )
    return numbers
