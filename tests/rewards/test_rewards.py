"""Rewards: published metric cases, what may and may not earn, the registry and custom functions."""

from __future__ import annotations

import math
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.agent.trajectory import Sample, Trajectory, Turn
from searchr1.errors import UserError
from searchr1.rewards.answers import answer_of, exact_match, f1_score, normalise, spam_factor, substring_match
from searchr1.rewards.registry import require_known
from searchr1.rewards.scorer import score_trajectory


def trajectory(*texts: str, golds: tuple[str, ...] = ("Paris",), reward_name: str | None = None) -> Trajectory:
    turns = [
        Turn(text, "invalid", len(text), tool_text="<information><answer>Paris</answer></information>") for text in texts
    ]
    return Trajectory(
        sample=Sample("set/0", 0, [1], "Q? <answer> Paris </answer>", list(golds), reward_name=reward_name),
        rollout_id=0,
        response_ids=np.zeros(1, np.int32),
        loss_mask=np.ones(1, np.bool_),
        rollout_logprobs=np.zeros(1, np.float32),
        turns=turns,
        stop="answer",
    )


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("The Beatles!", ["beatles"], 1),
        ("beatles", ["The Beatles"], 1),
        ("U.S.A.", ["USA"], 1),
        ("U.S. A", ["US"], 1),  # the article is what is left of the last letter
        ("Washington, D.C.", ["Washington DC"], 1),
        ("twenty-one", ["twenty one"], 0),  # punctuation goes without leaving a blank
        ("twenty-one", ["twentyone"], 1),
        ("  New\tYork \n City ", ["new york city"], 1),
        ("another", ["other"], 0),  # "an" is an article only as a word
        ("theatre", ["atre"], 0),
        ("Barack Obama", ["Obama", "Barack Obama", "B. Obama"], 1),  # any alias
        ("Obama", ["Barack Obama"], 0),
        ("São Paulo", ["são paulo"], 1),
        ("Sao Paulo", ["São Paulo"], 0),  # accents count
        ("1,000", ["1000"], 1),
        ("10", ["1 0"], 0),
        ("東京", ["東京"], 1),
        ("", ["Paris"], 0),
        ("Paris", [], 0),
        ("", ["The"], 0),  # normalisation leaves nothing of either
        ("a", ["The"], 0),
        ("the", ["The"], 1),
        ("?!", ["?!"], 1),
        ("", [""], 0),
        (None, ["Paris"], 0),
    ],
)
def test_exact_match(answer: str | None, golds: list[str], expected: int) -> None:
    assert exact_match(answer, golds) == expected


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("Paris France", ["Paris"], 2 / 3),
        ("Paris", ["Paris France"], 2 / 3),
        ("the cat sat", ["cat sat down"], 0.8),  # precision 1 (the article goes), recall 2/3
        ("b", ["b b"], 2 / 3),  # precision 1, recall 1/2
        ("x x y", ["x y y"], 2 / 3),  # repeated words count as often as both have them
        ("London", ["Paris", "Greater London"], 2 / 3),
        ("yes", ["yes"], 1),
        ("yes it is", ["yes"], 0),  # yes and no count only alone
        ("no", ["yes no"], 0),
        ("", ["Paris"], 0),
        (None, ["Paris"], 0),
        ("Paris", [], 0),
    ],
)
def test_f1(answer: str | None, golds: list[str], expected: float) -> None:
    assert f1_score(answer, golds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("It is Paris, in France", ["paris"], 1),
        ("Paris", ["Paris, France"], 0),
        ("anything", ["The"], 0),  # a gold answer of nothing stands in every text
        (None, ["Paris"], 0),
    ],
)
def test_substring_match(answer: str | None, golds: list[str], expected: int) -> None:
    assert substring_match(answer, golds) == expected


words = st.text(alphabet=string.ascii_letters + string.punctuation + " é東", max_size=20)


@given(words)
def test_normalising_leaves_nothing_to_strip(text: str) -> None:
    once = normalise(text)
    assert once == once.strip()
    assert "  " not in once
    assert not set(once) & set(string.punctuation)
    assert not {"a", "an", "the"} & set(once.split())


