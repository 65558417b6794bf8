"""The loop of Search-R1's recipes on scripted turns; expected texts were derived by hand from its generation.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from searchr1.agent.loop import run_trajectory
from searchr1.agent.settings import AgentSettings, Generation
from searchr1.agent.tools import FailureMonitor, SearchTool
from searchr1.agent.trajectory import Sample
from searchr1.config.load import load_config
from searchr1.retrieval.client.client import ClientStats
from searchr1.retrieval.documents import RetrievedDocument

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples/searchr1/config"
RECIPES = [
    "qwen2.5-3b-searchr1-v0.2",
    "qwen2.5-3b-searchr1-v0.2-ppo",
    "qwen2.5-3b-searchr1-v0.3",
    "qwen2.5-3b-searchr1-v0.3-ppo",
    "llama3.2-3b-agent-lightning",
]
INVALID = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
PARIS = '\n\n<information>Doc 1(Title: "Paris") Capital of France.\nDoc 2(Title: "Lyon") A city.</information>\n\n'
NOTHING = "\n\n<information></information>\n\n"


class Library:
    """Two passages about paris, nothing about anything else."""

    stats = ClientStats()

    def __init__(self):
        self.asked = []

    async def search(self, queries):
        self.asked += queries
        passages = [RetrievedDocument("0", "Paris", "Capital of France."), RetrievedDocument("1", "Lyon", "A city.")]
        return [passages if query == "paris" else [] for query in queries]

    async def access(self, urls):
        raise AssertionError

    async def aclose(self):
        pass


class Engine:
    """Says its turns and keeps what it was shown."""

    def __init__(self, tokenizer, turns):
        self.tokenizer, self.turns, self.shown = tokenizer, list(turns), []

    async def generate(self, prompt_ids, params):
        self.shown.append(self.tokenizer.decode(prompt_ids))
        ids = self.tokenizer.encode(self.turns.pop(0), add_special_tokens=False)[: params.max_new_tokens]
        reason = "length" if len(ids) == params.max_new_tokens else "stop"
        return Generation(ids, [-1.0] * len(ids), self.tokenizer.decode(ids), reason, 1)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "examples/demo/cold_start")


def run(tokenizer, recipe, turns, *changes):
    config = load_config(CONFIGS / f"{recipe}.yaml", list(changes))
    settings = AgentSettings.from_config(config, "eval")
    engine, library = Engine(tokenizer, turns), Library()
    tool = SearchTool(library, settings.information_style, FailureMonitor(0.0, "search"), settings.no_results_message)
    trajectory = asyncio.run(
        run_trajectory(
            sample=Sample("set/0", 0, tokenizer.encode("Question: ?", add_special_tokens=False), "?", ["Paris"]),
            rollout_id=0,
            engine=engine,
            tools={"search": tool},
            tokenizer=tokenizer,
            settings=settings,
            seed=1,
        )
    )
    return trajectory, engine.shown, library.asked


SEARCH = "<think>who</think><search> paris </search>"
ANSWER = "<think>I know</think><answer> Paris </answer>"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_kind_of_turn(tokenizer, recipe):
    turns = [
        SEARCH + " and what it goes on with",  # cut at its first </search>
        "I am not sure.<|im_end|>",  # no action: the message, without the end token before it
        "<search>nobody</search>",  # nothing found: an empty block
        "<search> </search>",  # a blank query is searched as well
        ANSWER,
    ]
    trajectory, shown, asked = run(tokenizer, recipe, turns)
    so_far = "Question: ?"
    expected = [so_far]
    for turn, observation in (
        (SEARCH, PARIS),
        ("I am not sure.", INVALID),
        ("<search>nobody</search>", NOTHING),
        ("<search> </search>", NOTHING),
    ):
        so_far += turn + observation
        expected.append(so_far)
    assert shown == expected
    assert asked == ["paris", "nobody", ""]
    assert tokenizer.decode(trajectory.response_ids.tolist()) == so_far.removeprefix("Question: ?") + ANSWER
    assert trajectory.stop == "answer"
    assert trajectory.invalid_actions == 1
    # Observations are tokenized as one string each, and none of their tokens is trained on.
    observations = [PARIS, INVALID, NOTHING, NOTHING]
    assert trajectory.response_ids[~trajectory.loss_mask].tolist() == [
        token for text in observations for token in tokenizer.encode(text, add_special_tokens=False)
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_four_turns_and_a_last_one_that_nobody_answers(tokenizer, recipe):
    trajectory, shown, asked = run(tokenizer, recipe, [SEARCH] * 5)
    assert len(shown) == 5
    assert asked == ["paris"] * 4
    assert shown[-1] == "Question: ?" + (SEARCH + PARIS) * 4
    assert tokenizer.decode(trajectory.response_ids.tolist()) == (SEARCH + PARIS) * 4 + SEARCH
    trajectory, shown, _ = run(tokenizer, recipe, ["no"] * 5)
    assert shown[-1] == "Question: ?" + ("no" + INVALID) * 4
    assert trajectory.invalid_actions == 5


def test_slime_generates_twice(tokenizer):
    trajectory, shown, asked = run(tokenizer, "qwen2.5-3b-slime", ["hm", SEARCH, ANSWER])
    assert shown == ["Question: ?", "Question: ?hm" + INVALID]
    assert asked == ["paris"]
    assert tokenizer.decode(trajectory.response_ids.tolist()) == "hm" + INVALID + SEARCH + PARIS


def test_the_first_complete_tag_decides(tokenizer):
    # "</answer>" ends a turn only where no "</search>" stands in it; the first complete tag is the answer all the same.
    trajectory, _, asked = run(tokenizer, RECIPES[0], [ANSWER + "<search>paris</search>!"])
    assert (trajectory.stop, asked) == ("answer", [])
    assert trajectory.policy_text == ANSWER + "<search>paris</search>"
    trajectory, _, asked = run(tokenizer, RECIPES[0], ["<search> a <search>paris</search>", ANSWER])
    assert asked == ["a <search>paris"]


@pytest.mark.parametrize("limit", [1, 5, 20])
def test_a_cut_observation_is_theirs_up_to_the_cut_and_keeps_its_closing_tag(tokenizer, limit):
    # Theirs is the first max_obs_length tokens of the block; the closing tag may be lost with the rest.
    theirs = tokenizer.encode(PARIS, add_special_tokens=False)
    tag = tokenizer.encode("</information>\n\n", add_special_tokens=False)
    opening = len(tokenizer.encode("\n\n<information>", add_special_tokens=False))
    change = f"agentloop.max_tool_response_length={limit}"
    trajectory, _, _ = run(tokenizer, RECIPES[0], [SEARCH, ANSWER], change)
    ids = trajectory.response_ids[~trajectory.loss_mask].tolist()
    assert ids == theirs[: opening + limit] + tag
    assert tokenizer.decode(ids) == trajectory.turns[0].tool_text


def test_defaults_are_another_loop(tokenizer):
    # Recipes without these keys go on as they did: an end token ends, nothing found is said, blank queries are invalid.
    trajectory, shown, asked = run(
        tokenizer, "qwen2.5-3b-tool-1node", ["<search>nobody</search>", "<search> </search>", "x<|im_end|>"]
    )
    assert asked == ["nobody"]
    assert "<information>No search results are found.</information>" in shown[1]
    assert "That was no valid action" in shown[2]
    assert trajectory.stop == "eos"
    assert trajectory.response_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
