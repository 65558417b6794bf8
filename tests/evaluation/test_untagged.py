"""Rollouts without any tag: how many there are is said, and `evaluation.untagged: text` scores their text."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from searchr1.agent.trajectory import Chunk, Turn
from searchr1.cluster import channels
from searchr1.cluster.reward_worker import RewardWorker
from searchr1.config.load import ConfigError
from searchr1.config.schema import Config
from searchr1.config.schema_reward import RewardConfig
from searchr1.errors import UserError
from searchr1.evaluation.ledger import Ledger
from searchr1.evaluation.manifest import manifest
from searchr1.evaluation.methods import METHODS, agent_settings
from searchr1.evaluation.page import page
from searchr1.evaluation.results import Results, method_result
from searchr1.evaluation.summary import validation_metrics
from searchr1.evaluation.tables import markdown
from searchr1.preflight.check import require_valid
from searchr1.rewards.answers import answer_of, scored_text
from searchr1.rewards.registry import Reward
from searchr1.rewards.scorer import Scorer
from searchr1.tracking.trajectory_log import trajectory_row


def said(make_trajectory, *texts, index=0, **fields):
    """A rollout of turns that call nothing; the gold answer is Ann Lee."""
    turns = [Turn(text, "invalid", 3) for text in texts]
    return make_trajectory(index, turns=turns, reward_parts={}, reward=0.0, stop="eos", **fields)


@pytest.mark.parametrize(
    ("turns", "answer"),
    [
        (["Ann Lee"], "Ann Lee"),
        (["  Ann Lee.\n<|im_end|>"], "Ann Lee."),
        (["Ann Lee</s> <|endoftext|>\n"], "Ann Lee"),
        (["<think> who? Bob? </think>\n\nAnn Lee"], "Ann Lee"),
        (["I do not know", "Ann Lee"], "Ann Lee"),
        (["<search> who </search>", "Ann Lee"], "Ann Lee"),
        # Whoever wrote the tags is taken at their word.
        (["<answer> Bob </answer> Ann Lee"], "Bob"),
        (["<answer> Bob </answer>", "Ann Lee"], "Bob"),
        (["<answer> Ann Lee"], None),
        (["<search> Ann Lee"], None),
        (["Ann Lee </answer>"], None),
        (["Ann Lee", "<search> who </search>"], None),
        (["<think> Ann Lee </think>"], None),
        (["  \n"], None),
        ([], None),
    ],
)
def test_whose_text_is_an_answer(turns, answer):
    assert answer_of(scored_text(turns, "text")) == answer
    assert scored_text(turns, "reject") == "".join(turns)


def results_of(trajectories, untagged, methods=("search",)):
    rows = [{"number": t.sample.index, **trajectory_row(t)} for t in trajectories]
    found = {name: method_result(rows, len(rows), "x", "greedy", 0, untagged) for name in methods}
    return Results("m", 3.0, found)


@pytest.fixture
def rollouts(make_trajectory):
    """A model that knows the tags half of the time; its text is right, too long, and wrong."""
    return [
        make_trajectory(0), make_trajectory(1, right=False),
        said(make_trajectory, "the Ann Lee", index=2), said(make_trajectory, "It was Ann Lee", index=3),
    ]  # fmt: skip


def test_the_text_is_scored_by_every_metric_where_it_is_asked_for(rollouts):
    rejected = results_of(rollouts, "reject").main.overall
    assert [rejected.scores[name].mean for name in ("exact_match", "f1", "substring_match")] == [0.25, 0.25, 0.25]
    scored = results_of(rollouts, "text").main.overall
    # the Ann Lee: 1, 1, 1. It was Ann Lee: 0, precision 2/4 and recall 2/2, 1.
    assert [scored.scores[name].mean for name in ("exact_match", "f1", "substring_match")] == pytest.approx(
        [0.5, (1 + 0 + 1 + 2 / 3) / 4, 0.75]
    )
    assert (rejected.facts["untagged"], scored.facts["untagged"]) == (0.5, 0.5)
    # Two turns of each tagged rollout, one of the others.
    assert scored.facts["untagged_turns"] == pytest.approx(2 / 6)
    assert (rejected.facts["by_text"], scored.facts["by_text"]) == (0, 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_the_share_is_reported_with_what_to_do(rollouts, method):
    results = results_of(rollouts, "reject", [method])
    words = (
        "50.0% of the rollouts (33.3% of the turns) have no <search>, <access> or <answer> tag at all and count as wrong."
    )
    text = results.text()
    assert f"WARNING: {words}" in text
    assert "data.prompt_template" in text
    assert "evaluation.untagged=text" in text
    assert "50.0% of the rollouts (33.3% of the turns) have no &lt;search&gt;" in page(results)
    assert "have no &lt;search&gt;" in markdown(results.tables()[-1])
    assert results.json()["methods"][method]["all"]["facts"]["untagged"] == 0.5
    scored = results_of(rollouts, "text", [method])
    assert "50.0% of the rollouts gave no answer tag and were scored by the whole text" in scored.text()
    assert "count as wrong" not in scored.text()
    assert scored.json()["methods"][method]["untagged"] == "text"
    assert "answer: the Ann Lee" in page(scored)
    assert "answer: none" in page(results)


def test_a_model_that_writes_its_tags_is_not_warned_of(make_trajectory):
    results = results_of([make_trajectory(i) for i in range(3)], "reject")
    assert "WARNING" not in results.text()
    assert results.main.overall.facts["untagged"] == 0


def test_an_evaluation_does_not_go_on_under_another_setting(rollouts, tmp_path, make_trajectory):
    config = Config()
    method = METHODS["search"]
    settings = agent_settings(config, method)
    samples = [rollout.sample for rollout in rollouts]

    def opened():
        return Ledger.open(tmp_path, manifest(config, method, settings, samples))

    with opened():
        pass
    assert "untagged" not in (tmp_path / "evaluation.json").read_text(), "an evaluation of an earlier version goes on"
    config.evaluation.untagged = "text"
    with pytest.raises(UserError, match="untagged was None, is 'text'"):
        opened()
    (tmp_path / "evaluation.json").unlink()
    with opened() as ledger:
        ledger.append([said(make_trajectory, "Ann Lee", index=2)])
        (row,) = ledger.rows()
    assert row["answer"] == "Ann Lee"


def test_rewards_of_an_evaluation_judge_included_see_the_text(make_trajectory):
    seen = []

    async def judge(policy_text, golds, trajectory):
        seen.append(answer_of(policy_text))
        return 1.0

    scorer = Scorer(RewardConfig(reward_type="exact_match"))
    scorer._found["exact_match"] = Reward("exact_match", judge, custom=False)
    rollout = said(make_trajectory, "Ann Lee")
    asyncio.run(scorer.score(rollout, "text"))
    asyncio.run(scorer.score(rollout))
    assert seen == ["Ann Lee", None]


@pytest.mark.parametrize(("mode", "untagged", "right"), [("eval", "text", 1), ("eval", "reject", 0), ("train", "text", 0)])
def test_training_never_pays_for_a_text_without_tags(make_trajectory, monkeypatch, mode, untagged, right):
    sent = []

    async def put(channel, chunk, key, seconds):
        sent.append(chunk)

    monkeypatch.setattr(channels, "put", put)
    config = Config()
    config.evaluation.untagged = untagged
    worker = SimpleNamespace(_config=config, _channel=None, _inference_ranks=0, _scorer=Scorer(config.reward))
    chunk = Chunk(1, mode, [said(make_trajectory, "Ann Lee")])
    asyncio.run(RewardWorker._score_chunk(worker, chunk))
    (trajectory,) = sent[0].trajectories
    assert (trajectory.reward, trajectory.reward_parts["exact_match"]) == (right, right)


def test_a_training_runs_evaluation_logs_the_share(rollouts):
    metrics = validation_metrics(rollouts)
    assert metrics["val/untagged"] == metrics["val/nq/untagged"] == 0.5
    assert metrics["val/untagged_turns"] == pytest.approx(2 / 6)


def test_another_value_is_rejected():
    config = Config()
    config.evaluation.untagged = "maybe"
    with pytest.raises(ConfigError, match=r"evaluation\.untagged: 'maybe' is not one of reject, text"):
        require_valid(config, for_training=False)
