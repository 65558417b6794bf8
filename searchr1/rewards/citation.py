"""The citation reward: how much of the answer stands in what was retrieved."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from searchr1.agent.trajectory import Trajectory
from searchr1.rewards import answers
from searchr1.rewards.evidence import any_stands_in, evidence_of, stands_in


def citation_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> dict[str, float]:
    """Longest run of the last answer's words that stands in one retrieved text, over all of its words.

    1 means that the answer stands there as it is, 0 that none of it does (or that nothing was retrieved or answered). An
    answer such as "yes" can hardly be cited, and a wrong one can: this is a part for a weighted sum, no reward alone.
    Parts: `cited` (the same), `gold_retrieved` (a gold answer stands there: was it found, whatever was made of it?).
    """
    evidence = evidence_of(trajectory)
    cited = support(answers.answer_of(policy_text), evidence)
    retrieved = any_stands_in(golden_answers, evidence)
    return {"reward": cited, "cited": cited, "gold_retrieved": float(retrieved)}


def support(answer: str | None, evidence: Sequence[str]) -> float:
    """The share of an answer's words, in [0, 1], that normalised texts support with one run of words."""
    words = answers.normalise(answer or "").split()
    if not words:
        return 0.0
    if stands_in(" ".join(words), evidence):
        return 1.0
    return max((_longest_run(words, text.split()) for text in evidence), default=0) / len(words)


def _longest_run(words: list[str], text: list[str]) -> int:
    return SequenceMatcher(None, words, text, autojunk=False).find_longest_match().size
