"""Our rewards against published functions: RLinf's and TRL's, which are installed, and verl's (run with 0.9.1)."""

from __future__ import annotations

import random
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lifted import lift
from support.trajectories import trajectory, turn

from searchr1.config.schema_reward import LengthPenaltyConfig
from searchr1.rewards.matching import exact_match_reward, substring_reward
from searchr1.rewards.scorer import length_penalty

words = st.lists(st.sampled_from(["the", "A", "Paris", "paris!", "U.S.", "42", "Łódź", " ", "\n", "-"]), max_size=4).map(
    " ".join
)
# A gold answer of nothing but articles and marks is met by every empty answer there, and by none here.
golds = st.lists(words.filter(lambda text: re.sub(r"\b(a|an|the)\b|[\W_]", "", text.lower())), min_size=1, max_size=3)
pieces = st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "<search>", "</search>"]) | words
texts = st.lists(pieces, max_size=9).map("".join)
answers = st.builds("{}<answer>{}</answer>{}".format, texts, words, words)
spam = st.builds("{}{}".format, st.integers(9, 12).map("<answer>Paris</answer>".__mul__), words)
policies = texts | answers | spam

NAMES = ("normalize_answer", "em_check", "subem_check", "extract_solution")
USED = {"re": re, "string": string, "random": random}


@settings(max_examples=150)
@given(policies, golds)
def test_exact_match_and_substring_are_rlinfs(text: str, gold: list[str]) -> None:
    file = "algorithms/rewards/searchr1/__init__.py"
    theirs = lift("rlinf", file, *NAMES, "count_answer_tags", "compute_score", "compute_score_subem", **USED)
    attempt = trajectory(turn(text))
    assert exact_match_reward(text, gold, attempt) == theirs.compute_score(text, gold, do_print=False)
    if max(text.count("<answer>"), text.count("</answer>")) <= 10:  # theirs has no quarter there
        expected = theirs.compute_score_subem(text, {"target": gold}, do_print=False)
        assert substring_reward(text, gold, attempt) == expected


@settings(max_examples=100)
@given(policies, golds)
def test_exact_match_is_verls(text: str, gold: list[str]) -> None:
    theirs = lift("verl", "utils/reward_score/search_r1_like_qa_em.py", *NAMES, "count_answer_tags", "compute_score", **USED)
    assert exact_match_reward(text, gold, trajectory(turn(text))) == theirs.compute_score(text, {"target": gold})


@given(st.integers(0, 130), st.integers(1, 100), st.integers(1, 100))
def test_the_length_penalty_is_trls(length: int, limit: int, buffer: int) -> None:
    rewards = pytest.importorskip("trl.rewards")
    buffer = min(limit, buffer)
    (expected,) = rewards.get_soft_overlong_punishment(limit, buffer)(completion_ids=[[1] * length])
    found = length_penalty(trajectory(policy_tokens=length), LengthPenaltyConfig(limit, buffer))
    assert found == pytest.approx(expected, abs=1e-12)