@given(words, st.lists(words, max_size=4))
def test_metrics_agree_with_each_other(answer: str, golds: list[str]) -> None:
    assert 0 <= f1_score(answer, golds) <= 1 + 1e-12
    if exact_match(answer, golds) and any(normalise(gold) and normalise(gold) == normalise(answer) for gold in golds):
        assert f1_score(answer, golds) == pytest.approx(1)
        assert substring_match(answer, golds) == 1
    assert exact_match(answer, [*golds, "zz"]) >= exact_match(answer, golds)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>a</answer> no, <answer> b </answer>", "b"),
        ("<answer>a</answer> and <answer>b", "a"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<Answer>a</Answer>", None),
        ("Paris", None),
        ("<answer></answer>", ""),
        ("</answer><answer>", None),
    ],
)
def test_the_last_complete_answer_counts(text: str, answer: str | None) -> None:
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("<answer>x</answer>" * 10, 1),
        ("<answer>x</answer>" * 11, 0.25),
        ("<answer>" * 11, 0.25),
        ("</answer>" * 11, 0.25),
        ("", 1),
    ],
)
def test_more_than_ten_answers_earn_a_quarter(text: str, factor: float) -> None:
    assert spam_factor(text) == factor


def test_spam_is_scored_a_quarter_but_reported_as_exact_match() -> None:
    reward, parts = score_trajectory(trajectory("<answer>Paris</answer>" * 11), "searchr1", 1.0)
    assert reward == 0.25
    assert parts["exact_match"] == 1


def test_neither_prompt_nor_tool_text_earns() -> None:
    for name in ("searchr1", "f1_score", "substring_match"):
        assert score_trajectory(trajectory("I do not know", "really not"), name, 1.0)[0] == 0
        assert score_trajectory(trajectory("<answer>London</answer>"), name, 1.0)[0] == 0


def test_scale_and_parts() -> None:
    reward, parts = score_trajectory(trajectory("<answer>Paris, France</answer>"), "f1_score", 10.0)
    assert reward == pytest.approx(20 / 3)
    assert parts == pytest.approx({"reward": 2 / 3, "exact_match": 0, "f1": 2 / 3})


def test_the_rows_own_reward_goes_first() -> None:
    row = trajectory("<answer>Paris, France</answer>", reward_name="substring_match")
    assert score_trajectory(row, "searchr1", 1.0)[0] == 1


@pytest.mark.parametrize("name", ["searchr1", "exact_match", "f1_score", "substring_match"])
def test_known_names(name: str) -> None:
    assert score_trajectory(trajectory("<answer>paris</answer>"), name, 1.0)[0] == 1


def custom(monkeypatch: pytest.MonkeyPatch, result: Any) -> str:
    """A custom function in an importable module that returns `result`; its dotted path."""
    import sys
    import types

    module = types.ModuleType("my_rewards")
    module.fn = lambda policy_text, golden_answers, trajectory: result  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return "my_rewards:fn"


def test_custom_function_by_both_spellings(monkeypatch: pytest.MonkeyPatch) -> None:
    path = custom(monkeypatch, 0.5)
    assert score_trajectory(trajectory("x"), path, 2.0)[0] == 1
    assert score_trajectory(trajectory("x"), path.replace(":", "."), 2.0)[0] == 1


def test_custom_function_with_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    path = custom(monkeypatch, {"reward": np.float32(0.5), "style": True})
    reward, parts = score_trajectory(trajectory("<answer>Paris</answer>"), path, 1.0)
    assert reward == 0.5
    assert parts == {"reward": 0.5, "style": 1.0, "exact_match": 1.0, "f1": 1.0}


@pytest.mark.parametrize(
    "result", [None, math.nan, math.inf, "much", [1.0], {}, {"style": 1.0}, {"reward": None}, {"reward": 1, "x": math.nan}]
)
def test_custom_function_that_returns_no_number(monkeypatch: pytest.MonkeyPatch, result: Any) -> None:
    path = custom(monkeypatch, result)
    with pytest.raises(UserError, match="reward my_rewards:fn returned"):
        score_trajectory(trajectory("x"), path, 1.0)


@pytest.mark.parametrize(
    "name", ["f2_score", "no_such_module:fn", "math:nothing", "math:pi", ".x.fn", "a..b", "", ":", "searchr1."]
)
def test_unknown_names_are_reported(name: str) -> None:
    with pytest.raises(UserError, match=r"reward\.reward_type"):
        require_known(name)


def test_an_unknown_plain_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="searchr1, exact_match, f1_score, substring_match"):
        require_known("f2_score")
