"""Rewards: functions of what the policy wrote, never of what it read."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.rewards.answers import answer_of, exact_match, f1_score, substring_match
    from searchr1.rewards.scorer import Scorer
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "answers": ["answer_of", "exact_match", "f1_score", "substring_match"],
            "scorer": ["Scorer"],
        },
    )

__all__ = [
    "Scorer",
    "answer_of",
    "exact_match",
    "f1_score",
    "substring_match",
]
