"""Rewards that compare the last answer with the gold answers."""

from __future__ import annotations

from collections.abc import Sequence

from searchr1.agent.trajectory import Trajectory
from searchr1.rewards import answers


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
