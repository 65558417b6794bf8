"""Rewards that compare the last answer with the gold answers or with what was retrieved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from searchr1.agent.protocol import NO_RESULTS
from searchr1.agent.trajectory import Trajectory
from searchr1.rewards import answers
from searchr1.rewards.answers import normalise


def exact_match_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> float:
    """Score exact match of the last answer; a quarter of it if the policy spams answers."""
    found = answers.answer_of(policy_text)
    return answers.exact_match(found, golden_answers) * answers.spam_factor(policy_text)


def f1_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> float:
    """Score token F1 of the last answer; a quarter of it if the policy spams answers."""
    return answers.f1_score(answers.answer_of(policy_text), golden_answers) * answers.spam_factor(policy_text)


def substring_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> float:
    """Score whether a gold answer stands in the last answer; a quarter of it if the policy spams answers."""
    found = answers.answer_of(policy_text)
    return answers.substring_match(found, golden_answers) * answers.spam_factor(policy_text)


# Our frame and labels are no evidence: an answer "2" must not be found in "Doc 2".
_LABEL = re.compile(r"^Doc \d+\(Title: |^\[Doc \d+\]\([^)\n]*\):|^>>>> Page \d+ >>>>$", re.MULTILINE)
_FRAME = re.compile(r"\A\s*<information>|</information>\s*(?:<think>\s*)?\Z")
# Letters that make words with blanks between them. Others (東京) may be followed by anything.
_SPACED = "0-9a-z\u00c0-\u024f\u0370-\u052f"


def evidence_of(trajectory: Trajectory) -> list[str]:
    """Return the normalised text of every answered tool call, without the environment's own words."""
    texts = []
    for turn in trajectory.turns:
        if not turn.queries or turn.tool_error is not None:
            continue
        body = _FRAME.sub("", turn.tool_text).strip()
        if body and body != NO_RESULTS:
            texts.append(normalise(_LABEL.sub("", body)))
    return texts


def stands_in(answer: str, evidence: Iterable[str]) -> bool:
    """Return whether the normalised answer stands in a text of `evidence`, as whole words."""
    wanted = normalise(answer)
    if not wanted:
        return False
    before = f"(?<![{_SPACED}])" if re.match(f"[{_SPACED}]", wanted) else ""
    after = f"(?![{_SPACED}])" if re.match(f"[{_SPACED}]", wanted[-1]) else ""
    pattern = re.compile(before + re.escape(wanted) + after)
    return any(pattern.search(text) for text in evidence)


def any_stands_in(golden_answers: Iterable[str], evidence: Sequence[str]) -> bool:
    """Return whether any text of `evidence` contains a gold answer."""
    return any(stands_in(gold, evidence) for gold in golden_answers)


def citation_reward(policy_text: str, golden_answers: Sequence[str], trajectory: Trajectory) -> dict[str, float]:
    """Return the longest run of the last answer's words that stands in one retrieved text, over all of its words.

    1 means that the answer stands there as it is, 0 that none of it does (or that nothing was retrieved or answered). An
    answer such as "yes" can hardly be cited, and a wrong one can: this is a part for a weighted sum, no reward alone.
    Parts: `cited` (the same), `gold_retrieved` (a gold answer stands there: was it found, whatever was made of it?).
    """
    evidence = evidence_of(trajectory)
    cited = support(answers.answer_of(policy_text), evidence)
    retrieved = any_stands_in(golden_answers, evidence)
    return {"reward": cited, "cited": cited, "gold_retrieved": float(retrieved)}


def support(answer: str | None, evidence: Sequence[str]) -> float:
    """Return the share of an answer's words, in [0, 1], that normalised texts support with one run of words."""
    words = answers.normalise(answer or "").split()
    if not words:
        return 0.0
    if stands_in(" ".join(words), evidence):
        return 1.0
    return max((_longest_run(words, text.split()) for text in evidence), default=0) / len(words)


def _longest_run(words: list[str], text: list[str]) -> int:
    return SequenceMatcher(None, words, text, autojunk=False).find_longest_match().size
