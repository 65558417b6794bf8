"""One scored rollout of one question, as numbers. Scores are taken anew from the rollout's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from searchr1.evaluation.published import canonical
from searchr1.rewards import answers

JUDGE = "judge"
JUDGE_PART = f"term/{JUDGE}"
"""Where a weighted reward keeps the judge's verdict."""


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """What the tables are made of."""

    question: int
    """Equal for all rollouts of one question."""
    rollout_id: int
    source: str
    """Name of the question set."""
    exact_match: float
    f1: float
    substring_match: float
    judge: float | None
    """None where no judge was asked."""
    reward: float
    searches: int
    turns: int
    response_length: int
    """Tokens, retrieved ones included."""
    policy_tokens: int
    invalid: int
    """Turns that neither called a tool nor answered."""
    tool_calls: int
    tool_failures: int
    answer: str | None
    """What was scored."""
    untagged: bool
    """No turn has a tag of an action."""
    untagged_turns: int
    by_text: bool
    """The answer is the text of the last turn (`evaluation.untagged: text`)."""
    answered: bool
    truncated: bool
    """It ran out of tokens."""
    failed: bool
    """An error ended it."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any], question: int, untagged: str = "reject") -> Self:
        """Score a row of a trajectory log; `untagged` is `evaluation.untagged`.

        Raises:
            KeyError, TypeError, AttributeError: it is none.
        """
        turns = row["turns"]
        texts = [turn["policy_text"] for turn in turns]
        scored = answers.scored_text(texts, untagged)
        answer = answers.answer_of(scored)
        without = sum(not answers.has_tag(text) for text in texts)
        golds = row["golden_answers"]
        parts = row["reward_parts"]
        verdict = parts.get(JUDGE_PART)
        return cls(
            question=question,
            rollout_id=int(row["replica"]),
            source=canonical(row["data_source"]),
            exact_match=answers.exact_match(answer, golds),
            f1=answers.f1_score(answer, golds),
            substring_match=answers.substring_match(answer, golds),
            judge=None if verdict is None else float(verdict),
            reward=float(row["reward"] or 0.0),
            searches=int(row["searches"]),
            turns=len(turns),
            response_length=int(row["response_length"]),
            policy_tokens=int(row["policy_tokens"]),
            invalid=sum(turn["action"] == "invalid" for turn in turns),
            tool_calls=sum(bool(turn["queries"]) for turn in turns),
            tool_failures=sum(turn["tool_error"] is not None for turn in turns),
            answer=answer,
            untagged=without == len(texts),
            untagged_turns=without,
            by_text=scored != "".join(texts),
            answered=row["stop"] == "answer",
            truncated=row["stop"] == "length",
            failed=row["stop"] == "error",
        )
