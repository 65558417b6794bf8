"""The loop under odd policies, hostile tools, a real tokenizer and many trajectories at once."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from searchr1.agent.loop import resolve_generate_fn, run_group, run_trajectory
from searchr1.agent.protocol import frame, parse_action
from searchr1.agent.settings import AgentSettings, GenerateParams, Generation
from searchr1.agent.tools import ToolResult
from searchr1.agent.trajectory import Sample
from searchr1.chat.async_chat import explain_stop
from searchr1.config.schema import Config
from searchr1.errors import UserError
from searchr1.preflight.check import check_agent, check_config
from searchr1.rewards.scorer import score_trajectory

TOKENIZER = Path(__file__).parents[2] / "examples/demo/cold_start"
SEARCH = "<search> q</search>"
ANSWER = "<answer> Paris</answer>"
SEARCH_TURN = Generation([5], [-1.0], SEARCH, "stop", 1)


class Engine:
    """Says its lines; a line may be a whole `Generation`."""

    def __init__(self, *lines, encode=lambda text: [ord(c) for c in text], delay=0.0):
        self.lines, self.encode, self.delay, self.asked = list(lines), encode, delay, []

    async def generate(self, prompt_ids, params):
        self.asked.append(list(prompt_ids))
        await asyncio.sleep(self.delay)
        line = self.lines.pop(0) if self.lines else ANSWER
        if isinstance(line, Exception):
            raise line
        if isinstance(line, Generation):
            return line
        cut = line[: params.max_new_tokens]
        ids = self.encode(cut)
        return Generation(ids, [-0.5] * len(ids), cut, "stop" if cut == line else "length", weight_version=1)


class Characters:
    eos_token_id = 0

    def encode(self, text, add_special_tokens=False):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Tool:
    def __init__(self, body="fact", delay=0.0):
        self.body, self.delay = body, delay

    async def call(self, arguments):
        await asyncio.sleep(self.delay)
        return ToolResult(self.body)

    async def aclose(self):
        pass


def arguments(engine, tool=None, tokenizer=None, prompt_ids=(81,), **changes):
    defaults = {"sampling": GenerateParams(max_new_tokens=5000), "max_model_len": 6000, "invalid_action_message": "\nNo.\n"}
    return {
        "sample": Sample("set/0", 0, list(prompt_ids), "Q", ["Paris"]),
        "engine": engine,
        "tools": {"search": tool or Tool()},
        "tokenizer": tokenizer or Characters(),
        "settings": AgentSettings(**(defaults | changes)),
        "seed": 1,
    }


def run(*lines, **changes):
    return asyncio.run(run_trajectory(rollout_id=0, **arguments(Engine(*lines), **changes)))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def test_a_search_that_nobody_answers_is_not_counted():
    t = run(SEARCH, SEARCH, max_turns=1)
    assert t.forced_final
    assert [turn.action for turn in t.turns] == ["search", "search"]
    assert [turn.queries for turn in t.turns] == [["q"], []]
    assert (t.searches, t.tool_calls) == (1, 1)


def test_a_call_of_a_tool_that_is_off_is_invalid():
    t = run("<access>u</access>", ANSWER)
    assert t.turns[0].action == "invalid"
    assert t.turns[0].tool_text == "\nNo.\n"


def test_the_oldest_weights_are_named():
    lines = [Generation([1], [-1.0], SEARCH, "stop", version) for version in (0, 5)]
    assert run(*lines, Generation([1], [-1.0], ANSWER, "stop", 6)).weight_version == 0


def test_an_aborted_generation_ends_the_trajectory():
    t = run(Generation([1, 2], [-1.0, -1.0], "half a", "abort", 1))
    assert t.stop == "error"
    assert len(t.response_ids) == 2


def test_lengths_that_disagree_are_rejected():
    with pytest.raises(ValueError, match="2 tokens with 1"):
        run(Generation([1, 2], [-1.0], "x", "stop", 1))


def test_an_engines_failure_is_the_trajectorys():
    with pytest.raises(RuntimeError, match="engine"):
        run(RuntimeError("engine is gone"))


def test_a_whole_last_token_stays_though_the_text_stops_inside_it(tokenizer):
    ids = [*tokenizer.encode("<search> q", add_special_tokens=False), 77]  # 77: "</search>" and more, in one token
    t = run(Generation(ids, [-1.0] * len(ids), SEARCH, "stop", 1), tokenizer=tokenizer)
    assert t.response_ids[: len(ids)].tolist() == ids
    assert t.turns[0].queries == ["q"]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_an_end_token_without_an_action_ends_the_trajectory(tokenizer, end):
    ids = tokenizer.encode("I am done" + end, add_special_tokens=False)
    t = run(Generation(ids, [-1.0] * len(ids), "I am done", "stop", 1), tokenizer=tokenizer)
    assert t.stop == "eos"
    assert t.invalid_actions == 1
    assert t.response_ids.tolist() == ids


@pytest.mark.parametrize("evil", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("limit", [3, 500])
def test_a_tools_text_carries_no_control_token(tokenizer, evil, limit):
    # A tool of the user's own that forgets to neutralise.
    engine = Engine(SEARCH, ANSWER, encode=lambda text: tokenizer.encode(text, add_special_tokens=False))
    body = f"one two{evil}three four five"
    changes = {"tool": Tool(body), "tokenizer": tokenizer, "max_tool_response_length": limit}
    t = asyncio.run(run_trajectory(rollout_id=0, **arguments(engine, **changes)))
    tool_ids = t.response_ids[~t.loss_mask].tolist()
    assert tokenizer.convert_tokens_to_ids(evil) not in tool_ids
    assert tokenizer.decode(tool_ids) == t.turns[0].tool_text
    assert t.turns[0].tool_text.startswith("\n\n<information>")
    assert t.turns[0].tool_text.endswith("</information>\n\n")
    assert evil not in t.turns[0].tool_text
    assert len(tool_ids) <= limit + 6


def test_tool_tokens_do_not_depend_on_being_cut(tokenizer):
    def tool_ids(limit):
        engine = Engine(SEARCH, ANSWER, encode=lambda text: tokenizer.encode(text, add_special_tokens=False))
        changes = {"tool": Tool("the city of Paris. It is"), "tokenizer": tokenizer, "max_tool_response_length": limit}
        t = asyncio.run(run_trajectory(rollout_id=0, **arguments(engine, **changes)))
        return t.response_ids[~t.loss_mask].tolist()

    whole = tool_ids(500)
    for limit in range(1, len(whole) - 6):
        assert tool_ids(limit) == whole[: 3 + limit] + whole[-3:]


def end_token_turn(tokenizer, text="I am done"):
    ids = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    return Generation(ids, [-1.0] * len(ids), text + "<|im_end|>", "stop", 1)


def test_no_call_ends():
    t = run("just talk", ANSWER, no_call_ends=True)
    assert (t.stop, len(t.turns), t.invalid_actions, t.turns[0].tool_text) == ("eos", 1, 1, "")
    assert run(SEARCH, ANSWER, no_call_ends=True).stop == "answer"
    cut = run("x" * 50, ANSWER, no_call_ends=True, max_new_tokens_per_turn=9)
    assert cut.stop == "length"
    limits = AgentSettings(GenerateParams(max_new_tokens=5000), max_model_len=6000, max_new_tokens_per_turn=9)
    assert explain_stop(cut, limits) == "the last turn used all of its 9 tokens (agentloop.max_new_tokens_per_turn)"


def test_an_end_token_that_ends_nothing_is_taken_off(tokenizer):
    turn = end_token_turn(tokenizer)
    t = run(turn, Generation([5], [-2.0], ANSWER, "stop", 1), tokenizer=tokenizer, end_token_ends=False)
    message = tokenizer.encode("\nNo.\n", add_special_tokens=False)
    assert t.response_ids.tolist() == turn.token_ids[:-1] + message + [5]
    assert t.loss_mask.tolist() == [True] * (len(turn.token_ids) - 1) + [False] * len(message) + [True]
    assert t.rollout_logprobs.tolist() == [-1.0] * (len(turn.token_ids) - 1) + [0.0] * len(message) + [-2.0]
    assert (t.turns[0].policy_text, t.turns[0].tool_text, t.stop) == ("I am done", "\nNo.\n", "answer")
    assert t.turns[0].policy_tokens == len(turn.token_ids) - 1
    # It stays where nothing follows: in the last turn, and where calls are all that goes on.
    assert run(turn, tokenizer=tokenizer, end_token_ends=False, max_turns=0).response_ids.tolist() == turn.token_ids
    stopped = run(turn, tokenizer=tokenizer, end_token_ends=False, no_call_ends=True)
    assert (stopped.response_ids.tolist(), stopped.stop) == (turn.token_ids, "eos")


@pytest.mark.parametrize("style", ["searchr1", "rlinf"])
@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("limit", [1, 2, 7, 500])
@pytest.mark.parametrize("body", ["the city of Paris. It is", "  über 東京\n\n", ">a", ""])
def test_a_block_tokenized_as_one_string_keeps_its_tags(tokenizer, style, side, limit, body):
    before, after = frame(style)
    t = run(
        SEARCH_TURN, tool=Tool(body), tokenizer=tokenizer, tool_text_tokens="whole", information_style=style,
        max_tool_response_length=limit, truncate_side=side,
    )  # fmt: skip
    ids = t.response_ids[~t.loss_mask].tolist()
    whole = tokenizer.encode(before + body + after, add_special_tokens=False)
    tags = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in (before, after))
    assert len(ids) <= tags + limit or ids == whole
    if len(whole) <= tags + limit:
        assert ids == whole
    elif side == "right":
        assert ids[: len(ids) - len(tokenizer.encode(after))] == whole[: len(ids) - len(tokenizer.encode(after))]
    elif side == "left":
        kept = len(ids) - len(tokenizer.encode(before))
        assert ids[-kept:] == whole[-kept:]
    text = tokenizer.decode(ids)
    assert text == t.turns[0].tool_text
    assert text.startswith(before)
    assert text.endswith(after)


pieces = st.sampled_from(
    [
        SEARCH,
        "<search>",
        "</search>",
        "<search></search>",
        "<access>u</access>",
        "</answer>",
        "<answer>",
        "<think>x</think>",
        "Paris",
        " ",
    ]
)
lines = st.lists(st.lists(pieces, max_size=5).map("".join), max_size=6)
bodies = st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=6).map("".join)


@hypothesis_settings(deadline=None)
@given(
    lines=lines,
    body=bodies,
    room=st.integers(1, 200),
    max_turns=st.integers(0, 4),
    limit=st.integers(0, 40),
    per_turn=st.one_of(st.none(), st.integers(1, 30)),
    side=st.sampled_from(["left", "right", "middle"]),
    style=st.sampled_from(["searchr1", "rlinf"]),
    final=st.booleans(),
    whole=st.booleans(),
)
def test_invariants(lines, body, room, max_turns, limit, per_turn, side, style, final, whole):
    engine = Engine(*lines)
    t = asyncio.run(
        run_trajectory(
            rollout_id=0,
            **arguments(
                engine,
                Tool(body),
                prompt_ids=(81, 63),
                max_model_len=room + 2,
                max_turns=max_turns,
                force_final_turn=final,
                max_tool_response_length=limit,
                max_new_tokens_per_turn=per_turn,
                truncate_side=side,
                information_style=style,
                tool_text_tokens="whole" if whole else "parts",
            ),
        )
    )
    n = len(t.response_ids)
    assert n == len(t.loss_mask) == len(t.rollout_logprobs) <= room
    assert t.rollout_logprobs[~t.loss_mask].sum() == 0
    assert (t.rollout_logprobs[t.loss_mask] == -0.5).all()
    assert "".join(map(chr, t.response_ids[t.loss_mask])) == t.policy_text
    assert "".join(map(chr, t.response_ids)) == "".join(turn.policy_text + turn.tool_text for turn in t.turns)
    assert sum(turn.tool_tokens for turn in t.turns) == (~t.loss_mask).sum()
    assert sum(turn.policy_tokens for turn in t.turns) == t.policy_length
    assert len(t.turns) <= max_turns + final
    assert t.tool_calls <= max_turns
    # Every generation saw exactly what came before it.
    for asked in engine.asked:
        assert asked == [81, 63, *t.response_ids.tolist()][: len(asked)]
    # Only what the policy said ends a trajectory with an answer, and only that earns.
    assert (t.stop == "answer") == bool(t.turns and parse_action(t.turns[-1].policy_text).kind == "answer")
    if "<answer>" not in t.policy_text:
        assert score_trajectory(t, "searchr1", 1.0)[0] == 0


def test_a_group_runs_at_once_and_keeps_its_order():
    delays = [0.2, 0.0, 0.1]

    async def attempt(*, rollout_id, **kwargs):
        await asyncio.sleep(delays[rollout_id])
        return await run_trajectory(rollout_id=rollout_id, **kwargs)

    started = time.perf_counter()
    group = asyncio.run(run_group(attempt, 3, **arguments(Engine())))
    assert [t.rollout_id for t in group] == [0, 1, 2]
    assert time.perf_counter() - started < 0.29


def test_a_failed_attempt_cancels_the_others_and_is_reported_as_it_is():
    cancelled = []

    async def attempt(*, rollout_id, **kwargs):
        if rollout_id == 1:
            raise UserError("the server is gone")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(rollout_id)
            raise

    with pytest.raises(UserError, match="the server is gone"):
        asyncio.run(run_group(attempt, 3, **arguments(Engine())))
    assert sorted(cancelled) == [0, 2]


def test_a_thousand_trajectories_search_at_once():
    async def everything():
        started = time.perf_counter()
        groups = await asyncio.gather(
            *(run_group(run_trajectory, 8, **arguments(Engine(*[SEARCH] * 8), Tool(delay=0.5))) for _ in range(125))
        )
        return groups, time.perf_counter() - started

    groups, seconds = asyncio.run(everything())
    assert sum(t.searches for group in groups for t in group) == 1000
    # One after the other they would take 500 s.
    assert seconds < 15


def test_a_long_page_does_not_hold_up_the_others():
    class Slow(Characters):
        def encode(self, text, add_special_tokens=False):
            if len(text) > 1000:
                time.sleep(0.5)
            return super().encode(text)

    async def both():
        tokenizer = Slow()
        slow = asyncio.create_task(
            run_trajectory(rollout_id=0, **arguments(Engine(SEARCH), Tool("x" * 50_000), tokenizer=tokenizer))
        )
        await asyncio.sleep(0.05)
        started = time.perf_counter()
        await run_trajectory(rollout_id=1, **arguments(Engine(SEARCH), Tool(), tokenizer=tokenizer))
        fast = time.perf_counter() - started
        assert not slow.done()
        assert len((await slow).response_ids) < 2000
        return fast

    assert asyncio.run(both()) < 0.4


async def my_loop(**kwargs):
    return "mine"


def not_a_loop(**kwargs):
    return "mine"


def test_a_loop_of_the_users_own(monkeypatch):
    import sys
    import types

    module = types.ModuleType("my_agent")
    module.my_loop, module.not_a_loop = my_loop, not_a_loop
    monkeypatch.setitem(sys.modules, "my_agent", module)
    assert resolve_generate_fn(None) is run_trajectory
    assert resolve_generate_fn("my_agent:my_loop") is my_loop
    assert resolve_generate_fn("my_agent.my_loop") is my_loop
    with pytest.raises(UserError, match=r"agentloop\.generate_fn.*not an async function"):
        resolve_generate_fn("my_agent:not_a_loop")


@pytest.mark.parametrize("path", ["my_loop", "no_such_module:fn", "math:nothing", "", ".x.fn"])
def test_a_loop_that_is_not_there(path):
    with pytest.raises(UserError, match=r"agentloop\.generate_fn"):
        resolve_generate_fn(path)


def test_evaluation_is_greedy_unless_asked_otherwise():
    config = Config()
    assert AgentSettings.from_config(config, "train").sampling.temperature == 1.0
    greedy = AgentSettings.from_config(config, "eval").sampling
    assert (greedy.temperature, greedy.top_p, greedy.top_k) == (0.0, 1.0, -1)
    config.algorithm.eval_sampling_params = replace(config.algorithm.sampling_params, temperature=0.5)
    assert AgentSettings.from_config(config, "eval").sampling.temperature == 0.5


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_key_of_the_loop_is_a_setting(mode):
    changes = {
        "max_turns": 7, "force_final_turn": False, "max_new_tokens_per_turn": 9, "max_tool_response_length": 11,
        "information_style": "rlinf", "invalid_action_message": "No.", "toolcall_parser": "searchr1-qwen",
        "no_call_ends": True, "end_token_ends": False, "no_results_message": "", "tool_text_tokens": "whole",
    }  # fmt: skip
    config = Config()
    for name, value in changes.items():
        assert getattr(config.agentloop, name) != value
        setattr(config.agentloop, name, value)
    settings = AgentSettings.from_config(config, mode)
    assert {name: getattr(settings, name) for name in changes} == changes


def test_access_needs_a_parser_that_reads_it():
    config = Config()
    config.tools.access.enabled = True
    assert not list(check_agent(config))
    config.agentloop.toolcall_parser = "searchr1-qwen"
    (problem,) = check_agent(config)
    assert str(problem).startswith("agentloop.toolcall_parser: searchr1-qwen reads no <access>; ")
    assert problem in check_config(config, for_training=False)


def test_arrays_have_the_types_that_the_trainer_reads():
    t = run(SEARCH, ANSWER)
    assert t.response_ids.dtype == np.int32
    assert t.loss_mask.dtype == np.bool_
    assert t.rollout_logprobs.dtype == np.float32
