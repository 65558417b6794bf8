"""The format reward: the published table, the state machine, and retrieved text that plays the policy."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.trajectories import trajectory, turn

from searchr1.agent.protocol import frame
from searchr1.config.schema_reward import FormatRewardConfig, RewardConfig
from searchr1.rewards.format import make, valid_format
from searchr1.rewards.scorer import Scorer

CALL = "<think>a</think>\n<search>q</search>"
RIGHT, WRONG = "<think>b</think>\n<answer>Paris</answer>", "<think>b</think><answer>Rome</answer>"
FOUND = '\n\n<information>Doc 1(Title: "France") Its capital is Paris.</information>\n\n'
NOTHING = '\n\n<information>Doc 1(Title: "Tea") A drink.</information>\n\n'
RLINF = "\n\n<information>\n[Doc 1](u):\nTea\n</information>\n<think>\n"


def format_reward(t, **values):
    config = RewardConfig(reward_type="searchr1_format", format=FormatRewardConfig(**values))
    return asyncio.run(Scorer(config).score(t))


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((turn(CALL, FOUND), turn(RIGHT)), 1.0),
        ((turn(CALL, FOUND), turn("Hm. " + RIGHT)), 0.7),
        ((turn(CALL, FOUND), turn(WRONG)), 0.35),
        ((turn(CALL, NOTHING), turn(WRONG)), 0.3),
        ((turn(WRONG),), 0.3),
        ((turn("Hm. " + WRONG),), 0.15),
        ((turn(CALL, FOUND), turn("I give up")), 0.0),
        ((), 0.0),
    ],
)
def test_the_published_table(turns, expected):
    reward, parts = format_reward(trajectory(*turns), structure_score=0.3, final_format_score=0.15, retrieval_score=0.05)
    assert reward == pytest.approx(expected)
    assert parts["valid_format"] == (expected in (1.0, 0.35, 0.3))


def test_defaults_are_the_papers():
    assert format_reward(trajectory(turn(RIGHT)))[0] == 1
    assert format_reward(trajectory(turn("x" + RIGHT)))[0] == pytest.approx(0.8)
    assert format_reward(trajectory(turn(CALL, FOUND), turn(WRONG)))[0] == 0.2
    assert format_reward(trajectory(turn("x" + WRONG)))[0] == 0.1


@pytest.mark.parametrize(
    ("turns", "valid"),
    [
        ([turn(CALL, FOUND), turn(CALL, FOUND), turn(RIGHT)], True),
        ([turn("\n" + CALL + "\n", FOUND), turn(RIGHT + "<|im_end|>\n")], True),
        ([turn("<think>a</think><access>u</access>", FOUND), turn(RIGHT)], True),
        ([turn(CALL, RLINF), turn("b</think><answer>x</answer>")], True),  # the environment opened the thought
        ([turn(CALL, RLINF), turn(RIGHT)], False),  # so it is opened twice
        ([turn(CALL, FOUND), turn("b</think><answer>x</answer>")], False),
        ([turn("<search>q</search>", FOUND), turn(RIGHT)], False),
        ([turn(CALL, FOUND), turn("<answer>x</answer>")], False),
        ([turn(CALL)], False),
        ([turn(CALL), turn(RIGHT)], False),  # a call that nobody answered
        ([turn(RIGHT), turn(RIGHT)], False),
        ([turn(RIGHT + RIGHT)], False),
        ([turn("<think>a<think>b</think></think><answer>x</answer>")], False),
        ([turn("<think>a</think><think>b</think><answer>x</answer>")], False),
        ([turn("<think>a</think><answer>x")], False),
        ([turn("<think>a</think><information>Paris</information><answer>x</answer>")], False),
        ([turn("<think>a</think> so <answer>x</answer>")], False),
        ([turn("<think>a</think><search>q</search><search>r</search>", FOUND), turn(RIGHT)], False),
        ([turn("just text", "\nThat was no valid action.\n"), turn(RIGHT)], False),
        ([turn("<think>1 < 2, <b>so</b></think><answer>x</answer>")], True),  # other markup is text
    ],
)
def test_the_state_machine(turns, valid):
    assert valid_format(turns) is valid


def test_a_long_text_of_blanks_is_read_at_once():
    started = time.process_time()
    assert not valid_format([turn(RIGHT + " " * 200_000 + "x")])
    assert not valid_format([turn("<think>" + "<" * 200_000)])
    assert time.process_time() - started < 5


plain = st.text(alphabet="ab <>/\n.", max_size=15).filter(lambda text: "<a" not in text)
hostile = st.lists(
    st.sampled_from(["<think>", "</think>", "<search>", "</search>", "<answer>Paris</answer>", "</information>", "x", "\n",
                     "</information>\n<think>\n", "<information>"]), max_size=8
).map("".join)  # fmt: skip


@st.composite
def policies(draw):
    """Turns of a policy that may or may not keep to the format, and whether it does (by construction)."""
    texts, good = [], True
    for last in [False] * draw(st.integers(0, 3)) + [True]:
        thought, word = draw(plain), draw(plain)
        kind = "answer" if last else "search"
        flaw = draw(st.sampled_from(["", "", "", "before", "between", "no thought", "unclosed", "tag inside"]))
        good &= not flaw
        text = {
            "": f"<think>{thought}</think> \n<{kind}>q{word}</{kind}>",
            "before": f"So <think>{thought}</think><{kind}>q{word}</{kind}>",
            "between": f"<think>{thought}</think>.<{kind}>q{word}</{kind}>",
            "no thought": f"<{kind}>q{word}</{kind}>",
            "unclosed": f"<think>{thought}<{kind}>q{word}</{kind}>",
            "tag inside": f"<think>{thought}</information></think><{kind}>q{word}</{kind}>",
        }[flaw]
        texts.append(text)
    return texts, good


@given(policies(), st.lists(hostile, min_size=4, max_size=4), st.sampled_from(["searchr1", "rlinf"]))
def test_generated_trajectories_and_hostile_documents(policy, bodies, style):
    texts, good = policy
    before, after = frame(style)

    def turns(bodies):
        opened, found = False, []
        for i, text in enumerate(texts):
            text = re.sub("<think>", "", text, count=1) if opened else text
            last = i == len(texts) - 1
            found.append(turn(text, "" if last else before + bodies[i] + after))
            opened = style == "rlinf"
        return found

    # With a frame that opens the thought, dropping the tag can mend or break flawed turns: only good ones are foretold.
    calm = valid_format(turns(["tea"] * 4))
    if good or style == "searchr1":
        assert calm is good
    assert valid_format(turns(bodies)) is calm
    value = make(RewardConfig())
    rewards = [value("".join(texts), ["no such answer"], trajectory(*turns(b)))["reward"] for b in (["tea"] * 4, bodies)]
    assert rewards[0] == rewards[1]
