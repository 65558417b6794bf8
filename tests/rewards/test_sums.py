"""Citation, penalties, weighted sums and how functions are called."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.trajectories import trajectory, turn

from searchr1.config.schema_reward import LengthPenaltyConfig, RewardConfig, SearchPenaltyConfig
from searchr1.errors import UserError
from searchr1.rewards.matching import evidence_of, stands_in, support
from searchr1.rewards.scorer import Scorer, length_penalty

SEARCH = "<search>q</search>"


def score(t, **config):
    return asyncio.run(Scorer(RewardConfig(**config)).score(t))


def shown(text, title="T"):
    return f'\n\n<information>Doc 1(Title: "{title}") {text}</information>\n\n'


@pytest.mark.parametrize(
    ("answer", "tool_text", "cited"),
    [
        ("Paris", shown("The capital is Paris."), 1),
        ("Paris, France", shown("The capital is Paris."), 0.5),
        ("the city of London", shown("a City of light"), 2 / 3),
        ("Paris", shown("Comparison"), 0),
        ("art", shown("a party"), 0),  # whole words
        ("France", shown("x", title="France"), 1),
        ("Doc 1", shown("x"), 0),  # our labels are no evidence
        ("search results", "\n\n<information>No search results are found.</information>\n\n", 0),
        ("京", shown("東京は"), 1),  # no blanks between words there
        ("2020", shown("2020年"), 1),
        ("", shown("x"), 0),
    ],
)
def test_citation(answer, tool_text, cited):
    t = trajectory(turn(SEARCH, tool_text), turn(f"<answer>{answer}</answer>"), golds=("Rome",))
    reward, parts = score(t, reward_type="citation")
    assert reward == pytest.approx(cited)
    assert parts["cited"] == reward
    assert parts["gold_retrieved"] == 0


def test_only_what_was_retrieved_is_evidence():
    answer = turn("<think>Paris</think><information>Paris</information><answer>Paris</answer>")
    assert score(trajectory(answer), reward_type="citation")[0] == 0
    failed = turn(SEARCH, shown("Paris"), error="down")
    assert score(trajectory(failed, answer), reward_type="citation")[0] == 0
    invalid = turn("Paris?", "That was no valid action: Paris")
    assert evidence_of(trajectory(invalid, answer)) == []
    parts = score(trajectory(turn(SEARCH, shown("Paris")), turn("<answer>Rome</answer>")), reward_type="citation")[1]
    assert (parts["cited"], parts["gold_retrieved"]) == (0, 1)


words = st.lists(st.sampled_from("alpha beta gamma delta".split()), max_size=6)


@given(words, words)
def test_support_is_the_longest_common_run(answer, text):
    runs = [answer[i:j] for i in range(len(answer)) for j in range(i + 1, len(answer) + 1)]
    inside = [len(r) for r in runs if any(text[k : k + len(r)] == r for k in range(len(text)))]
    expected = max(inside, default=0) / len(answer) if answer else 0
    assert support(" ".join(answer), [" ".join(text)]) == pytest.approx(expected)
    assert stands_in(" ".join(answer), [" ".join(text)]) == (expected == 1)


@given(st.integers(0, 400), st.integers(1, 300), st.data(), st.floats(0, 4))
def test_length_penalty_is_equation_13(length, limit, data, factor):
    cache = data.draw(st.integers(1, limit))
    if length <= limit - cache:
        expected = Fraction(0)
    elif length <= limit:
        expected = Fraction(limit - cache - length, cache)
    else:
        expected = Fraction(-1)
    config = LengthPenaltyConfig(max_length=limit, overlong_buffer=cache, penalty_factor=factor)
    assert length_penalty(trajectory(policy_tokens=length), config) == pytest.approx(float(expected) * factor, abs=1e-9)


def test_what_the_length_penalty_counts():
    t = trajectory(turn("<answer>Paris</answer>"), policy_tokens=5, tool_tokens=10)
    config = {"max_length": 20, "overlong_buffer": 10}
    assert score(t, length_penalty=LengthPenaltyConfig(**config))[0] == 0.5
    assert score(t, length_penalty=LengthPenaltyConfig(**config, tokens="policy"))[0] == 1


def test_penalties_are_parts_and_scaled_with_the_reward():
    t = trajectory(*[turn(SEARCH, shown("x"))] * 4, turn("<answer>Paris</answer>"), reward_name="f1_score")
    reward, parts = score(t, search_penalty=SearchPenaltyConfig(free_searches=1, per_search=0.1), reward_scale=10.0)
    assert reward == pytest.approx(7)
    assert parts["search_penalty"] == pytest.approx(-0.3)
    assert parts["reward"] == 1


@pytest.fixture
def own(monkeypatch):
    """Own functions in an importable module, and how many ran at once."""
    module = types.ModuleType("own_rewards")
    running, most = [], {"sync": 0, "async": 0}

    def sync(policy_text, golden_answers, trajectory):
        running.append(threading.get_ident())
        most["sync"] = max(most["sync"], len(running))
        time.sleep(0.01)
        running.pop()
        assert threading.current_thread() is not threading.main_thread()
        return 0.5

    async def waits(policy_text, golden_answers, trajectory):
        running.append(0)
        most["async"] = max(most["async"], len(running))
        await asyncio.sleep(0.02)
        running.pop()
        return {"reward": 0.25, "style": 3.0}

    async def fails(policy_text, golden_answers, trajectory):
        raise UserError("told")

    module.sync, module.waits, module.fails, module.most = sync, waits, fails, most
    monkeypatch.setitem(sys.modules, "own_rewards", module)
    return module


def test_a_weighted_sum(own):
    t = trajectory(turn("<answer>Paris, France</answer>"))
    weights = {"exact_match": 1.0, "f1_score": 0.3, "own_rewards:sync": 2.0, "own_rewards.waits": -1, "citation": 0.0}
    reward, parts = score(t, weights=weights)
    assert reward == pytest.approx(0 + 0.3 * 2 / 3 + 1.0 - 0.25)
    assert parts == pytest.approx(
        {
            "reward": reward, "exact_match": 0, "f1": 2 / 3, "style": 3, "cited": 0, "gold_retrieved": 0,
            "term/exact_match": 0, "term/f1_score": 2 / 3, "term/own_rewards:sync": 0.5, "term/own_rewards.waits": 0.25,
            "term/citation": 0,
        }
    )  # fmt: skip


def test_a_rows_own_reward_goes_before_the_weights():
    t = trajectory(turn("<answer>Paris, France</answer>"), reward_name="substring_match")
    reward, parts = score(t, weights={"exact_match": 5.0})
    assert reward == 1
    assert "term/exact_match" not in parts


def test_what_awaits_runs_together_up_to_the_limit_and_what_does_not_one_at_a_time(own):
    many = [trajectory(turn("x")) for _ in range(12)]
    asyncio.run(Scorer(RewardConfig(reward_type="own_rewards:waits", concurrency=5)).score_all(many))
    assert own.most["async"] == 5
    assert [t.reward for t in many] == [0.25] * 12
    asyncio.run(Scorer(RewardConfig(reward_type="own_rewards:sync")).score_all(many))
    assert own.most["sync"] == 1
    assert [t.reward for t in many] == [0.5] * 12


def test_the_first_failure_is_reported_as_it_is(own):
    with pytest.raises(UserError, match="told"):
        asyncio.run(Scorer(RewardConfig(reward_type="own_rewards:fails")).score_all([trajectory(turn("x"))] * 3))


def test_unknown_names_are_reported_with_their_key():
    with pytest.raises(UserError, match=r"reward\.weights: 'f2'"):
        Scorer(RewardConfig(weights={"f2": 1.0}))
