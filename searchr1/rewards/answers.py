"""The metrics of open-domain question answering, as SQuAD and Search-R1 define them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from searchr1.agent.protocol import last_answer

MAX_ANSWER_TAGS = 10
"""Above this, RLinf's rule gives a quarter of the reward."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ACTION_TAG = re.compile(r"</?(?:search|access|answer)>")
_END_TOKENS = re.compile(r"(?:\s*(?:<\|[^<>|]{1,40}\|>|</s>|<end_of_turn>))+\s*$")
"""Whatever a tokenizer calls the end of a text or a turn, where it is part of the text."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str | None, golden_answers: Sequence[str]) -> float:
    """Return 1 if the normalised answer equals any normalised gold answer, else 0.

    A gold answer of which normalisation leaves nothing ("The", "?!") must be met as it is written, lower case: otherwise
    an empty answer would be right.
    """
    return float(answer is not None and any(_equal(answer, gold) for gold in golden_answers))


def _equal(answer: str, gold: str) -> bool:
    if normalise(gold):
        return normalise(answer) == normalise(gold)
    return bool(gold.strip()) and answer.strip().lower() == gold.strip().lower()


def f1_score(answer: str | None, golden_answers: Sequence[str]) -> float:
    """Return the best token F1 over the gold answers; yes, no and noanswer count only if equal."""
    if answer is None:
        return 0.0
    return max((_f1_of(normalise(answer), normalise(gold)) for gold in golden_answers), default=0.0)


def _f1_of(answer: str, gold: str) -> float:
    if answer != gold and ({answer, gold} & {"yes", "no", "noanswer"}):
        return 0.0
    ours, theirs = answer.split(), gold.split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def substring_match(answer: str | None, golden_answers: Sequence[str]) -> float:
    """Return 1 if any normalised gold answer stands in the normalised answer, else 0."""
    if answer is None:
        return 0.0
    text = normalise(answer)
    return float(any(gold in text for gold in map(normalise, golden_answers) if gold))


def answer_of(policy_text: str) -> str | None:
    """Return the policy's last complete answer."""
    return last_answer(policy_text)


def has_tag(text: str) -> bool:
    """Return whether a text has a tag that an action begins or ends with, complete or not."""
    return _ACTION_TAG.search(text) is not None


def scored_text(turns: Sequence[str], untagged: str) -> str:
    """Return the text that a rollout is scored by: everything that the policy wrote.

    Args:
        turns: the policy's text of each turn.
        untagged: `text` makes an answer of the last turn's text where it has no tag of an action and no turn has an answer;
            thoughts that end with `</think>`, and tokens that end a text, are no part of it. `reject` does not.
    """
    whole = "".join(turns)
    if untagged != "text" or not turns or has_tag(turns[-1]) or last_answer(whole) is not None:
        return whole
    text = _END_TOKENS.sub("", turns[-1].rpartition("</think>")[2]).strip()
    return f"<answer>{text}</answer>" if text else whole


def spam_factor(policy_text: str) -> float:
    """Return 1/4 for more than `MAX_ANSWER_TAGS` answer tags, opening or closing, else 1."""
    tags = max(policy_text.count("<answer>"), policy_text.count("</answer>"))
    return 0.25 if tags > MAX_ANSWER_TAGS else 1.0
